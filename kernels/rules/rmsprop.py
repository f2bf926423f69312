"""RMSprop (Hinton, lecture 6e, 2012), with momentum, and centered (Graves 2013, arXiv:1308.0850)."""

import math
from typing import Any, NamedTuple

from .rule import BELOW_ONE, SWITCH, UP_TO_ONE, Option, Options, Rule


class RmspropScalars(NamedTuple):
    lr: float
    alpha: float
    one_minus_alpha: float
    mu: float
    weight_decay: float
    eps: float
    eps_inside: float  # one of the two epsilons is zero, and adding zero is exact
    zero: float  # a literal 0 would promote float32 to float64


def rmsprop(p: Any, g: Any, v: Any, h: RmspropScalars) -> tuple[Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    v = h.alpha * v + h.one_minus_alpha * g * g
    return p - h.lr * g / (math.sqrt(v + h.eps_inside) + h.eps), v


def rmsprop_momentum(p: Any, g: Any, v: Any, b: Any, h: RmspropScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    v = h.alpha * v + h.one_minus_alpha * g * g
    b = h.mu * b + g / (math.sqrt(v + h.eps_inside) + h.eps)
    return p - h.lr * b, v, b


def rmsprop_centered(p: Any, g: Any, v: Any, m: Any, h: RmspropScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    v = h.alpha * v + h.one_minus_alpha * g * g
    m = h.alpha * m + h.one_minus_alpha * g
    variance = v - m * m
    variance = v if variance != variance else variance  # of infinity less infinity; NaN stays
    variance = h.zero if variance < h.zero else variance  # where rounding took it below zero
    return p - h.lr * g / (math.sqrt(variance + h.eps_inside) + h.eps), v, m


def rmsprop_centered_momentum(p: Any, g: Any, v: Any, m: Any, b: Any, h: RmspropScalars) -> tuple[Any, Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    v = h.alpha * v + h.one_minus_alpha * g * g
    m = h.alpha * m + h.one_minus_alpha * g
    variance = v - m * m
    variance = v if variance != variance else variance
    variance = h.zero if variance < h.zero else variance
    b = h.mu * b + g / (math.sqrt(variance + h.eps_inside) + h.eps)
    return p - h.lr * b, v, m, b


def rmsprop_scalars(t: int, o: Options) -> RmspropScalars:
    alpha, eps = o["alpha"], o["eps"]
    outside, inside = (0.0, eps) if o["eps_inside_sqrt"] else (eps, 0.0)
    return RmspropScalars(o["lr"], alpha, 1.0 - alpha, o["momentum"], o["weight_decay"], outside, inside, 0.0)


OPTIONS = {
    "lr": Option(1e-2),
    "alpha": Option(0.99, BELOW_ONE),
    "eps": Option(1e-8),
    "weight_decay": Option(0.0),
    "momentum": Option(0.0, UP_TO_ONE),
    "centered": Option(False),
    "eps_inside_sqrt": SWITCH,
}


def variant(o: Options) -> str:
    return "rmsprop" + ("_centered" if o["centered"] else "") + ("_momentum" if o["momentum"] else "")


def _rule(step: Any, *state: str) -> Rule:
    record = step.__name__, step, RmspropScalars, rmsprop_scalars, state
    return Rule(*record, options=OPTIONS, variant=variant)


RULES = (
    _rule(rmsprop, "square_avg"),
    _rule(rmsprop_momentum, "square_avg", "momentum_buffer"),
    _rule(rmsprop_centered, "square_avg", "grad_avg"),
    _rule(rmsprop_centered_momentum, "square_avg", "grad_avg", "momentum_buffer"),
)
