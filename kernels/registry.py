"""Every update rule by name: the one table that compiler, optimizers, tests and benchmarks read."""

from __future__ import annotations

from .epilogues import AVERAGE, ROUND
from .rules import adadelta, adagrad, adam, adamax, asgd, lamb, lars, lion, nadam, radam, rmsprop, rprop, sgd
from .rules.rule import Options, Rule

FAMILIES = tuple(
    family.RULES
    for family in (sgd, adagrad, rmsprop, adam, adadelta, adamax, nadam, radam, rprop, asgd, lion, lars, lamb)
)

RULES: dict[str, Rule] = {rule.name: rule for family in FAMILIES for rule in family}

PREBUILT = {*RULES.values(), ROUND, AVERAGE}
"""What kernels are compiled of ahead of time."""


def variant(rule: Rule, options: Options) -> Rule:
    """The rule that these options select: one of its variants, if it has any."""
    return RULES[rule.variant(options)] if rule.variant is not None else rule


def family_states(rule: Rule) -> set[str]:
    """States of a rule and of its variants."""
    family = next((family for family in FAMILIES if rule in family), (rule,))
    return {name for one in family for name in one.state}
