"""Adam (Kingma and Ba 2015, arXiv:1412.6980), AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and AMSGrad
(Reddi, Kale and Kumar 2018, arXiv:1904.09237)."""

import math
from collections.abc import Callable
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
    weight_decay: float  # enters the gradient; zero where the decay is decoupled
    decay: float  # factor on p; one where the decay is coupled


def adam(p: Any, g: Any, m: Any, v: Any, h: AdamScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    return h.decay * p - h.step_size * m / (math.sqrt(v) * h.unbias_root + h.eps), m, v


def amsgrad(p: Any, g: Any, m: Any, v: Any, v_max: Any, h: AdamScalars) -> tuple[Any, Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    v_max = v_max if v_max > v else v
    return h.decay * p - h.step_size * m / (math.sqrt(v_max) * h.unbias_root + h.eps), m, v, v_max


def scalars_of(decoupled: bool) -> Callable[[int, Options], AdamScalars]:
    """The scalars of Adam, or of AdamW."""

    def adam_scalars(t: int, o: Options) -> AdamScalars:
        beta1, beta2 = o["betas"]
        step_size, root = o["lr"] / (1.0 - beta1**t), math.sqrt(1.0 - beta2**t)
        unbias_root, weight_decay, decay = 1.0 / root, o["weight_decay"], 1.0
        if o["eps_hat"]:  # the paper's second form: eps is added before the correction of v
            step_size, unbias_root = step_size * root, 1.0
        if decoupled:
            rate = o["lr"] / o["initial_lr"] if o["fully_decoupled"] else o["lr"]
            weight_decay, decay = 0.0, 1.0 - rate * weight_decay
        return AdamScalars(
            step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, unbias_root, o["eps"], weight_decay, decay
        )

    return adam_scalars


OPTIONS = {
    "lr": Option(1e-3),
    "betas": Option((0.9, 0.999), BETAS),
    "eps": Option(1e-8),
    "weight_decay": Option(0.0),
    "amsgrad": Option(False),
    "eps_hat": SWITCH,
}

OPTIONS_W = {
    **OPTIONS,
    "weight_decay": Option(1e-2),
    "fully_decoupled": SWITCH,
    "initial_lr": Option(range=NONNEGATIVE, noted=True),
}


def conflict(o: Options) -> str | None:
    wrong = o["fully_decoupled"] and o.get("initial_lr") == 0.0
    return "fully_decoupled=True needs an initial lr > 0, got 0." if wrong else None


def variant(o: Options, decoupled: bool = False) -> str:
    return ("amsgrad" if o["amsgrad"] else "adam") + ("w" if o.get("decoupled_weight_decay", decoupled) else "")


def variant_w(o: Options) -> str:
    return variant(o, True)


MOMENTS = "exp_avg", "exp_avg_sq"
MAXIMUM = "max_exp_avg_sq"  # switched on later, it is one from there on
COUPLED, DECOUPLED = scalars_of(False), scalars_of(True)

RULES = (
    Rule("adam", adam, AdamScalars, COUPLED, MOMENTS, options=OPTIONS, variant=variant),
    Rule("adamw", adam, AdamScalars, DECOUPLED, MOMENTS, options=OPTIONS_W, variant=variant_w, conflict=conflict),
    Rule("amsgrad", amsgrad, AdamScalars, COUPLED, (*MOMENTS, MAXIMUM), options=OPTIONS, late=(MAXIMUM,)),
    Rule("amsgradw", amsgrad, AdamScalars, DECOUPLED, (*MOMENTS, MAXIMUM), options=OPTIONS_W, late=(MAXIMUM,)),
)
