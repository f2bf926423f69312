"""The loop that one writes by hand in Numba: ``prange``, one function per optimizer, one call per array."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from ..case import Case
from .base import Arrays, betas_of, zeros_like
from .limited import Limited

Scalars = tuple[float, ...]


@functools.cache
def loops() -> dict[str, Callable[..., None]]:
    """The update rules of the papers with ``@njit(parallel=True)``, and nothing else said to Numba.

    They are in a function so that this module can be imported without Numba. Scalars are of the arrays' dtype, and
    1 - beta is one of them: next to a literal, or to a float of Python's, Numba computes in float64.
    """
    from numba import njit, prange

    @njit(parallel=True)
    def sgd(p: Any, g: Any, lr: float, decay: float) -> None:
        for i in prange(p.size):
            p[i] -= lr * (g[i] + decay * p[i])

    @njit(parallel=True)
    def momentum(p: Any, g: Any, b: Any, lr: float, decay: float, mu: float) -> None:
        for i in prange(p.size):
            b[i] = mu * b[i] + (g[i] + decay * p[i])
            p[i] -= lr * b[i]

    @njit(parallel=True)
    def adagrad(p: Any, g: Any, s: Any, lr: float, decay: float, eps: float) -> None:
        for i in prange(p.size):
            d = g[i] + decay * p[i]
            s[i] += d * d
            p[i] -= lr * d / (math.sqrt(s[i]) + eps)

    @njit(parallel=True)
    def rmsprop(p: Any, g: Any, v: Any, lr: float, decay: float, eps: float, alpha: float, rest: float) -> None:
        for i in prange(p.size):
            d = g[i] + decay * p[i]
            v[i] = alpha * v[i] + rest * d * d
            p[i] -= lr * d / (math.sqrt(v[i]) + eps)

    @njit(parallel=True)
    def adam(
        p: Any, g: Any, m: Any, v: Any, lr: float, eps: float, l2: float, keep: float,
        beta1: float, rest1: float, beta2: float, rest2: float, correction1: float, correction2: float,
    ) -> None:  # fmt: skip
        for i in prange(p.size):
            d = g[i] + l2 * p[i]
            m[i] = beta1 * m[i] + rest1 * d
            v[i] = beta2 * v[i] + rest2 * d * d
            p[i] = keep * p[i] - lr * (m[i] / correction1) / (math.sqrt(v[i] / correction2) + eps)

    @njit(parallel=True)
    def lion(
        p: Any, g: Any, m: Any, lr: float, keep: float, beta1: float, rest1: float, beta2: float, rest2: float
    ) -> None:  # fmt: skip
        for i in prange(p.size):
            c = beta1 * m[i] + rest1 * g[i]
            p[i] *= keep
            if c > 0:
                p[i] -= lr
            elif c < 0:
                p[i] += lr
            m[i] = beta2 * m[i] + rest2 * g[i]

    both = {"Adam": adam, "AdamW": adam}
    return {"SGD": sgd, "momentum": momentum, "Adagrad": adagrad, "RMSprop": rmsprop, **both, "Lion": lion}


class NumbaLoop(Limited):
    """Numba's ``prange``, as one writes it by hand."""

    package = "numba"
    dtypes = ("float32", "float64")
    known: ClassVar[dict[str, tuple[str, ...]]] = {
        "SGD": ("lr", "momentum", "weight_decay"),
        "Adagrad": ("lr", "eps", "weight_decay"),
        "RMSprop": ("lr", "alpha", "eps", "weight_decay"),
        "Adam": ("lr", "betas", "eps", "weight_decay"),
        "AdamW": ("lr", "betas", "eps", "weight_decay"),
        "Lion": ("lr", "betas", "weight_decay"),
    }
    states: ClassVar[dict[str, int]] = {"SGD": 0, "Adam": 2, "AdamW": 2}
    """Number of states of the parameter's shape, where it is not 1."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import numba

        numba.set_num_threads(threads)
        self.case, self.params, self.t = case, params, 0
        self.gradients = list(grads.values())
        name = "momentum" if case.hyper.get("momentum") else case.optimizer
        self.loop = loops()[name]
        states = [zeros_like(params) for _ in range(self.states.get(name, 1))]
        # One dimension: of a contiguous array that is a view.
        self.arguments = [[arrays[key].reshape(-1) for arrays in (params, grads, *states)] for key in params]
        self.cast = np.dtype(case.dtype).type

    def step(self) -> None:  # noqa: D102
        self.t += 1
        scalars = [self.cast(value) for value in self.scalars()]
        for arrays in self.arguments:
            self.loop(*arrays, *scalars)

    def scalars(self) -> Scalars:
        """What a loop takes after its arrays, in its order."""
        name, hyper = self.case.optimizer, self.case.hyper
        lr, decay = hyper["lr"], hyper.get("weight_decay", 0.01 if name == "AdamW" else 0.0)
        if name == "SGD":
            return (lr, decay, hyper["momentum"]) if hyper.get("momentum") else (lr, decay)
        if name == "Adagrad":
            return lr, decay, hyper.get("eps", 1e-10)
        if name == "RMSprop":
            alpha = hyper.get("alpha", 0.99)
            return lr, decay, hyper.get("eps", 1e-8), alpha, 1 - alpha
        if name == "Lion":
            beta1, beta2 = hyper.get("betas", (0.9, 0.99))
            return lr, 1 - lr * decay, beta1, 1 - beta1, beta2, 1 - beta2
        beta1, beta2 = betas_of(hyper)
        l2, keep = (0.0, 1 - lr * decay) if name == "AdamW" else (decay, 1.0)
        corrections = 1 - beta1**self.t, 1 - beta2**self.t
        return lr, hyper.get("eps", 1e-8), l2, keep, beta1, 1 - beta1, beta2, 1 - beta2, *corrections

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]
