"""Rules of one's own: the record that functions make, checked once, and its class for arrays."""

from __future__ import annotations

import ast
import collections
import functools
import inspect
import keyword
import numbers
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .base import Optimizer
from .engine.classes import class_of
from .engine.options import OF_THE_OPTIMIZER, ranges_of
from .kernels.layout import CARRY, SCALAR_GROUP_WORDS
from .kernels.rules.rule import Option, Rule

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
            ``skip_nonfinite`` have Numba compile it, where every return must be a dict display.
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
        first = None if carry is None else _carried(carry, checked, states, where)
        given, asked = _given(scalars, checked, first, where)
        numeric = [n for n, v in options.items() if isinstance(v, numbers.Real)]
        for n in options.keys() - numeric:
            if n not in asked or n in starts.values():
                needed = "initial needs one" if n in starts.values() else "scalars must make numbers of it"
                raise TypeError(f"{where}the option {n} is {options[n]!r}, which is no number: {needed}.")

        fields = (*dict.fromkeys((*numeric, *given)), *(["ratio"] if ratio is not None else []))
        if not fields:
            raise ValueError(f"{where}it has no options: give it a number, such as lr.")
        Scalars: Any = collections.namedtuple(f"{called}_scalars", fields)  # type: ignore[misc]
        values = {**checked, **given, "ratio": 1.0}
        arguments = ("p", "g", *states, "h")
        some = np.linspace(0.5, 0.75, 2 + len(states), dtype=np.float32)
        result = _tried(step, "it", arguments, (*some, Scalars(*(np.float32(values[n]) for n in fields))), where)
        if result is not ... and not (isinstance(result, tuple) and len(result) == 1 + len(states)):
            raise TypeError(f"{where}it must return a tuple ({', '.join(['p', *states])}), got {result!r}.")
        if terms is not None:
            h = types.SimpleNamespace(**{n: np.float32(values[n]) for n in fields if n != "ratio"})
            result = _tried(terms, "terms", arguments, (*some, h), where)
            if result is not ... and not isinstance(result, tuple):
                raise TypeError(f"{where}terms must return a tuple of numbers, got {result!r}.")
            if not any(isinstance(x, int) for pair in pairs for x in pair):
                raise ValueError(f"{where}terms are given, but products have no number of one.")
        if ratio is not None:
            wide = Scalars(*(float(values[n]) for n in fields))
            result = _tried(ratio, "ratio", ("sums", "h"), ((1.0,) * len(pairs), wide), where)
            if result is not ... and not isinstance(result, numbers.Real):
                raise TypeError(f"{where}ratio must return a number, got {result!r}.")
        return Rule(
            *(str(called), step, Scalars, _formed(scalars, Scalars, given, where), states, starts),
            carry=None if carry is None else _annotated(carry, type(first)),
            options=declared,
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


def _tried(function: Any, part: str, names: tuple[str, ...], values: tuple[Any, ...], where: str) -> Any:
    """What a function returns for these arguments; ... where they may be no numbers that it can compute with."""
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{where}{part} must be a Python function of ({', '.join(names)}), got {function!r}.")
    signature, compiled = inspect.signature(function), names[0] == "p"
    try:
        signature.bind(*values)
    except TypeError:
        raise TypeError(f"{where}{part} must take ({', '.join(names)}), but it takes {signature}.") from None
    literals = [x for x in function.__code__.co_consts if isinstance(x, float)]
    if compiled and literals:
        raise TypeError(
            f"{where}{part} has the literal {literals[0]}, which would promote float32 to float64: make it an option, "
            "or a number that scalars returns."
        )
    try:
        with np.errstate(all="ignore"):
            return function(*values)
    except Exception as error:
        if isinstance(error, (ArithmeticError, ValueError)) and (compiled or part == "ratio"):
            return ...
        raise TypeError(f"{where}{part} cannot be computed: {type(error).__name__}: {error}") from error


def _carried(carry: Any, options: Mapping[str, Any], states: tuple[str, ...], where: str) -> Any:
    """What is carried into the first step."""
    first = _tried(carry, "carry", ("options",), (options,), where)
    names = getattr(first, "_fields", ())
    if not names or len(names) > SCALAR_GROUP_WORDS - CARRY:
        raise TypeError(
            f"{where}carry must return a NamedTuple of at most {SCALAR_GROUP_WORDS - CARRY} numbers, got {first!r}."
        )
    _check_names(names, "a number carried", where, {*OF_STATES, *states})
    return first


def _given(scalars: Any, options: Mapping[str, Any], first: Any, where: str) -> tuple[Mapping[str, Any], set[str]]:
    """What ``scalars`` returns in the first step, and the options that it reads."""
    if scalars is None:
        if first is not None:
            raise TypeError(f"{where}carry needs scalars, which reads and returns it.")
        return {}, set()
    asked = _Asked(options)
    arguments = (1, asked) if first is None else (1, asked, first)
    given = _tried(scalars, "scalars", ("t", "options", "carry")[: len(arguments)], arguments, where)
    if first is not None:
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], type(first))):
            raise TypeError(f"{where}scalars must return (dict, {type(first).__name__}), got {given!r}.")
        given = given[0]
    if not isinstance(given, dict) or not all(isinstance(x, numbers.Real) for x in given.values()):
        raise TypeError(f"{where}scalars must return a dict of numbers, got {given!r}.")
    _check_names(given, "a scalar", where, OF_SCALARS)
    return given, asked.names


class _Asked(collections.UserDict[str, Any]):
    """Options that remember which of them were read."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)


def _annotated(carry: Any, Carry: type) -> Any:
    def start(options: Any) -> Any:
        return carry(options)

    start.__annotations__["return"] = Carry
    return start


def _formed(scalars: Any, Scalars: Any, given: Mapping[str, Any], where: str) -> Any:
    """The function ``(t, options) -> Scalars`` of a rule."""
    sources = ["1.0" if name == "ratio" else f"options[{name!r}]" for name in Scalars._fields]
    if scalars is None:
        return eval(f"lambda t, options: Scalars({', '.join(sources)})", {"Scalars": Scalars})
    compiled = compilable(scalars, Scalars, given)
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


def compilable(scalars: Any, Scalars: Any, given: Mapping[str, Any]) -> Any:
    """``scalars`` with its dicts made into ``Scalars``, whose other fields are options; None where that cannot be.

    It is made of the source, where every return is a dict display with the names of ``given``.
    """
    code = scalars.__code__
    definition = _definition(scalars)
    if definition is None or len(definition.args.args) < 2 or scalars.__kwdefaults__ or not _ends(definition.body):
        return None
    options = definition.args.args[1].arg
    for node in list(ast.walk(definition)):
        if isinstance(node, ast.Name) and node.id == options and isinstance(node.ctx, ast.Store):
            return None
        if isinstance(node, ast.Return):
            pair = node.value.elts if isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2 else None
            entries = _entries(pair[0] if pair else node.value)
            if entries.keys() != given.keys():
                return None
            texts = {name: "1.0" if name == "ratio" else f"{options}[{name!r}]" for name in Scalars._fields}
            fields = [entries.get(name) or ast.parse(text, mode="eval").body for name, text in texts.items()]
            made = ast.Call(ast.Name(MADE, ast.Load()), fields, [])
            node.value = ast.Tuple([made, pair[1]], ast.Load()) if pair else made
    changed = _code(definition, (*code.co_freevars, MADE), code.co_filename)
    cells = dict(zip(code.co_freevars, scalars.__closure__ or (), strict=True)) | {MADE: types.CellType(Scalars)}
    closure = tuple(cells[name] for name in changed.co_freevars)
    return types.FunctionType(changed, scalars.__globals__, scalars.__name__, scalars.__defaults__, closure)


def _definition(function: Any) -> Any:
    """The definition of a function, or of a lambda as one, if its source is there and is what was compiled."""
    code = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, SyntaxError, TypeError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            for argument in node.args.args:
                argument.annotation = None
            definition: Any = ast.parse("def scalars(): pass").body[0]
            definition.args = node.args
            definition.body = [ast.Return(node.body)] if isinstance(node, ast.Lambda) else node.body
            first = min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))
            if first == code.co_firstlineno:
                seen = _code(definition, code.co_freevars, code.co_filename)
                if (seen.co_code, seen.co_names, seen.co_consts) == (code.co_code, code.co_names, code.co_consts):
                    return definition
    return None


def _ends(body: list[ast.stmt]) -> bool:
    """Whether statements end with a return whatever happens."""
    last = body[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and _ends(last.body) and _ends(last.orelse)
    return isinstance(last, (ast.Return, ast.Raise))


def _entries(node: Any) -> dict[str, ast.expr]:
    """The entries of a dict display by their names; of other things none."""
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {key.value: value for key, value in zip(node.keys, node.values, strict=True)}  # type: ignore[union-attr]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): keyword.value for keyword in node.keywords}
    return {}


def _code(definition: Any, free: Sequence[str], file: str) -> types.CodeType:
    """The code of a function with these free variables."""
    module = ast.parse(f"def around({', '.join(free)}): pass")
    module.body[0].body = [definition]  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(module), file, "exec", dont_inherit=True)
    for _ in range(2):
        code = next(x for x in code.co_consts if isinstance(x, types.CodeType))
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
