"""NAdam: Adam with Nesterov momentum (Dozat 2016, ICLR workshop)."""

import math
from typing import Any, NamedTuple

from .rule import BETAS, NONNEGATIVE, Option, Options, Rule


class NadamCarry(NamedTuple):
    mu_product: float


class NadamScalars(NamedTuple):
    g_size: float  # lr (1 - mu_t) / (1 - prod_{i<=t} mu_i)
    m_size: float  # lr mu_{t+1} / (1 - prod_{i<=t+1} mu_i)
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    unbias_root: float  # 1 / sqrt(1 - beta2^t)
    eps: float
    weight_decay: float  # enters the gradient; zero where the decay is decoupled
    decay: float  # factor on p; one where the decay is coupled


def nadam(p: Any, g: Any, m: Any, v: Any, h: NadamScalars) -> tuple[Any, Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * g * g
    return h.decay * p - (h.g_size * g + h.m_size * m) / (math.sqrt(v) * h.unbias_root + h.eps), m, v


def nadam_scalars(t: int, o: Options, carry: NadamCarry) -> tuple[NadamScalars, NadamCarry]:
    lr, (beta1, beta2), weight_decay, psi = o["lr"], o["betas"], o["weight_decay"], o["momentum_decay"]
    mu = beta1 * (1.0 - 0.5 * 0.96 ** (t * psi))
    mu_next = beta1 * (1.0 - 0.5 * 0.96 ** ((t + 1) * psi))
    mu_product = carry.mu_product * mu  # carried, not recomputed: a schedule may move beta1 between steps
    g_size, m_size = lr * (1.0 - mu) / (1.0 - mu_product), lr * mu_next / (1.0 - mu_product * mu_next)
    unbias_root = 1.0 / math.sqrt(1.0 - beta2**t)
    coupled, decay = (0.0, 1.0 - lr * weight_decay) if o["decoupled_weight_decay"] else (weight_decay, 1.0)
    moments = g_size, m_size, beta1, 1.0 - beta1, beta2, 1.0 - beta2
    return NadamScalars(*moments, unbias_root, o["eps"], coupled, decay), NadamCarry(mu_product)


OPTIONS = {
    "lr": Option(2e-3),
    "betas": Option((0.9, 0.999), BETAS),
    "eps": Option(1e-8),
    "weight_decay": Option(0.0),
    "momentum_decay": Option(4e-3, NONNEGATIVE),
    "decoupled_weight_decay": Option(False),
}

STATE, CARRY = ("exp_avg", "exp_avg_sq"), NadamCarry(1.0)

RULES = (Rule("nadam", nadam, NadamScalars, nadam_scalars, STATE, carry=lambda o: CARRY, options=OPTIONS),)
