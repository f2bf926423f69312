"""Options: their ranges, each of which turns a value into what is computed with or says what is wrong with it; what is
refused; and what they select."""

from __future__ import annotations

import difflib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from ..kernels.epilogues import EMA
from ..kernels.registry import variant
from ..kernels.rules.rule import BELOW_ONE, SWITCH, Option, Options, Rule

if TYPE_CHECKING:
    from .step import Request


@dataclass(frozen=True)
class Number:
    """A real number in a range."""

    text: str
    holds: Callable[[float], bool]

    def __call__(self, value: Any, where: str) -> float:
        """The value as a Python float: scalars are formed in float64 even from a float32 hyperparameter."""
        number = value if type(value) is float else self._float(value, where)
        if not self.holds(number):
            raise ValueError(f"{where} must be in {self.text}, got {value!r}.")
        return number

    def _float(self, value: Any, where: str) -> float:
        if isinstance(value, (np.generic, np.ndarray)) and value.shape == ():
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            hint = ""
            if callable(value):
                option = f'opt.param_groups[0]["{where.split()[-1]}"]'
                hint = (
                    f" A schedule, such as those of fastopt.schedules, is asked before each step: {option} = "
                    "schedule(step). For tensors there is torch.optim.lr_scheduler.LambdaLR, too."
                )
            raise TypeError(f"{where} must be a number in {self.text}, got {value!r}.{hint}")
        try:
            return float(value)
        except OverflowError:
            return math.inf  # an integer of hundreds of digits


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

EMA_OPTIONS: Mapping[str, Option] = {"ema_decay": Option(None, BELOW_ONE, keyword=True), "ema_warmup": SWITCH}
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
OF_THE_OPTIMIZER = {*STEP_OPTIONS, "master_weights", "flatten"}
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


OTHER_NAMES = {
    "beta1": "betas",
    "beta2": "betas",
    "clip_grad_norm": "max_grad_norm",
    "epsilon": "eps",
    "learning_rate": "lr",
    "max_norm": "max_grad_norm",
}
"""What other libraries call arguments."""


def own_options(group: Mapping[str, Any], known: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of a param group; the other keys are the user's, whose values are not looked at.

    Refused are what is no group's to choose, and what looks like an option misspelt.
    """
    if group.keys() <= known.keys():
        return dict(group)
    refuse_extras(group, {}, where.removesuffix(": "))
    for name in group:
        if name not in known and name != "params" and near_name(name, known):
            raise ValueError(f"{where}{no_option(name, known)}")
    return {name: value for name, value in group.items() if name in known}


def refuse_extras(group: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Refuse a param group with an option that only the whole optimizer has, unless it says the same as its ``own``.

    ``ZeroRedundancyOptimizer`` gives its keywords both to the constructor and to every group.
    """
    for name in group.keys() & OF_THE_OPTIMIZER:
        value, same = group[name], own.get(name, ...)
        if value is not same and not (isinstance(value, (bool, int, float)) and value == same):
            raise ValueError(
                f"{where}: {name} is an option of the whole optimizer, not of a param group. Pass it to the "
                f"constructor, as {name}=..."
            )


def check_keywords(cls: type, keywords: Iterable[str]) -> None:
    """Refuse a keyword that the constructor of a class does not take, and name those that it does."""
    taken = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    for name in keywords:
        if name not in taken:
            options = [option for option in taken if option not in ("self", "params")]
            raise TypeError(f"{cls.__name__}: {no_option(name, options)}")


def near_name(name: Any, known: Collection[str]) -> str | None:
    """The option of which a name is a misspelling; ``lr_scale`` and ``initial_lr`` are none of ``lr``."""
    if not isinstance(name, str) or any(name.startswith(f"{x}_") or name.endswith(f"_{x}") for x in known):
        return None
    return next(iter(difflib.get_close_matches(name, known, 1, 0.8)), None)


def no_option(name: Any, known: Collection[str]) -> str:
    """The refusal of an option that does not exist."""
    other = OTHER_NAMES.get(name)
    near = other if other in known else near_name(name, known)
    hint = f" Did you mean {near!r}?" if near else ""
    return f"there is no option {name!r}; options are {', '.join(known)}.{hint}"


def check_options(
    options: Mapping[str, Any], defaults: Mapping[str, Any], ranges: Mapping[str, Range], computed: set[str], where: str
) -> dict[str, Any]:
    """The options of a param group, each in its range and not lost in the dtypes in which it is ``computed``."""
    for name in sorted(defaults.keys() - options.keys()):
        raise ValueError(f"{where}the option {name!r} is missing.")
    for name in options.keys() - defaults.keys() - ranges.keys():
        raise ValueError(f"{where}{no_option(name, defaults)}")
    checked = {name: ranges[name](x, where + name) if name in ranges else x for name, x in options.items()}
    if "float32" in computed:
        for name, value in checked.items():
            if isinstance(value, float) and FLOAT32_MAX < abs(value) < math.inf:
                raise ValueError(f"{where}{name}={value!r} is too large for float32, in which this is computed.")
        eps = checked.get("eps")
        if eps and np.float32(eps) == 0:
            raise ValueError(f"{where}eps={eps!r} rounds to zero in float32, in which this is computed.")
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


Made = TypeVar("Made", bound="RuleOptimizer")


class RuleOptimizer:
    """What optimizers of both front ends have: a rule that options select, and options of every step."""

    rule: ClassVar[Rule | None] = None
    """The rule of the class, which knows ranges and variants; a subclass may override ``select_rule`` instead."""

    flags: ClassVar[tuple[str, ...]] = ()
    """Options beside those of the rule, keywords that are False by default."""

    ranges: ClassVar[Mapping[str, Range]] = {}
    """Ranges of options."""

    max_grad_norm: float | None = step_option("max_norm", NORM)
    skip_nonfinite: bool = step_option("skip_nonfinite", boolean)
    zero_grads: bool = step_option("zero_grads", boolean)

    _request: Request  # what every step is asked to do

    def __new__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        """Say which keyword is meant, where one is wrong."""
        check_keywords(cls, kwargs)
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have tools see the arguments of the constructor, not those of ``__new__``."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def _ask(self, **fields: Any) -> None:
        self._request = replace(self._request, **fields)

    def _step_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STEP_OPTIONS}

    def select_rule(self, options: Options) -> Rule:
        """The update rule for a param group with these options."""
        if self.rule is None:
            raise NotImplementedError(f"{type(self).__name__} must have a rule, or override select_rule.")
        return variant(self.rule, options)

    def check(self, options: Options, where: str) -> None:
        """Refuse options that do not go together; a subclass may say which beside those of its rule."""
        conflict = None if self.rule is None or self.rule.conflict is None else self.rule.conflict(options)
        if conflict is not None:
            raise ValueError(f"{where}{conflict}")
