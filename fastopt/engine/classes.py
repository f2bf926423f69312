"""Constructors and classes that are made of a rule's record, in either front end."""

from __future__ import annotations

import functools
import inspect
import linecache
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any

from ..kernels.rules.rule import Option, Rule
from .options import USUAL


def keywords_of(init: Callable[..., None]) -> list[Parameter]:
    """The keyword-only arguments of a constructor."""
    return [p for p in inspect.signature(init, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]


def option_arguments(options: Mapping[str, Option], params: Any, lr: Any = float) -> list[Parameter]:
    """Parameters and options as arguments of a class; the types of two depend on the front end."""
    arguments = [Parameter("params", Parameter.POSITIONAL_OR_KEYWORD, annotation=params)]
    for name, (default, said, is_keyword, noted) in options.items():
        kind = Parameter.KEYWORD_ONLY if is_keyword else Parameter.POSITIONAL_OR_KEYWORD
        annotation: Any = lr if name == "lr" else _type_of(default, said)
        given = Parameter.empty if default is ... else default
        if not noted:
            arguments.append(Parameter(name, kind, default=given, annotation=annotation))
    return arguments


def _type_of(default: Any, said: Any) -> Any:
    if default is None:
        return (bool if said is bool else float) | None
    if isinstance(default, tuple):
        return tuple[tuple(map(type, default))]  # type: ignore[misc]
    return float if type(default) is int or default is ... else type(default)


def constructor(owner: str, arguments: Iterable[Parameter], begin: Callable[..., None]) -> Callable[..., None]:
    """A function ``__init__`` with these arguments, which calls ``begin(self, <all of them by name>)``.

    It is made of source, as dataclasses make theirs: what reads signatures finds every name, default and type, and what
    reads the source finds that. Of an argument that is given twice the first counts.
    """
    by_name: dict[str, Parameter] = {}
    for argument in arguments:
        by_name.setdefault(argument.name, argument)
    parameters = sorted(by_name.values(), key=lambda p: p.kind)
    listed = [
        f"{p.name}: {inspect.formatannotation(p.annotation)}" + f" = _defaults[{p.name!r}]" * (p.default is not p.empty)
        for p in parameters
    ]
    listed.insert(sum(p.kind is not p.KEYWORD_ONLY for p in parameters), "*")
    passed = ", ".join(f"{name}={name}" for name in by_name)
    source = f"def __init__(self, {', '.join(listed)}):\n    _begin(self, {passed})\n"
    namespace: dict[str, Any] = {"_begin": begin, "_defaults": {p.name: p.default for p in parameters}}
    file = f"<{owner}.__init__, made of the rule's record>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
    exec(compile(source, file, "exec"), namespace)
    init: Callable[..., None] = namespace["__init__"]
    init.__annotations__ = {**{p.name: p.annotation for p in parameters}, "return": None}
    init.__module__, init.__qualname__ = begin.__module__, f"{owner}.__init__"
    return init


@functools.cache
def class_of(rule: Rule, *bases: type) -> type[Any]:
    """The class of a rule of one's own, always the same."""
    if not isinstance(rule, Rule) or not rule.options:
        raise TypeError(f"fastopt.optimizer: rule must be what @fastopt.rule makes of a function, got {rule!r}.")
    made = type(rule.name, bases, {"__module__": rule.step.__module__, "rule": rule})
    ranges = {name: o.range or USUAL.get(name) for name, o in rule.options.items()}
    arguments = [
        f"    {name}: By default {o.default!r}" + (f", in {ranges[name]}." if ranges[name] else ".")
        for name, o in rule.options.items()
    ]
    shared = ", ".join(name for name in inspect.signature(made).parameters if name not in ranges)
    head = inspect.getdoc(rule.step) or f"The rule {rule.name}."
    state = ", ".join(("step", *rule.carried, *rule.state))
    made.__doc__ = "\n".join(
        [head, "", "Args:", *arguments, f"    {shared}: As for all classes.", "", f"State: {state}."]
    )
    return made
