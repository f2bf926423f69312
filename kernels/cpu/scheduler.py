"""The scheduler for builds without a C compiler: what launch.c does, under Numba's prange.

Same tables, same kernels, same bits. Two steps at once take turns, because not every threading layer of Numba can run
two parallel regions; the child of a fork runs everything in one thread, because Numba's layers end the process there.
"""

from __future__ import annotations

import math
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
from ..layout import BLOCK, GRADIENT, KNOW_G, KNOW_W, LANES, MULTIPLIER, PARAMETER, RATIO, SEGMENT
from . import loop

WORD = np.dtype(np.uint64).itemsize
UPDATE, SQUARES, LAYERS = range(3)


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
_round = _caller(loop.ROUND_SIGNATURE)
_norm = _caller(reductions.SIGNATURE)
_ratio = _caller(reductions.RATIO_SIGNATURE)


class Scheduler:
    """Walks tables of segments."""

    def __init__(self) -> None:
        assert SEGMENT.fields is not None
        places = {name: SEGMENT.fields[name][1] // WORD for name in SEGMENT.fields}
        words = SEGMENT.itemsize // WORD
        update_at, norm_at, scalars_at = places["update"], places["norm"], places["scalars"]
        arrays_at, own_at, ratio_at = places["arrays"], places["own"], places["ratio"]
        round_at, copy_at = places["round"], places["copy"]

        # A table arrives as words: two views of the same bytes, as integers and as float64.
        @njit(nogil=True)
        def update_part(table: Any, at: int, s: int, lo: int, hi: int) -> float:
            base = at + s * WORD
            arrays, own = base + arrays_at * WORD, base + own_at * WORD
            return _update(table[s + update_at], (lo, hi, arrays, table[s + scalars_at], own))  # type: ignore[no-any-return]

        @njit(nogil=True)
        def update_chunk(table: Any, at: int, chunk: Any) -> float:
            s, lo, end = chunk[0] * words, chunk[1], chunk[2]
            if table[s + round_at] == 0:
                return update_part(table, at, s, lo, end)  # type: ignore[no-any-return]
            mode: Any = enter()  # type: ignore[call-arg]
            squares = 0.0
            while lo < end:
                hi = min(lo + BLOCK, end)
                squares += update_part(table, at, s, lo, hi)
                _round(table[s + round_at], (lo, hi, table[s + arrays_at + PARAMETER], table[s + copy_at]))
                lo = hi
            squares = settled(squares)
            leave(mode)
            return squares

        @njit(nogil=True)
        def chunk_squares(table: Any, chunk: Any, which: int) -> float:
            s = chunk[0] * words
            return _norm(table[s + norm_at + which], (chunk[1], chunk[2], table[s + arrays_at + which]))  # type: ignore[no-any-return]

        @njit(nogil=True)
        def trust_ratio(address: int, squares: Any, multiplier: float, scalars: int) -> float:
            mode: Any = enter()  # type: ignore[call-arg]
            w_norm, g_norm = math.sqrt(squares[PARAMETER]), abs(multiplier) * math.sqrt(squares[GRADIENT])
            ratio = settled(_ratio(address, (w_norm, g_norm, scalars)))
            leave(mode)
            return ratio

        @njit(nogil=True)
        def commit(counts: Any) -> None:
            half = len(counts) // 2
            counts[:half] = counts[half:]

        def build(parallel: bool) -> tuple[Any, Any, Any]:
            """Update, squares and layers; each is compiled when it is first needed."""

            @njit(parallel=parallel, nogil=True)
            def each_chunk(table: Any, at: int, chunks: Any, w_partials: Any) -> None:
                for i in prange(len(chunks)):
                    squares = update_chunk(table, at, chunks[i])
                    if len(w_partials):
                        w_partials[i] = squares

            @njit(parallel=parallel, nogil=True)
            def squares(table: Any, chunks: Any, which: int, partials: Any, only_adapting: bool) -> None:
                for i in prange(len(chunks)):
                    if not only_adapting or table[chunks[i, 0] * words + ratio_at] != 0:
                        partials[i] = chunk_squares(table, chunks[i], which)

            @njit(nogil=True)
            def update(table: Any, at: int, chunks: Any, counts: Any) -> None:
                each_chunk(table, at, chunks, np.empty(0))
                commit(counts)

            @njit(nogil=True)
            def layers(
                table: Any,
                at: int,
                own: Any,
                sums: Any,
                chunks: Any,
                waves: Any,
                partials: Any,
                flags: int,
                counts: Any,
            ) -> None:
                s = c = 0
                for w in range(len(waves)):
                    last, end = s + waves[w, 0], c + waves[w, 1]
                    for which, flag in ((PARAMETER, KNOW_W), (GRADIENT, KNOW_G)):
                        if not flags & flag:
                            squares(table, chunks[c:end], which, partials[which, c:end], True)
                            _sum_chunks(sums, chunks[c:end], partials[which, c:end], which)
                    for k in range(s, last):
                        ratio, h = table[k * words + ratio_at], table[k * words + scalars_at]
                        if ratio != 0:
                            own[k, RATIO] = trust_ratio(ratio, sums[k], own[k, MULTIPLIER], h)
                    each_chunk(table, at, chunks[c:end], partials[PARAMETER, c:end])
                    _sum_chunks(sums, chunks[c:end], partials[PARAMETER, c:end], PARAMETER)
                    s, c = last, end
                commit(counts)

            return update, squares, layers

        self._serial, self._parallel = build(False), build(True)

    def update(self, segments: Any, at: int, chunks: Any, counts: Any, threads: int) -> None:
        """Update every chunk, then commit the counts."""
        self._run(UPDATE, threads, _words(segments), at, chunks, counts)

    def squares(self, segments: Any, chunks: Any, partials: Any, which: int, threads: int) -> float:
        """Sum of squares of every segment, and the sum over all of them."""
        self._run(SQUARES, threads, _words(segments), chunks, which, partials, False)
        _sum_chunks(segments["squares"], chunks, partials, which)
        return _sum_lanes(segments["squares"][:, which])  # type: ignore[no-any-return]

    def layers(
        self, segments: Any, at: int, chunks: Any, waves: Any, partials: Any, flags: int, counts: Any, threads: int
    ) -> None:
        """Norms, trust ratios and update, wave after wave; then commit the counts."""
        table = _words(segments), at, segments["own"], segments["squares"]
        self._run(LAYERS, threads, *table, chunks, waves, partials, flags, counts)

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


@njit
def _sum_chunks(squares: Any, chunks: Any, partials: Any, which: int) -> None:
    start = 0
    while start < len(chunks):
        segment, end = chunks[start, 0], start
        while end < len(chunks) and chunks[end, 0] == segment:
            end += 1
        squares[segment, which] = _sum_lanes(partials[start:end])
        start = end


_lock = threading.Lock()
_forked = False


def _after_fork() -> None:
    global _forked, _lock
    _forked, _lock = True, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
