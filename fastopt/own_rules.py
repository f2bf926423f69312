"""Rules of one's own: the record that functions make, checked once, and its class for arrays."""

from __future__ import annotations

import ast
import collections
import functools
import inspect
import keyword
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .base import Optimizer
from .engine.classes import class_of
from .engine.options import OF_THE_OPTIMIZER, ranges_of
from .kernels.rules.rule import Option, Rule, tried

OF_STATES = {"step", "params", "param_names", "master_param", "ema", "slow_param"}
OF_SCALARS = {"ratio", "stretch"}
OF_GROUPS = {"self", "params", "param_names", "maximize", "capturable", "foreach", "fused", "differentiable"}
OF_GROUPS |= {"initial_lr", "lr_at", "max_norm", "ema_decay", "ema_warmup", *OF_THE_OPTIMIZER, *OF_SCALARS}
"""Names that mean something else, or will."""

MADE = "made_scalars"


def rule(
    state: Iterable[str] = (),
    options: Mapping[str, Any] = types.MappingProxyType({}),
    *,
    name: str | None = None,
    scalars: Callable[..., Any] | None = None,
    terms: Callable[..., tuple[Any, ...]] | None = None,
    products: Iterable[tuple[str | int, str | int]] = (),
    ratio: Callable[..., float] | None = None,
    initial: Mapping[str, str] | None = None,
    carry: Callable[..., Any] | None = None,
    ranges: Mapping[str, Any] | None = None,
    keeps_zeros: bool | None = None,
) -> Callable[[Callable[..., tuple[Any, ...]]], Rule]:
    """Make a ``Rule`` of a function ``(p, g, *state, h) -> (p, *state)``, which Numba compiles on first use.

    p (the float32 master where there is one), g (unscaled, clipped, negated by ``maximize``), states and the fields of
    ``h`` are numbers of the compute dtype: float64 for float64 parameters, else float32. The function has no literals,
    which would promote float32 to float64: make them options or scalars. ``h`` has every option that is a number or a
    flag, what ``scalars`` returns, and ``h.ratio`` where there is a ratio. Pass the rule to ``fastopt.optimizer`` or
    ``fastopt.torch.optimizer`` for a class. A rule's classes and kernels stay until the process ends.

    Args:
        state: Names of the state arrays, which have the shapes of their parameters and begin at zero.
        options: Options of a param group and their defaults, in the order of the class's arguments. One that is neither
            number nor flag (a tuple, None) must be read by ``scalars``.
        name: Name of the rule and of its classes; the function's by default.
        scalars: Function ``(t, options) -> dict`` of further numbers for ``h``, for step t (from 1), formed in float64
            and rounded once. One with the name of an option takes its place. On a GPU, ``capturable`` and
            ``skip_nonfinite`` have Numba compile it: then it is a ``def`` in a file whose returns are dict displays.
        terms: Function ``(p, g, *state, h) -> (x, ...)`` of p and states before the step. Its h has no ratio.
        products: At most four pairs whose products are summed over each parameter in float64: numbers of terms, "p" and
            "g" for what is stored. A sum with "g" is multiplied by the gradient's multiplier, once for each "g".
        ratio: Function ``(sums, h) -> float`` in float64, in which literals are allowed, of the sums in the order of
            ``products``; for every parameter, whatever its dimension. The rule finds it as ``h.ratio``.
        initial: For a state that does not begin at zero, the option that fills it.
        carry: Function ``(options) -> NamedTuple`` of numbers that a parameter carries from step to step, at most four,
            before step 1. ``scalars`` is then ``(t, options, carry) -> (dict, carry)``. They are saved by name.
        ranges: Range of an option: an interval such as "[0, 1)", or a tuple of them. ``lr``,
            ``weight_decay`` and ``eps`` are in [0, inf) by default, other numbers in (-inf, inf).
        keeps_zeros: Whether zeros with gradients of zero stay zeros; None: found out by trying.

    Raises:
        TypeError, ValueError: What is wrong with which argument, where the function is defined. A wrong dtype, of a
            whole number as literal, say, only shows in the first step, which then writes nothing.

    Example:
        >>> import math, numpy as np, fastopt
        >>> def ratio(sums, h):
        ...     return math.sqrt(sums[0] / sums[1]) if sums[0] > 0.0 and sums[1] > 0.0 else 1.0
        >>> def update(p, g, m, h):
        ...     return (h.momentum * m + g,)
        >>> options = {"lr": 0.1, "momentum": 0.9}
        >>> @fastopt.rule(("m",), options, terms=update, products=(("p", "p"), (0, 0)), ratio=ratio)
        ... def normed(p, g, m, h):
        ...     m = h.momentum * m + g
        ...     return p - h.lr * h.ratio * m, m
        >>> Normed = fastopt.optimizer(normed)
        >>> w = np.array([3.0, 4.0])
        >>> info = Normed([w], lr=0.5).step([np.array([0.0, 2.0])])  # the ratio is 5 / 2
        >>> w.tolist()
        [3.0, 1.5]
    """

    if callable(state):
        raise TypeError("fastopt.rule: write @fastopt.rule(state, options), with the names of states and the defaults.")

    def decorate(step: Callable[..., tuple[Any, ...]]) -> Rule:
        called = name if name is not None else getattr(step, "__name__", step)
        where = f"Rule {called!r}: "
        _check_names([called], "a rule", where)
        if isinstance(state, str) or not isinstance(state, Iterable):
            raise TypeError(f"{where}state must be a tuple of names, got {state!r}.")
        if not isinstance(options, Mapping):
            raise TypeError(f"{where}options must be a dict of names and defaults, got {options!r}.")
        _check_names(states := tuple(state), "a state", where, OF_STATES)
        _check_names(options, "an option", where, OF_GROUPS)
        said, starts, pairs = {**(ranges or {})}, {**(initial or {})}, _pairs(products, where)
        for argument, named in (("ranges", said), ("initial", starts.values())):
            for each in named:
                if each not in options:
                    raise ValueError(f"{where}{argument} names the option {each!r}; options are {', '.join(options)}.")
        try:
            declared = {n: Option(v, said.get(n)) for n, v in options.items()}
            checks = ranges_of(declared)
        except ValueError as error:
            raise ValueError(f"{where}ranges: {error}") from None
        checked = {n: checks[n](v, where + n) if n in checks else v for n, v in options.items()}
        given = _given(scalars, carry, checked, {*OF_STATES, *states}, where)
        numeric = [n for n, v in options.items() if isinstance(v, numbers.Real)]
        for n in options.keys() - numeric:
            if scalars is None or n in starts.values():
                needed = "initial needs one" if n in starts.values() else "scalars must make numbers of it"
                raise TypeError(f"{where}the option {n} is {options[n]!r}, which is no number: {needed}.")

        fields = (*dict.fromkeys((*numeric, *given)), *(["ratio"] if ratio is not None else []))
        if not fields:
            raise ValueError(f"{where}it has no options: give it a number, such as lr.")
        if terms is not None and not any(isinstance(x, int) for pair in pairs for x in pair):
            raise ValueError(f"{where}terms are given, but products have no number of one.")
        Scalars: Any = collections.namedtuple(f"{called}_scalars", fields)  # type: ignore[misc]
        values = {**checked, **given, "ratio": 1.0}
        some = dict.fromkeys(("p", "g", *states), np.float32(0.75))
        result = tried(step, "it", where, {**some, "h": Scalars(*(np.float32(values[n]) for n in fields))})
        if result is not ... and not (isinstance(result, tuple) and len(result) == 1 + len(states)):
            raise TypeError(f"{where}it must return a tuple ({', '.join(['p', *states])}), got {result!r}.")
        if ratio is not None:
            h = Scalars(*(float(values[n]) for n in fields))
            result = tried(ratio, "ratio", where, {"sums": (1.0,) * len(pairs), "h": h})
            if result is not ... and not isinstance(result, numbers.Real):
                raise TypeError(f"{where}ratio must return a number, got {result!r}.")
        return Rule(
            *(str(called), step, Scalars, _formed(scalars, Scalars, given, where), states, starts, carry, declared),
            terms=terms,
            products=pairs,
            ratio=ratio,
            keeps_zeros=keeps_zeros,
        )

    return decorate


def _check_names(names: Iterable[Any], kind: str, where: str, taken: Iterable[str] = ()) -> None:
    seen = {*taken}
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"{where}{name!r} cannot be the name of {kind}: needed is an identifier.")
        if name in seen:
            raise ValueError(f"{where}{name!r} cannot be the name of {kind}: it is taken.")
        seen.add(name)


def _pairs(products: Any, where: str) -> tuple[Any, ...]:
    sequences = list, tuple
    if not isinstance(products, sequences) or not all(isinstance(x, sequences) and len(x) == 2 for x in products):
        raise TypeError(f'{where}products must be pairs such as (("p", "p"), (0, 0)), got {products!r}.')
    return tuple(map(tuple, products))


def _given(scalars: Any, carry: Any, options: Mapping[str, Any], taken: set[str], where: str) -> Mapping[str, Any]:
    """What ``scalars`` returns in the first step."""
    arguments: dict[str, Any] = {"t": 1, "options": options}
    if carry is not None:
        first = arguments["carry"] = tried(carry, "carry", where, {"options": options})
        if not getattr(first, "_fields", ()):
            raise TypeError(f"{where}carry must return a NamedTuple of numbers, got {first!r}.")
        _check_names(first._fields, "a number carried", where, taken)
        if scalars is None:
            raise TypeError(f"{where}carry needs scalars, which reads and returns it.")
    if scalars is None:
        return {}
    given = tried(scalars, "scalars", where, arguments)
    if carry is not None:
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], type(first))):
            raise TypeError(f"{where}scalars must return (dict, {type(first).__name__}), got {given!r}.")
        given = given[0]
    if not isinstance(given, dict) or not all(isinstance(x, numbers.Real) for x in given.values()):
        raise TypeError(f"{where}scalars must return a dict of numbers, got {given!r}.")
    _check_names(given, "a scalar", where, OF_SCALARS)
    return given


def _formed(scalars: Any, Scalars: Any, given: Mapping[str, Any], where: str) -> Any:
    """The function ``(t, options) -> Scalars`` of a rule."""
    if scalars is None:
        fields = ("1.0" if name == "ratio" else f"options[{name!r}]" for name in Scalars._fields)
        return eval(f"lambda t, options: Scalars({', '.join(fields)})", {"Scalars": Scalars})
    compiled = compilable(scalars, Scalars, given, where)
    if compiled is not None:
        return compiled

    @functools.wraps(scalars)
    def formed(t: int, options: Any, *carry: Any) -> Any:
        returned, *after = scalars(t, options, *carry) if carry else (scalars(t, options),)
        if not isinstance(returned, dict) or returned.keys() != given.keys():
            raise ValueError(
                f"{where}scalars returned {returned!r} in step {t}; needed is a dict of {', '.join(given)}."
            )
        values = {**options, "ratio": 1.0, **returned}
        h = Scalars(*(values[name] for name in Scalars._fields))
        return (h, *after) if carry else h

    return formed


# --- scalars in a form that Numba compiles ---------------------------------------------------------------------------


def compilable(scalars: Any, Scalars: Any, given: Mapping[str, Any], where: str) -> Any:
    """``scalars`` with its dicts made into ``Scalars``, whose other fields are options; None where that cannot be.

    It is made of the source, where every return is a dict display with the names of ``given``.
    """
    code, definition = scalars.__code__, _definition(scalars)
    if definition is None or code.co_argcount < 2 or scalars.__kwdefaults__:
        return None
    options = code.co_varnames[1]
    nodes: Any = [*ast.walk(definition)]
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == options and isinstance(node.ctx, ast.Store):
            return None
        if isinstance(node, ast.Return):
            returned, *carry = getattr(node.value, "elts", None) or [node.value]
            if not isinstance(returned, ast.Dict):
                return None
            entries = {getattr(key, "value", None): x for key, x in zip(returned.keys, returned.values, strict=True)}
            if entries.keys() != given.keys():
                return None
            texts = {name: "1.0" if name == "ratio" else f"{options}[{name!r}]" for name in Scalars._fields}
            fields = [entries.get(name) or ast.parse(text, mode="eval").body for name, text in texts.items()]
            made = ast.Call(ast.Name(MADE, ast.Load()), fields, [])
            node.value = ast.Tuple([made, *carry], ast.Load()) if carry else made
    definition.body += ast.parse(f"raise ValueError({where + 'scalars returned None.'!r})").body
    changed = _code(definition, (*code.co_freevars, MADE), code.co_filename)
    cells = dict(zip(code.co_freevars, scalars.__closure__ or (), strict=True)) | {MADE: types.CellType(Scalars)}
    closure = tuple(cells[name] for name in changed.co_freevars)
    return types.FunctionType(changed, scalars.__globals__, scalars.__name__, scalars.__defaults__, closure)


def _definition(function: Any) -> Any:
    """The definition of a function, or of a lambda as one; None where its source is not there or is another's."""
    code = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, SyntaxError, TypeError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            definition: Any = ast.parse("def scalars(): pass").body[0]
            definition.args = node.args
            definition.body = [ast.Return(node.body)] if isinstance(node, ast.Lambda) else node.body
            if min(x.lineno for x in (node, *getattr(node, "decorator_list", ()))) == code.co_firstlineno:
                seen = _code(definition, code.co_freevars, code.co_filename)
                if (seen.co_code, seen.co_names, seen.co_consts) == (code.co_code, code.co_names, code.co_consts):
                    return definition
    return None


def _code(definition: Any, free: Iterable[str], file: str) -> types.CodeType:
    """The code of a function with these free variables."""
    module: Any = ast.parse(f"def around({', '.join(free)}): pass")
    module.body[0].body = [definition]
    code = compile(ast.fix_missing_locations(module), file, "exec", dont_inherit=True)
    for name in ("around", definition.name):
        code = next(x for x in code.co_consts if isinstance(x, types.CodeType) and x.co_name == name)
    return code


# --- the class -------------------------------------------------------------------------------------------------------


def optimizer(rule: Rule) -> type[Any]:
    """The class of optimizers ``C(params, <options>, *, maximize, capturable, <options of the step>)`` by a rule.

    Args:
        rule: What ``@fastopt.rule`` made.

    Returns:
        A class like those of the library: groups, clipping, flat buffers, checkpoints, GPUs. It is named as the rule,
        and always the same for a rule.

    Raises:
        TypeError: ``rule`` is none, or was made without defaults for its options.
    """
    return class_of(rule, Optimizer)
