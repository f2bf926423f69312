"""Update rules as one writes them in NumPy: array by array, operation by operation, states in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..case import Case
from .base import Arrays, Contender, zeros_like

Array = NDArray[Any]
State = dict[str, Any]
Pair = tuple[float, float]


def _sgd(
    p: Array, g: Array, s: State, t: int, *,
    lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    if weight_decay:
        g = g + weight_decay * p
    if momentum:
        s["buf"] *= momentum
        s["buf"] += g
        g = g + momentum * s["buf"] if nesterov else s["buf"]
    p -= lr * g


def _adagrad(p: Array, g: Array, s: State, t: int, *, lr: float, eps: float = 1e-10) -> None:
    s["sum"] += g**2
    p -= lr * g / (np.sqrt(s["sum"]) + eps)


def _rmsprop(p: Array, g: Array, s: State, t: int, *, lr: float, alpha: float = 0.99, eps: float = 1e-8) -> None:
    s["v"] *= alpha
    s["v"] += (1 - alpha) * g**2
    p -= lr * g / (np.sqrt(s["v"]) + eps)


def _moments(g: Array, s: State, betas: Pair) -> None:
    s["m"] *= betas[0]
    s["m"] += (1 - betas[0]) * g
    s["v"] *= betas[1]
    s["v"] += (1 - betas[1]) * g**2


def _adam(
    p: Array, g: Array, s: State, t: int, *,
    lr: float, betas: Pair = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    if weight_decay:
        g = g + weight_decay * p
    _moments(g, s, betas)
    m_hat, v_hat = s["m"] / (1 - betas[0] ** t), s["v"] / (1 - betas[1] ** t)
    p -= lr * m_hat / (np.sqrt(v_hat) + eps)


def _adamw(p: Array, g: Array, s: State, t: int, *, lr: float, weight_decay: float = 0.01, **h: Any) -> None:
    p *= 1 - lr * weight_decay
    _adam(p, g, s, t, lr=lr, **h)


def _adadelta(p: Array, g: Array, s: State, t: int, *, lr: float, rho: float = 0.9, eps: float = 1e-6) -> None:
    s["v"] *= rho
    s["v"] += (1 - rho) * g**2
    delta = np.sqrt(s["u"] + eps) / np.sqrt(s["v"] + eps) * g
    s["u"] *= rho
    s["u"] += (1 - rho) * delta**2
    p -= lr * delta


def _adamax(p: Array, g: Array, s: State, t: int, *, lr: float, betas: Pair = (0.9, 0.999), eps: float = 1e-8) -> None:
    s["m"] *= betas[0]
    s["m"] += (1 - betas[0]) * g
    s["u"] *= betas[1]
    np.maximum(s["u"], np.abs(g) + eps, out=s["u"])
    p -= lr / (1 - betas[0] ** t) * s["m"] / s["u"]


def _nadam(
    p: Array, g: Array, s: State, t: int, *,
    lr: float, betas: Pair = (0.9, 0.999), eps: float = 1e-8, momentum_decay: float = 4e-3,
) -> None:  # fmt: skip
    _moments(g, s, betas)
    mu, mu_next = (betas[0] * (1 - 0.5 * 0.96 ** (k * momentum_decay)) for k in (t, t + 1))
    s["mu_product"] = s.get("mu_product", 1.0) * mu
    m_hat = mu_next / (1 - s["mu_product"] * mu_next) * s["m"] + (1 - mu) / (1 - s["mu_product"]) * g
    p -= lr * m_hat / (np.sqrt(s["v"] / (1 - betas[1] ** t)) + eps)


def _radam(p: Array, g: Array, s: State, t: int, *, lr: float, betas: Pair = (0.9, 0.999), eps: float = 1e-8) -> None:
    _moments(g, s, betas)
    m_hat = s["m"] / (1 - betas[0] ** t)
    rest = 1 - betas[1] ** t
    rho_inf = 2 / (1 - betas[1]) - 1
    rho = rho_inf - 2 * t * betas[1] ** t / rest
    if rho <= 5:
        p -= lr * m_hat
        return
    r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho) * rest)
    p -= lr * r * m_hat / (np.sqrt(s["v"]) + eps)


def _rprop(
    p: Array, g: Array, s: State, t: int, *, lr: float, etas: Pair = (0.5, 1.2), step_sizes: Pair = (1e-6, 50.0)
) -> None:
    if t == 1:
        s["step_size"][:] = lr
    factor = np.sign(g * s["prev"])
    turned = factor < 0
    factor[factor > 0] = etas[1]
    factor[factor == 0] = 1
    factor[turned] = etas[0]
    s["step_size"] *= factor
    np.clip(s["step_size"], *step_sizes, out=s["step_size"])
    s["prev"][:] = g
    s["prev"][turned] = 0
    p -= np.sign(s["prev"]) * s["step_size"]


def _asgd(
    p: Array, g: Array, s: State, t: int, *, lr: float, lambd: float = 1e-4, alpha: float = 0.75, t0: float = 1e6
) -> None:
    eta = lr / (1 + lambd * lr * (t - 1)) ** alpha
    mu = 1 / max(1.0, t - 1 - t0)
    p *= 1 - lambd * eta
    p -= eta * g
    if mu == 1:
        s["ax"][:] = p
    else:
        s["ax"] += mu * (p - s["ax"])


def _lion(
    p: Array, g: Array, s: State, t: int, *, lr: float, betas: Pair = (0.9, 0.99), weight_decay: float = 0.0
) -> None:
    if weight_decay:
        p *= 1 - lr * weight_decay
    p -= lr * np.sign(betas[0] * s["m"] + (1 - betas[0]) * g)
    s["m"] *= betas[1]
    s["m"] += (1 - betas[1]) * g


def _lars(
    p: Array, g: Array, s: State, t: int, *,
    lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust_coefficient: float = 1e-3,
) -> None:  # fmt: skip
    if p.ndim > 1:
        norm_p, norm_g = float(np.linalg.norm(p)), float(np.linalg.norm(g))
        if norm_p and norm_g:
            lr *= trust_coefficient * norm_p / (norm_g + weight_decay * norm_p)
        if weight_decay:
            g = g + weight_decay * p
    s["buf"] *= momentum
    s["buf"] += lr * g
    p -= s["buf"]


def _lamb(
    p: Array, g: Array, s: State, t: int, *,
    lr: float, betas: Pair = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
) -> None:  # fmt: skip
    _moments(g, s, betas)
    u = s["m"] / (1 - betas[0] ** t) / (np.sqrt(s["v"] / (1 - betas[1] ** t)) + eps)
    if p.ndim > 1:
        u += weight_decay * p
        norm_p, norm_u = float(np.linalg.norm(p)), float(np.linalg.norm(u))
        lr *= norm_p / norm_u if norm_p and norm_u else 1.0
    p -= lr * u


UPDATES: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "SGD": (_sgd, ("buf",)),
    "Adagrad": (_adagrad, ("sum",)),
    "RMSprop": (_rmsprop, ("v",)),
    "Adam": (_adam, ("m", "v")),
    "AdamW": (_adamw, ("m", "v")),
    "Adadelta": (_adadelta, ("v", "u")),
    "Adamax": (_adamax, ("m", "u")),
    "NAdam": (_nadam, ("m", "v")),
    "RAdam": (_radam, ("m", "v")),
    "Rprop": (_rprop, ("prev", "step_size")),
    "ASGD": (_asgd, ("ax",)),
    "Lion": (_lion, ("m",)),
    "LARS": (_lars, ("buf",)),
    "LAMB": (_lamb, ("m", "v")),
}
"""By the class in fastopt: the update of one array, whose options have torch's names, and its states."""


class Plain(Contender):
    """NumPy, eagerly."""

    optimizers = tuple(UPDATES)
    dtypes = ("float32", "float64")

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        self.update, names = UPDATES[case.optimizer]
        self.params, self.grads, self.hyper, self.t = params, grads, case.hyper, 0
        self.gradients = list(grads.values())
        made = {name: zeros_like(params) for name in names}
        self.states: dict[str, State] = {array: {name: made[name][array] for name in names} for array in params}

    def step(self) -> None:  # noqa: D102
        self.t += 1
        for name, p in self.params.items():
            self.update(p, self.grads[name], self.states[name], self.t, **self.hyper)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]
