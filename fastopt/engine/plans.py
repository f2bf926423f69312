"""Which plan serves which memory."""

from __future__ import annotations

from ..arrays import HOST, Space
from .host import HostPlan
from .plan import Plan


def plan_class(space: Space | None) -> type[Plan]:
    """The class of plans for arrays that live in ``space``."""
    if space is HOST:
        return HostPlan
    from .cuda.plan import CudaPlan

    return CudaPlan
