"""AdaGrad (Duchi, Hazan and Singer 2011, JMLR 12)."""

import math
from typing import Any, NamedTuple

from .rule import NONNEGATIVE, SWITCH, Option, Options, Rule


class AdagradScalars(NamedTuple):
    clr: float  # lr / (1 + (t - 1) lr_decay)
    weight_decay: float
    eps: float
    eps_inside: float  # one of the two epsilons is zero, and adding zero is exact


def adagrad(p: Any, g: Any, s: Any, h: AdagradScalars) -> tuple[Any, Any]:
    g = g + h.weight_decay * p if h.weight_decay else g
    s = s + g * g
    return p - h.clr * g / (math.sqrt(s + h.eps_inside) + h.eps), s


def adagrad_scalars(t: int, o: Options) -> AdagradScalars:
    outside, inside = (0.0, o["eps"]) if o["eps_inside_sqrt"] else (o["eps"], 0.0)
    return AdagradScalars(o["lr"] / (1.0 + (t - 1) * o["lr_decay"]), o["weight_decay"], outside, inside)


OPTIONS = {
    "lr": Option(1e-2),
    "lr_decay": Option(0.0, NONNEGATIVE),
    "weight_decay": Option(0.0),
    "initial_accumulator_value": Option(0.0, NONNEGATIVE),
    "eps": Option(1e-10),
    "eps_inside_sqrt": SWITCH,
}

START = {"sum": "initial_accumulator_value"}

RULES = (Rule("adagrad", adagrad, AdagradScalars, adagrad_scalars, ("sum",), START, options=OPTIONS),)
