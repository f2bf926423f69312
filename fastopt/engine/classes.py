"""The class of a rule's record, in either front end."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..kernels.rules.rule import Rule
from .options import USUAL


@dataclass(frozen=True, eq=False)
class Front:
    """What the classes of a front end are made of."""

    bases: tuple[type, ...]
    shared: Mapping[str, Any]  # keywords that all have, with their defaults
    arguments: Callable[..., dict[str, Any]]  # from ``locals()`` to what the first base takes


def class_of(rule: Rule, front: Front) -> type[Any]:
    """The class of a rule. Its constructor names all that it takes: options, and what all classes do."""
    if not isinstance(rule, Rule) or rule.defaults is None:
        raise TypeError(f"fastopt.optimizer: rule must be what @fastopt.rule makes of a function, got {rule!r}.")
    return _class_of(rule, front)


@functools.cache
def _class_of(rule: Rule, front: Front) -> type[Any]:
    assert rule.defaults is not None
    first, last = ("".join(f"{name}=_[{name!r}], " for name in names) for names in (rule.defaults, front.shared))
    body = "_super(_made, self).__init__(**_arguments(_locals()))"
    namespace: dict[str, Any] = {"_": {**rule.defaults, **front.shared}, "_arguments": front.arguments}
    namespace |= {"_super": super, "_locals": locals}  # no option begins with _
    exec(f"def __init__(self, params, {first}*, {last}): {body}", namespace)  # as dataclasses do: one like others
    said = {**dict.fromkeys(USUAL, "[0, inf)"), **rule.ranges}
    where = {n: f", in {said[n]}" if n in said else "" for n in rule.defaults}
    head = inspect.getdoc(rule.step) or f"The rule {rule.name}."
    listed = [f"    {n}: By default {default!r}{where[n]}." for n, default in rule.defaults.items()]
    lines = [head, "", "Args:", *listed, f"    params, {', '.join(front.shared)}: As for all classes.", ""]
    doc = "\n".join([*lines, f"State: {', '.join(('step', *rule.carried, *rule.state))}."])
    members = {"__doc__": doc, "__module__": rule.step.__module__, "rule": rule, "__init__": namespace["__init__"]}
    made = namespace["_made"] = type(rule.name, front.bases, members)
    return made
