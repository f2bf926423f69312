"""Epilogues: what an update does besides with the parameters that it has just written, while they are in the cache.

Each is a rule whose parameter is an element of the target, and whose gradient is that of the parameter; its one scalar,
a weight, is shared by all parameters of a scalar group.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .dtypes import COMPUTE, COPIES
from .rules.rule import EMA as EMA
from .rules.rule import Rule


class Number(NamedTuple):
    """The scalars of an epilogue."""

    weight: float


def rounded(copy: Any, p: Any, h: Number) -> tuple[Any]:
    """The parameter; storing it rounds it."""
    return (p,)


def averaged(e: Any, p: Any, h: Number) -> tuple[Any]:
    """The average, moved to the parameter by a weight."""
    # As d e + (1 - d) p, float32 would be biased by 2e-3 at d = 0.99999. Infinities, too, are copied where that is due.
    return (e + h.weight * (p - e) if h.weight else p,)


def average_weight(n: float, decay: float, warmup: float) -> float:
    """Weight of the parameter in the n-th averaging after the copy; 0 stands for a copy, as is that of n = 0.

    It is 1 - decay, with ``warmup`` 1 - min(decay, (1 + n) / (10 + n)). GPUs run this function, too.
    """
    ramp = (1.0 + n) / (10.0 + n)
    if warmup != 0.0 and ramp < decay:
        decay = ramp
    return 1.0 - decay if n > 0.0 and decay > 0.0 else 0.0


ROUND = Rule("rounded", rounded, Number, average_weight)
"""The parameter, rounded to a 16-bit copy."""

AVERAGE = Rule("averaged", averaged, Number, average_weight)
"""The exponential moving average of the parameter."""

KINDS = (*((ROUND, dtype) for dtype in COPIES), (AVERAGE, "float32"), (AVERAGE, "float64"))
"""Each epilogue with the storage dtype of its target. A segment on a GPU has a word for each."""

EMA_STEP = "ema_step"
"""Name in a parameter's state of the number of averagings, the copy at the start included."""


def kinds_of(p: str) -> list[int]:
    """Which of ``KINDS`` there are for parameters stored as ``p``."""
    return [k for k, (what, dtype) in enumerate(KINDS) if (p == "float32" if what is ROUND else dtype == COMPUTE[p])]
