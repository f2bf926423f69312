"""What the kernels of a step walk in device memory: segments and chunks, and the launches over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.layout import CHUNKS, FIRST_CHUNK, PARTS_BITS, SUMS, WORD
from ..table import chunks_of
from .device import CudaDevice, Function, PinnedRing


class Launch(NamedTuple):
    """An update or terms kernel, its blocks, and the address of its chunks."""

    kernel: Function
    blocks: int
    chunks: int


class CudaTable:
    """Segments, cut into chunks, and what the kernels find out about them.

    Args:
        device: The device.
        sizes: Elements of each segment.
        words: What each segment is, (segments, SEGMENT_WORDS), all but its chunks.
        first: The parameter with which each segment begins.
        updates: The update kernel of each segment.
        terms: The terms kernel of each segment that has a ratio.
    """

    def __init__(
        self,
        device: CudaDevice,
        sizes: NDArray[np.int64],
        words: NDArray[np.int64],
        first: NDArray[np.int64],
        updates: Sequence[Function],
        terms: Sequence[Function | None],
    ) -> None:
        self._device = device
        self._kept: list[Any] = []  # device arrays by whose addresses kernels are called
        self.first = first
        chunks = chunks_of(sizes)
        self.segment_count, self.chunk_count = len(sizes), len(chunks)
        words[:, CHUNKS] = np.bincount(chunks[:, 0], minlength=len(sizes))
        words[:, FIRST_CHUNK] = np.cumsum(words[:, CHUNKS]) - words[:, CHUNKS]
        gradients = self._address(np.zeros(len(sizes), np.uint64))
        self.places = self._address(chunks), self._address(words), gradients
        self.partials = self._address(np.zeros(SUMS * len(chunks)))
        self.gradients = PinnedRing(device, gradients, WORD * len(sizes))
        # One launch for each kernel: nearly always there is one. Backwards, so that the update begins with what the
        # prologue read last, which is still in the second-level cache.
        self.updates = [
            Launch(kernel, len(mine) << PARTS_BITS, self._address(chunks[mine[::-1]]))
            for kernel, mine in _chunks_by_kernel(updates, chunks)
        ]
        self.sums = [
            Launch(kernel, len(mine), self._address(mine)) for kernel, mine in _chunks_by_kernel(terms, chunks)
        ]

    def _address(self, array: NDArray[Any]) -> int:
        self._kept.append(self._device.upload(np.ascontiguousarray(array)))
        return self._device.address(self._kept[-1])


def _chunks_by_kernel(
    kernels: Sequence[Function | None], chunks: NDArray[np.int64]
) -> list[tuple[Function, NDArray[np.int64]]]:
    """Each kernel of segments with the numbers of their chunks."""
    numbers: dict[Function | None, int] = {None: 0}
    of_chunks = np.array([numbers.setdefault(kernel, len(numbers)) for kernel in kernels], np.int64)[chunks[:, 0]]
    found = [(kernel, np.flatnonzero(of_chunks == number)) for kernel, number in numbers.items() if kernel is not None]
    return [(kernel, mine) for kernel, mine in found if len(mine)]
