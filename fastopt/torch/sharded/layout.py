"""Where the parameters of a sharded optimizer lie: side by side in buckets, of which each process owns a slice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.layout import CHUNK

ALIGNED = 32
"""Parameters begin at multiples of so many elements: 64 bytes and more."""


class Part(NamedTuple):
    """The elements of a parameter that a process owns, as they lie in memory: a chunk lies with one process."""

    lo: int
    hi: int


class Bucket:
    """Parameters side by side in flat memory, in equal slices, one a process.

    Args:
        members: Indices of the parameters.
        params: All parameters; they are moved here.
        processes: How many share it.
    """

    def __init__(self, members: Sequence[int], params: Sequence[Tensor], processes: int) -> None:
        self.members = list(members)
        first = params[self.members[0]]
        self.begins, self.share = placed([params[i].numel() for i in self.members], processes)
        self.flat = torch.zeros(processes * self.share, dtype=first.dtype, device=first.device)
        self.views = [
            self.flat.as_strided(params[i].shape, params[i].stride(), begin)
            for i, begin in zip(self.members, self.begins, strict=True)
        ]
        for i, view in zip(self.members, self.views, strict=True):
            view.copy_(params[i].detach())
            params[i].data = view

    def parts(self, process: int) -> list[Part]:
        """What a process owns of each member."""
        first, last = process * self.share, (process + 1) * self.share
        parts = []
        for begin, view in zip(self.begins, self.views, strict=True):
            lo, hi = max(first - begin, 0), min(last - begin, view.numel())
            parts.append(Part(lo, hi) if lo < hi else Part(0, 0))
        return parts


def placed(sizes: Sequence[int], processes: int) -> tuple[list[int], int]:
    """Where arrays begin, and the size of a slice: borders of slices fall on borders of chunks of an array.

    So an array that crosses a border begins a number of whole chunks before it, and a smaller one begins there: each
    border costs less than one chunk of padding.
    """
    share = max(1, -(-sum(map(_aligned, sizes)) // (processes * CHUNK))) * CHUNK
    while True:
        begins, at = [], 0
        for size in sizes:
            room = -at % share
            if size > room:
                at += room % CHUNK
            begins.append(at)
            at += _aligned(size)
        if at <= processes * share:
            return begins, share
        share += CHUNK


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def bucketed(params: Sequence[Tensor], members: Iterable[int], nbytes: float) -> list[list[int]]:
    """Indices of parameters by bucket: the last first, as backward makes their gradients.

    A bucket is full with so many bytes, and holds parameters of one dtype, all of which require gradients or none.
    """
    buckets: list[list[int]] = []
    filling: dict[tuple[torch.dtype, bool], list[int]] = {}
    for i in reversed(list(members)):
        kind = params[i].dtype, params[i].requires_grad
        if kind not in filling:
            filling[kind] = []
            buckets.append(filling[kind])
        filling[kind].append(i)
        if sum(params[k].nbytes for k in filling[kind]) >= nbytes:
            del filling[kind]
    return buckets
