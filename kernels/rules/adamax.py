"""Adamax: Adam with the infinity norm (Kingma and Ba 2015, arXiv:1412.6980, Algorithm 2)."""

from typing import Any, NamedTuple

from .rule import BETAS, Option, Options, Rule


class AdamaxScalars(NamedTuple):
    step_size: float  # lr / (1 - beta1^t)
    beta1: float
    one_minus_beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamax(p: Any, g: Any, m: Any, u: Any, h: AdamaxScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    m = h.beta1 * m + h.one_minus_beta1 * g
    size = abs(g) + h.eps
    u = h.beta2 * u
    u = u if u > size else size
    return p - h.step_size * m / u, m, u


def adamax_scalars(t: int, o: Options) -> AdamaxScalars:
    beta1, beta2 = o["betas"]
    return AdamaxScalars(o["lr"] / (1.0 - beta1**t), beta1, 1.0 - beta1, beta2, o["eps"], o["weight_decay"])


OPTIONS = {"lr": Option(2e-3), "betas": Option((0.9, 0.999), BETAS), "eps": Option(1e-8), "weight_decay": Option(0.0)}


RULES = (Rule("adamax", adamax, AdamaxScalars, adamax_scalars, ("exp_avg", "exp_inf"), options=OPTIONS),)
