"""LAMB: Adam's direction, scaled layer by layer (You et al. 2020, arXiv:1904.00962, Algorithm 2)."""

import math
from typing import Any, NamedTuple

from .rule import BETAS, POSITIVE, Option, Options, Rule


class LambScalars(NamedTuple):
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    unbias: float  # 1 / (1 - beta1^t)
    unbias_root: float  # 1 / sqrt(1 - beta2^t)
    eps: float
    weight_decay: float
    trust_clip: float  # the largest ratio
    stretch: float  # 1, or a power of two taken out of a ratio beyond float32
    ratio: float  # lr times the ratio; without a ratio, lr


def lamb_terms(p: Any, g: Any, m: Any, v: Any, h: LambScalars) -> tuple[Any]:
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    u = h.unbias * m / (math.sqrt(v) * h.unbias_root + h.eps)
    return (u + h.weight_decay * p if h.weight_decay else u,)


def lamb(p: Any, g: Any, m: Any, v: Any, h: LambScalars) -> tuple[Any, Any, Any]:
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    u = h.unbias * m / (math.sqrt(v) * h.unbias_root + h.eps)
    u = u + h.weight_decay * p if h.weight_decay else u
    return p - h.ratio * (h.stretch * u), m, v


def trust_ratio(sums: tuple[float, float], h: LambScalars) -> float:
    w_norm, u_norm = math.sqrt(sums[0]), math.sqrt(sums[1])
    ratio = 1.0 if w_norm == 0.0 or u_norm == 0.0 else w_norm / u_norm
    return h.trust_clip if ratio > h.trust_clip else ratio


def lamb_scalars(t: int, o: Options) -> LambScalars:
    beta1, beta2 = o["betas"]
    moments = beta1, 1.0 - beta1, beta2, 1.0 - beta2, 1.0 / (1.0 - beta1**t), 1.0 / math.sqrt(1.0 - beta2**t)
    trust_clip = o["trust_clip"] or math.inf
    return LambScalars(*moments, o["eps"], o["weight_decay"], trust_clip, 1.0, o["lr"])


OPTIONS = {
    "lr": Option(1e-3),
    "betas": Option((0.9, 0.999), BETAS),
    "eps": Option(1e-6),
    "weight_decay": Option(0.0),
    "adapt": Option(None, bool, keyword=True),
    "decay_1d": Option(None, bool, keyword=True),
    "trust_clip": Option(None, POSITIVE, keyword=True),
}


RULES = (
    Rule(
        *("lamb", lamb, LambScalars, lamb_scalars, ("exp_avg", "exp_avg_sq")),
        options=OPTIONS,
        layerwise=True,
        terms=lamb_terms,
        products=(("p", "p"), (0, 0)),
        ratio=trust_ratio,
    ),
)
