"""Learning-rate schedules: small immutable functions from steps done to learning rate.

A schedule is built from plain numbers and called with k, the number of steps already done (0 before the first
step). It keeps no count of its own, so it needs no checkpoint of its own::

    lr = schedules.warmup(schedules.cosine(0.1, total=900), steps=100)
    for k in range(1000):
        opt.param_groups[0]["lr"] = lr(k)
        opt.step(grads)

Formulas are those of ``torch.optim.lr_scheduler`` where it has them, in closed form, so no rounding error builds up.
Past its end a schedule keeps its last value. Schedules compare by their arguments, print them, and can be pickled. An
argument of the wrong type raises TypeError, one outside its range (NaN is outside all of them) ValueError.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .engine.options import interval

__all__ = ["constant", "cosine", "exponential", "inverse_sqrt", "one_cycle", "polynomial", "step", "warmup"]


# Ranges of the arguments, the same wherever a name occurs. Infinity and NaN are outside all of them.
_AT_LEAST = {"step_size": 1, "total": 1, "steps": 0}  # whole numbers
_RANGES = {
    **dict.fromkeys(("gamma", "power", "timescale", "div_factor", "final_div_factor"), interval("(0, inf)")),
    **dict.fromkeys(("lr", "max_lr", "end"), interval("[0, inf)")),
    **dict.fromkeys(("pct_start", "start"), interval("[0, 1]")),
}


class _Schedule:
    """What the schedules share: the checks of k and of their arguments."""

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            where = f"{type(self).__name__}: {name}"
            if name in _AT_LEAST:
                object.__setattr__(self, name, _whole(value, _AT_LEAST[name], where))
            elif name in _RANGES:
                object.__setattr__(self, name, _RANGES[name](value, where))
            elif name == "anneal_strategy" and value not in ("cos", "linear"):
                raise ValueError(f"{where} must be 'cos' or 'linear', got {value!r}.")
            elif name == "schedule" and not callable(value):
                raise TypeError(f"{where} must be a schedule or a function of k, got {value!r}.")

    def __call__(self, k: int) -> float:
        """The learning rate of the step that follows k steps already done."""
        k = _whole(k, 0, f"{type(self).__name__}: k")
        try:
            return self._at(k)
        except OverflowError:
            raise ValueError(f"{self!r}: the learning rate after {k} steps is beyond the range of float64.") from None

    def _at(self, k: int) -> float:
        raise NotImplementedError


def _whole(value: Any, least: int, where: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{where} must be a whole number, got {value!r}.") from None
    if number < least:
        raise ValueError(f"{where} must be at least {least}, got {number}.")
    return number


def _between(start: float, end: float, weight: float) -> float:
    """Weighted mean that is exactly start at weight 1 and exactly end at weight 0."""
    return start * weight + end * (1 - weight)


@dataclass(frozen=True)
class constant(_Schedule):
    """The learning rate lr, in [0, inf), at every step.

    >>> constant(0.1)(1000)
    0.1
    """

    lr: float

    def _at(self, k: int) -> float:
        return self.lr


@dataclass(frozen=True)
class step(_Schedule):
    """Multiply the learning rate by gamma after every step_size steps (torch's StepLR)::

        lr(k) = lr gamma^floor(k / step_size)

    Args:
        lr: Learning rate of the first step, in [0, inf).
        step_size: Number of steps with the same learning rate, at least 1.
        gamma: Factor, in (0, inf).

    >>> lr = step(1.0, step_size=10, gamma=0.5)
    >>> lr(0), lr(9), lr(10), lr(20)
    (1.0, 1.0, 0.5, 0.25)
    """

    lr: float
    step_size: int
    gamma: float = 0.1

    def _at(self, k: int) -> float:
        return self.lr * self.gamma ** (k // self.step_size)


@dataclass(frozen=True)
class exponential(_Schedule):
    """Multiply the learning rate by gamma after every step (torch's ExponentialLR)::

        lr(k) = lr gamma^k

    Args:
        lr: Learning rate of the first step, in [0, inf).
        gamma: Factor, in (0, inf).

    >>> lr = exponential(1.0, gamma=0.5)
    >>> lr(0), lr(1), lr(2)
    (1.0, 0.5, 0.25)
    """

    lr: float
    gamma: float

    def _at(self, k: int) -> float:
        return self.lr * self.gamma**k


@dataclass(frozen=True)
class polynomial(_Schedule):
    """Decay from lr to end within total steps (torch's PolynomialLR, whose end is 0; linear with power 1)::

        lr(k) = end + (lr - end) (1 - k / total)^power        for k <= total, then end

    Args:
        lr: Learning rate of the first step, in [0, inf).
        total: Number of steps after which end is reached, at least 1.
        power: Exponent, in (0, inf).
        end: Last learning rate, in [0, inf).

    >>> lr = polynomial(1.0, total=4)
    >>> [lr(k) for k in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    lr: float
    total: int
    power: float = 1.0
    end: float = 0.0

    def _at(self, k: int) -> float:
        return _between(self.lr, self.end, (1 - min(k, self.total) / self.total) ** self.power)


@dataclass(frozen=True)
class cosine(_Schedule):
    """Decay from lr to end along half a cosine within total steps (torch's CosineAnnealingLR, which rises again)::

        lr(k) = end + (lr - end) (1 + cos(pi k / total)) / 2        for k <= total, then end

    Args:
        lr: Learning rate of the first step, in [0, inf).
        total: Number of steps after which end is reached, at least 1.
        end: Last learning rate, in [0, inf).

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983, equation 5, without restarts.

    >>> lr = cosine(0.1, total=100)
    >>> lr(0), round(lr(50), 12), lr(100), lr(1000)
    (0.1, 0.05, 0.0, 0.0)
    """

    lr: float
    total: int
    end: float = 0.0

    def _at(self, k: int) -> float:
        return _between(self.lr, self.end, (1 + math.cos(math.pi * min(k, self.total) / self.total)) / 2)


@dataclass(frozen=True)
class inverse_sqrt(_Schedule):
    """Decay with the inverse square root of the number of steps::

        lr(k) = lr sqrt(timescale / (timescale + k))

    The usual forms, with N the number of steps done, warm-up included: ``warmup(inverse_sqrt(lr, W), W)`` is
    Vaswani's d^-0.5 min(N^-0.5, N W^-1.5) for lr = (d W)^-0.5, and ``warmup(inverse_sqrt(lr, W), W, start=1.0)``
    is T5's 1 / sqrt(max(N, W)) for lr = W^-0.5.
    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 3; Raffel et al. 2020, arXiv:1910.10683, section 3.1.2.

    Args:
        lr: Learning rate of the first step, in [0, inf).
        timescale: The learning rate halves within 3 timescale steps; in (0, inf).

    >>> lr = inverse_sqrt(1.0, timescale=100)
    >>> lr(0), lr(300)
    (1.0, 0.5)
    """

    lr: float
    timescale: float

    def _at(self, k: int) -> float:
        return self.lr * math.sqrt(self.timescale / (self.timescale + k))


@dataclass(frozen=True)
class one_cycle(_Schedule):
    """Rise from max_lr / div_factor to max_lr, then fall far below the start (torch's OneCycleLR, two phases)::

        start = max_lr / div_factor;  low = start / final_div_factor;  peak = pct_start total - 1
        lr(k) = from start to max_lr over k = 0 ... peak, then from max_lr to low over k = peak ... total - 1

    Each way along half a cosine, or a straight line. Only the learning rate is scheduled, not the momentum.
    Source: Smith and Topin, Super-Convergence, 2017, arXiv:1708.07120.

    Args:
        max_lr: Largest learning rate, in [0, inf).
        total: Number of steps; the last of them, k = total - 1, has the lowest learning rate. At least 1.
        pct_start: Fraction of the steps spent rising, in [0, 1].
        anneal_strategy: "cos" or "linear".
        div_factor: max_lr over the first learning rate, in (0, inf).
        final_div_factor: The first over the last learning rate, in (0, inf).

    >>> lr = one_cycle(1.0, total=21, pct_start=0.5, anneal_strategy="linear", div_factor=20.0)
    >>> round(lr(0), 12), round(lr(5), 12), round(lr(20), 12)
    (0.05, 0.55, 5e-06)
    """

    max_lr: float
    total: int
    pct_start: float = 0.3
    anneal_strategy: str = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def _at(self, k: int) -> float:
        k = min(k, self.total - 1)
        peak = self.pct_start * self.total - 1  # a fractional step, or before the first, as in torch
        first = self.max_lr / self.div_factor
        if k <= peak:
            start, end, begin, length = first, self.max_lr, 0.0, peak
        else:
            start, end, begin, length = self.max_lr, first / self.final_div_factor, peak, self.total - 1 - peak
        done = (k - begin) / length if length > 0 else 1.0  # torch divides by zero where the rise is a single step
        return _between(start, end, (1 + math.cos(math.pi * done)) / 2 if self.anneal_strategy == "cos" else 1 - done)


@dataclass(frozen=True)
class warmup(_Schedule):
    """Rise linearly to the first value of another schedule, which then begins::

        lr(k) = schedule(0) (start + (1 - start) k / steps)    for k < steps
        lr(k) = schedule(k - steps)                            from there on

    The schedule counts from the end of the warm-up; in torch this is SequentialLR of LinearLR and the schedule.
    Source: Goyal et al., Accurate, Large Minibatch SGD, 2017, arXiv:1706.02677, section 2.2.

    Args:
        schedule: Any of the schedules, or a function of the number of steps done.
        steps: Length of the warm-up; 0 means none.
        start: First learning rate over schedule(0), in [0, 1]; 0.0 makes that of the very first step 0.

    >>> lr = warmup(step(1.0, step_size=2, gamma=0.5), steps=4)
    >>> [lr(k) for k in range(8)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.5]
    """

    schedule: Callable[[int], float]
    steps: int
    start: float = 0.0

    def _at(self, k: int) -> float:
        if k >= self.steps:
            return self.schedule(k - self.steps)
        return self.schedule(0) * _between(1.0, self.start, k / self.steps)
