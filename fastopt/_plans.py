"""Which plan serves which memory."""

from __future__ import annotations

from ._arrays import HOST, Space
from ._host_plan import HostPlan
from ._plan import Plan


def plan_class(space: Space | None) -> type[Plan]:
    """The class of plans for arrays that live in ``space``."""
    if space is HOST:
        return HostPlan
    from ._cuda.plan import CudaPlan

    return CudaPlan
