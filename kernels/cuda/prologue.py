"""What has to be known before the update: the norm of the gradients, and from it skip and clipping; scalars.

Each block of threads sums the squares of one chunk in the order of ``..reductions``. The block that completes an array
adds up the array's chunks, and the block that completes the last array does the rest alone: nothing of it ever visits
the host. Where the device keeps the step counts, that block also forms the scalars of the step, because only it knows
whether the step is taken.

Where parameters are spread over processes, one launch takes the sums of chunks (``SUM``). After those of all processes
were brought together, another one, with a block for each array, does the rest (``DECIDE``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from .. import layout
from ..dtypes import CODES, COMPUTE
from ..epilogues import average_weight
from ..layout import DECIDE, LANES, SUM, SUMS, WORD
from ..rules.rule import Rule
from .memory import scalars_at, segment_at
from .sums import sums
from .toolchain import THREADS, cuda, device_function, types

ROWS_AT_ONCE = 16  # independent loads in flight


def prologue(rule: Rule, access: Any) -> Callable[..., None]:
    """The prologue kernel for scalar groups of ``rule``, to be compiled; its norm serves any rule."""
    word, put_word, real, put_real = access.word, access.put_word, access.real, access.put_real
    single, form_scalars, weight_of = access.single, access.scalars_former(rule), device_function(average_weight)
    lane_sums = [_lane_sum(access.add_rows(d, ROWS_AT_ONCE), access.add_rows(d, 1)) for d in COMPUTE]
    float32_sum, float64_sum, float16_sum, bfloat16_sum = lane_sums
    float32_code, float64_code, float16_code = (CODES[d] for d in ("float32", "float64", "float16"))
    lane_of, chunk_sum, sum_of, is_last = sums(access)
    before_lr = itertools.takewhile(lambda name: name != "lr", rule.counts)
    has_lr, lr_at = "lr" in rule.counts, sum(rule.counts[name] for name in before_lr)

    def kernel(
        chunks: Any,
        segments: Any,
        gradients: Any,
        numbers: Any,  # the header, then those of the scalar groups
        partials: Any,  # sums by chunk
        scalar_groups: Any,
        segment_count: Any,
        scalar_group_count: Any,
        act: Any,  # SUM, DECIDE, or 0 for both
        chunk_count: Any,  # all, or segments in DECIDE; 0 where no sums are asked for
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
        if chunk_count > 0:
            chunk = s = cuda.blockIdx.x
            if act != DECIDE:
                s = word(chunks, 3 * chunk)
            segment = segment_at(segments, s)
            if act != DECIDE:
                x, (i, stop), code = word(gradients, s), lane_of(chunks, chunk), word(segment, layout.G_CODE)
                if code == float32_code:
                    total = float32_sum(x, i, stop)
                elif code == float64_code:
                    total = float64_sum(x, i, stop)
                elif code == float16_code:
                    total = float16_sum(x, i, stop)
                else:
                    total = bfloat16_sum(x, i, stop)
                total = chunk_sum(lanes, total)
                if thread == 0:
                    put_real(partials, SUMS * (chunk + word(segment, layout.SHIFT)), total)
                if act == SUM:
                    return
            count = word(segment, layout.CHUNKS)
            if act != DECIDE and not is_last(last, segment + WORD * layout.DONE, 1, count):
                return
            total = sum_of(lanes, partials + WORD * SUMS * word(segment, layout.FIRST_CHUNK), SUMS, count)
            if thread == 0:
                put_real(segment, layout.SQUARES, total)
            if not is_last(last, numbers + WORD * layout.ALL_DONE, 1 if act == DECIDE else count, chunk_count):
                return

        if decide:
            total = sum_of(lanes, segments + WORD * layout.SQUARES, layout.SEGMENT_WORDS, segment_count)
            if thread == 0:
                if scale != 0:
                    multiplier = 1.0 / single(scale, 0)
                norm = math.sqrt(total) * multiplier
                skip = check != 0 and not math.isfinite(norm)
                if max_norm < math.inf:
                    coefficient = max_norm / (norm + 1e-6)
                    if not coefficient > 1.0:  # NaN stays
                        multiplier *= coefficient
                put_real(numbers, layout.MULTIPLIER64, multiplier)
                put_word(numbers, layout.SKIP, skip)
                if result != 0:
                    put_real(result, 0, norm)
                    put_real(result, 1, skip)
        cuda.syncthreads()
        if form == 0 or word(numbers, layout.SKIP):
            return
        for c in range(thread, scalar_group_count, THREADS):
            scalar_group = scalar_groups + WORD * layout.SCALAR_GROUP_WORDS * c
            if word(scalar_group, layout.RULE) == number:
                t = word(scalar_group, layout.STEPS) + 1
                put_word(scalar_group, layout.STEPS, t)
                scalars = scalars_at(numbers, c)
                options = scalars + WORD * layout.SCALARS
                lr = word(scalar_group, layout.LR)
                if has_lr and lr != 0:
                    put_real(options, lr_at, real(lr, 0) if word(scalar_group, layout.LR_BYTES) == 8 else single(lr, 0))
                form_scalars(t, scalar_group, options, scalars)
                n = word(scalar_group, layout.AVERAGED)
                put_word(scalar_group, layout.AVERAGED, n + 1)
                weight = weight_of(float(n), real(options, layout.DECAY), real(options, layout.WARMUP))
                put_real(scalars, layout.WEIGHT, weight)

    return kernel


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

    return device_function(lane_sum)
