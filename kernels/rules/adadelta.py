"""Adadelta (Zeiler 2012, arXiv:1212.5701)."""

import math
from typing import Any, NamedTuple

from .rule import BELOW_ONE, Option, Options, Rule


class AdadeltaScalars(NamedTuple):
    lr: float
    rho: float
    one_minus_rho: float
    eps: float
    weight_decay: float


def adadelta(p: Any, g: Any, v: Any, u: Any, h: AdadeltaScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    v = h.rho * v + h.one_minus_rho * g * g
    delta = math.sqrt(u + h.eps) / math.sqrt(v + h.eps) * g
    u = h.rho * u + h.one_minus_rho * (delta * delta)
    return p - h.lr * delta, v, u


def adadelta_scalars(t: int, o: Options) -> AdadeltaScalars:
    return AdadeltaScalars(o["lr"], o["rho"], 1.0 - o["rho"], o["eps"], o["weight_decay"])


OPTIONS = {"lr": Option(1.0), "rho": Option(0.9, BELOW_ONE), "eps": Option(1e-6), "weight_decay": Option(0.0)}


STATE = "square_avg", "acc_delta"

RULES = (Rule("adadelta", adadelta, AdadeltaScalars, adadelta_scalars, STATE, options=OPTIONS),)
