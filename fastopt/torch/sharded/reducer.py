"""Reducing gradients to the process that owns them, bucket by bucket, while backward goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Bucket, Part
from .wire import reduce


class Reducer:
    """Hooks that take gradients as backward makes them.

    A round reduces every bucket once, in order, and belongs to one backward pass that is not inside ``no_sync``.
    Parameters without gradient count as zeros; which have none anywhere, the processes tell each other in the step.

    Args:
        params: The parameters, of all buckets.
        buckets: Where they lie.
        group: The processes.
    """

    def __init__(self, params: Sequence[Tensor], buckets: Sequence[Bucket], group: Any) -> None:
        self.waits = False  # whether gradients are left where they are
        self._group = group
        self._params: Sequence[Tensor] = []
        self._buckets: list[_Reduced] = []
        self._at: list[tuple[_Reduced, int]] = []  # bucket and place of each parameter
        self._arrived: set[int] = set()  # in this round
        self._seen: set[int] = set()  # since the last step
        self._next = 0  # bucket of this round
        self._rounds = 0
        self._is_open = False  # whether backward will call when it ends
        self.add(params, buckets)

    def add(self, params: Sequence[Tensor], buckets: Sequence[Bucket]) -> None:
        """Take the gradients of further parameters and buckets."""
        self._params = params
        new = [_Reduced(bucket, self._group) for bucket in buckets[len(self._buckets) :]]
        self._buckets += new
        at = {i: (b, begin) for b in new for i, begin in zip(b.bucket.members, b.bucket.begins, strict=True)}
        self._at += [at[i] for i in range(len(self._at), len(params))]
        for i in sorted(at):
            if params[i].requires_grad:
                parameter: Any = params[i]
                parameter.register_post_accumulate_grad_hook(functools.partial(self._hook, i))

    def _hook(self, i: int, parameter: Tensor) -> None:
        if self.waits:
            return
        if not self._is_open:
            self._is_open = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._take(i)
        while self._next < len(self._buckets) and self._buckets[self._next].awaited <= self._arrived:
            self._launch()

    def _take(self, i: int) -> None:
        parameter, (reduced, begin) = self._params[i], self._at[i]
        assert parameter.grad is not None
        with torch.no_grad():
            reduced.place(begin, parameter).copy_(parameter.grad)
        parameter.grad = None
        self._arrived.add(i)
        self._seen.add(i)

    def _launch(self) -> None:
        reduced = self._buckets[self._next]
        self._next += 1
        if reduced.awaited:
            reduced.launch()

    def _end(self) -> None:
        """Backward is over: the rest of its round goes out."""
        self._is_open = False
        while self._next < len(self._buckets):
            self._launch()
        self._next, self._arrived = 0, set()
        self._rounds += 1

    def finish(self, pieces: Sequence[Tensor], parts: Sequence[Part]) -> None:
        """Wait for the gradients of this process's pieces, and give them to the pieces."""
        rest = [i for i, p in enumerate(self._params) if p.grad is not None and self._buckets]
        count = len(self._params)
        told = torch.zeros(count + 2)
        told[[*self._seen, *rest]] = 1.0
        told[count], told[count + 1] = self._rounds, bool(rest)
        if self._group.size() > 1:
            told = told.to(self._params[0].device)
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        *has, rounds, left = told.tolist()
        while self._rounds < rounds:
            self._end()
        if left:  # gradients of no_sync, or which the user set
            for i in rest:
                self._take(i)
            self._end()
        for reduced in self._buckets:
            reduced.finish()
        for i, (piece, (lo, hi)) in enumerate(zip(pieces, parts, strict=True)):
            reduced, begin = self._at[i]
            start = begin + lo - self._group.rank() * reduced.bucket.share if hi else 0
            own = reduced.own if has[i] else None
            piece.grad = None if own is None else own[start : start + hi - lo].view(piece.shape)

    def drop(self) -> None:
        """Forget what was reduced."""
        for reduced in self._buckets:
            reduced.drop()
        self._seen, self._rounds = set(), 0


class _Reduced:
    """The gradients of a bucket: of this process, on their way, and the average of its slice."""

    def __init__(self, bucket: Bucket, group: Any) -> None:
        self.bucket, self._group = bucket, group
        self.own: Tensor | None = None  # None until something was reduced
        self._whole: Tensor | None = None
        self._incoming: Tensor | None = None
        self._wait: Callable[[], None] | None = None
        self.awaited: set[int] = set(bucket.members)

    def place(self, begin: int, parameter: Tensor) -> Tensor:
        """Where the gradient of a parameter is put."""
        if self._whole is None:
            self._whole = torch.zeros_like(self.bucket.flat)
        return self._whole.as_strided(parameter.shape, parameter.stride(), begin)

    def launch(self) -> None:
        """Begin to add up over processes what was put here."""
        self.finish()
        whole, self._whole = self._whole, None  # the next round may begin to fill another one
        whole = torch.zeros_like(self.bucket.flat) if whole is None else whole
        self._incoming = torch.empty_like(whole[: self.bucket.share])
        self._wait = reduce(whole, self._incoming, self._group)

    def finish(self) -> None:
        """Wait for what is on its way, and add it to what was reduced before."""
        if self._wait is None or self._incoming is None:
            return
        self._wait()
        self._incoming.div_(self._group.size())
        self.own = self._incoming if self.own is None else self.own.add_(self._incoming)
        self._incoming = self._wait = None

    def drop(self) -> None:
        """Forget what was reduced and what was put here."""
        self.finish()
        self.own = self._whole = None
