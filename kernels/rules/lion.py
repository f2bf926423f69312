"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""

from typing import Any, NamedTuple

from .rule import BETAS, Option, Options, Rule


class LionScalars(NamedTuple):
    lr: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    weight_decay: float
    one: float  # literals would promote float32 to float64
    zero: float


def lion(p: Any, g: Any, m: Any, h: LionScalars) -> tuple[Any, Any]:
    u = h.beta1 * m + h.one_minus_beta1 * g
    u = h.one if u > h.zero else (-h.one if u < h.zero else u)  # of zero: zero; of NaN: NaN
    u = u + h.weight_decay * p if h.weight_decay else u
    return p - h.lr * u, h.beta2 * m + h.one_minus_beta2 * g


def lion_scalars(t: int, o: Options) -> LionScalars:
    beta1, beta2 = o["betas"]
    return LionScalars(o["lr"], beta1, 1.0 - beta1, beta2, 1.0 - beta2, o["weight_decay"], 1.0, 0.0)


OPTIONS = {"lr": Option(1e-4), "betas": Option((0.9, 0.99), BETAS), "weight_decay": Option(0.0)}


RULES = (Rule("lion", lion, LionScalars, lion_scalars, ("exp_avg",), options=OPTIONS),)
