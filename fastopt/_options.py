"""Ranges of hyperparameters: each turns a value into what is computed with, or says what is wrong with it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Number:
    """A real number in a range."""

    text: str
    holds: Callable[[float], bool]

    def __call__(self, value: Any, where: str) -> float:
        """The value as a Python float: scalars are formed in float64 even from a float32 hyperparameter."""
        if getattr(value, "shape", None) == ():
            value = value.item()  # a NumPy scalar or a 0-d array
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{where} must be a number in {self.text}, got {value!r}.")
        number = float(value)
        if not self.holds(number):
            raise ValueError(f"{where} must be in {self.text}, got {value!r}.")
        return number


@dataclass(frozen=True)
class Pair:
    """Two numbers, each in its range."""

    first: Number
    second: Number

    def __call__(self, value: Any, where: str) -> tuple[float, float]:
        """The value as a tuple of two floats."""
        try:
            first, second = value
        except (TypeError, ValueError):
            raise TypeError(f"{where} must be two numbers, got {value!r}.") from None
        return self.first(first, f"{where}[0]"), self.second(second, f"{where}[1]")


def boolean(value: Any, where: str) -> bool:
    """The value as a bool; other things that are true are refused."""
    if isinstance(value, bool) or type(value).__name__ == "bool_" or type(value).__name__ == "bool":
        return bool(value)
    raise TypeError(f"{where} must be True or False, got {value!r}.")


def optional_boolean(value: Any, where: str) -> bool | None:
    """None or the value as a bool."""
    return None if value is None else boolean(value, where)


NONNEGATIVE = Number("[0, inf)", lambda x: 0.0 <= x < math.inf)
POSITIVE = Number("(0, inf)", lambda x: 0.0 < x < math.inf)
BELOW_ONE = Number("[0, 1)", lambda x: 0.0 <= x < 1.0)
UP_TO_ONE = Number("[0, 1]", lambda x: 0.0 <= x <= 1.0)
BETAS = Pair(BELOW_ONE, BELOW_ONE)
EPS = Number("(0, inf), or an element without gradient becomes 0 / 0", lambda x: 0.0 < x < math.inf)

Range = Callable[[Any, str], Any]
