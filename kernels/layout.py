"""The bytes that API, schedulers and launch.c share: a segment, and the flags of a launch."""

from __future__ import annotations

import numpy as np

CHUNK = 16_384
"""Elements per chunk. The sums of squares are defined by it (reductions.py): changing it changes bits."""

LANES, ROWS = 32, 64
BLOCK = LANES * ROWS
"""A block of elements whose squares are summed together (reductions.py)."""

SEGMENT = np.dtype(
    [
        ("update", np.uint64),
        ("norm", np.uint64, 2),
        ("ratio", np.uint64),
        ("scalars", np.uint64),
        ("round", np.uint64),
        ("copy", np.uint64),
        ("arrays", np.uint64, 8),
        ("own", np.float64, 3),
        ("squares", np.float64, 2),
    ]
)
"""A run of elements that share kernel and scalars: the same bytes as ``segment`` in launch.c. "copy" is the address
of a 16-bit copy of the parameters, and "round" the kernel that writes it; both are 0 where there is none."""

PARAMETER, GRADIENT = 0, 1
"""Places in "norm" and "squares", and the first two in "arrays"; states follow."""

MULTIPLIER, RATIO, ZERO = 0, 1, 2
"""Places in "own": gradient multiplier, trust ratio, whether to zero the gradient."""

KNOW_W, KNOW_G = 1, 2
"""Flags: the squares of the parameters, or of the gradients, are known already."""


def layout_of_library() -> list[int]:
    """What ``fastopt_layout`` in launch.c must say of all this; the first number is how many there are."""
    assert SEGMENT.fields is not None
    chunk = wave = 3 * WORD
    numbers = [
        *(SEGMENT.itemsize, chunk, wave),
        *(field[1] for field in SEGMENT.fields.values()),
        *(0, WORD, 2 * WORD),  # segment, first element and end of a chunk
        *(PARAMETER, GRADIENT, MULTIPLIER, RATIO, ZERO, KNOW_W, KNOW_G, LANES, BLOCK),
    ]
    return [len(numbers) + 1, *numbers]


# --- on a GPU: tables of 64-bit words --------------------------------------------------------------------------------

COHORT, SIGN, ADAPTS, P_CODE, G_CODE, FIRST_CHUNK, CHUNKS, COPY, COPY_CODE = range(8, 17)
SEGMENT_WORDS = 17
"""A segment there: its addresses as in "arrays" (that of the gradient is in a list of its own), then these words. COPY
is as "copy" above, COPY_CODE the number of its dtype."""

STEPS, RULE, LR, LR_BYTES, CARRY = range(5)
COHORT_WORDS = 8
"""A cohort: steps taken, number of its rule, address and itemsize of an lr that lives on the device (or 0), the numbers
that the rule carries."""

OPTIONS = 24
"""Numbers that a cohort has room for in the table of options."""

SCALARS = 16
"""Numbers that a cohort has room for in the table of scalars, which exists in float64 and in float32."""

MULTIPLIER64, MULTIPLIER32, SKIP = 0, 2, 2
HEADER_WORDS = 4
"""What all blocks read first: the gradient multiplier in float64 and in float32 (places counted in their own type), and
whether the step is skipped (counted in words)."""

PARTS_BITS = 2
"""A chunk is shared by 2^PARTS_BITS blocks of threads in the update."""

WORD = 8
"""Bytes of a word."""

THREADS = 256
"""Threads per block of every kernel; the prologue's order of addition is laid out for it."""
