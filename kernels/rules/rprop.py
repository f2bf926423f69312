"""Rprop: resilient backpropagation, the variant without weight backtracking (Riedmiller and Braun 1993; iRprop- of
Igel and Husken 2000)."""

from typing import Any, NamedTuple

from .rule import POSITIVE, Option, Options, Rule


class RpropScalars(NamedTuple):
    eta_minus: float
    eta_plus: float
    step_min: float
    step_max: float
    one: float  # literals would promote float32 to float64
    zero: float


def rprop(p: Any, g: Any, prev: Any, size: Any, h: RpropScalars) -> tuple[Any, Any, Any]:
    agreement = g * prev
    factor = h.eta_plus if agreement > h.zero else (h.eta_minus if agreement < h.zero else h.one)
    size = size * factor
    size = h.step_min if size < h.step_min else size
    size = h.step_max if size > h.step_max else size
    g = h.zero if agreement < h.zero else g
    sign = h.one if g > h.zero else (-h.one if g < h.zero else h.zero)  # of NaN: zero, as in torch
    return p - sign * size, g, size


def rprop_scalars(t: int, o: Options) -> RpropScalars:
    (eta_minus, eta_plus), (step_min, step_max) = o["etas"], o["step_sizes"]
    return RpropScalars(eta_minus, eta_plus, step_min, step_max, 1.0, 0.0)


OPTIONS = {
    "lr": Option(1e-2),
    "etas": Option((0.5, 1.2), ("(0, 1)", "(1, inf)")),
    "step_sizes": Option((1e-6, 50.0), (POSITIVE, POSITIVE)),
}


def conflict(o: Options) -> str | None:
    smallest, largest = o["step_sizes"]
    wrong = f"step_sizes[0] must not exceed step_sizes[1], got {(smallest, largest)}."
    return wrong if smallest > largest else None


STATE, START = ("prev", "step_size"), {"step_size": "lr"}

RULES = (Rule("rprop", rprop, RpropScalars, rprop_scalars, STATE, START, options=OPTIONS, conflict=conflict),)
