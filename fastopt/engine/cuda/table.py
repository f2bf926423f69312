"""The chunk table in device memory: uploaded when it is built, and from then on only the addresses of gradients."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.dtypes import CODES
from ...kernels.epilogues import KINDS
from ...kernels.layout import (
    ADAPTS,
    CHUNKS,
    FIRST_CHUNK,
    G_CODE,
    GRADIENT,
    P_CODE,
    PARAMETER,
    PARTS_BITS,
    SCALAR_GROUP,
    SEGMENT_WORDS,
    SIGN,
    SUMS,
    TARGETS,
    WORD,
)
from ...kernels.rules.rule import Rule
from ..table import chunks_of
from .runtime import Function, Runtime, address
from .staging import PinnedRing


class Launch(NamedTuple):
    """An update or terms kernel, whether it computes in float64, its blocks, and the address of its chunks."""

    kernel: Function
    wide: bool
    blocks: int
    chunks: int


class NormTasks(NamedTuple):
    """A list of chunks whose squares are summed: where it lies, how long it is, how many arrays it completes."""

    address: int
    chunks: int
    arrays: int


NO_TASKS = NormTasks(0, 0, 0)


class CudaTable:
    """Segments, cut into chunks, and what the prologue finds out about them.

    Args:
        runtime: The device.
        sizes: Elements of each segment.
        words: What each segment is, (segments, SEGMENT_WORDS), all but its chunks.
        first: The parameter with which each segment begins.
        kernels: The update kernel of each segment, and whether it computes in float64.
        terms: The terms kernel of each segment whose rule has one and that has a ratio.
    """

    def __init__(
        self,
        runtime: Runtime,
        sizes: NDArray[np.int64],
        words: NDArray[np.int64],
        first: NDArray[np.int64],
        kernels: list[tuple[Function, bool]],
        terms: list[Function | None],
    ) -> None:
        self._runtime = runtime
        self._first = first
        self.segment_count = len(sizes)
        chunks = chunks_of(sizes)
        self.chunk_count = len(chunks)
        words[:, CHUNKS] = np.bincount(chunks[:, 0], minlength=len(sizes))
        words[:, FIRST_CHUNK] = np.cumsum(words[:, CHUNKS]) - words[:, CHUNKS]
        self._words, self._chunks = words, chunks
        self._kept: list[Any] = []  # device arrays by whose addresses kernels are called
        self.segments, self.chunks = self._address(words), self._address(chunks)
        self.gradients = self._address(np.zeros(len(sizes), np.uint64))
        self._staging = PinnedRing(runtime, self.gradients, WORD * len(sizes))
        # One launch for each kernel: nearly always there is one. Backwards, so that the update begins with what the
        # prologue read last, which is still in the second-level cache.
        self.launches: list[Launch] = []
        for kernel, wide in dict.fromkeys(kernels):
            mine = chunks[np.array([k is kernel for k, _ in kernels])[chunks[:, 0]]]
            if len(mine):
                self.launches.append(Launch(kernel, wide, len(mine) << PARTS_BITS, self._address(mine[::-1])))
        self.sums: list[Launch] = []
        for sums, wide in dict.fromkeys((t, wide) for t, (_, wide) in zip(terms, kernels, strict=True) if t):
            mine = np.flatnonzero(np.array([t is sums for t in terms])[chunks[:, 0]])
            if len(mine):
                self.sums.append(Launch(sums, wide, len(mine), self._address(mine)))
        self._of_squares = (words[:, ADAPTS] != 0) & np.array([t is None for t in terms], bool)
        self.ratios64 = self._address(np.ones(2 * len(sizes)))  # stretch and ratio of each segment that adapts
        self.ratios32 = self._address(np.ones(2 * len(sizes), np.float32))

    def _address(self, array: NDArray[Any]) -> int:
        on_device = self._runtime.upload(np.ascontiguousarray(array))
        self._kept.append(on_device)
        return address(on_device)

    def point_at(self, gradients: NDArray[np.uint64], stream: Any) -> bool:
        """Have the gradients taken from these addresses; whether that had to be uploaded."""
        return self._staging.send(gradients[self._first].view(np.uint8), stream, to_graphs=True)

    @functools.cached_property
    def partials(self) -> int:
        """Sums of each chunk: of squares of the parameters, then of the gradients; or of a rule's products."""
        return self._address(np.zeros(SUMS * self.chunk_count))

    @functools.cached_property
    def squares(self) -> int:
        """Sums of squares of each parameter, then of each gradient."""
        return self._address(np.zeros(2 * self.segment_count))

    @functools.cached_property
    def counters(self) -> int:
        """How many blocks are done, of each sum of squares; and how many of these are complete."""
        return self._address(np.zeros(2 * self.segment_count + 1, np.int64))

    @functools.cached_property
    def norm_tasks(self) -> NormTasks:
        """Chunks to be squared where the norm of all gradients is needed."""
        return self._jobs(np.ones(self.segment_count, bool))

    @functools.cached_property
    def ratio_tasks(self) -> NormTasks:
        """Chunks to be squared where only trust ratios are needed."""
        return self._jobs(self._of_squares)

    def _jobs(self, gradients: NDArray[np.bool_]) -> NormTasks:
        tasks, arrays = [], 0
        for which, wanted in ((PARAMETER, self._of_squares), (GRADIENT, gradients)):
            chunk = np.flatnonzero(wanted[self._chunks[:, 0]])
            tasks.append(np.stack([np.full(len(chunk), which), chunk], axis=1))
            arrays += int((wanted & (self._words[:, CHUNKS] > 0)).sum())
        table = np.concatenate(tasks)
        table = table[np.argsort(table[:, 1], kind="stable")]  # chunk by chunk, for the cache's sake
        return NormTasks(self._address(table), len(table), arrays)


def segment_words(
    addresses: list[list[int]],
    *,
    scalar_groups: list[int],
    signs: list[float],
    adapts: list[bool],
    stored: list[tuple[str, str]],
    epilogues: list[list[tuple[Rule, str, int]]],
) -> NDArray[np.int64]:
    """What segments are, for ``CudaTable``; ``stored`` are the dtypes of parameter and gradient, ``epilogues`` those of
    each with dtype and address of the target."""
    words = np.zeros((len(addresses), SEGMENT_WORDS), np.int64)
    for row, arrays in zip(words, addresses, strict=True):
        row[: len(arrays)] = arrays
    words[:, SCALAR_GROUP], words[:, SIGN], words[:, ADAPTS] = scalar_groups, signs, adapts
    for row, of_segment in zip(words, epilogues, strict=True):
        for what, dtype, target in of_segment:
            row[TARGETS + KINDS.index((what, dtype))] = target
    words[:, P_CODE], words[:, G_CODE] = [CODES[p] for p, _ in stored], [CODES[g] for _, g in stored]
    return words
