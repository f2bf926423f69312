"""Adam (Kingma and Ba 2015, arXiv:1412.6980), AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and AMSGrad
(Reddi, Kale and Kumar 2018, arXiv:1904.09237)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from .rule import BETAS, NONNEGATIVE, SWITCH, Option, Options, Rule


class AdamScalars(NamedTuple):
    step_size: float  # lr / (1 - beta1^t)
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    unbias_root: float  # 1 / sqrt(1 - beta2^t)
    eps: float
    weight_decay: float  # Adam: enters the gradient
    decay: float  # AdamW: factor on p, 1 - lr weight_decay


def adam(p: Any, g: Any, m: Any, v: Any, h: AdamScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    return p - h.step_size * m / (math.sqrt(v) * h.unbias_root + h.eps), m, v


def adamw(p: Any, g: Any, m: Any, v: Any, h: AdamScalars) -> tuple[Any, Any, Any]:
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    return h.decay * p - h.step_size * m / (math.sqrt(v) * h.unbias_root + h.eps), m, v


def amsgrad(p: Any, g: Any, m: Any, v: Any, v_max: Any, h: AdamScalars) -> tuple[Any, Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    v_max = v_max if v_max > v else v
    return p - h.step_size * m / (math.sqrt(v_max) * h.unbias_root + h.eps), m, v, v_max


def amsgradw(p: Any, g: Any, m: Any, v: Any, v_max: Any, h: AdamScalars) -> tuple[Any, Any, Any, Any]:
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    v_max = v_max if v_max > v else v
    return h.decay * p - h.step_size * m / (math.sqrt(v_max) * h.unbias_root + h.eps), m, v, v_max


def adam_scalars(t: int, o: Options) -> AdamScalars:
    beta1, beta2 = o["betas"]
    step_size, root = o["lr"] / (1.0 - beta1**t), math.sqrt(1.0 - beta2**t)
    unbias_root = 1.0 / root
    if o["eps_hat"]:  # the paper's second form: eps is added before the correction of v
        step_size, unbias_root = step_size * root, 1.0
    weight_decay = o["weight_decay"]
    return AdamScalars(step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, unbias_root, o["eps"], weight_decay, 1.0)


def adamw_scalars(t: int, o: Options) -> AdamScalars:
    beta1, beta2 = o["betas"]
    step_size, root = o["lr"] / (1.0 - beta1**t), math.sqrt(1.0 - beta2**t)
    unbias_root = 1.0 / root
    if o["eps_hat"]:
        step_size, unbias_root = step_size * root, 1.0
    rate = o["lr"] / o["initial_lr"] if o["fully_decoupled"] else o["lr"]
    weight_decay, decay = o["weight_decay"], 1.0 - rate * o["weight_decay"]
    return AdamScalars(step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, unbias_root, o["eps"], weight_decay, decay)


OPTIONS = {
    "lr": Option(1e-3),
    "betas": Option((0.9, 0.999), BETAS),
    "eps": Option(1e-8),
    "weight_decay": Option(0.0),
    "amsgrad": Option(False),
    "eps_hat": SWITCH,
}

DECOUPLED = {
    **OPTIONS,
    "weight_decay": Option(1e-2),
    "fully_decoupled": SWITCH,
    "initial_lr": Option(range=NONNEGATIVE, noted=True),
}


def variant(o: Options, decoupled: bool = False) -> str:
    return ("amsgrad" if o["amsgrad"] else "adam") + ("w" if o.get("decoupled_weight_decay", decoupled) else "")


def variant_w(o: Options) -> str:
    return variant(o, True)


def conflict(o: Options) -> str | None:
    wrong = o["fully_decoupled"] and o.get("initial_lr") == 0.0
    return "fully_decoupled=True needs an initial lr > 0, got 0." if wrong else None


MOMENTS = "exp_avg", "exp_avg_sq"
MAXIMUM = "max_exp_avg_sq"  # switched on later, it is one from there on

RULES = (
    Rule(*("adam", adam, AdamScalars, adam_scalars, MOMENTS), options=OPTIONS, variant=variant),
    Rule(
        *("adamw", adamw, AdamScalars, adamw_scalars, MOMENTS), options=DECOUPLED, variant=variant_w, conflict=conflict
    ),
    Rule("amsgrad", amsgrad, AdamScalars, adam_scalars, (*MOMENTS, MAXIMUM), options=OPTIONS, late=(MAXIMUM,)),
    Rule("amsgradw", amsgradw, AdamScalars, adamw_scalars, (*MOMENTS, MAXIMUM), options=DECOUPLED, late=(MAXIMUM,)),
)
