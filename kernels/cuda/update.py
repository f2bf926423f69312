"""The CUDA loop around an update rule: one block of threads per part of a chunk, four elements per thread at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from ..dtypes import COMPUTE
from ..epilogues import KINDS, kinds_of
from ..layout import (
    ADAPTS,
    CHUNK,
    MULTIPLIER32,
    MULTIPLIER64,
    PARAMETER,
    PARTS_BITS,
    SCALAR_GROUP,
    SCALARS,
    SEGMENT_WORDS,
    SIGN,
    SKIP,
    TARGETS,
    WEIGHT,
    WORD,
)
from ..rules.rule import Rule
from .toolchain import THREADS, cuda

PARTS = 1 << PARTS_BITS

VECTOR = {"float32": 4, "float64": 2}
"""Elements per access by compute dtype: 16 bytes of a state, 8 or 16 of a parameter or gradient."""


def update_loop(rule: Rule, p: str, g: str, access: Any, threads: int = THREADS) -> Callable[..., None]:
    """The kernel of ``rule`` over parameters stored as ``p`` and gradients stored as ``g``, to be compiled.

    What a loop needs is found just before it, from the tables, so that no loop keeps registers for the next one.
    """
    compute = COMPUTE[p]
    width = VECTOR[compute]
    stride = width * threads
    arrays = access.Arrays(rule, p, g)
    pointers_of, aligned, moved = arrays.pointers_of(), arrays.aligned(width), arrays.moved()
    load, load_one = arrays.load(width), arrays.load(1)
    store, store_one = arrays.store(width), arrays.store(1)
    clear, clear_one = arrays.clear(width), arrays.clear(1)
    word, scalars_of, opaque = access.word, access.scalars_loader(rule, compute), access.opaque
    number = access.single if compute == "float32" else access.real
    number_size = 4 if compute == "float32" else 8
    multiplier_at = MULTIPLIER32 if compute == "float32" else MULTIPLIER64
    apply = arrays.apply()
    has_ratio, last = rule.ratio is not None, len(rule.Scalars._fields) - 1  # type: ignore[attr-defined]
    part_of = _part(access)
    follow = functools.reduce(_then, [_epilogue(k, p, access, threads) for k in kinds_of(p)])

    def arrays_of(chunks: Any, segments: Any, gradients: Any) -> Any:
        s, lo, hi = part_of(chunks)
        pointers = pointers_of(segments + WORD * SEGMENT_WORDS * s, word(gradients, s))
        tail = lo  # where elements begin that are taken one by one
        if aligned(pointers):
            tail += (hi - lo) & -width
        return s, lo, tail, hi, pointers

    arrays_of = cuda.jit(device=True, inline="always")(arrays_of)

    def update(chunks: Any, segments: Any, gradients: Any, header: Any, scalars: Any, ratios: Any, zero: Any) -> None:
        s, lo, tail, hi, pointers = arrays_of(chunks, segments, gradients)
        if hi <= lo:  # the chunk ends before this part of it
            return
        if word(header, SKIP):
            i = lo + cuda.threadIdx.x
            while zero and i < hi:
                clear_one(pointers, i)
                i = opaque(i + threads)
            return
        segment = segments + WORD * SEGMENT_WORDS * s
        multiplier = number(header, multiplier_at)
        if word(segment, SIGN) < 0:
            multiplier = -multiplier
        own = scalars + number_size * SCALARS * word(segment, SCALAR_GROUP)
        ratio = ratios + 2 * number_size * s
        if has_ratio and word(segment, ADAPTS) == 0:
            ratio = own + number_size * (last - 1)
        h = scalars_of(own, ratio)
        left = tail - lo - width * cuda.threadIdx.x
        pointers = moved(pointers, lo + width * cuda.threadIdx.x)
        while left > stride:
            first, second = load(pointers, 0, multiplier, h), load(pointers, stride, multiplier, h)
            store(pointers, 0, apply(first))
            store(pointers, stride, apply(second))
            if zero:
                clear(pointers, 0)
                clear(pointers, stride)
            pointers = moved(pointers, 2 * stride)
            left = opaque(left - 2 * stride)
        if left > 0:
            store(pointers, 0, apply(load(pointers, 0, multiplier, h)))
            if zero:
                clear(pointers, 0)
        s, lo, tail, hi, pointers = arrays_of(chunks, segments, gradients)
        i = tail + cuda.threadIdx.x
        while i < hi:
            store_one(pointers, i, apply(load_one(pointers, i, multiplier, h)))
            if zero:
                clear_one(pointers, i)
            i = opaque(i + threads)
        follow(chunks, segments, scalars)

    return update


def _part(access: Any) -> Any:
    """Device function ``(chunks) -> (segment, first element, one past the last)``: what a block of threads takes."""
    word, opaque = access.word, access.opaque

    def part_of(chunks: Any) -> tuple[Any, Any, Any]:
        block = opaque(cuda.blockIdx.x)
        chunk, part = block >> PARTS_BITS, block & (PARTS - 1)
        lo = word(chunks, 3 * chunk + 1) + part * (CHUNK // PARTS)
        return word(chunks, 3 * chunk), lo, min(word(chunks, 3 * chunk + 2), lo + CHUNK // PARTS)

    return cuda.jit(device=True, inline="always")(part_of)


def _then(first: Any, second: Any) -> Any:
    def both(chunks: Any, segments: Any, scalars: Any) -> None:
        first(chunks, segments, scalars)
        second(chunks, segments, scalars)

    return cuda.jit(device=True, inline="always")(both)


def _epilogue(kind: int, p: str, access: Any, threads: int) -> Any:
    """Device function ``(chunks, segments, scalars)``: an epilogue of what the block updated, where the segment has it.

    It is a loop of its own and reads all anew, addresses, too: the loop of the update keeps no register for it, and is
    the same with and without. What was just written comes from the caches. It takes elements one by one, since vectors
    would take more registers than some updates have: neighbouring threads take neighbouring elements all the same.
    """
    epilogue, target = KINDS[kind]
    compute = COMPUTE[p]
    arrays, part_of, word, opaque = access.Arrays(epilogue, target, p), _part(access), access.word, access.opaque
    load, apply, store, unit = arrays.load(1), arrays.apply(), arrays.store(1), np.dtype(compute).type(1)
    scalars_of, number_size = access.scalars_loader(epilogue, compute), 4 if compute == "float32" else 8

    def follow(chunks: Any, segments: Any, scalars: Any) -> None:
        s, lo, hi = part_of(chunks)
        segment = segments + WORD * SEGMENT_WORDS * s
        if word(segment, TARGETS + kind) == 0:
            return
        cuda.syncthreads()  # another thread of the block may have written what this one reads
        pointers = word(segment, TARGETS + kind), word(segment, PARAMETER)
        h = scalars_of(scalars + number_size * (SCALARS * word(segment, SCALAR_GROUP) + WEIGHT), 0)
        i = lo + cuda.threadIdx.x
        while i < hi:
            store(pointers, i, apply(load(pointers, i, unit, h)))
            i = opaque(i + threads)

    return cuda.jit(device=True, inline="always")(follow)
