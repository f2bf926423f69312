"""Stochastic gradient descent: plain, with momentum (Polyak 1964), with Nesterov's momentum (Sutskever et al. 2013)."""

from typing import Any, NamedTuple

from .rule import SWITCH, UP_TO_ONE, Option, Options, Rule


class SgdScalars(NamedTuple):
    lr: float
    weight_decay: float


def sgd(p: Any, g: Any, h: SgdScalars) -> tuple[Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    return (p - h.lr * g,)


def sgd_scalars(t: int, o: Options) -> SgdScalars:
    return SgdScalars(o["lr"], o["weight_decay"])


class MomentumScalars(NamedTuple):
    mu: float
    inner: float  # weight of the gradient inside the buffer: 1 - dampening, times lr where lr lives in the buffer
    outer: float  # weight of the buffer in the step: lr, or 1 where lr lives in the buffer
    nesterov: float  # whether the step looks ahead
    weight_decay: float


def momentum(p: Any, g: Any, b: Any, h: MomentumScalars) -> tuple[Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    d = h.inner * g
    b = h.mu * b + d
    return p - h.outer * (d + h.mu * b if h.nesterov else b), b


def momentum_scalars(t: int, o: Options) -> MomentumScalars:
    # The first gradient enters undamped, as in torch: the buffer starts as that gradient, not as a fraction of it.
    inner, outer = 1.0 if t == 1 else 1.0 - o["dampening"], o["lr"]
    if o["lr_in_momentum"]:
        inner, outer = outer * inner, 1.0
    return MomentumScalars(o["momentum"], inner, outer, float(o["nesterov"]), o["weight_decay"])


OPTIONS = {
    "lr": Option(1e-3),
    "momentum": Option(0.0, UP_TO_ONE),
    "dampening": Option(0.0, UP_TO_ONE),
    "weight_decay": Option(0.0),
    "nesterov": Option(False),
    "lr_in_momentum": SWITCH,
}


def variant(o: Options) -> str:
    return "momentum" if o["momentum"] else "sgd"


def conflict(o: Options) -> str | None:
    if o["nesterov"] and (o["momentum"] == 0.0 or o["dampening"] != 0.0):
        given = f"got momentum={o['momentum']} and dampening={o['dampening']}."
        return f"nesterov=True needs momentum > 0 and dampening 0, {given}"
    return None


RULES = (
    Rule("sgd", sgd, SgdScalars, sgd_scalars, options=OPTIONS, variant=variant, conflict=conflict),
    Rule("momentum", momentum, MomentumScalars, momentum_scalars, ("momentum_buffer",), options=OPTIONS),
)
