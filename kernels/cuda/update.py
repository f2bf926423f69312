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
    """The kernel of ``rule`` over parameters stored as ``p`` and gradients stored as ``g``, to be compiled."""
    compute = COMPUTE[p]
    width = VECTOR[compute]
    stride = width * threads
    arrays = access.Arrays(rule, p, g)
    pointers_of, aligned = arrays.pointers_of(), arrays.aligned(width)
    load, load_one = arrays.load(width), arrays.load(1)
    store, store_one = arrays.store(width), arrays.store(1)
    clear, clear_one = arrays.clear(width), arrays.clear(1)
    word, scalars_of = access.word, access.scalars_loader(rule, compute)
    number = access.single if compute == "float32" else access.real
    number_size = 4 if compute == "float32" else 8
    multiplier_at = MULTIPLIER32 if compute == "float32" else MULTIPLIER64
    apply = arrays.apply()
    has_ratio, last = rule.ratio is not None, len(rule.Scalars._fields) - 1  # type: ignore[attr-defined]
    part_of = _part(access)
    follow = functools.reduce(_then, [_epilogue(k, p, access, threads) for k in kinds_of(p)])

    def update(chunks: Any, segments: Any, gradients: Any, header: Any, scalars: Any, ratios: Any, zero: Any) -> None:
        s, lo, hi = part_of(chunks)
        if hi <= lo:  # the chunk ends before this part of it
            return
        segment = segments + WORD * SEGMENT_WORDS * s
        pointers = pointers_of(segment, word(gradients, s))
        i = lo + width * cuda.threadIdx.x
        one = lo + cuda.threadIdx.x  # where elements are taken one by one: all of them, or those of the tail
        if aligned(pointers):
            one += (hi - lo) & -width
        else:
            i = hi
        if word(header, SKIP):
            if zero:
                while i + width <= hi:
                    clear(pointers, i)
                    i += stride
                while one < hi:
                    clear_one(pointers, one)
                    one += threads
            return
        multiplier = number(header, multiplier_at)
        if word(segment, SIGN) < 0:
            multiplier = -multiplier
        own = scalars + number_size * SCALARS * word(segment, SCALAR_GROUP)
        ratio = ratios + 2 * number_size * s
        if has_ratio and word(segment, ADAPTS) == 0:
            ratio = own + number_size * (last - 1)
        h = scalars_of(own, ratio)
        while i + stride + width <= hi:
            first, second = load(pointers, i, multiplier, h), load(pointers, i + stride, multiplier, h)
            store(pointers, i, apply(first))
            store(pointers, i + stride, apply(second))
            if zero:
                clear(pointers, i)
                clear(pointers, i + stride)
            i += 2 * stride
        if i + width <= hi:
            store(pointers, i, apply(load(pointers, i, multiplier, h)))
            if zero:
                clear(pointers, i)
        while one < hi:
            store_one(pointers, one, apply(load_one(pointers, one, multiplier, h)))
            if zero:
                clear_one(pointers, one)
            one += threads
        follow(chunks, segments, scalars)

    return update


def _part(access: Any) -> Any:
    """Device function ``(chunks) -> (segment, first element, one past the last)``: what a block of threads takes."""
    word = access.word

    def part_of(chunks: Any) -> tuple[Any, Any, Any]:
        chunk, part = cuda.blockIdx.x >> PARTS_BITS, cuda.blockIdx.x & (PARTS - 1)
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
    arrays, part_of, word = access.Arrays(epilogue, target, p), _part(access), access.word
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
        for i in range(lo + cuda.threadIdx.x, hi, threads):
            store(pointers, i, apply(load(pointers, i, unit, h)))

    return cuda.jit(device=True, inline="always")(follow)
