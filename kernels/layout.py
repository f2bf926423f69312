"""The bytes that API, schedulers and parallel.c share: a segment, and the flags of a launch."""

from __future__ import annotations

import numpy as np

CHUNK = 16_384
"""Elements per chunk. The sums of squares are defined by it (reductions.py): changing it changes bits."""

SEGMENT = np.dtype(
    [
        ("update", np.uint64),
        ("norm", np.uint64, 2),
        ("ratio", np.uint64),
        ("scalars", np.uint64),
        ("arrays", np.uint64, 8),
        ("own", np.float64, 3),
        ("squares", np.float64, 2),
    ]
)
"""A run of elements that share kernel and scalars: the same bytes as ``segment`` in parallel.c."""

PARAMETER, GRADIENT = 0, 1
"""Places in "norm" and "squares", and the first two in "arrays"; states follow."""

MULTIPLIER, RATIO, ZERO = 0, 1, 2
"""Places in "own": gradient multiplier, trust ratio, whether to zero the gradient."""

KNOW_W, KNOW_G = 1, 2
"""Flags: the squares of the parameters, or of the gradients, are known already."""
