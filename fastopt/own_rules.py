"""Rules of one's own: the record that functions make, checked once, and the class that a record makes."""

from __future__ import annotations

import collections
import functools
import inspect
import keyword
import numbers
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .base import Optimizer
from .device_scalars import compilable
from .engine.options import OF_THE_OPTIMIZER, USUAL, constructor_arguments, ranges_of
from .kernels.layout import CARRY, COHORT_WORDS
from .kernels.rules.rule import Rule

GROUP_FLAGS = {"maximize": False, "capturable": False}
OF_STATES = {"step", "params", "param_names", "master_param", "ema", "slow_param"}
OF_GROUPS = {"self", "params", "param_names", "maximize", "capturable", "foreach", "fused", "differentiable"}
OF_GROUPS |= {"initial_lr", "lr_at", "max_norm", "ema_decay", "ema_warmup", *OF_THE_OPTIMIZER}
OF_SCALARS = {"ratio", "stretch"}
OF_GROUPS |= OF_SCALARS
"""Names that mean something else, or will."""


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
    ``fastopt.torch.optimizer`` for a class.

    Args:
        state: Names of the state arrays, which have the shapes of their parameters and begin at zero.
        options: Options of a param group and their defaults, in the order of the class's arguments. One that is neither
            number nor flag (a tuple, None) must be read by ``scalars``.
        name: Name of the rule and of its classes; the function's by default.
        scalars: Function ``(t, options) -> dict`` of further numbers for ``h``, for step t (from 1), formed in float64
            and rounded once. One with the name of an option takes its place. On a GPU, ``capturable`` and
            ``skip_nonfinite`` have Numba compile it: then it is a ``def`` that returns a dict display.
        terms: Function ``(p, g, *state, h) -> (x, ...)`` of p and states before the step. Its h has no ratio.
        products: At most four pairs whose products are summed over each parameter in float64: numbers of terms, "p" and
            "g" for what is stored. A sum with "g" is multiplied by the gradient's multiplier, once for each "g".
        ratio: Function ``(sums, h) -> float`` in float64, in which literals are allowed, of the sums in the order of
            ``products``; for every parameter, whatever its dimension. The rule finds it as ``h.ratio``.
        initial: For a state that does not begin at zero, the option that fills it.
        carry: Function ``(options) -> NamedTuple`` of numbers that a parameter carries from step to step, at most four,
            before step 1. ``scalars`` is then ``(t, options, carry) -> (dict, carry)``. They are saved by name.
        ranges: Range of an option: an interval such as "[0, 1)", or a tuple of them. ``lr`` and ``weight_decay`` are
            in [0, inf) by default, other numbers in (-inf, inf).
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

    def decorate(step: Callable[..., tuple[Any, ...]]) -> Rule:
        called = name if name is not None else getattr(step, "__name__", step)
        where = f"Rule {called!r}: "
        _check_names([called], "name", where)
        if isinstance(state, str) or not isinstance(state, Iterable):
            raise TypeError(f"{where}state must be a tuple of names, got {state!r}.")
        states = tuple(state)
        if not isinstance(options, Mapping):
            raise TypeError(f"{where}options must be a dict of names and defaults, got {options!r}.")
        _check_names(states, "state", where, OF_STATES)
        _check_names(options, "option", where, OF_GROUPS)
        said, starts = {**(ranges or {})}, {**(initial or {})}
        for argument, named in (("ranges", said), ("initial", starts.values())):
            for each in named:
                if each not in options:
                    raise ValueError(f"{where}{argument} names the option {each!r}; options are {', '.join(options)}.")
        checks = ranges_of(options, said)
        checked = {n: checks[n](v, where + n) if n in checks else v for n, v in options.items()}
        numeric = [n for n, v in options.items() if isinstance(v, numbers.Real)]

        first = None if carry is None else _tried(carry, "carry", ("options",), (checked,), where)
        Carry = type(first)
        if carry is not None:
            if not hasattr(Carry, "_fields"):
                raise TypeError(f"{where}carry must return a NamedTuple of numbers, got {first!r}.")
            _check_names(Carry._fields, "number carried", where, {*OF_STATES, *states})
            if len(Carry._fields) > COHORT_WORDS - CARRY:
                raise ValueError(f"{where}at most {COHORT_WORDS - CARRY} numbers are carried, got {Carry._fields}.")
        asked = _Asked(checked)
        given: Any = {}
        if scalars is not None:
            arguments = (1, asked) if carry is None else (1, asked, first)
            given = _tried(scalars, "scalars", ("t", "options", "carry")[: len(arguments)], arguments, where)
            if carry is not None:
                if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Carry)):
                    raise TypeError(f"{where}scalars must return (dict, carry), as there is a carry, got {given!r}.")
                given = given[0]
            if not isinstance(given, dict) or not all(isinstance(x, numbers.Real) for x in given.values()):
                raise TypeError(f"{where}scalars must return a dict of numbers, got {given!r}.")
            _check_names(given, "scalar", where, OF_SCALARS)
        elif carry is not None:
            raise TypeError(f"{where}carry needs scalars, which reads and returns it.")
        for n, v in options.items():
            if n not in numeric and n not in asked.names:
                raise TypeError(f"{where}the option {n} is {v!r}, which is no number: scalars must read it.")
            if n not in numeric and n in starts.values():
                raise TypeError(f"{where}initial names the option {n}, which is {v!r}, no number.")

        pairs = _pairs(products, where)
        fields = (*dict.fromkeys((*numeric, *given)), *(("ratio",) if ratio is not None else ()))
        Scalars: Any = collections.namedtuple(f"{called}_scalars", fields)  # type: ignore[misc]
        Scalars.__module__ = __name__
        values = {**checked, **given, "ratio": 1.0}
        h = Scalars(*(np.float32(values[n]) for n in fields))
        some = tuple(map(np.float32, np.linspace(0.5, 0.75, 2 + len(states))))
        arguments = ("p", "g", *states, "h")
        result = _tried(step, "the rule", arguments, (*some, h), where, compiled=True)
        _check_tuple(result, ("p", *states), "the rule", where)
        if terms is not None:
            if not any(isinstance(x, int) for pair in pairs for x in pair):
                raise ValueError(f"{where}terms are given, but no number of a term is in products.")
            without = collections.namedtuple(
                "h", [n for n in fields if n != "ratio"]
            )(  # type: ignore[misc]
                *h[: len(fields) - (ratio is not None)]
            )
            _check_tuple(
                _tried(terms, "terms", arguments, (*some, without), where, compiled=True), None, "terms", where
            )
        if ratio is not None:
            wide = Scalars(*(float(values[n]) for n in fields))
            result = _tried(ratio, "ratio", ("sums", "h"), ((1.0,) * len(pairs), wide), where)
            if not isinstance(result, (numbers.Real, _Unknown)):
                raise TypeError(f"{where}ratio must return a number, got {result!r}.")
        return Rule(
            *(called, step, Scalars, _formed(scalars, Scalars, given, where), states, starts),
            carry=None if carry is None else _annotated(carry, Carry),
            options={n: len(v) if isinstance(v, tuple) else 1 for n, v in options.items() if _fits_gpu(v)},
            terms=terms,
            products=pairs,
            ratio=ratio,
            keeps_zeros=keeps_zeros,
            ranges=said,
            defaults={**options},
        )

    return decorate


class _Asked(Mapping[str, Any]):
    """Options that remember which of them were read."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)


class _Unknown:
    """What a function returns that cannot compute with the numbers it was tried with."""


def _check_names(names: Iterable[Any], kind: str, where: str, taken: Iterable[str] = ()) -> None:
    seen: set[str] = set()
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"{where}{name!r} cannot be the name of a {kind}: it must be an identifier.")
        if name in taken or name in seen:
            raise ValueError(f"{where}{name!r} cannot be the name of a {kind}: it is taken.")
        seen.add(name)


def _tried(
    function: Any, what: str, arguments: tuple[str, ...], values: tuple[Any, ...], where: str, *, compiled: bool = False
) -> Any:
    """What a function returns, if it can compute with these numbers; it must take so many, and not be wrong."""
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{where}{what} must be a Python function of ({', '.join(arguments)}), got {function!r}.")
    try:
        inspect.signature(function).bind(*values)
    except TypeError:
        raise TypeError(
            f"{where}{what} must take ({', '.join(arguments)}), but it takes {inspect.signature(function)}."
        ) from None
    if compiled:
        literals = [x for x in function.__code__.co_consts if isinstance(x, float)]
        if literals:
            raise TypeError(
                f"{where}{what} has the literal {literals[0]}, which would promote float32 to float64: make it an "
                "option, or a number that scalars returns."
            )
    try:
        with np.errstate(all="ignore"):
            return function(*values)
    except (ArithmeticError, ValueError):
        return _Unknown()
    except Exception as error:
        raise TypeError(f"{where}{what} cannot be computed: {type(error).__name__}: {error}") from error


def _check_tuple(result: Any, names: tuple[str, ...] | None, what: str, where: str) -> None:
    if isinstance(result, _Unknown):
        return
    if not isinstance(result, tuple) or (names is not None and len(result) != len(names)):
        expected = f"({', '.join(names)}{',' * (len(names) == 1)})" if names else "a tuple"
        raise TypeError(f"{where}{what} must return {expected}, got {result!r}.")


def _pairs(products: Any, where: str) -> tuple[Any, ...]:
    pairs = products if isinstance(products, (list, tuple)) else None
    if pairs is None or not all(isinstance(x, (list, tuple)) and len(x) == 2 for x in pairs):
        raise TypeError(f'{where}products must be pairs such as (("p", "p"), (0, 0)), got {products!r}.')
    return tuple(map(tuple, pairs))


def _fits_gpu(default: Any) -> bool:
    numbers_of = default if isinstance(default, tuple) else (default,)
    return all(x is None or isinstance(x, numbers.Real) for x in numbers_of)


def _annotated(carry: Any, Carry: type) -> Any:
    def start(options: Any) -> Any:
        return carry(options)

    start.__annotations__["return"] = Carry
    return start


def _formed(scalars: Any, Scalars: Any, given: Mapping[str, Any], where: str) -> Any:
    """The function ``(t, options) -> Scalars`` of a rule."""
    ratio = ("ratio",) if Scalars._fields[-1:] == ("ratio",) else ()
    names = Scalars._fields[: len(Scalars._fields) - len(ratio)]
    if scalars is None:
        numbers_of = ", ".join([*(f"options[{name!r}]" for name in names), *["1.0"] * len(ratio)])
        return eval(f"lambda t, options: Scalars({numbers_of})", {"Scalars": Scalars})
    compiled = compilable(scalars, Scalars, given)
    if compiled is not None:
        return compiled

    @functools.wraps(scalars)
    def formed(t: int, options: Any, *carry: Any) -> Any:
        returned, *carry_after = scalars(t, options, *carry) if carry else (scalars(t, options),)
        if returned.keys() != given.keys():
            raise ValueError(
                f"{where}scalars returned {', '.join(returned)} in step {t}, but in the first {', '.join(given)}."
            )
        h = Scalars(*(returned[n] if n in given else options[n] for n in names), *[1.0] * len(ratio))
        return (h, *carry_after) if carry else h

    return formed


def class_of(rule: Any, bases: tuple[type, ...], flags: Mapping[str, Any], arguments: Callable[..., Any]) -> Any:
    """A class of a rule, whose constructor names all that it takes: options, flags, what that of the base does."""
    if not isinstance(rule, Rule) or rule.defaults is None:
        raise TypeError(f"fastopt.optimizer: rule must be what @fastopt.rule makes of a function, got {rule!r}.")
    own = inspect.signature(bases[0].__init__).parameters.values()  # type: ignore[misc]
    shared = {**flags, **{p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY}}
    defaults = {**rule.defaults, **shared}
    head = "".join(f"{name}=defaults[{name!r}], " for name in rule.defaults)
    tail = ", ".join(f"{name}=defaults[{name!r}]" for name in shared)
    namespace: dict[str, Any] = {"defaults": defaults, "arguments": arguments}
    exec(  # as dataclasses do, so that the constructor is like a written one
        f"def __init__(self, params, {head}*, {tail}):\n super(cls, self).__init__(**arguments(locals()))", namespace
    )
    said = {**dict.fromkeys(USUAL, "[0, inf)"), **rule.ranges}
    listed = [
        f"    {n}: {said[n]} by default {v!r}." if n in said else f"    {n}: by default {v!r}."
        for n, v in rule.defaults.items()
    ]
    doc = "\n".join(
        [
            inspect.getdoc(rule.step) or f"The rule {rule.name}.",
            *("", "Args:", "    params: As for the other classes.", *listed, f"    {', '.join(shared)}: As there."),
            *("", f"State: {', '.join((*rule.carried, *rule.state)) or 'none'}."),
        ]
    )
    members = {"__doc__": doc, "__module__": rule.step.__module__, "rule": rule, "__init__": namespace["__init__"]}
    made = namespace["cls"] = type(rule.name, bases, members)
    return made


@functools.cache
def optimizer(rule: Rule) -> type[Optimizer]:
    """The class of optimizers ``C(params, <options>, *, maximize, capturable, <options of the step>)`` by a rule.

    Args:
        rule: What ``@fastopt.rule`` made.

    Returns:
        A class like those of the library: groups, clipping, flat buffers, checkpoints, GPUs. It is named as the rule,
        and always the same for a rule.

    Raises:
        TypeError: ``rule`` is none, or was made without defaults for its options.
    """
    made: type[Optimizer] = class_of(rule, (Optimizer,), GROUP_FLAGS, constructor_arguments)
    return made
