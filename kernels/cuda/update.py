"""The CUDA loop around an update rule: one block of threads per part of a chunk, four elements per thread at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..dtypes import COMPUTE
from ..layout import (
    ADAPTS,
    CHUNK,
    COHORT,
    MULTIPLIER32,
    MULTIPLIER64,
    PARTS_BITS,
    SCALARS,
    SEGMENT_WORDS,
    SIGN,
    SKIP,
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

    def update(chunks: Any, segments: Any, gradients: Any, header: Any, scalars: Any, ratios: Any, zero: Any) -> None:
        chunk, part = cuda.blockIdx.x >> PARTS_BITS, cuda.blockIdx.x & (PARTS - 1)
        s = word(chunks, 3 * chunk)
        lo = word(chunks, 3 * chunk + 1) + part * (CHUNK // PARTS)
        hi = min(word(chunks, 3 * chunk + 2), lo + CHUNK // PARTS)
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
        scalars += number_size * SCALARS * word(segment, COHORT)
        ratio = ratios + 2 * number_size * s
        if has_ratio and word(segment, ADAPTS) == 0:
            ratio = scalars + number_size * (last - 1)
        h = scalars_of(scalars, ratio)
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

    return update
