"""LARS: layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017, arXiv:1708.03888), in MLPerf's form."""

import math
from typing import Any, NamedTuple

from .rule import NONNEGATIVE, SWITCH, UP_TO_ONE, Option, Options, Rule


class LarsScalars(NamedTuple):
    mu: float
    outer: float  # 1 where lr lives in the buffer, else lr
    nesterov: float  # whether the step looks ahead
    weight_decay: float
    trust_coefficient: float
    eps: float
    cap_scale: float  # LARC's clipping takes min(ratio / lr, 1): 1 / lr, else 1
    cap: float  # and 1, else inf
    stretch: float  # 1, or a power of two taken out of a ratio beyond float32
    ratio: float  # times lr where that lives in the buffer; without a ratio, that alone


def lars(p: Any, g: Any, b: Any, h: LarsScalars) -> tuple[Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    d = h.ratio * (h.stretch * g)
    b = h.mu * b + d if h.mu else d
    return p - h.outer * (d + h.mu * b if h.nesterov else b), b


def trust_ratio(sums: tuple[float, float], h: LarsScalars) -> float:
    w_norm, g_norm = math.sqrt(sums[0]), math.sqrt(sums[1])
    if w_norm == 0.0 or g_norm == 0.0:
        return 1.0
    ratio = h.cap_scale * h.trust_coefficient * w_norm / (g_norm + h.weight_decay * w_norm + h.eps)
    return h.cap if ratio > h.cap else ratio


def lars_scalars(t: int, o: Options) -> LarsScalars:
    lr, nesterov = o["lr"], float(o["nesterov"])
    inner, outer = (lr, 1.0) if o["lr_in_momentum"] else (1.0, lr)
    cap_scale, cap = (1.0 / (lr or 1.0), 1.0) if o["clip"] else (1.0, math.inf)
    formed = o["momentum"], outer, nesterov, o["weight_decay"], o["trust_coefficient"], o["eps"]
    return LarsScalars(*formed, cap_scale, cap, 1.0, inner)


OPTIONS = {
    "lr": Option(),
    "momentum": Option(0.9, UP_TO_ONE),
    "weight_decay": Option(0.0),
    "trust_coefficient": Option(1e-3, NONNEGATIVE, keyword=True),
    "eps": Option(0.0, keyword=True),
    "nesterov": SWITCH,
    "lr_in_momentum": Option(True, keyword=True),
    "clip": SWITCH,
    "adapt": Option(None, bool, keyword=True),
    "decay_1d": Option(None, bool, keyword=True),
}


def conflict(o: Options) -> str | None:
    return "nesterov=True needs momentum > 0, got 0." if o["nesterov"] and o["momentum"] == 0.0 else None


RULES = (
    Rule(
        *("lars", lars, LarsScalars, lars_scalars, ("momentum_buffer",)),
        products=(("p", "p"), ("g", "g")),
        ratio=trust_ratio,
        layerwise=True,
        options=OPTIONS,
        conflict=conflict,
    ),
)
