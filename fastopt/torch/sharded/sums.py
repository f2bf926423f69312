"""Sums over parameters that are cut between processes, which have the same bits for any number of them."""

from __future__ import annotations

import functools
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ...engine.plan import Plan
from ...engine.table import Stages, Whole, add_up
from ...kernels.layout import CHUNK, SUMS
from .._devices import device_of
from .layout import Member
from .wire import Facts, Gathering, agree

if TYPE_CHECKING:
    from ...engine.cuda.plan import CudaPlan


class Slices:
    """The parts of all parameters that this process owns, in the place of ``Shards``.

    Parts begin and end where chunks do, so each sum of a chunk is known whole to one process. All are brought
    together, and every process adds them up in the order in which one process would.

    Args:
        members: The parameters.
        gathering: What brings buckets to the other processes, one after the other, while the next is updated.
        group: The processes.
        where: Who asks, for errors.

    Attributes:
        members: Indices of the parameters.
        options: What must be the same on all processes in this step.
    """

    def __init__(self, members: Sequence[Member], gathering: Gathering, group: Any, where: str) -> None:
        self._counts = -(-np.array([m.view.numel() for m in members], np.int64) // CHUNK)
        self._begins = np.cumsum(self._counts) - self._counts
        self._own = [
            np.arange(m.part.lo // CHUNK, -(-m.part.hi // CHUNK)) for m in members
        ]  # the numbers of own chunks
        self._members, self._gathering, self._group, self._where = members, gathering, group, where
        self.members = range(len(members))
        self.options: Callable[[], Facts] = list
        device = device_of(members[0].piece)
        self._late = Late(int(self._counts.sum()), members[0].piece, device, group, where) if device.on_gpu else None

    def join(self, plan: Plan, present: Sequence[int], ratios: bool) -> None:
        """Have a plan for these parameters add up over processes, for ratios, too, where some have one."""
        chosen, counts = list(present), self._counts[list(present)]
        stages = Stages([self._members[i].bucket.number for i in chosen], self._gathering.begin)
        if self._late is not None:
            first = self._begins[chosen]
            own = first + np.array([self._members[i].part.lo // CHUNK for i in chosen], np.int64)
            combine = functools.partial(self._combine_late, self._late, present)
            cast("CudaPlan", plan).share(Whole(self._late.address, first, counts, own, ratios, combine), stages)
            return
        own = np.concatenate([np.empty(0, np.int64), *(self._begins[i] + self._own[i] for i in chosen)])
        starts = np.repeat(self._begins[chosen] - (np.cumsum(counts) - counts), counts)
        plan.combine = functools.partial(self._combine, present, own, starts + np.arange(len(starts)), counts)
        plan.combine_ratios = plan.combine if ratios else None
        plan.stages = stages

    def _combine(
        self,
        present: Sequence[int],
        own: NDArray[np.int64],
        chunks: NDArray[np.int64],
        counts: NDArray[np.int64],
        sums: NDArray[np.float64],
        partials: NDArray[np.float64],
    ) -> None:
        """Form the sums of parameters by those of all chunks.

        Args:
            present: The parameters, those with a gradient.
            own: Which chunks of all are here.
            chunks: Which of all are those of the parameters.
            counts: How many each has.
            sums: A row for each parameter, to be written.
            partials: Sums of the chunks that are here.
        """
        processes, me = self._group.size(), self._group.rank()
        total, columns = int(self._counts.sum()), sums.shape[1]
        sent = np.zeros(total * columns + processes)
        every, told = sent[: total * columns].reshape(total, columns), sent[total * columns :]
        every[own] = partials
        facts = self._facts(present)
        told[me] = zlib.crc32(repr(facts).encode())
        if processes > 1:
            dist.all_reduce(torch.from_numpy(sent), group=self._group)  # of each chunk one sum is not zero
        if (told != told[me]).any():
            agree(lambda: facts, self._group, self._where)
        sums[:] = add_up(every[chunks], counts)

    def _facts(self, present: Sequence[int]) -> Facts:
        return [("gradients", present), *self.options()]

    def _combine_late(self, late: Late, present: Sequence[int], launch: Callable[[], None]) -> None:
        late.combine(self._facts(present), launch)


LATE = 8
"""Sums, of which a step takes one or two, after which the host looks at what the processes said of them. By then a GPU
has taken them; unless the host is steps ahead, and then it waits while the GPU still has work."""


class Late:
    """Sums of chunks on a GPU, to which those of other processes are added there, and what these say they pass.

    Args:
        chunks: How many there are on all processes.
        like: A tensor on the GPU.
        device: The GPU.
        group: The processes.
        where: Who asks, for errors.

    Attributes:
        address: Where the sums begin.
    """

    def __init__(self, chunks: int, like: Tensor, device: Any, group: Any, where: str) -> None:
        self._device, self._group, self._where = device, group, where
        self._numbers = like.new_zeros(group.size() + SUMS * chunks, dtype=torch.float64)
        self._told: deque[tuple[Facts, Tensor, Any]] = deque()
        self.address = self._numbers[group.size() :].data_ptr()

    def combine(self, facts: Facts, launch: Callable[[], None]) -> None:
        """Take sums: those here, which a function puts on the stream, and those of the other processes.

        Raises:
            ValueError: The processes did not say the same a few sums ago.
        """
        if len(self._told) >= LATE:
            self._look(*self._told.popleft())
        # The value of a tensor on a GPU would be waited for.
        facts = [(name, "on a GPU" if isinstance(x, Tensor) and device_of(x).on_gpu else x) for name, x in facts]
        self._numbers.zero_()
        self._numbers[self._group.rank()].fill_(zlib.crc32(repr(facts).encode()))
        launch()
        dist.all_reduce(self._numbers, group=self._group)  # of each chunk one sum is not zero
        if not self._device.capturing():
            told = self._numbers[: self._group.size()].to("cpu", non_blocking=True, copy=True)  # pinned memory
            self._told.append((facts, told, self._device.event(self._device.stream())))

    def _look(self, facts: Facts, told: Tensor, done: Any) -> None:
        if not done.done:
            done.synchronize()
        if (told != told[0]).any():
            self._told.clear()
            agree(lambda: facts, self._group, f"{self._where}: in a step before this one")
