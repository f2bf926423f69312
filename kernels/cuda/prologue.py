"""What has to be known before the update, found in one launch: norms, and from them skip, clipping and trust ratios.

Each block of threads sums the squares of one chunk in the order of ``..reductions``. The block that completes an array
adds up the array's chunks, and the block that completes the last array does the rest alone: nothing of it ever visits
the host. Where the device keeps the step counts, that block also forms the scalars of the step, because only it knows
whether the step is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..dtypes import CODES, COMPUTE
from ..epilogues import average_weight
from ..layout import (
    ADAPTS,
    AVERAGED,
    BLOCK,
    CHUNKS,
    DECAY,
    FIRST_CHUNK,
    G_CODE,
    LANES,
    LR,
    LR_BYTES,
    MULTIPLIER32,
    MULTIPLIER64,
    OPTIONS,
    P_CODE,
    PARAMETER,
    RULE,
    SCALAR_GROUP,
    SCALAR_GROUP_WORDS,
    SCALARS,
    SEGMENT_WORDS,
    SKIP,
    STEPS,
    WARMUP,
    WEIGHT,
    WORD,
)
from ..rules.rule import Rule
from .toolchain import THREADS, cuda, types

ROWS_AT_ONCE = 16  # independent loads in flight


def prologue(rule: Rule, access: Any) -> Callable[..., None]:
    """The prologue kernel for scalar groups of ``rule``, to be compiled; its norms serve any rule."""
    word, put_word, real, put_real = access.word, access.put_word, access.real, access.put_real
    fresh_real, count_up = access.fresh_real, access.count_up
    single, put_single = access.single, access.put_single
    sums = [_lane_sum(access.add_rows(d, ROWS_AT_ONCE), access.add_rows(d, 1)) for d in COMPUTE]
    float32_sum, float64_sum, float16_sum, bfloat16_sum = sums
    float32_code, float64_code, float16_code = (CODES[d] for d in ("float32", "float64", "float16"))
    sum_lanes = cuda.jit(device=True, inline="always")(add_lanes)
    form_scalars, trust_ratio = access.scalars_former(rule), access.ratio_caller(rule)
    has_ratio, last_scalar = rule.ratio is not None and not rule.sources, len(rule.Scalars._fields) - 1  # type: ignore[attr-defined]
    factors = cuda.jit(device=True, inline="always")(rule.factors)
    weight_of = cuda.jit(device=True, inline="always")(average_weight)
    lr_at = -1 if "lr" not in rule.counts else sum(_before(rule.counts, "lr"))

    def kernel(
        chunks: Any,
        segments: Any,
        gradients: Any,
        tasks: Any,  # pairs of 0 or 1 (parameter or gradient) and a chunk
        job_count: Any,
        arrays: Any,  # how many sums of squares there are to complete
        chunk_count: Any,
        segment_count: Any,
        scalar_group_count: Any,
        partials: Any,  # sums of squares by chunk: of all parameters, then of all gradients
        squares: Any,  # by segment, likewise
        counters: Any,  # blocks that are done by segment, likewise, and arrays that are done
        header: Any,
        scalars64: Any,
        scalars32: Any,
        ratios64: Any,
        ratios32: Any,
        scalar_groups: Any,
        options: Any,
        number: Any,  # of this kernel's rule
        multiplier: Any,
        scale: Any,  # address of a float32 loss scale on the device, or 0
        max_norm: Any,  # inf: no clipping
        check: Any,  # whether a step whose gradients are not finite is skipped
        form: Any,  # whether the device keeps the step counts, and so forms the scalars
        decide: Any,  # whether this launch writes the header, or finds it written
        result: Any,  # where the norm goes, and whether the step is skipped; or 0
    ) -> None:
        lanes = cuda.shared.array(THREADS, types.float64)
        last = cuda.shared.array(1, types.int64)
        thread = cuda.threadIdx.x
        if job_count > 0:
            which, chunk = word(tasks, 2 * cuda.blockIdx.x), word(tasks, 2 * cuda.blockIdx.x + 1)
            s = word(chunks, 3 * chunk)
            segment = segments + WORD * SEGMENT_WORDS * s
            x, code = word(gradients, s), word(segment, G_CODE)
            if which == PARAMETER:
                x, code = word(segment, PARAMETER), word(segment, P_CODE)
            # A group of 32 threads takes a block of reductions.py, a thread one of its lanes.
            block = word(chunks, 3 * chunk + 1) + thread // LANES * BLOCK
            stop = min(word(chunks, 3 * chunk + 2), block + BLOCK)
            if code == float32_code:
                lanes[thread] = float32_sum(x, block + thread % LANES, stop)
            elif code == float64_code:
                lanes[thread] = float64_sum(x, block + thread % LANES, stop)
            elif code == float16_code:
                lanes[thread] = float16_sum(x, block + thread % LANES, stop)
            else:
                lanes[thread] = bfloat16_sum(x, block + thread % LANES, stop)
            sum_lanes(lanes, thread)
            partials += WORD * chunk_count * which
            place = segment_count * which + s
            if thread == 0:
                total = 0.0
                for k in range(0, THREADS, LANES):
                    total += lanes[k]
                put_real(partials, chunk, total)
                cuda.threadfence()
                complete = count_up(counters, place) + 1 == word(segment, CHUNKS)
                if complete:
                    cuda.threadfence()  # what the other blocks wrote before they counted is read after it
                last[0] = complete
            cuda.syncthreads()
            if last[0] == 0:
                return
            first, count = word(segment, FIRST_CHUNK), word(segment, CHUNKS)
            lanes[thread] = 0.0
            if thread < LANES:
                total = 0.0
                for k in range(thread, count, LANES):
                    total += fresh_real(partials, first + k)
                lanes[thread] = total
            sum_lanes(lanes, thread)
            if thread == 0:
                put_real(squares, place, lanes[0])
                put_word(counters, place, 0)
                cuda.threadfence()
                complete = count_up(counters, 2 * segment_count) + 1 == arrays
                if complete:
                    cuda.threadfence()
                last[0] = complete
            cuda.syncthreads()
            if last[0] == 0:
                return
            if thread == 0:
                put_word(counters, 2 * segment_count, 0)

        if decide:
            lanes[thread] = 0.0
            if thread < LANES:
                total = 0.0
                for s in range(thread, segment_count, LANES):
                    total += fresh_real(squares, segment_count + s)
                lanes[thread] = total
            sum_lanes(lanes, thread)
            if thread == 0:
                if scale != 0:
                    multiplier = 1.0 / single(scale, 0)
                norm = math.sqrt(lanes[0]) * multiplier
                skip = check != 0 and not math.isfinite(norm)
                if max_norm < math.inf:
                    coefficient = max_norm / (norm + 1e-6)
                    if not coefficient > 1.0:  # NaN stays
                        multiplier *= coefficient
                put_real(header, MULTIPLIER64, multiplier)
                put_single(header, MULTIPLIER32, multiplier)
                put_word(header, SKIP, skip)
                if result != 0:
                    put_real(result, 0, norm)
                    put_real(result, 1, skip)
        cuda.syncthreads()
        if word(header, SKIP):
            return
        if form:
            for c in range(thread, scalar_group_count, THREADS):
                scalar_group = scalar_groups + WORD * SCALAR_GROUP_WORDS * c
                if word(scalar_group, RULE) == number:
                    t = word(scalar_group, STEPS) + 1
                    put_word(scalar_group, STEPS, t)
                    row = options + 8 * OPTIONS * c
                    if lr_at >= 0 and word(scalar_group, LR) != 0:
                        lr = (
                            real(word(scalar_group, LR), 0)
                            if word(scalar_group, LR_BYTES) == 8
                            else single(word(scalar_group, LR), 0)
                        )
                        put_real(row, lr_at, lr)
                    own64, own32 = scalars64 + 8 * SCALARS * c, scalars32 + 4 * SCALARS * c
                    form_scalars(t, scalar_group, row, own64, own32)
                    n = word(scalar_group, AVERAGED)
                    put_word(scalar_group, AVERAGED, n + 1)
                    weight = weight_of(float(n), real(row, DECAY), real(row, WARMUP))
                    put_real(own64, WEIGHT, weight)
                    put_single(own32, WEIGHT, weight)
            cuda.syncthreads()
        if has_ratio:
            multiplier = real(header, MULTIPLIER64)
            for s in range(thread, segment_count, THREADS):
                segment = segments + WORD * SEGMENT_WORDS * s
                c = word(segment, SCALAR_GROUP)
                if word(segment, ADAPTS) and word(scalar_groups + WORD * SCALAR_GROUP_WORDS * c, RULE) == number:
                    w, g = fresh_real(squares, s), fresh_real(squares, segment_count + s)
                    own = scalars64 + 8 * SCALARS * c
                    stretch, ratio = factors(trust_ratio((w, g), multiplier, own) * real(own, last_scalar))
                    put_real(ratios64, 2 * s, stretch)
                    put_real(ratios64, 2 * s + 1, ratio)
                    put_single(ratios32, 2 * s, stretch)
                    put_single(ratios32, 2 * s + 1, ratio)

    return kernel


def _before(options: Any, name: str) -> list[int]:
    names = list(options)
    return [options[other] for other in names[: names.index(name)]]


def _lane_sum(add_rows: Any, add_row: Any) -> Any:
    """Sum of the squares of elements i, i + 32, i + 64, ... below ``stop``, which is at most a block away."""

    def lane_sum(x: Any, i: Any, stop: Any) -> float:
        total = 0.0
        while i + (ROWS_AT_ONCE - 1) * LANES < stop:
            total = add_rows(total, x, i)
            i += ROWS_AT_ONCE * LANES
        while i < stop:
            total = add_row(total, x, i)
            i += LANES
        return total

    return cuda.jit(device=True, inline="always")(lane_sum)


def add_lanes(lanes: Any, thread: Any) -> None:
    """Add up each group of 32 lanes pairwise, into the first of them."""
    width = LANES // 2
    while width > 0:
        cuda.syncthreads()
        if thread % LANES < width:
            lanes[thread] += lanes[thread + width]
        width //= 2
    cuda.syncthreads()
