"""Adam (Kingma and Ba 2015, arXiv:1412.6980), AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and AMSGrad
(Reddi, Kale and Kumar 2018, arXiv:1904.09237)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..rule import Options, Rule


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
    g = g + h.weight_decay * p
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * (g * g)
    return p - h.step_size * m / (math.sqrt(v) * h.unbias_root + h.eps), m, v


def adamw(p: Any, g: Any, m: Any, v: Any, h: AdamScalars) -> tuple[Any, Any, Any]:
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * (g * g)
    return h.decay * p - h.step_size * m / (math.sqrt(v) * h.unbias_root + h.eps), m, v


def amsgrad(p: Any, g: Any, m: Any, v: Any, v_max: Any, h: AdamScalars) -> tuple[Any, Any, Any, Any]:
    g = g + h.weight_decay * p
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * (g * g)
    v_max = v_max if v_max > v else v
    return p - h.step_size * m / (math.sqrt(v_max) * h.unbias_root + h.eps), m, v, v_max


def amsgradw(p: Any, g: Any, m: Any, v: Any, v_max: Any, h: AdamScalars) -> tuple[Any, Any, Any, Any]:
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * (g * g)
    v_max = v_max if v_max > v else v
    return h.decay * p - h.step_size * m / (math.sqrt(v_max) * h.unbias_root + h.eps), m, v, v_max


def adam_scalars(t: int, o: Options) -> AdamScalars:
    lr, (beta1, beta2), weight_decay = o["lr"], o["betas"], o["weight_decay"]
    step_size = lr / (1.0 - beta1**t)
    root = math.sqrt(1.0 - beta2**t)
    unbias_root = 1.0 / root
    if o["eps_hat"]:  # the paper's second form: eps is added before the correction of v
        step_size, unbias_root = step_size * root, 1.0
    decay_rate = lr / o["initial_lr"] if o.get("fully_decoupled") else lr
    return AdamScalars(
        step_size,
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        unbias_root,
        o["eps"],
        weight_decay,
        1.0 - decay_rate * weight_decay,
    )


def _rule(step: Any, *state: str) -> Rule:
    return Rule(step.__name__, step, AdamScalars, adam_scalars, state)


RULES = (
    _rule(adam, "exp_avg", "exp_avg_sq"),
    _rule(adamw, "exp_avg", "exp_avg_sq"),
    _rule(amsgrad, "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    _rule(amsgradw, "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
)
