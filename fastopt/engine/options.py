"""Ranges of hyperparameters: each turns a value into what is computed with, or says what is wrong with it."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..kernels.epilogues import EMA
from ..kernels.rules.rule import Option, Options, Rule


@dataclass(frozen=True)
class Number:
    """A real number in a range."""

    text: str
    holds: Callable[[float], bool]

    def __call__(self, value: Any, where: str) -> float:
        """The value as a Python float: scalars are formed in float64 even from a float32 hyperparameter."""
        if isinstance(value, (np.generic, np.ndarray)) and value.shape == ():
            value = value.item()
        if callable(value):
            name = where.split()[-1]
            raise TypeError(
                f"{where} must be a number in {self.text}, got {value!r}. A schedule of fastopt.schedules is asked "
                f'before each step: opt.param_groups[0]["{name}"] = schedule(step)'
            )
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{where} must be a number in {self.text}, got {value!r}.")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf  # an integer of hundreds of digits
        if not self.holds(number):
            raise ValueError(f"{where} must be in {self.text}, got {value!r}.")
        return number


@dataclass(frozen=True)
class Numbers:
    """Several numbers, each in its range."""

    ranges: tuple[Number, ...]

    def __call__(self, value: Any, where: str) -> tuple[float, ...]:
        """The value as a tuple of floats."""
        try:
            values = tuple(value)
        except TypeError:
            values = ()
        if len(values) != len(self.ranges):
            count = "two" if len(self.ranges) == 2 else len(self.ranges)
            raise TypeError(f"{where} must be {count} numbers, got {value!r}.")
        return tuple(number(x, f"{where}[{k}]") for k, (number, x) in enumerate(zip(self.ranges, values, strict=True)))


def boolean(value: Any, where: str) -> bool:
    """The value as a bool; other things that are true are refused."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{where} must be True or False, got {value!r}.")


Range = Callable[[Any, str], Any]


def optional(check: Range) -> Range:
    """None, or what is in a range."""
    return lambda value, where: None if value is None else check(value, where)


def interval(text: Any) -> Number:
    """The numbers of an interval, which is written as "[0, 1)"."""
    try:
        low, high = map(float, text[1:-1].split(","))
        is_above = {"[": operator.ge, "(": operator.gt}[text[0]]
        is_below = {"]": operator.le, ")": operator.lt}[text[-1]]
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f'a range is an interval such as "[0, 1)", got {text!r}.') from None
    return Number(text, lambda x: is_above(x, low) and is_below(x, high))


def range_of(said: Any, default: Any) -> Range:
    """The range of an option by what a record says of it: an interval, a tuple of them, bool, or such a function."""
    check: Range
    if isinstance(said, tuple):
        check = Numbers(tuple(map(interval, said)))
    else:
        check = boolean if said is bool else said if callable(said) else interval(said)
    return optional(check) if default is None else check


NONNEGATIVE = interval("[0, inf)")
SCALE = interval("[1e-37, 1e37]")  # its inverse is a float32
NORM = optional(interval("[0, inf]"))
USUAL: Mapping[str, Range] = dict.fromkeys(("lr", "weight_decay", "eps"), NONNEGATIVE)
"""Options that mean the same in all classes."""

EMA_RANGES: Mapping[str, Callable[[Any, str], Any]] = {"ema_decay": optional(interval("[0, 1)")), "ema_warmup": boolean}
"""Options of every class, in both front ends."""


def ranges_of(options: Mapping[str, Option]) -> dict[str, Range]:
    """The range of each option. A record need not say those of flags, and of numbers that only must be finite."""
    ranges = {}
    for name, (default, said, *_) in options.items():
        if said is not None:
            ranges[name] = range_of(said, default)
        elif name in USUAL:
            ranges[name] = USUAL[name]
        elif isinstance(default, bool):
            ranges[name] = boolean
        elif isinstance(default, numbers.Real):
            ranges[name] = interval("(-inf, inf)")
        elif isinstance(default, tuple) and all(isinstance(x, numbers.Real) for x in default):
            ranges[name] = range_of(("(-inf, inf)",) * len(default), default)
    return ranges


STEP_OPTIONS = ("max_grad_norm", "skip_nonfinite", "zero_grads")
OF_THE_OPTIMIZER = (*STEP_OPTIONS, "master_weights", "flatten")
"""What is chosen for all param groups together."""


class StepOption:
    """An option of every step: an attribute that is checked when it is set, and that a field of the request holds.

    The optimizer has its request as ``_request``, and changes fields by ``_ask``.
    """

    def __init__(self, field: str, check: Range) -> None:
        self._field, self._check = field, check

    def __get__(self, opt: Any, owner: type) -> Any:
        return self if opt is None else getattr(opt._request, self._field)

    def __set__(self, opt: Any, value: Any) -> None:
        name = "max_grad_norm" if self._field == "max_norm" else self._field
        opt._ask(**{self._field: self._check(value, f"{type(opt).__name__}: {name}")})


def step_option(field: str, check: Range) -> Any:
    """A ``StepOption``; to type checkers of the type that is written beside it."""
    return StepOption(field, check)


FLOAT32_MAX = float(np.finfo(np.float32).max)


def own_options(group: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a param group; the other keys are the user's, whose values are not looked at.

    Refused are what is no group's to choose, and what looks like an option misspelt.
    """
    if group.keys() <= known.keys():
        return dict(group)
    for name in group:
        if name in OF_THE_OPTIMIZER:
            raise ValueError(f"{where}{name} is not an option of a param group but of the optimizer; give it that.")
        if name not in known and name != "params" and near_name(name, known):
            raise ValueError(f"{where}{no_option(name, known)}")
    return {name: value for name, value in group.items() if name in known}


def near_name(name: Any, known: Collection[str]) -> str | None:
    """The option of which a name is a misspelling; ``lr_scale`` and ``initial_lr`` are none of ``lr``."""
    if not isinstance(name, str) or any(name.startswith(f"{x}_") or name.endswith(f"_{x}") for x in known):
        return None
    return next(iter(difflib.get_close_matches(name, known, 1, 0.8)), None)


def naming_options(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that names its arguments where it is given one that it does not have."""
    parameters = inspect.signature(init).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return init
    options = [name for name in parameters if name not in ("self", "params")]

    @functools.wraps(init)
    def named(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in parameters:
                raise TypeError(f"{type(self).__name__}: {no_option(name, options)}")
        init(self, *args, **kwargs)

    return named


def no_option(name: Any, known: Collection[str]) -> str:
    """The refusal of an option that does not exist."""
    near = near_name(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"there is no option {name!r}; options are {', '.join(known)}.{hint}"


def check_options(
    options: Mapping[str, Any], defaults: Mapping[str, Any], ranges: Mapping[str, Range], computed: set[str], where: str
) -> dict[str, Any]:
    """The options of a param group, each in its range and not lost in the dtypes in which it is ``computed``."""
    missing = set(defaults) - set(options)
    if missing:
        raise ValueError(f"{where}the option {min(missing)!r} is missing.")
    checked = dict(options)
    for name, value in options.items():
        if name not in defaults and name not in ranges:
            raise ValueError(f"{where}{no_option(name, defaults)}")
        if name in ranges:
            checked[name] = ranges[name](value, where + name)
    if "float32" in computed:
        for name, value in checked.items():
            if isinstance(value, float) and FLOAT32_MAX < abs(value) < math.inf:
                raise ValueError(f"{where}{name}={value!r} is too large for float32, in which this is computed.")
    eps = checked.get("eps")
    for dtype in sorted(computed):
        if eps and np.dtype(dtype).type(eps) == 0:
            raise ValueError(f"{where}eps={eps!r} rounds to zero in {dtype}, in which this is computed.")
    return checked


class RuleChoice(NamedTuple):
    """What is done to a parameter: its rule, whether its layer's trust ratio counts, options that are replaced, whether
    it is averaged."""

    rule: Rule
    adapts: bool
    overrides: tuple[tuple[str, Any], ...] = ()
    averages: bool = False

    @property
    def state(self) -> tuple[str, ...]:
        """Names of the state arrays."""
        return (*self.rule.state, EMA) if self.averages else self.rule.state

    def start(self, options: Options) -> dict[str, float]:
        """What the state arrays hold before the first step."""
        return {**self.rule.start(options), **({EMA: 0.0} if self.averages else {})}


def choice(rule: Rule, options: Options, dimensions: int) -> RuleChoice:
    """What is done to a parameter of so many dimensions; LARS and LAMB leave some out."""
    averages = options.get("ema_decay") is not None
    if not rule.layerwise:
        return RuleChoice(rule, True, averages=averages)
    adapt, decay_1d, low = options["adapt"], options.get("decay_1d"), dimensions < 2  # older checkpoints lack it
    if decay_1d is None:
        decay_1d = adapt is not None
    overrides = (("weight_decay", 0.0),) if low and not decay_1d else ()
    return RuleChoice(rule, not low if adapt is None else adapt, overrides, averages)
