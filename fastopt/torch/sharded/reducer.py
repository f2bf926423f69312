"""Reducing gradients to the process that owns them, bucket by bucket, while backward goes on."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._tensors import COMPUTED
from .layout import Bucket, Member
from .wire import reduce

WHERE = "ShardedOptimizer"


class Reducer:
    """Hooks that take gradients as backward makes them.

    A round reduces every bucket once, in order, and belongs to one backward pass that is not inside ``no_sync``.
    Parameters without gradient count as zeros; which have none anywhere, the processes tell each other in the step.

    Args:
        members: The parameters.
        group: The processes.
    """

    def __init__(self, members: Sequence[Member], group: Any) -> None:
        self.waits = False  # whether gradients are left where they are
        self._group = group
        self._members: list[Member] = []
        self._buckets: list[_Reduced] = []
        self._arrived: set[int] = set()  # in this round
        self._seen: set[int] = set()  # since the last step
        self._next = 0  # bucket of this round
        self._rounds = 0
        self._dropped = 0  # rounds since the last step whose gradients were thrown away
        self._is_open = False  # whether backward will call when it ends
        self.is_broken = False  # whether an interrupt may have left something half sent
        self.add(members)

    def add(self, members: Sequence[Member]) -> None:
        """Take the gradients of further parameters."""
        first = len(self._members)
        self._members += members
        for bucket in sorted({m.bucket for m in members}, key=lambda b: b.number):
            self._buckets.append(_Reduced(bucket))
        for i, member in enumerate(members, first):
            if member.param.requires_grad:
                parameter: Any = member.param
                parameter.register_post_accumulate_grad_hook(_weak(self._hook, i))
                self._buckets[member.bucket.number].awaited.add(i)

    def _hook(self, i: int) -> None:
        if self.waits:
            return
        if not self._is_open:
            self._is_open = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        self._take(i)
        while self._next < len(self._buckets) and self._buckets[self._next].awaited <= self._arrived:
            self._launch()

    def _take(self, i: int) -> None:
        member = self._members[i]
        with torch.no_grad():
            self._buckets[member.bucket.number].put(member)
        self._arrived.add(i)
        self._seen.add(i)

    def _launch(self) -> None:
        reduced, self.is_broken = self._buckets[self._next], True
        self._next += 1
        if reduced.bucket.is_trained:  # on all processes, or on none
            reduced.launch()
        self.is_broken = False

    def _end(self) -> None:
        """Backward is over: the rest of its round goes out."""
        self._is_open = False
        while self._next < len(self._buckets):
            self._launch()
        self._next, self._arrived = 0, set()
        self._rounds += 1

    def finish(self) -> None:
        """Wait for the gradients of this process's pieces, and give them to the pieces."""
        rest = [i for i, m in enumerate(self._members) if m.param.grad is not None]
        count = len(self._members)
        told = torch.zeros(count + 5)
        told[[*self._seen, *rest]] = 1.0
        rounds, dropped = self._rounds + self._dropped, self._dropped
        told[count:] = torch.tensor([rounds, dropped, -dropped, bool(rest), self._is_open])
        if self._group.size() > 1:
            told = told.to(self._members[0].piece.device)
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        *has, rounds, most, least, left, failed = told.tolist()
        if failed:
            raise RuntimeError(f"{WHERE}: a backward failed on some process. Call zero_grad on all, then backward.")
        while self._rounds + self._dropped < rounds:
            self._end()
        if most != -least:
            raise RuntimeError(
                f"{WHERE}: zero_grad was called on some processes after a backward, on others before. Call it on all, "
                "then backward."
            )
        self.is_broken = True
        if left:  # gradients of no_sync, or which the user set
            for i in rest:
                self._take(i)
            self._end()
        for reduced in self._buckets:
            reduced.finish()
        for i, m in enumerate(self._members):
            own, (lo, hi) = self._buckets[m.bucket.number].own, m.part
            start = m.begin + lo - self._group.rank() * m.bucket.share if hi else 0
            m.piece.grad = own[start : start + hi - lo].view(m.shape) if has[i] and own is not None else None
        self.is_broken = False

    def drop(self, *, stepped: bool = False) -> None:
        """Forget what was reduced, because a step has used it, or nobody wants it."""
        if self._is_open:  # backward failed; on other processes it may have come to its end
            self._end()
        for reduced in self._buckets:
            reduced.drop()
        self._dropped = 0 if stepped else self._dropped + self._rounds
        self._seen, self._rounds = set(), 0


def _weak(method: Callable[[int], None], i: int) -> Callable[[Tensor], None]:
    """A hook that calls a method as long as its object lives: parameters may outlive their optimizer."""
    reference = weakref.WeakMethod(method)

    def hook(_: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(i)

    return hook


class _Reduced:
    """The gradients of a bucket: of this process, on their way, and the average of its slice."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        kinds = [getattr(m.param, "grad_dtype", None) or m.param.dtype for m in bucket.members]
        self._dtype = functools.reduce(torch.promote_types, kinds)
        self.own: Tensor | None = None  # None until something was reduced
        self._whole: Tensor | None = None
        self._incoming: Tensor | None = None
        self._wait: Callable[[], None] | None = None
        self.awaited: set[int] = set()  # parameters whose gradients make it complete

    def put(self, member: Member) -> None:
        """Take a gradient away from its parameter."""
        if self._whole is None:
            self._whole = torch.zeros_like(self.bucket.flat, dtype=self._dtype)
        place = self._whole.as_strided(member.view.shape, member.view.stride(), member.begin)
        place.copy_(member.param.grad)  # type: ignore[arg-type]
        member.param.grad = None

    def launch(self) -> None:
        """Begin to add up over processes what was put here."""
        self.finish()
        whole, self._whole = self._whole, None  # the next round may begin to fill another one
        whole = torch.zeros_like(self.bucket.flat, dtype=self._dtype) if whole is None else whole
        self._incoming = torch.empty_like(whole[: self.bucket.share])
        self._wait = reduce(whole, self._incoming, self.bucket.group)

    def finish(self) -> None:
        """Wait for what is on its way, and add it to what was reduced before."""
        if self._wait is None or self._incoming is None:
            return
        self._wait()
        self._incoming.div_(self.bucket.group.size())
        if self.own is None:
            self.own = self._incoming
        else:
            wide = COMPUTED[self._dtype] if hasattr(self.own, "grad_dtype") else self._dtype
            self.own = self.own.to(wide).add_(self._incoming)  # where .grad may have another dtype than its parameter
        self._incoming = self._wait = None

    def drop(self) -> None:
        """Forget what was reduced and what was put here."""
        self.finish()
        self.own = self._whole = None
