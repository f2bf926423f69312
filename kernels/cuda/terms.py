"""The sums of a rule's products, and the ratio of each parameter by them: a launch between prologue and update.

A block of threads takes a chunk, in the order of ``..reductions``; the block that completes a parameter adds up its
chunks and forms the ratio, which the update finds in its segment. Over processes that are two launches, as of the
prologue.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import layout
from ..dtypes import COMPUTE
from ..layout import DECIDE, LANES, SUM, SUMS, WORD
from ..rules.rule import Rule
from .memory import scalars_at, segment_at
from .sums import sums
from .toolchain import THREADS, cuda, device_function, types


def terms_loop(rule: Rule, p: str, g: str, access: Any) -> Callable[..., None]:
    """The kernel of ``rule`` for parameters stored as ``p`` and gradients stored as ``g``, to be compiled."""
    arrays = access.Arrays(rule, p, g)
    pointers_of, add_products = arrays.pointers_of(), arrays.add_products()
    word, real, put_real, rounded = access.word, access.real, access.put_real, access.rounded(COMPUTE[p])
    scalars_of, ratio_of = access.scalars_loader(rule, COMPUTE[p]), access.ratio_caller(rule)
    products, last_scalar = len(rule.products), len(rule.Scalars._fields) - 1  # type: ignore[attr-defined]
    zeros = (0.0,) * products
    factors, (lane_of, chunk_sum, sum_of, is_last) = device_function(rule.factors), sums(access)

    def kernel(
        chunks: Any,
        segments: Any,
        gradients: Any,
        numbers: Any,
        partials: Any,  # sums of each product by chunk
        act: Any,  # SUM, DECIDE, or 0 for both
        mine: Any,  # the chunks that are taken, or segments in DECIDE
    ) -> None:
        lanes = cuda.shared.array(THREADS, types.float64)
        last = cuda.shared.array(1, types.int64)
        thread = cuda.threadIdx.x
        if word(numbers, layout.SKIP):
            return
        chunk = s = word(mine, cuda.blockIdx.x)
        if act != DECIDE:
            s = word(chunks, 3 * chunk)
        segment = segment_at(segments, s)
        multiplier, multiplier64 = rounded(numbers, layout.MULTIPLIER64), real(numbers, layout.MULTIPLIER64)
        if word(segment, layout.SIGN) < 0:
            multiplier, multiplier64 = -multiplier, -multiplier64
        scalars = scalars_at(numbers, word(segment, layout.SCALAR_GROUP))
        if act != DECIDE:
            pointers = pointers_of(segment, word(gradients, s))
            h = scalars_of(scalars, scalars + WORD * (last_scalar - 1))
            (first, stop), totals = lane_of(chunks, chunk), zeros
            for i in range(first, stop, LANES):
                totals = add_products(totals, pointers, i, multiplier, h)
            for k in range(products):
                total = chunk_sum(lanes, totals[k])
                if thread == 0:
                    put_real(partials, SUMS * (chunk + word(segment, layout.SHIFT)) + k, total)
            if act == SUM:
                return
        count = word(segment, layout.CHUNKS)
        if act != DECIDE and not is_last(last, segment + WORD * layout.DONE, 1, count):
            return
        sums_at = partials + WORD * SUMS * word(segment, layout.FIRST_CHUNK)  # of all chunks in the end
        for k in range(products):
            total = sum_of(lanes, sums_at + WORD * k, SUMS, count)
            if thread == 0:
                put_real(sums_at, k, total)
        if thread == 0:
            stretch, ratio = factors(ratio_of(sums_at, multiplier64, scalars) * real(scalars, last_scalar))
            put_real(segment, layout.FACTORS, stretch)
            put_real(segment, layout.FACTORS + 1, ratio)

    return kernel
