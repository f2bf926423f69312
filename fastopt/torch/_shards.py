"""Sums over the processes that hold parts of parameters (DTensors: FSDP2, HSDP, tensor parallel)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._tensors import PLAIN

if TYPE_CHECKING:
    from ..engine.plan import Plan


class Shards:
    """Which parameters are spread over which processes; false where none is.

    Every process adds up for all of them in each step, whichever have a gradient: so the collectives of a step are the
    same ones everywhere.

    Attributes:
        members: Indices of the parameters that are spread.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._count = len(params)
        spread: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
        for i, p in enumerate(params):
            axes = tuple(axis for axis, _ in split_axes(p))
            if axes:
                spread.setdefault((p.device_mesh, axes), []).append(i)  # type: ignore[attr-defined]
        self.members = list(chain(*spread.values()))
        self._spread = [
            (mesh.device_type, [mesh.get_group(axis) for axis in axes], members)
            for (mesh, axes), members in spread.items()
        ]

    def __bool__(self) -> bool:
        return bool(self._spread)

    def join(self, plan: Plan, present: Sequence[int], ratios: bool) -> None:
        """Have a plan for these parameters add up over processes, for ratios, too, where some have one."""
        plan.combine = functools.partial(self._combine, list(present))
        plan.combine_ratios = plan.combine if ratios else None

    def _combine(self, present: list[int], sums: NDArray[np.float64], partials: NDArray[np.float64]) -> None:
        """Add up the rows of parameters that are spread over processes; replicas are counted once.

        Every process gets the same bits.
        """
        every = np.zeros((self._count, sums.shape[1]))
        every[present] = sums
        for device, groups, members in self._spread:
            part = torch.from_numpy(every[members]).to(device)
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
            every[members] = part.cpu().numpy()
        sums[:] = every[present]


def split_axes(tensor: Tensor) -> list[tuple[int, Any]]:
    """The dimensions of its mesh over which a distributed tensor is spread, and how."""
    mesh: Any = None if type(tensor) in PLAIN else getattr(tensor, "device_mesh", None)
    if mesh is None:
        return []
    placements = enumerate(tensor.placements)  # type: ignore[attr-defined]
    return [(axis, placement) for axis, placement in placements if not placement.is_replicate() and mesh.size(axis) > 1]


def why_not_combined(tensor: Tensor) -> str | None:
    """Why sums over the whole of a parameter cannot be had; None where they can."""
    if getattr(tensor, "_fsdp_flattened", False) and torch.distributed.get_world_size() > 1:
        return "flattened by FSDP1"
    axes = split_axes(tensor)
    if any(placement.is_partial() for _, placement in axes):
        return "a Partial DTensor, of which this process holds summands"
    return "sharded and on a GPU" if axes and tensor.device.type != "cpu" else None
