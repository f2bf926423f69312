"""Averaged stochastic gradient descent (Polyak and Juditsky 1992)."""

from typing import Any, NamedTuple

from .rule import NONNEGATIVE, Option, Options, Rule


class AsgdCarry(NamedTuple):
    eta: float
    mu: float


class AsgdScalars(NamedTuple):
    eta: float
    shrink: float  # 1 - lambd eta
    mu: float
    one_minus_mu: float
    weight_decay: float


def asgd(p: Any, g: Any, ax: Any, h: AsgdScalars) -> tuple[Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    p = h.shrink * p - h.eta * g
    return p, h.mu * p + h.one_minus_mu * ax if h.one_minus_mu else p


def asgd_scalars(t: int, o: Options, carry: AsgdCarry) -> tuple[AsgdScalars, AsgdCarry]:
    eta, mu = carry.eta, carry.mu
    scalars = AsgdScalars(eta, 1.0 - o["lambd"] * eta, mu, 1.0 - mu, o["weight_decay"])
    # As in torch, a step prepares the eta and mu of the next one.
    lr = o["lr"]
    return scalars, AsgdCarry(lr / (1.0 + o["lambd"] * lr * t) ** o["alpha"], 1.0 / max(1.0, t - o["t0"]))


OPTIONS = {
    "lr": Option(1e-2),
    "lambd": Option(1e-4, NONNEGATIVE),
    "alpha": Option(0.75, NONNEGATIVE),
    "t0": Option(1e6, "[0, inf]"),
    "weight_decay": Option(0.0),
}


def start(o: Options) -> AsgdCarry:
    return AsgdCarry(o["lr"], 1.0)


RULES = (Rule("asgd", asgd, AsgdScalars, asgd_scalars, ("ax",), carry=start, options=OPTIONS),)
