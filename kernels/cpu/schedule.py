"""The schedule: which chunks a thread takes, what it has done with them, and how sums of chunks are added.

It is compiled as kernels are. All threads of a team run it at once, under OpenMP (launch.c) or as Python's threads
(team.py). Chunks do not depend on the number of threads and no two chunks share an element, so neither do the results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

from .. import layout
from ..environment import enter, leave
from ..layout import WORD, places, structure
from .memory import call, clear, count_up, put_real, put_word, real, word

EVERY_SUM = (1 << layout.SUMS) - 1

KERNEL, SCALARS, ARRAYS, OWN, ZEROED, EPILOGUES, TERMS, RATIO, SQUARES, SUMS = places("segment")
SEGMENT_WORDS, EPILOGUE_WORDS = (structure(name).itemsize // WORD for name in ("segment", "epilogue"))
SEGMENTS, SEGMENT_COUNT, CHUNKS, CHUNK_COUNT, WAVES_AT, WAVE_COUNT, PARTIALS = places("table")[:7]
COUNTS, HALF, NEXT, TOTAL, UNIT, SUMMED = places("table")[7:]


def schedule(half: bool) -> Callable[..., None]:
    """The schedule, to be compiled: ``SCHEDULE`` in team.py is its C signature."""
    return _schedule


def _schedule(table: Any, act: Any, flags: Any, me: Any, threads: Any, barrier: Any) -> None:
    mode = enter()
    count, segment_count = word(table, CHUNK_COUNT), word(table, SEGMENT_COUNT)
    norm, squares = act == layout.NORM, 1 << flags if act == layout.NORM else ~flags & (layout.KNOW_W | layout.KNOW_G)
    of_terms = squares if norm else EVERY_SUM
    if act == layout.WAVES:
        # A few segments at a time, whose data fit the cache: their sums are taken, and the update follows before the
        # data are gone. Each thread takes neighbours, the same ones both times: it finds in its own cache what it read
        # before. Backwards, what it read last comes first.
        wave, s, c = word(table, WAVES_AT), 0, 0
        for _ in range(word(table, WAVE_COUNT)):
            segments, chunks, elements = word(wave, 0), word(wave, 1), word(wave, 2)
            lo, hi = _share(table, c, chunks, elements, me, threads)
            for i in range(lo, hi):
                _sum_chunk(table, i, norm, squares)
            call(barrier, ())
            if me == 0:
                _add_chunks(table, c, c + chunks, squares, of_terms)
                _decide(table, s, s + segments)
            call(barrier, ())
            for k in range(hi - lo):
                _update_chunk(table, hi - 1 - k, flags)
            wave, s, c = wave + 3 * WORD, s + segments, c + chunks
    elif act != layout.DECIDE:
        # Cores are not equally fast, or not equally free. Several chunks at a time: arrays may be small.
        batch = count // (32 * threads) + 1
        first = count_up(table, NEXT, batch)
        while first < count:
            for i in range(first, min(first + batch, count)):
                if act == layout.UPDATE:
                    _update_chunk(table, i, 0)
                else:
                    _sum_chunk(table, i, norm, squares)
            first = count_up(table, NEXT, batch)
    call(barrier, ())
    if me == 0:
        put_word(table, NEXT, 0)
        if act in (layout.NORM, layout.SUM):
            _add_chunks(table, 0, count, squares, of_terms)
        if norm:
            sums = word(table, SEGMENTS) + WORD * (SUMS + flags)
            put_real(table, TOTAL, _add_lanes(table, sums, segment_count, SEGMENT_WORDS))
        if act == layout.DECIDE:
            _decide(table, 0, segment_count)
        if flags & layout.KEEP_W and act == layout.WAVES:
            _add_chunks(table, 0, count, layout.KNOW_W, 0)
        if act in (layout.UPDATE, layout.WAVES):
            # Commit (Counts in fastopt/engine/table.py): what is counted in the second half becomes the first.
            counts, half = word(table, COUNTS), word(table, HALF)
            for k in range(half):
                put_real(counts, k, real(counts, half + k))
    leave(mode)


_inlined = njit(error_model="numpy", forceinline=True)


@_inlined
def _chunk(table: Any, i: Any) -> tuple[Any, Any, Any, Any]:
    """The segment of a chunk, its elements, and where its sums are."""
    chunk = word(table, CHUNKS) + 3 * WORD * i
    segment = word(table, SEGMENTS) + SEGMENT_WORDS * WORD * word(chunk, 0)
    return segment, word(chunk, 1), word(chunk, 2), word(table, PARTIALS) + layout.SUMS * WORD * i


@_inlined
def _update(task: Any, lo: Any, hi: Any, own: Any) -> None:
    call(word(task, KERNEL), (lo, hi, task + WORD * ARRAYS, word(task, SCALARS), own))


@_inlined
def _add_squares(segment: Any, which: Any, lo: Any, hi: Any, sums: Any) -> None:
    call(word(segment, SQUARES + which), (lo, hi, word(segment, ARRAYS + which), sums + WORD * which))


@_inlined
def _update_chunk(table: Any, i: Any, flags: Any) -> None:
    """Epilogues and zeros follow strip by strip, while parameters and gradients are in the first-level cache."""
    segment, lo, end, sums = _chunk(table, i)
    first, nbytes = segment + WORD * EPILOGUES, word(segment, ZEROED)
    keep = flags & layout.KEEP_W != 0 and word(segment, RATIO) != 0 and word(segment, TERMS) == 0
    strip = layout.STRIP if word(first, KERNEL) else layout.BLOCK if nbytes else end - lo
    if keep:
        strip = layout.BLOCK
        put_real(sums, layout.PARAMETER, 0.0)
    while lo < end:
        hi = min(lo + strip, end)
        _update(segment, lo, hi, segment + WORD * OWN)
        for epilogue in range(first, segment + WORD * TERMS, WORD * EPILOGUE_WORDS):
            if word(epilogue, KERNEL):
                _update(epilogue, lo, hi, table + WORD * UNIT)
        if nbytes:
            clear(word(segment, ARRAYS + layout.GRADIENT) + nbytes * lo, nbytes * (hi - lo))
        if keep:
            _add_squares(segment, layout.PARAMETER, lo, hi, sums)
        lo = hi


@_inlined
def _sum_chunk(table: Any, i: Any, norm: Any, squares: Any) -> None:
    """What the ratio of the chunk's segment needs to know of it, or the squares alone."""
    segment, lo, hi, sums = _chunk(table, i)
    if norm or (word(segment, RATIO) and not word(segment, TERMS)):
        for which in range(2):
            if squares >> which & 1:
                put_real(sums, which, 0.0)
                _add_squares(segment, which, lo, hi, sums)
    elif word(segment, RATIO):
        for k in range(layout.SUMS):
            put_real(sums, k, 0.0)
        own = segment + WORD * OWN
        call(word(segment, TERMS), (lo, hi, segment + WORD * ARRAYS, word(segment, SCALARS), own, sums))


@_inlined
def _share(table: Any, first: Any, count: Any, elements: Any, me: Any, threads: Any) -> tuple[Any, Any]:
    """The chunks of a wave that fall to a thread: neighbours with an equal share of the elements."""
    lo, hi, before = first, first, 0
    for i in range(first, first + count):
        owner = before * threads // elements
        if owner < me:
            lo = i + 1
        if owner <= me:
            hi = i + 1
        _, begin, end, _ = _chunk(table, i)
        before += end - begin
    return lo, hi


@_inlined
def _add_chunks(table: Any, first: Any, last: Any, squares: Any, of_terms: Any) -> None:
    """Each of the segments' sums is that of their chunks' partial sums: the places that have a bit in ``squares``, or,
    where a segment has terms, in ``of_terms``."""
    while first < last:
        segment, _, _, sums = _chunk(table, first)
        end = first + 1
        while end < last and _chunk(table, end)[0] == segment:
            end += 1
        for k in range(layout.SUMS):
            if (of_terms if word(segment, TERMS) else squares) >> k & 1:
                put_real(segment, SUMS + k, _add_lanes(table, sums + WORD * k, end - first, layout.SUMS))
        first = end


@_inlined
def _add_lanes(table: Any, numbers: Any, count: Any, stride: Any) -> float:
    """Lane j adds numbers j, j + 32, ... in order; then the lanes are added pairwise (reductions.py)."""
    lanes = table + WORD * SUMMED
    for j in range(layout.LANES):
        put_real(lanes, j, 0.0)
    for i in range(count):
        put_real(lanes, i % layout.LANES, real(lanes, i % layout.LANES) + real(numbers, i * stride))
    width = layout.LANES // 2
    while width:
        for j in range(width):
            put_real(lanes, j, real(lanes, j) + real(lanes, j + width))
        width //= 2
    return real(lanes, 0)  # type: ignore[no-any-return]


@_inlined
def _decide(table: Any, first: Any, last: Any) -> None:
    """The ratios of segments by their sums."""
    for s in range(first, last):
        segment = word(table, SEGMENTS) + SEGMENT_WORDS * WORD * s
        if word(segment, RATIO):
            call(word(segment, RATIO), (segment + WORD * SUMS, word(segment, SCALARS), segment + WORD * OWN))
