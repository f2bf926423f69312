"""Every update rule by name: the one table that compiler, optimizers, tests and benchmarks read."""

from __future__ import annotations

from .rules import adadelta, adagrad, adam, adamax, asgd, lamb, lars, lion, nadam, radam, rmsprop, rprop, sgd
from .rules.rule import Rule

RULES: dict[str, Rule] = {
    rule.name: rule
    for family in (sgd, adagrad, rmsprop, adam, adadelta, adamax, nadam, radam, rprop, asgd, lion, lars, lamb)
    for rule in family.RULES
}
