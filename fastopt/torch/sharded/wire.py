"""What processes send one another: slices of buckets. All of it is torch.distributed's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Bucket

MESSAGE = 2**19
"""Elements of a message between two processes."""


class Gathering:
    """Brings slices to all processes, bucket by bucket: the order is the same everywhere.

    On the CPU slices go straight from process to process, in messages that caches hold, and all receives are posted
    before the first send: 200 MB between 2 processes over gloo take 41 ms so, 46 to 65 in messages of a bucket and
    more, 64 to 112 by broadcasts, 87 by all_gather_single.

    Args:
        buckets: All of them; more may come.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self._buckets = buckets
        self._works: list[Any] = []
        self._begun = 0

    def begin(self, number: int) -> None:
        """This process has written its slices of this bucket and of those before."""
        if not self._begun:
            for bucket in self._trained(0, len(self._buckets)):
                self._works += _receive(bucket.flat, bucket.group)
        for bucket in self._trained(self._begun, number + 1):
            self._works += _send(bucket.flat, bucket.group)
        self._begun = max(self._begun, number + 1)

    def _trained(self, begin: int, end: int) -> list[Bucket]:
        return [bucket for bucket in self._buckets[begin:end] if bucket.is_trained]

    def finish(self) -> None:
        """Wait for all buckets."""
        try:
            self.begin(len(self._buckets) - 1)
            wait(self._works)
        finally:
            self._works, self._begun = [], 0


def _receive(flat: Tensor, group: Any) -> list[Any]:
    """Begin to take the slices of the other processes."""
    slices, n, me = flat.chunk(group.size()), group.size(), group.rank()
    if flat.is_cuda:
        return []
    senders = [(me - k) % n for k in range(1, n)]
    return [dist.irecv(x, group=group, group_src=of) for of in senders for x in slices[of].split(MESSAGE)]


def _send(flat: Tensor, group: Any) -> list[Any]:
    """Begin to bring the own slice to all others; on a GPU to take theirs, too."""
    slices, n, me = flat.chunk(group.size()), group.size(), group.rank()
    if flat.is_cuda:
        all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return [all_gather(flat, slices[me], group=group, async_op=True)]
    receivers = [(me + k) % n for k in range(1, n)]
    return [dist.isend(x, group=group, group_dst=to) for to in receivers for x in slices[me].split(MESSAGE)]


def reduce(whole: Tensor, own: Tensor, group: Any) -> Callable[[], None]:
    """Begin to add up a bucket over all processes.

    On the CPU each adds its slice in the order of processes: 200 MB on 2 processes over gloo take 85 ms, 170 by
    reduce_scatter_single, 93 by all_reduce (4 processes: 170, 330, 240).

    Args:
        whole: The bucket of this process.
        own: A slice, to which the sum of all processes' slices is written.
        group: The processes.

    Returns:
        Waits for it.
    """
    slices, me = whole.chunk(group.size()), group.rank()
    if whole.is_cuda:
        scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        work = scatter(own, whole, group=group, async_op=True)
        return lambda: work.wait()
    parts = [x if k == me else torch.empty_like(own) for k, x in enumerate(slices)]
    works = _exchange(slices, parts, group)

    def add() -> None:
        wait(works)
        own.copy_(parts[0])
        for part in parts[1:]:
            own.add_(part)

    return add


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: Any) -> list[Any]:
    """Send each other process one tensor, and receive one of each."""
    n, me = group.size(), group.rank()
    operations = []
    for k in range(1, n):
        to, of = (me + k) % n, (me - k) % n
        operations.append(dist.P2POp(dist.isend, sent[to], group=group, group_peer=to))
        operations.append(dist.P2POp(dist.irecv, received[of], group=group, group_peer=of))
    return dist.batch_isend_irecv(operations) if operations else []


def wait(works: Sequence[Any]) -> None:
    """Wait for all; on a GPU the current stream does."""
    for work in works:
        work.wait()


Facts = Sequence[tuple[str, Any]]


def agree(facts: Callable[[], Facts], group: Any, where: str) -> None:
    """Refuse on all processes what one of them refuses, or what they do not say alike.

    Args:
        facts: Looks at what must be equal: names, for errors, and values. It may raise.
        group: The processes, which all call this.
        where: Who asks, for errors.
    """
    own: Facts = ()
    error: Exception | None = None
    try:
        own = [(name, repr(value)) for name, value in facts()]
    except Exception as caught:
        error = caught
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (own, error and f"{type(error).__name__}: {error}"), group=group)
    if error is not None:
        raise error
    for process, (_, failure) in enumerate(everyone):
        if failure is not None:
            raise RuntimeError(f"{where}: process {process} of the group refused: {failure}")
    first, nothing = everyone[0][0], ("parameters", "no more")
    for process, (others, _) in enumerate(everyone):
        for (name, expected), (other, value) in zip_longest(first, others, fillvalue=nothing):
            if (name, expected) != (other, value):
                raise ValueError(
                    f"{where}: all processes must pass the same, but {name} is {expected} on process 0 of the group, "
                    f"and {other} is {value} on process {process}."
                )
