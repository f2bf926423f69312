"""The CUDA loop around an update rule: one block of threads per part of a chunk, a vector per thread at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .. import layout
from ..dtypes import COMPUTE, ITEMSIZE
from ..epilogues import KINDS, kinds_of
from ..layout import CHUNK, PARTS_BITS, WORD
from ..rules.rule import Rule
from .memory import scalars_at, segment_at
from .toolchain import THREADS, cuda, device_function

PARTS = 1 << PARTS_BITS


def update_loop(rule: Rule, p: str, g: str, access: Any, threads: int = THREADS) -> Callable[..., None]:
    """The kernel of ``rule`` over parameters stored as ``p`` and gradients stored as ``g``, to be compiled.

    What a loop needs is found just before it, from the tables, so that no loop keeps registers for the next one.
    """
    compute = COMPUTE[p]
    width = 16 // max(ITEMSIZE[dtype] for dtype in (p, g, *[compute] * len(rule.state)))  # elements of an access
    arrays = access.Arrays(rule, p, g)
    pointers_of, aligned = arrays.pointers_of(), arrays.aligned(width)
    clear, word, opaque, rounded = arrays.clear(1), access.word, access.opaque, access.rounded(compute)
    scalars_of, has_ratio = access.scalars_loader(rule, compute), rule.ratio is not None
    last = len(rule.Scalars._fields) - 1  # type: ignore[attr-defined]
    part_of = _part(access)
    take_vectors, take_elements = (_loop(arrays, access, count, threads) for count in (width, 1))
    follow = functools.reduce(_then, [_epilogue(k, p, access, threads) for k in kinds_of(p)])

    @device_function
    def arrays_of(chunks: Any, segments: Any, gradients: Any) -> Any:
        s, lo, hi = part_of(chunks)
        pointers = pointers_of(segment_at(segments, s), word(gradients, s))
        tail = lo  # where elements begin that are taken one by one
        if aligned(pointers):
            tail += (hi - lo) & -width
        return s, lo, tail, hi, pointers

    def update(chunks: Any, segments: Any, gradients: Any, numbers: Any, zero: Any) -> None:
        s, lo, tail, hi, pointers = arrays_of(chunks, segments, gradients)
        if hi <= lo:  # the chunk ends before this part of it
            return
        if word(numbers, layout.SKIP):
            i = lo + cuda.threadIdx.x
            while zero and i < hi:
                clear(pointers, i)
                i = opaque(i + threads)
            return
        segment = segment_at(segments, s)
        multiplier = rounded(numbers, layout.MULTIPLIER64)
        if word(segment, layout.SIGN) < 0:
            multiplier = -multiplier
        scalars = scalars_at(numbers, word(segment, layout.SCALAR_GROUP))
        ratio = segment + WORD * layout.FACTORS
        if has_ratio and word(segment, layout.ADAPTS) == 0:
            ratio = scalars + WORD * (last - 1)
        h = scalars_of(scalars, ratio)
        take_vectors(pointers, lo, tail, multiplier, h, zero)
        s, lo, tail, hi, pointers = arrays_of(chunks, segments, gradients)
        take_elements(pointers, tail, hi, multiplier, h, zero)
        follow(chunks, segments, numbers)

    return update


def _loop(arrays: Any, access: Any, count: int, threads: int) -> Any:
    """Device function ``(pointers, lo, hi, multiplier, h, zero)``: the rule over elements that a block of threads
    shares, each of which takes ``count`` at a time."""
    load, apply, store, clear = arrays.load(count), arrays.apply(count), arrays.store(count), arrays.clear(count)
    moved, opaque = arrays.moved(), access.opaque

    def take(pointers: Any, lo: Any, hi: Any, multiplier: Any, h: Any, zero: Any) -> None:
        first = lo + count * cuda.threadIdx.x
        pointers, left = moved(pointers, first), hi - first
        while left > 0:
            elements = load(pointers, 0, multiplier, h)
            if zero:
                clear(pointers, 0)
            store(pointers, 0, apply(elements))
            pointers = moved(pointers, count * threads)
            left = opaque(left - count * threads)

    return device_function(take)


def _part(access: Any) -> Any:
    """Device function ``(chunks) -> (segment, first element, one past the last)``: what a block of threads takes."""
    word, opaque = access.word, access.opaque

    def part_of(chunks: Any) -> tuple[Any, Any, Any]:
        block = opaque(cuda.blockIdx.x)
        chunk, part = block >> PARTS_BITS, block & (PARTS - 1)
        lo = word(chunks, 3 * chunk + 1) + part * (CHUNK // PARTS)
        return word(chunks, 3 * chunk), lo, min(word(chunks, 3 * chunk + 2), lo + CHUNK // PARTS)

    return device_function(part_of)


def _then(first: Any, second: Any) -> Any:
    def both(chunks: Any, segments: Any, numbers: Any) -> None:
        first(chunks, segments, numbers)
        second(chunks, segments, numbers)

    return device_function(both)


def _epilogue(kind: int, p: str, access: Any, threads: int) -> Any:
    """Device function ``(chunks, segments, numbers)``: an epilogue of what the block updated, where the segment has it.

    It is a loop of its own and reads all anew, addresses, too: the loop of the update keeps no register for it, and is
    the same with and without. What was just written comes from the caches. It takes elements one by one, since vectors
    would take more registers than some updates have: neighbouring threads take neighbouring elements all the same.
    """
    epilogue, target = KINDS[kind]
    compute = COMPUTE[p]
    arrays, part_of, word = access.Arrays(epilogue, target, p), _part(access), access.word
    take, unit = _loop(arrays, access, 1, threads), np.dtype(compute).type(1)
    scalars_of = access.scalars_loader(epilogue, compute)

    def follow(chunks: Any, segments: Any, numbers: Any) -> None:
        s, lo, hi = part_of(chunks)
        segment = segment_at(segments, s)
        if word(segment, layout.TARGETS + kind) == 0:
            return
        cuda.syncthreads()  # another thread of the block may have written what this one reads
        pointers = word(segment, layout.TARGETS + kind), word(segment, layout.PARAMETER)
        h = scalars_of(scalars_at(numbers, word(segment, layout.SCALAR_GROUP)) + WORD * layout.WEIGHT, 0)
        take(pointers, lo, hi, unit, h, 0)

    return device_function(follow)
