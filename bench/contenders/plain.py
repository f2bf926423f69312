"""Update rules as one writes them in NumPy, array by array and operation by operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..case import Case
from .base import Arrays, Contender, betas_of, zeros_like

Array = NDArray[Any]
Hyper = Mapping[str, Any]


def _sgd(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> None:
    g = g + h.get("weight_decay", 0.0) * p
    if h.get("momentum"):
        s["buf"][:] = h["momentum"] * s["buf"] + g
        g = s["buf"]
    p -= h["lr"] * g


def _adagrad(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> None:
    s["sum"] += g**2
    p -= h["lr"] * g / (np.sqrt(s["sum"]) + h.get("eps", 1e-10))


def _rmsprop(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> None:
    alpha = h.get("alpha", 0.99)
    s["v"][:] = alpha * s["v"] + (1 - alpha) * g**2
    p -= h["lr"] * g / (np.sqrt(s["v"]) + h.get("eps", 1e-8))


def _adam(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> None:
    beta1, beta2 = betas_of(h)
    s["m"][:] = beta1 * s["m"] + (1 - beta1) * g
    s["v"][:] = beta2 * s["v"] + (1 - beta2) * g**2
    m_hat, v_hat = s["m"] / (1 - beta1**t), s["v"] / (1 - beta2**t)
    p -= h["lr"] * m_hat / (np.sqrt(v_hat) + h.get("eps", 1e-8))


def _coupled_adam(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> None:
    _adam(p, g + h["weight_decay"] * p if h.get("weight_decay") else g, s, t, h)


def _adamw(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> None:
    p *= 1 - h["lr"] * h.get("weight_decay", 0.01)
    _adam(p, g, s, t, h)


def _lion(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> None:
    beta1, beta2 = h.get("betas", (0.9, 0.99))
    p *= 1 - h["lr"] * h.get("weight_decay", 0.0)
    p -= h["lr"] * np.sign(beta1 * s["m"] + (1 - beta1) * g)
    s["m"][:] = beta2 * s["m"] + (1 - beta2) * g


UPDATES: dict[str, tuple[Callable[[Array, Array, dict[str, Array], int, Hyper], None], tuple[str, ...]]] = {
    "SGD": (_sgd, ("buf",)),
    "Adagrad": (_adagrad, ("sum",)),
    "RMSprop": (_rmsprop, ("v",)),
    "Adam": (_coupled_adam, ("m", "v")),
    "AdamW": (_adamw, ("m", "v")),
    "Lion": (_lion, ("m",)),
}


class Plain(Contender):
    """NumPy, eagerly."""

    optimizers = tuple(UPDATES)
    dtypes = ("float32", "float64")

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        self.update, names = UPDATES[case.optimizer]
        self.params, self.grads, self.hyper, self.t = params, grads, case.hyper, 0
        self.gradients = list(grads.values())
        made = {name: zeros_like(params) for name in names}
        self.states = {array: {name: made[name][array] for name in names} for array in params}

    def step(self) -> None:  # noqa: D102
        self.t += 1
        for name, p in self.params.items():
            self.update(p, self.grads[name], self.states[name], self.t, self.hyper)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]
