"""Where the parameters of a sharded optimizer lie: side by side in buckets, of which each process owns a slice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.layout import CHUNK

ALIGNED = 32
"""Parameters begin at multiples of so many elements: 64 bytes and more."""


class Part(NamedTuple):
    """Elements of a parameter, as they lie in memory, that one process owns: a chunk lies with one process."""

    lo: int
    hi: int


class Member:
    """A parameter in a bucket.

    Attributes:
        param: The parameter.
        part: What this process owns of it.
        piece: A parameter on the memory of that, which is stepped; it has as many dimensions.
        view: Where the whole parameter lies in the bucket.
    """

    def __init__(self, param: Tensor, bucket: Bucket, begin: int) -> None:
        self.param, self.bucket, self.begin = param, bucket, begin
        self.view = bucket.flat.as_strided(param.shape, param.stride(), begin)
        self.part = lo, hi = self.part_of(bucket.group.rank())
        self.shape: tuple[int, ...] = (*[1] * (param.dim() - 1), hi - lo) if param.dim() or not hi else ()
        elements = bucket.flat[begin + lo : begin + hi].view(self.shape).data  # has a version counter of its own
        self.piece = torch.nn.Parameter(elements, requires_grad=param.requires_grad)
        self.strides = self.piece.stride()
        self.take_in()

    def part_of(self, process: int) -> Part:
        """What a process owns of the parameter."""
        border = process * self.bucket.share - self.begin
        lo, hi = max(border, 0), min(border + self.bucket.share, self.view.numel())
        return Part(lo, hi) if lo < hi else Part(0, 0)

    def take_in(self) -> None:
        """Move the parameter here."""
        self.param.data = self.view.copy_(self.param.detach())


class Bucket:
    """Parameters side by side in flat memory, in equal slices, one a process; all have the values of the first process.

    Args:
        number: Of the bucket.
        params: The parameters, which are moved here.
        group: The processes.
    """

    def __init__(self, number: int, params: Sequence[Tensor], group: Any) -> None:
        begins, self.share = placed([p.numel() for p in params], group.size())
        self.number, self.group = number, group
        self.flat = torch.zeros(group.size() * self.share, dtype=params[0].dtype, device=params[0].device)
        self.members = [Member(p, self, begin) for p, begin in zip(params, begins, strict=True)]
        dist.broadcast(self.flat, group_src=0, group=group)

    @property
    def is_trained(self) -> bool:
        """Whether gradients are required. All parameters of a bucket do, or none, when it is made."""
        return any(m.param.requires_grad for m in self.members)


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


def bucketed(params: Iterable[Tensor], nbytes: float) -> list[list[Tensor]]:
    """Parameters by bucket: the last first, as backward makes their gradients.

    A bucket is full with so many bytes, and holds parameters of one dtype, all of which require gradients or none.
    """
    buckets: list[list[Tensor]] = []
    filling: dict[tuple[torch.dtype, bool], list[Tensor]] = {}
    for p in reversed(list(params)):
        kind = p.dtype, p.requires_grad
        if kind not in filling:
            filling[kind] = []
            buckets.append(filling[kind])
        filling[kind].append(p)
        if sum(x.nbytes for x in filling[kind]) >= nbytes:
            del filling[kind]
    return buckets
