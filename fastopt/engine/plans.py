"""Which plan serves which memory and which pattern of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

from .device import Device
from .host import HostPlan
from .plan import Plan


def plan_class(device: Device) -> type[Plan]:
    """The class of plans for arrays that live in ``device``."""
    if device.name == "cpu":
        return HostPlan
    from .cuda.plan import CudaPlan

    return CudaPlan


class Serves(Protocol):
    """A plan, or what a front end keeps with one."""

    @property
    def kept(self) -> int:
        """How many may be kept."""

    def resume(self) -> bool:
        """Serve again, after others did; False where it cannot."""


S = TypeVar("S", bound=Serves)


class Plans(Generic[S]):
    """One plan for each pattern of gradients, a few in all: the least recently used goes.

    Patterns are tuples that begin with the indices of the parameters that have a gradient.
    """

    def __init__(self) -> None:
        self._by_pattern: dict[tuple[Any, ...], S] = {}

    def resume(self, pattern: tuple[Any, ...]) -> S | None:
        """The plan that served a pattern before, if it can again."""
        plan = self._by_pattern.pop(pattern, None)
        if plan is None or not plan.resume():
            return None
        self._by_pattern[pattern] = plan
        return plan

    def keep(self, pattern: tuple[Any, ...], plan: S) -> S:
        """Remember the plan that serves a pattern now."""
        self._by_pattern[pattern] = plan
        for oldest in list(self._by_pattern)[: -plan.kept]:
            del self._by_pattern[oldest]
        return plan

    def last(self, present: tuple[int, ...]) -> tuple[Any, ...] | None:
        """The pattern that was served last of those with these indices."""
        return next((pattern for pattern in reversed(self._by_pattern) if pattern[0] == present), None)

    def __iter__(self) -> Iterator[S]:
        return iter(self._by_pattern.values())
