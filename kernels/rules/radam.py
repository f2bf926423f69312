"""RAdam: Adam with a rectified learning rate (Liu et al. 2020, arXiv:1908.03265)."""

import math
from typing import Any, NamedTuple

from .rule import BETAS, Option, Options, Rule


class RadamScalars(NamedTuple):
    step_size: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    rectified: float  # 1, or 0 while the variance is not tractable (a plain momentum step)
    eps: float
    weight_decay: float  # enters the gradient; zero where the decay is decoupled
    decay: float  # factor on p; one where the decay is coupled


def radam(p: Any, g: Any, m: Any, v: Any, h: RadamScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    step = h.step_size * m
    step = step / (math.sqrt(v) + h.eps) if h.rectified else step
    return h.decay * p - step, m, v


def radam_scalars(t: int, o: Options) -> RadamScalars:
    lr, (beta1, beta2), weight_decay = o["lr"], o["betas"], o["weight_decay"]
    unbias2 = 1.0 - beta2**t
    rho_inf = 2.0 / (1.0 - beta2) - 1.0
    rho = rho_inf - 2.0 * t * beta2**t / unbias2
    step_size, rectified = lr / (1.0 - beta1**t), 0.0
    if rho > 5.0:
        rate = math.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
        step_size, rectified = step_size * rate * math.sqrt(unbias2), 1.0
    coupled, decay = (0.0, 1.0 - lr * weight_decay) if o["decoupled_weight_decay"] else (weight_decay, 1.0)
    return RadamScalars(step_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2, rectified, o["eps"], coupled, decay)


OPTIONS = {
    "lr": Option(1e-3),
    "betas": Option((0.9, 0.999), BETAS),
    "eps": Option(1e-8),
    "weight_decay": Option(0.0),
    "decoupled_weight_decay": Option(False),
}


RULES = (Rule("radam", radam, RadamScalars, radam_scalars, ("exp_avg", "exp_avg_sq"), options=OPTIONS),)
