"""The chunk table: what one launch walks, whatever the number of arrays, groups, dtypes and rules."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..kernels.layout import CHUNK, LANES, RATIO, SEGMENT, SUMS, structure

WAVE = 262_144
"""Elements after which a wave of segments ends: 2 MiB of float32 parameters and gradients, which stay in the cache of
two cores between the norms and the update. LARS on ResNet-50 against momentum: 1.30 to 1.34 (twice as large: 1.30 to
1.35; four times: 1.32 to 1.35; half: 1.29 to 1.36, with more waves, after each of which the threads wait)."""


ROW = 8
"""Numbers of a scalar group in ``Counts``: steps taken, then what its rule carries."""


class Counts:
    """Step counts of a plan's scalar groups: in the first half as they are, in the second as they will be next.

    What runs a step copies the second half over the first as its last act. An interrupt, which Python raises only after
    that, finds parameters and counts in agreement.
    """

    def __init__(self, scalar_groups: int = 0) -> None:
        self.half = ROW * scalar_groups
        self.numbers = array("d", bytes(2 * 8 * self.half))
        self.address = self.numbers.buffer_info()[0]


NOTHING = Counts()


def chunks_of(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Segment, first element and one past the last element of each chunk of segments of the given sizes."""
    per_segment = -(-sizes // CHUNK)
    segment = np.repeat(np.arange(len(sizes)), per_segment)
    first = np.repeat(np.cumsum(per_segment) - per_segment, per_segment)
    lo = (np.arange(len(segment)) - first) * CHUNK
    return np.stack([segment, lo, np.minimum(lo + CHUNK, sizes[segment])], axis=1)


class Stages(NamedTuple):
    """Parts in which an update is done one after the other, and what follows each. An interrupt between two of them, or
    an error of what follows, leaves a step half done that is not counted."""

    of: Sequence[int]  # the stage of each parameter
    reached: Callable[[int], None]


class Whole(NamedTuple):
    """Parameters of which a GPU has some chunks and other processes have the rest: where on it are the sums of all.

    Attributes:
        sums: Address of a row of sums for each chunk.
        first: The row of the first chunk of each parameter.
        counts: Chunks of each parameter.
        own: The row of the first chunk that is here; any where none is.
        ratios: Whether ratios need sums, too.
        combine: Sets all sums to zero, has a function put the sums of the chunks here on the stream, and then adds
            those of the other processes.
    """

    sums: int
    first: NDArray[np.int64]
    counts: NDArray[np.int64]
    own: NDArray[np.int64]
    ratios: bool
    combine: Callable[[Callable[[], None]], None]


def add_up(numbers: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of runs of so many rows, each in the canonical order (kernels/reductions.py)."""
    heights = -(-counts // LANES)
    starts = np.cumsum(heights) - heights
    within = np.arange(len(numbers)) - np.repeat(np.cumsum(counts) - counts, counts)
    padded = np.zeros((int(heights.sum()), LANES, numbers.shape[1]))
    padded.reshape(-1, numbers.shape[1])[np.repeat(starts * LANES, counts) + within] = numbers
    lanes = np.zeros((len(counts), LANES, numbers.shape[1]))
    for row in range(heights.max(initial=0)):
        higher = heights > row
        lanes[higher] += padded[starts[higher] + row]
    width = LANES // 2
    while width:
        lanes[:, :width] += lanes[:, width : 2 * width]
        width //= 2
    return lanes[:, 0]


class Table:
    """Segments of given sizes, cut into chunks, and the counts that an update of them commits.

    The addresses in it are those of arrays that others keep alive.
    """

    def __init__(self, sizes: Any, counts: Counts = NOTHING) -> None:
        self.counts = counts
        self.sizes: NDArray[np.int64] = np.asarray(sizes, np.int64)
        self.elements = int(self.sizes.sum())
        self.segments = np.zeros(len(self.sizes), SEGMENT)
        self.segments["own"][:, RATIO] = 1.0
        self.chunks = chunks_of(self.sizes)
        self.count = len(self.chunks)
        self.waves = _waves_of(self.sizes)
        self.partials: NDArray[np.float64] = np.zeros((self.count, SUMS))
        self.record = np.zeros((), structure("table"))
        self.record["segments"], self.record["segment_count"] = self.segments.ctypes.data, len(self.segments)
        self.record["chunks"], self.record["chunk_count"] = self.chunks.ctypes.data, self.count
        self.record["waves"], self.record["wave_count"] = self.waves.ctypes.data, len(self.waves)
        self.record["partials"], self.record["unit"] = self.partials.ctypes.data, 1.0
        self.record["counts"], self.record["half"] = counts.address, counts.half
        self.total = self.record["total"]  # of all sums of squares, where they were taken
        self.record_at = self.record.ctypes.data
        self.own: NDArray[np.float64] = self.segments["own"]
        self.arrays: NDArray[np.uint64] = self.segments["arrays"]
        self.first: NDArray[np.int64] = np.arange(len(self.sizes))  # the parameter with which each segment begins
        self.signs: NDArray[np.float64] = np.ones(len(self.sizes))  # of the gradient multiplier
        self.itemsizes: NDArray[np.int64] = np.zeros(len(self.sizes), np.int64)  # of the gradients
        self.launched_with: tuple[float, bool] | None = None  # multiplier and zeroing that segments have
        self._stages: list[tuple[int, NDArray[Any], NDArray[np.int64]]] = []

    def stages(self, of: Sequence[int]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Records of the same table with the chunks of one stage each; the last one commits the counts.

        Args:
            of: The stage of each parameter, the same in all calls.
        """
        if not self._stages:
            stage_of = np.asarray(of, np.int64)[self.first[self.chunks[:, 0]]]
            for stage in np.unique(stage_of).tolist() or [0]:
                record, chunks = self.record.copy(), self.chunks[stage_of == stage]
                record["chunks"], record["chunk_count"], record["half"] = chunks.ctypes.data, len(chunks), 0
                self._stages.append((stage, record, chunks))
            record["half"] = self.record["half"]
        return ((stage, record) for stage, record, _ in self._stages)


def _waves_of(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of segments, chunks and elements of each wave of segments of the given sizes."""
    elements, chunks = (np.concatenate([[0], np.cumsum(x)]) for x in (sizes, -(-sizes // CHUNK)))
    ends = [0]
    while ends[-1] < len(sizes):
        ends.append(min(int(np.searchsorted(elements, elements[ends[-1]] + WAVE)), len(sizes)))
    return np.stack([np.diff(x) for x in (ends, chunks[ends], elements[ends])], axis=1)
