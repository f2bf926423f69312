"""The scheduler for builds without a C compiler: what launch.c does, in Python. Same tables, same kernels, same bits.

Kernels are C functions that Numba compiled; while one runs, Python's lock is free for the other threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from .. import reductions
from ..environment import enter, leave, settled
from ..layout import BLOCK, GRADIENT, KNOW_G, KNOW_W, LANES, MULTIPLIER, PARAMETER, RATIO, SEGMENT, STRIP, SUMS
from . import loop, terms

EVERY_SUM = (1 << SUMS) - 1
KINDS = {types.int64: ctypes.c_int64, types.float64: ctypes.c_double, types.void: None}
SIGNATURES = {
    "update": loop.SIGNATURE,
    "epilogue": loop.EPILOGUE_SIGNATURE,
    "squares": reductions.SIGNATURE,
    "terms": terms.SIGNATURE,
    "ratio": reductions.RATIO_SIGNATURE,
}


@functools.cache
def _function(kind: str, address: int) -> Any:
    """The kernel at an address; pointers are passed as integers. None at address 0."""
    signature = SIGNATURES[kind]
    kinds = [KINDS.get(t, ctypes.c_void_p) for t in (signature.return_type, *signature.args)]
    return ctypes.CFUNCTYPE(*kinds)(address) if address else None  # type: ignore[arg-type]


class _Segment(NamedTuple):
    """A segment of a table as it is in this call."""

    update: Any
    squares: tuple[Any, Any]
    terms: Any
    ratio: Any
    scalars: int
    epilogues: list[tuple[Any, int, int]]
    data: tuple[int, int]  # where parameters and gradients begin
    arrays: int  # where the addresses of all arrays stand
    own: int
    sums: int

    def update_chunk(self, lo: int, end: int) -> float:
        """Update elements; the sum of squares of the parameters, where the kernel forms one."""
        if not self.epilogues:
            return self.update(lo, end, self.arrays, self.scalars, self.own)  # type: ignore[no-any-return]
        squares, strip = [], BLOCK if self.ratio and not self.terms else STRIP
        while lo < end:
            hi = min(lo + strip, end)
            squares.append(self.update(lo, hi, self.arrays, self.scalars, self.own))
            for kernel, target, number in self.epilogues:
                kernel(lo, hi, self.data[PARAMETER], target, number)
            lo = hi
        return _add(np.array(squares))  # type: ignore[no-any-return]

    def chunk_sums(self, lo: int, hi: int, partials: Any, known: int) -> None:
        """Fill a column of partial sums, where there is a ratio."""
        if self.ratio and self.terms:
            sums = (ctypes.c_double * SUMS)()
            self.terms(lo, hi, self.arrays, self.scalars, self.own, ctypes.addressof(sums))
            partials[:] = sums
        elif self.ratio:
            for k in (PARAMETER, GRADIENT):
                if not known >> k & 1:
                    partials[k] = self.squares[k](lo, hi, self.data[k])


class _Walk:
    """A table in one call."""

    def __init__(self, table: Any, threads: int) -> None:
        fields, at = table.segments, table.segments_at
        assert SEGMENT.fields is not None
        places = [at + SEGMENT.fields[name][1] for name in ("arrays", "own", "sums")]
        named = [fields[name].tolist() for name in ("update", "squares", "terms", "ratio", "scalars", "epilogues")]
        self.segments = [
            _Segment(
                _function("update", update),
                (_function("squares", squares[PARAMETER]), _function("squares", squares[GRADIENT])),
                *(_function("terms", terms), _function("ratio", ratio), scalars),
                [(_function("epilogue", kernel), target, number) for kernel, target, number in epilogues if kernel],
                *((data[PARAMETER], data[GRADIENT]), *(place + s * SEGMENT.itemsize for place in places)),
            )
            for s, (update, squares, terms, ratio, scalars, epilogues, data) in enumerate(
                zip(*named, fields["arrays"].tolist(), strict=True)
            )
        ]
        self._table, self._threads = table, threads
        self._chunks: list[tuple[int, int, int]] = table.chunks.tolist()

    def each(self, chunks: Iterable[int], work: Callable[[_Segment, int, int, int], None]) -> None:
        """Call work for chunks: segment, elements, index."""
        todo = iter(chunks)  # which the threads share

        def take() -> None:
            for i in todo:
                s, lo, hi = self._chunks[i]
                work(self.segments[s], lo, hi, i)

        others = [_pool().submit(take) for _ in range(self._threads - 1)]
        take()
        for other in others:
            other.result()

    def update(self, chunks: Sequence[int], row: Any = None) -> None:
        """Update chunks; sums of squares go to ``row``."""

        def work(s: _Segment, lo: int, hi: int, i: int) -> None:
            squares = s.update_chunk(lo, hi)
            if row is not None:
                row[i] = squares

        self.each(chunks, work)

    def sums(self, chunks: Sequence[int], known: int) -> None:
        """The sums of the segments with a ratio to which chunks belong."""
        partials = self._table.partials
        self.each(chunks, lambda s, lo, hi, i: s.chunk_sums(lo, hi, partials[:, i], known))
        self.add(chunks, ~known & (KNOW_W | KNOW_G), EVERY_SUM)

    def add(self, chunks: Sequence[int], places: int, of_terms: int) -> None:
        """Add the partial sums of each segment's chunks."""
        sums, partials, start = self._table.segments["sums"], self._table.partials, 0
        while start < len(chunks):
            segment, end = self._chunks[chunks[start]][0], start
            while end < len(chunks) and self._chunks[chunks[end]][0] == segment:
                end += 1
            wanted = of_terms if self.segments[segment].terms else places
            for k in range(SUMS):
                if wanted >> k & 1:
                    sums[segment, k] = _sum_lanes(partials[k, chunks[start] : chunks[start] + end - start])
            start = end

    def decide(self, segments: Iterable[int]) -> None:
        """The ratios by the sums."""
        own = self._table.segments["own"]
        for i in segments:
            s = self.segments[i]
            if s.ratio:
                own[i, RATIO] = s.ratio(s.sums, own[i, MULTIPLIER], s.scalars)


def update(table: Any, threads: int) -> None:
    """Update every chunk, then commit the counts."""

    def work() -> None:
        _Walk(table, threads).update(range(table.count))
        table.counts.commit()

    _finish(work)


def squares(table: Any, which: int, threads: int) -> float:
    """Sum of squares of every segment, and the sum over all of them."""
    walk, row, chunks = _Walk(table, threads), table.partials[which], range(table.count)

    def work(s: _Segment, lo: int, hi: int, i: int) -> None:
        row[i] = s.squares[which](lo, hi, s.data[which])

    walk.each(chunks, work)
    walk.add(chunks, 1 << which, 1 << which)
    return _sum_lanes(table.segments["sums"][:, which])  # type: ignore[no-any-return]


def sums(table: Any, known: int, threads: int) -> None:
    """The sums of every segment with a ratio."""
    _Walk(table, threads).sums(range(table.count), known)


def ratios(table: Any) -> None:
    """The ratios by the sums."""
    _Walk(table, 1).decide(range(len(table.sizes)))


def waves(table: Any, known: int, threads: int) -> None:
    """Sums, ratios and update, wave after wave; then commit the counts."""

    def work() -> None:
        walk, s, c = _Walk(table, threads), 0, 0
        for segments, chunks, _ in table.waves.tolist():
            mine = range(c, c + chunks)
            walk.sums(mine, known)
            walk.decide(range(s, s + segments))
            walk.update(mine, table.partials[PARAMETER])
            walk.add(mine, KNOW_W, 0)
            s, c = s + segments, c + chunks
        table.counts.commit()

    _finish(work)


def _finish(work: Callable[[], None]) -> None:
    """Have another thread do the work: an interrupt is raised here, and there nothing is left half done."""
    done = _pool().submit(work)
    try:
        done.result()
    finally:
        wait([done])


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2048, "fastopt")  # threads are started when they are needed


os.register_at_fork(after_in_child=_pool.cache_clear)


@njit
def _add(x: Any) -> float:
    mode: Any = enter()  # type: ignore[call-arg]
    total = 0.0
    for i in range(len(x)):
        total += x[i]
    total = settled(total)
    leave(mode)
    return total


@njit
def _sum_lanes(x: Any) -> float:
    """Lane j adds numbers j, j + 32, ... in order; then the lanes are added pairwise (reductions.py)."""
    mode: Any = enter()  # type: ignore[call-arg]
    lanes = np.zeros(LANES)
    for i in range(len(x)):
        lanes[i % LANES] += x[i]
    width = LANES // 2
    while width:
        for j in range(width):
            lanes[j] += lanes[j + width]
        width //= 2
    total = settled(lanes[0])
    leave(mode)
    return total
