"""Epilogues: what an update does besides with the parameters that it has just written, while they are in the cache.

Each is a scalar function ``(x, p, number) -> (x,)`` of an element of its target, of the parameter, and of a number that
all parameters of a scalar group share, like a rule without literals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .dtypes import COMPUTE, COPIES


@dataclass(frozen=True, eq=False)
class Epilogue:
    """An epilogue.

    Attributes:
        name: Name in the symbols of the compiled library.
        step: The function.
    """

    name: str
    step: Callable[[Any, Any, Any], tuple[Any]]
    state: tuple[str, ...] = ()  # as of a rule: the target takes the place of its parameter


def _round(copy: Any, p: Any, number: Any) -> tuple[Any]:
    return (p,)


def _average(e: Any, p: Any, weight: Any) -> tuple[Any]:
    # As d e + (1 - d) p, float32 would be biased by 2e-3 at d = 0.99999. Infinities, too, are copied where that is due.
    return (e + weight * (p - e) if weight else p,)


ROUND = Epilogue("round", _round)
"""The parameter, rounded to a 16-bit copy."""

AVERAGE = Epilogue("average", _average)
"""The exponential moving average of the parameter; its number is ``average_weight``."""

KINDS = (*((ROUND, dtype) for dtype in COPIES), (AVERAGE, "float32"), (AVERAGE, "float64"))
"""Each epilogue with the storage dtype of its target. A segment on a GPU has a word for each."""

EMA, EMA_STEP = "ema", "ema_step"
"""Names in a parameter's state of its average, and of the number of averagings, the copy at the start included."""


def kinds_of(p: str) -> list[int]:
    """Which of ``KINDS`` there are for parameters stored as ``p``."""
    return [k for k, (what, dtype) in enumerate(KINDS) if (p == "float32" if what is ROUND else dtype == COMPUTE[p])]


def average_weight(n: float, decay: float, warmup: float) -> float:
    """Weight of the parameter in the n-th averaging after the copy; 0 stands for a copy, as is that of n = 0.

    It is 1 - decay, with ``warmup`` 1 - min(decay, (1 + n) / (10 + n)). GPUs run this function, too.
    """
    ramp = (1.0 + n) / (10.0 + n)
    if warmup != 0.0 and ramp < decay:
        decay = ramp
    return 1.0 - decay if n > 0.0 and decay > 0.0 else 0.0
