"""The sums of a rule's terms, and the ratio of each parameter by them: one launch between the prologue and the update.

A block of threads takes a chunk, in the order of ``..reductions``; the block that completes a parameter adds up its
chunks and forms the ratio, which the update finds in device memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..dtypes import COMPUTE
from ..layout import (
    BLOCK,
    CHUNKS,
    FIRST_CHUNK,
    LANES,
    MULTIPLIER32,
    MULTIPLIER64,
    SCALAR_GROUP,
    SCALARS,
    SEGMENT_WORDS,
    SIGN,
    SKIP,
    SUMS,
    WORD,
)
from ..rules.rule import Rule
from .prologue import add_lanes
from .toolchain import THREADS, cuda, types


def terms_loop(rule: Rule, p: str, g: str, access: Any) -> Callable[..., None]:
    """The kernel of ``rule`` for parameters stored as ``p`` and gradients stored as ``g``, to be compiled."""
    compute = COMPUTE[p]
    arrays = access.Arrays(rule, p, g)
    pointers_of, load, stored, terms = arrays.pointers_of(), arrays.load(1), arrays.stored(), arrays.terms()
    add_products, no_sums = arrays.add_products(), arrays.no_sums()
    word, put_word, real, put_real = access.word, access.put_word, access.real, access.put_real
    fresh_real, count_up, put_single = access.fresh_real, access.count_up, access.put_single
    scalars_of, trust_ratio = access.scalars_loader(rule, compute), access.ratio_caller(rule)
    wide = compute == "float64"
    number, size = (access.real, 8) if wide else (access.single, 4)
    multiplier_at = MULTIPLIER64 if wide else MULTIPLIER32
    last_scalar, products = len(rule.Scalars._fields) - 1, len(rule.products)  # type: ignore[attr-defined]
    factors = cuda.jit(device=True, inline="always")(rule.factors)
    sum_lanes = cuda.jit(device=True, inline="always")(add_lanes)

    def kernel(
        chunks: Any,
        segments: Any,
        gradients: Any,
        mine: Any,  # the chunks that are taken
        chunk_count: Any,
        partials: Any,  # sums by chunk, a row for each product
        counters: Any,  # blocks that are done, by segment
        header: Any,
        scalars: Any,  # in the compute dtype
        scalars64: Any,
        ratios64: Any,
        ratios32: Any,
    ) -> None:
        lanes = cuda.shared.array(THREADS, types.float64)
        sums = cuda.shared.array(SUMS, types.float64)
        last = cuda.shared.array(1, types.int64)
        thread = cuda.threadIdx.x
        if word(header, SKIP):
            return
        chunk = word(mine, cuda.blockIdx.x)
        s = word(chunks, 3 * chunk)
        segment = segments + WORD * SEGMENT_WORDS * s
        pointers = pointers_of(segment, word(gradients, s))
        multiplier, multiplier64 = number(header, multiplier_at), real(header, MULTIPLIER64)
        if word(segment, SIGN) < 0:
            multiplier, multiplier64 = -multiplier, -multiplier64
        own = scalars + size * SCALARS * word(segment, SCALAR_GROUP)
        h = scalars_of(own, own + size * (last_scalar - 1))
        # A group of 32 threads takes a block of reductions.py, a thread one of its lanes.
        block = word(chunks, 3 * chunk + 1) + thread // LANES * BLOCK
        stop = min(word(chunks, 3 * chunk + 2), block + BLOCK)
        totals = no_sums()
        for i in range(block + thread % LANES, stop, LANES):
            (element,) = load(pointers, i, multiplier, h)
            totals = add_products(totals, stored(pointers, i), terms(element))
        for k in range(products):
            lanes[thread] = totals[k]
            sum_lanes(lanes, thread)
            if thread == 0:
                total = 0.0
                for j in range(0, THREADS, LANES):
                    total += lanes[j]
                put_real(partials, chunk_count * k + chunk, total)
            cuda.syncthreads()
        if thread == 0:
            cuda.threadfence()
            complete = count_up(counters, s) + 1 == word(segment, CHUNKS)
            if complete:
                cuda.threadfence()  # what the other blocks wrote before they counted is read after it
            last[0] = complete
        cuda.syncthreads()
        if last[0] == 0:
            return
        first, count = word(segment, FIRST_CHUNK), word(segment, CHUNKS)
        for k in range(products):
            lanes[thread] = 0.0
            if thread < LANES:
                total = 0.0
                for j in range(thread, count, LANES):
                    total += fresh_real(partials, chunk_count * k + first + j)
                lanes[thread] = total
            sum_lanes(lanes, thread)
            if thread == 0:
                sums[k] = lanes[0]
            cuda.syncthreads()
        if thread == 0:
            put_word(counters, s, 0)
            own = scalars64 + 8 * SCALARS * word(segment, SCALAR_GROUP)
            of_products = sums[0], sums[1], sums[2], sums[3]
            stretch, ratio = factors(trust_ratio(of_products, multiplier64, own) * real(own, last_scalar))
            put_real(ratios64, 2 * s, stretch)
            put_real(ratios64, 2 * s + 1, ratio)
            put_single(ratios32, 2 * s, stretch)
            put_single(ratios32, 2 * s + 1, ratio)

    return kernel
