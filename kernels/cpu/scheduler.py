"""The scheduler for builds without a C compiler: what launch.c does, under Numba's prange.

Same tables, same kernels, same bits. Two steps at once take turns, because not every threading layer of Numba can run
two parallel regions; the child of a fork runs everything in one thread, because Numba's layers end the process there.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from .. import reductions
from ..environment import enter, leave, settled
from ..layout import BLOCK, EPILOGUES, GRADIENT, KNOW_W, LANES, MULTIPLIER, PARAMETER, RATIO, SEGMENT, STRIP, SUMS
from . import loop, terms

WORD = np.dtype(np.uint64).itemsize
UPDATE, SQUARES, SUM, WAVES = range(4)
EVERY_SUM = (1 << SUMS) - 1


def _caller(signature: Any) -> Any:
    """Intrinsic ``(address, arguments)`` that calls the C function of a signature; pointers are passed as integers."""
    passed = types.Tuple(
        [types.int64 if isinstance(a, (types.CPointer, types.RawPointer)) else a for a in signature.args]
    )

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        kinds = [context.get_value_type(a) for a in signature.args]
        result = ir.VoidType() if signature.return_type == types.void else ir.DoubleType()
        function = builder.inttoptr(args[0], ir.FunctionType(result, kinds).as_pointer())
        arguments = [
            builder.inttoptr(x, kind) if isinstance(kind, ir.PointerType) else x
            for x, kind in zip(cgutils.unpack_tuple(builder, args[1]), kinds, strict=True)
        ]
        value = builder.call(function, arguments)
        return context.get_dummy_value() if signature.return_type == types.void else value

    @intrinsic
    def call(typingctx: Any, address: Any, arguments: Any) -> Any:
        return signature.return_type(types.int64, passed), codegen

    return call


_update = _caller(loop.SIGNATURE)
_epilogue = _caller(loop.EPILOGUE_SIGNATURE)
_squares = _caller(reductions.SIGNATURE)
_terms = _caller(terms.SIGNATURE)
_ratio = _caller(reductions.RATIO_SIGNATURE)


class Scheduler:
    """Walks tables of segments."""

    def __init__(self) -> None:
        assert SEGMENT.fields is not None
        places = {name: SEGMENT.fields[name][1] // WORD for name in SEGMENT.fields}
        words = SEGMENT.itemsize // WORD
        update_at, squares_at, scalars_at = places["update"], places["squares"], places["scalars"]
        arrays_at, own_at, ratio_at = places["arrays"], places["own"], places["ratio"]
        terms_at, sums_at, epilogues_at = places["terms"], places["sums"], places["epilogues"]

        # A table arrives as words: two views of the same bytes, as integers and as float64.
        @njit(nogil=True)
        def update_part(table: Any, at: int, s: int, lo: int, hi: int) -> float:
            base = at + s * WORD
            arrays, own = base + arrays_at * WORD, base + own_at * WORD
            return _update(table[s + update_at], (lo, hi, arrays, table[s + scalars_at], own))  # type: ignore[no-any-return]

        @njit(nogil=True)
        def update_chunk(table: Any, at: int, chunk: Any) -> float:
            s, lo, end = chunk[0] * words, chunk[1], chunk[2]
            if table[s + epilogues_at] == 0:
                return update_part(table, at, s, lo, end)  # type: ignore[no-any-return]
            mode: Any = enter()  # type: ignore[call-arg]
            squares = 0.0
            strip = BLOCK if table[s + ratio_at] != 0 and table[s + terms_at] == 0 else STRIP
            while lo < end:
                hi = min(lo + strip, end)
                squares += update_part(table, at, s, lo, hi)
                for e in range(s + epilogues_at, s + epilogues_at + 3 * EPILOGUES, 3):  # kernel, target, number
                    if table[e] != 0:
                        _epilogue(table[e], (lo, hi, table[s + arrays_at + PARAMETER], table[e + 1], table[e + 2]))
                lo = hi
            squares = settled(squares)
            leave(mode)
            return squares

        @njit(nogil=True)
        def chunk_squares(table: Any, chunk: Any, which: int) -> float:
            s = chunk[0] * words
            return _squares(table[s + squares_at + which], (chunk[1], chunk[2], table[s + arrays_at + which]))  # type: ignore[no-any-return]

        @njit(nogil=True)
        def chunk_sums(table: Any, at: int, chunks: Any, i: int, partials: Any, known: int) -> None:
            s, lo, hi = chunks[i, 0] * words, chunks[i, 1], chunks[i, 2]
            if table[s + ratio_at] == 0:
                return
            if table[s + terms_at] != 0:
                base, sums = at + s * WORD, np.zeros(SUMS)
                arrays, own = base + arrays_at * WORD, base + own_at * WORD
                _terms(table[s + terms_at], (lo, hi, arrays, table[s + scalars_at], own, sums.ctypes.data))
                partials[:, i] = sums
                return
            for k in (PARAMETER, GRADIENT):
                if not known >> k & 1:
                    partials[k, i] = chunk_squares(table, chunks[i], k)

        @njit(nogil=True)
        def sum_chunks(table: Any, sums: Any, chunks: Any, partials: Any, places: int, of_terms: int) -> None:
            start = 0
            while start < len(chunks):
                segment, end = chunks[start, 0], start
                while end < len(chunks) and chunks[end, 0] == segment:
                    end += 1
                wanted = of_terms if table[segment * words + terms_at] != 0 else places
                for k in range(SUMS):
                    if wanted >> k & 1:
                        sums[segment, k] = _sum_lanes(partials[k, start:end])
                start = end

        @njit(nogil=True)
        def decide(table: Any, at: int, own: Any, first: int, end: int) -> None:
            for s in range(first, end):
                ratio = table[s * words + ratio_at]
                if ratio != 0:
                    sums = at + (s * words + sums_at) * WORD
                    own[s, RATIO] = _ratio(ratio, (sums, own[s, MULTIPLIER], table[s * words + scalars_at]))

        @njit(nogil=True)
        def commit(counts: Any) -> None:
            half = len(counts) // 2
            counts[:half] = counts[half:]

        def build(parallel: bool) -> tuple[Any, Any, Any, Any]:
            """Update, squares, sums and waves; each is compiled when it is first needed."""

            @njit(parallel=parallel, nogil=True)
            def each_chunk(table: Any, at: int, chunks: Any, w_partials: Any) -> None:
                for i in prange(len(chunks)):
                    squares = update_chunk(table, at, chunks[i])
                    if len(w_partials):
                        w_partials[i] = squares

            @njit(parallel=parallel, nogil=True)
            def squares(table: Any, sums: Any, chunks: Any, which: int, partials: Any) -> None:
                for i in prange(len(chunks)):
                    partials[which, i] = chunk_squares(table, chunks[i], which)
                sum_chunks(table, sums, chunks, partials, 1 << which, 1 << which)

            @njit(nogil=True)
            def update(table: Any, at: int, chunks: Any, counts: Any) -> None:
                each_chunk(table, at, chunks, np.empty(0))
                commit(counts)

            @njit(parallel=parallel, nogil=True)
            def sum_all(table: Any, at: int, sums: Any, chunks: Any, partials: Any, known: int) -> None:
                for i in prange(len(chunks)):
                    chunk_sums(table, at, chunks, i, partials, known)
                sum_chunks(table, sums, chunks, partials, ~known & 3, EVERY_SUM)

            @njit(nogil=True)
            def waves(
                table: Any,
                at: int,
                own: Any,
                sums: Any,
                chunks: Any,
                each: Any,
                partials: Any,
                known: int,
                counts: Any,
            ) -> None:
                s = c = 0
                for w in range(len(each)):
                    last, end = s + each[w, 0], c + each[w, 1]
                    mine, row = chunks[c:end], partials[:, c:end]
                    sum_all(table, at, sums, mine, row, known)
                    decide(table, at, own, s, last)
                    each_chunk(table, at, mine, row[PARAMETER])
                    sum_chunks(table, sums, mine, row, KNOW_W, 0)
                    s, c = last, end
                commit(counts)

            return update, squares, sum_all, waves

        self._decide = decide
        self._serial, self._parallel = build(False), build(True)

    def update(self, segments: Any, at: int, chunks: Any, counts: Any, threads: int) -> None:
        """Update every chunk, then commit the counts."""
        self._run(UPDATE, threads, _words(segments), at, chunks, counts)

    def squares(self, segments: Any, chunks: Any, partials: Any, which: int, threads: int) -> float:
        """Sum of squares of every segment, and the sum over all of them."""
        self._run(SQUARES, threads, _words(segments), segments["sums"], chunks, which, partials)
        return _sum_lanes(segments["sums"][:, which])  # type: ignore[no-any-return]

    def sums(self, segments: Any, at: int, chunks: Any, partials: Any, known: int, threads: int) -> None:
        """The sums of every segment with a ratio."""
        self._run(SUM, threads, _words(segments), at, segments["sums"], chunks, partials, known)

    def ratios(self, segments: Any, at: int) -> None:
        """The ratios by the sums."""
        self._decide(_words(segments), at, segments["own"], 0, len(segments))

    def waves(
        self, segments: Any, at: int, chunks: Any, waves: Any, partials: Any, known: int, counts: Any, threads: int
    ) -> None:
        """Sums, ratios and update, wave after wave; then commit the counts."""
        table = _words(segments), at, segments["own"], segments["sums"]
        self._run(WAVES, threads, *table, chunks, waves, partials, known, counts)

    def _run(self, which: int, threads: int, *args: Any) -> None:
        if threads == 1 or _forked:
            self._serial[which](*args)
            return
        with _lock:
            before = numba.get_num_threads()
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            try:
                self._parallel[which](*args)
            finally:
                numba.set_num_threads(before)  # it is also the number of the user's own loops


def _words(segments: Any) -> Any:
    return segments.view(np.int64).reshape(-1)


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


_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked, _lock
    _forked, _lock = True, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
