"""Sums over the processes that hold parts of parameters (DTensors: FSDP2, HSDP, tensor parallel)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ._tensors import PLAIN

if TYPE_CHECKING:
    from ..engine.plan import Plan


_groups: WeakKeyDictionary[Any, dict[tuple[int, ...], Any]] = WeakKeyDictionary()
"""Process groups that meshes have none of, by the group of all processes and by who is in them."""


class Spread(NamedTuple):
    """Processes that hold different parts of some parameters."""

    ranks: tuple[int, ...]
    mesh: Any
    axes: tuple[int, ...]
    members: list[int]  # indices of the parameters

    def all_reduce(self, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sums over the processes, the same bits on each."""
        part = torch.from_numpy(numbers).to(self.mesh.device_type)
        dist.all_reduce(part, group=self._group())
        summed: NDArray[np.float64] = part.cpu().numpy()
        return summed

    def _group(self) -> Any:
        """A mesh has a group for each of its dimensions. One for several is made when it is first needed, which is at
        the same time on all of its processes: all are about to add up."""
        if len(self.axes) == 1:
            return self.mesh.get_group(self.axes[0])
        world: Any = dist.group.WORLD
        if len(self.ranks) == world.size():
            return world
        made = _groups.setdefault(world, {})
        if self.ranks not in made:
            made[self.ranks] = dist.new_group([*self.ranks], use_local_synchronization=True)
        return made[self.ranks]


class Shards:
    """Which parameters are spread over which processes; false where none is.

    Every process adds up for all of them in each step, whichever have a gradient: so the collectives of a step are the
    same ones everywhere, one for each set of processes.

    Attributes:
        members: Indices of the parameters that are spread.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._count = len(params)
        by_axes: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for i, p in enumerate(params):
            axes = tuple(axis for axis, _ in split_axes(p))
            if axes:
                by_axes.setdefault((p.device_mesh, axes), []).append(i)  # type: ignore[attr-defined]
        spread: dict[tuple[str, tuple[int, ...]], Spread] = {}
        for (mesh, axes), members in by_axes.items():
            here = mesh.get_coordinate()
            if here is not None:  # else this process holds nothing of them, and none waits for it
                index = tuple(slice(None) if axis in axes else place for axis, place in enumerate(here))
                ranks = tuple(sorted(mesh.mesh[index].flatten().tolist()))
                first = spread.setdefault((mesh.device_type, ranks), Spread(ranks, mesh, axes, []))
                first.members.extend(members)
        self._spread = list(spread.values())
        self.members = list(chain(*(s.members for s in self._spread)))

    def __bool__(self) -> bool:
        return bool(self._spread)

    def join(self, plan: Plan, present: Sequence[int], ratios: bool) -> None:
        """Have a plan for these parameters add up over processes, for ratios, too, where some have one."""
        plan.combine = functools.partial(self._combine, list(present))
        plan.combine_ratios = plan.combine if ratios else None

    def anywhere(self, *facts: bool) -> list[bool]:
        """Whether each is true on this process, or on one of those with which it shares parameters."""
        told = np.array(facts, np.float64)
        for spread in self._spread:
            told = spread.all_reduce(told)
        return [bool(count) for count in told]

    def _combine(
        self, present: list[int], sums: NDArray[np.float64], partials: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Add up the rows of parameters that are spread over processes; replicas are counted once.

        Returns:
            The rows of all parameters: zeros where none has a gradient. Every process gets the same bits.
        """
        every = np.zeros((self._count, sums.shape[1]))
        every[present] = sums
        for spread in self._spread:
            every[spread.members] = spread.all_reduce(every[spread.members])
        sums[:] = every[present]
        return every


def split_axes(tensor: Tensor) -> list[tuple[int, Any]]:
    """The dimensions of its mesh over which a distributed tensor is spread, and how."""
    mesh: Any = None if type(tensor) in PLAIN else getattr(tensor, "device_mesh", None)
    if mesh is None:
        return []
    placements = enumerate(tensor.placements)  # type: ignore[attr-defined]
    return [(axis, placement) for axis, placement in placements if not placement.is_replicate() and mesh.size(axis) > 1]


def why_not_combined(tensor: Tensor) -> str | None:
    """Why sums over the whole of a parameter cannot be had; None where they can."""
    if getattr(tensor, "_fsdp_flattened", False) and dist.get_world_size() > 1:
        return "flattened by FSDP1"
    axes = split_axes(tensor)
    if any(placement.is_partial() for _, placement in axes):
        return "a Partial DTensor, of which this process holds summands"
    return "sharded and on a GPU" if axes and tensor.device.type != "cpu" else None
