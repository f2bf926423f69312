"""Where the parameters of a sharded optimizer lie: side by side in buckets, of which each process owns a slice."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.device import check_apart
from ...kernels.layout import CHUNK
from .._tensors import PLAIN, STORED, layout_of, parameter_memory, part_of

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
        self.view = part_of(bucket.flat, begin, begin + param.numel(), layout_of(param))
        self.part = lo, hi = self.part_of(bucket.group.rank())
        self.shape: tuple[int, ...] = (*[1] * (param.dim() - 1), hi - lo) if param.dim() or not hi else ()
        elements = bucket.flat[begin + lo : begin + hi].view(self.shape).data  # has a version counter of its own
        self.piece = torch.nn.Parameter(elements, requires_grad=param.requires_grad)
        if hasattr(self.piece, "grad_dtype"):
            self.piece.grad_dtype = None  # any
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
        layout = placed([p.numel() for p in params], group.size())
        assert layout is not None
        begins, self.share = layout
        self.number, self.group = number, group
        self.flat = torch.zeros(group.size() * self.share, dtype=params[0].dtype, device=params[0].device)
        self.members = [Member(p, self, begin) for p, begin in zip(params, begins, strict=True)]
        self._is_trained = False
        dist.broadcast(self.flat, group_src=0, group=group)

    @property
    def is_trained(self) -> bool:
        """Whether it may have been written: a parameter had a gradient, or might have had one; on all processes."""
        self._is_trained |= any(m.param.requires_grad or m.piece.grad is not None for m in self.members)
        return self._is_trained


def placed(sizes: Sequence[int], processes: int) -> tuple[list[int], int] | None:
    """Where arrays begin, and the size of a slice: borders of slices fall on borders of chunks of an array.

    So an array that crosses a border begins a number of whole chunks before it, and a smaller one begins there: each
    border costs less than one chunk of padding. A slice has no more than its part of the elements and one chunk; None
    where that cannot be, which only an array can cause that is larger than a slice.
    """
    total = sum(map(_aligned, sizes))
    whole = max(1, -(-total // (processes * CHUNK))) * CHUNK
    for share in (whole, _aligned(-(-(total + (processes - 1) * CHUNK) // processes))):
        begins, at = [], 0
        for size in sizes:
            room = -at % share
            if size > room:
                at += room % CHUNK
                if share % CHUNK and size > room - room % CHUNK + share:  # its second border would cut a chunk
                    break
            begins.append(at)
            at += _aligned(size)
        if len(begins) == len(sizes) and at <= processes * share:
            return begins, share
    return None


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def bucketed(params: Iterable[Tensor], nbytes: float, processes: int) -> list[list[Tensor]]:
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
    return [parts for bucket in buckets for parts in _fitting(bucket, processes)]


def _fitting(params: list[Tensor], processes: int) -> list[list[Tensor]]:
    """The parameters of a bucket, the largest in one of its own where they cannot be placed together."""
    if placed([p.numel() for p in params], processes):
        return [params]
    largest = max(params, key=Tensor.numel)
    return [*_fitting([p for p in params if p is not largest], processes), [largest]]


def facts_of(
    groups: Sequence[Mapping[str, Any]], first: int, others: Sequence[Tensor], names: Collection[str], where: str
) -> list[tuple[str, Any]]:
    """What of param groups must be the same on all processes; refuses what cannot be sharded.

    Args:
        groups: The groups.
        first: The index of the first of them.
        others: Parameters that there are already.
        names: Of the options.
        where: Who asks, for errors.
    """
    devices = {p.device for p in chain(others, *(group["params"] for group in groups))}
    if len(devices) > 1:
        raise ValueError(f"{where}: parameters are on {' and '.join(map(str, devices))}; needed is one device.")
    facts: list[tuple[str, Any]] = []
    named: list[tuple[str, Tensor]] = []
    for g, group in enumerate(groups, first):
        facts += [(f"{name} of group {g}", x) for name, x in group.items() if name in names]
        for i, p in enumerate(group["params"]):
            name = f"parameter {i} of group {g}"
            if type(p) not in PLAIN or p.dtype not in STORED or p.is_complex() or p.untyped_storage().is_shared():
                raise TypeError(
                    f"{where}: {name} is a {type(p).__name__} of {p.dtype}; needed is a real tensor that is neither "
                    "distributed nor shared between processes."
                )
            parameter_memory(p, f"{where}: {name}")
            named.append((name, p))
            called = group.get("param_names", ())[i : i + 1]
            facts.append((name, (*called, *layout_of(p), p.requires_grad, p.device.type)))
    starts = np.array([p.data_ptr() for _, p in named], np.uint64)
    sizes = np.array([p.nbytes for _, p in named], np.int64)
    check_apart(starts, sizes, lambda k: named[k][0], where)
    return facts
