"""Sums over parameters that are cut between processes, which have the same bits for any number of them."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from ...engine.plan import Plan
from ...engine.table import Stages, add_up
from ...kernels.layout import CHUNK
from .layout import Member
from .wire import Facts, Gathering, agree


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

    def join(self, plan: Plan, present: Sequence[int], ratios: bool) -> None:
        """Have a plan for these parameters add up over processes, for ratios, too, where some have one."""
        chosen, counts = list(present), self._counts[list(present)]
        own = np.concatenate([np.empty(0, np.int64), *(self._begins[i] + self._own[i] for i in chosen)])
        starts = np.repeat(self._begins[chosen] - (np.cumsum(counts) - counts), counts)
        plan.combine = functools.partial(self._combine, present, own, starts + np.arange(len(starts)), counts)
        plan.combine_ratios = plan.combine if ratios else None
        plan.stages = Stages([self._members[i].bucket.number for i in chosen], self._gathering.begin)

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
        facts = [("gradients", present), *self.options()]
        told[me] = zlib.crc32(repr(facts).encode())
        if processes > 1:
            dist.all_reduce(torch.from_numpy(sent), group=self._group)  # of each chunk one sum is not zero
        if (told != told[me]).any():
            agree(lambda: facts, self._group, self._where)
        sums[:] = add_up(every[chunks], counts)
