"""What the kernels of a step walk in device memory: segments and chunks, and the launches over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.layout import CHUNKS, FIRST_CHUNK, PARTS_BITS, SHIFT, SUMS, WORD
from ..table import Whole, chunks_of
from .device import CudaDevice, Function, PinnedRing


class Launch(NamedTuple):
    """An update or terms kernel, its blocks, the address of its chunks or segments, and the stage of the update."""

    kernel: Function
    blocks: int
    mine: int
    stage: int = 0


class CudaTable:
    """Segments, cut into chunks, and what the kernels find out about them.

    Args:
        device: The device.
        sizes: Elements of each segment.
        words: What each segment is, (segments, SEGMENT_WORDS), all but its chunks.
        first: The parameter with which each segment begins.
        updates: The update kernel of each segment.
        terms: The terms kernel of each segment that has a ratio.
        whole: Where the sums of chunks are, if other processes have some of them.
        stages: The stage of each segment's update, if there are some.
    """

    def __init__(
        self,
        device: CudaDevice,
        sizes: NDArray[np.int64],
        words: NDArray[np.int64],
        first: NDArray[np.int64],
        updates: Sequence[Function],
        terms: Sequence[Function | None],
        whole: Whole | None = None,
        stages: Sequence[int] | None = None,
    ) -> None:
        self._device = device
        self._kept: list[Any] = []  # device arrays by whose addresses kernels are called
        self.first = first
        chunks = chunks_of(sizes)
        self.segment_count, self.chunk_count = len(sizes), len(chunks)
        counts = np.bincount(chunks[:, 0], minlength=len(sizes))
        begins = np.cumsum(counts) - counts
        words[:, CHUNKS], words[:, FIRST_CHUNK] = (counts, begins) if whole is None else (whole.counts, whole.first)
        words[:, SHIFT] = 0 if whole is None else whole.own - begins
        gradients = self._address(np.zeros(len(sizes), np.uint64))
        self.places = self._address(chunks), self._address(words), gradients
        self.partials = self._address(np.zeros(SUMS * len(chunks))) if whole is None else whole.sums
        self.gradients = PinnedRing(device, gradients, WORD * len(sizes))
        # One launch for each kernel: nearly always there is one. Backwards, so that the update begins with what the
        # prologue read last, which is still in the second-level cache.
        self.updates = [
            Launch(kernel, len(mine) << PARTS_BITS, self._address(chunks[mine[::-1]]), stage)
            for (stage, kernel), mine in _by_kernel(updates, chunks[:, 0], stages)
        ]
        self.sums = [
            Launch(kernel, len(mine), self._address(mine)) for (_, kernel), mine in _by_kernel(terms, chunks[:, 0])
        ]
        summed = np.flatnonzero([] if whole is None else whole.counts)  # each has rows of its own
        self.ratios = [
            Launch(kernel, len(mine), self._address(summed[mine])) for (_, kernel), mine in _by_kernel(terms, summed)
        ]

    def _address(self, array: NDArray[Any]) -> int:
        self._kept.append(self._device.upload(np.ascontiguousarray(array)))
        return self._device.address(self._kept[-1])


def _stage(pair: tuple[int, Function | None]) -> int:
    return pair[0]


def _by_kernel(
    kernels: Sequence[Function | None], segments: NDArray[np.int64], stages: Sequence[int] | None = None
) -> list[tuple[tuple[int, Function], NDArray[np.int64]]]:
    """Stages and kernels, by stage, with the places in a list of segments of those that they are for."""
    pairs = list(zip(stages or [0] * len(kernels), kernels, strict=True))
    numbers = {pair: number for number, pair in enumerate(sorted(dict.fromkeys(pairs), key=_stage))}
    chosen = np.array([numbers[pair] for pair in pairs], np.int64)[segments]
    found = [((stage, kernel), np.flatnonzero(chosen == n)) for (stage, kernel), n in numbers.items() if kernel]
    return [(pair, mine) for pair, mine in found if len(mine)]
