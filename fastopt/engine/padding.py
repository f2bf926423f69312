"""Whether zeros stay zeros: what a rule does to the padding of flat buffers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..kernels.registry import PREBUILT
from ..kernels.rules.rule import Options, Rule

STEPS = (1, 10, 1000, 100_000)
"""Steps that are tried: scalars depend on them. RAdam divides by eps from its sixth step on."""


def keeps_zeros(rule: Rule, options: Options) -> bool:
    """Whether a parameter of zeros stays zero while its gradients are zero, with these options."""
    if rule.keeps_zeros is not None:
        return rule.keeps_zeros
    if rule not in PREBUILT:
        return _try(rule, options.items())
    read = {name: options[name] for name in (*rule.options, *rule.initial.values()) if name in options}
    # Schedules change lr in every step; all that matters of it here is whether it is zero.
    return _known(rule, (*read.items(), ("lr", float(read["lr"] != 0.0))))


def _try(rule: Rule, items: Iterable[tuple[str, Any]]) -> bool:
    """Try it in float32, in which more is zero than in float64, with gradients of zero of either sign."""
    zero, options = np.float32(0.0), dict(items)
    initial = {name: np.float32(options[option]) for name, option in rule.initial.items()}
    try:
        with np.errstate(all="ignore"):
            for gradient in (zero, -zero):
                p, states = zero, [initial.get(name, zero) for name in rule.state]
                carry = rule.carry(options) if rule.carry else None
                for t in STEPS:
                    scalars = rule.scalars(t, options) if carry is None else rule.scalars(t, options, carry)
                    if carry is not None:
                        scalars, carry = scalars
                    p, *states = rule.step(p, gradient, *states, rule.Scalars(*map(np.float32, scalars)))  # type: ignore[arg-type]
                    if p != zero:
                        return False
    except Exception:  # Python's own floats raise where a kernel makes infinity or NaN; scalars may know fewer steps
        return False
    return True


_known = functools.lru_cache(256)(_try)
