"""Options: their ranges, each of which turns a value into what is computed with or says what is wrong with it; what is
refused; and what they select."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import numbers
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from ..kernels.epilogues import EMA
from ..kernels.registry import variant
from ..kernels.rules.rule import BELOW_ONE, NONNEGATIVE, SWITCH, Option, Options, Rule

if TYPE_CHECKING:
    from .step import Request


Range = Callable[[Any, str], Any]
"""Function ``(value, where) -> value`` that turns an option into what is computed with, or refuses it."""


def interval(text: Any) -> Range:
    """The real numbers of an interval, which is written as "[0, 1)"."""
    try:
        low, high = map(float, text[1:-1].split(","))
        is_above = {"[": operator.ge, "(": operator.gt}[text[0]]
        is_below = {"]": operator.le, ")": operator.lt}[text[-1]]
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f'a range is an interval such as "[0, 1)", got {text!r}.') from None

    def checked(value: Any, where: str) -> float:
        number = value if type(value) is float else _float(value, f"{where} must be a number in {text}", where)
        if not (is_above(number, low) and is_below(number, high)):
            raise ValueError(f"{where} must be in {text}, got {value!r}.")
        return number

    return checked


def _float(value: Any, needed: str, where: str) -> float:
    """A number as Python's float: scalars are formed in float64 even from a float32 hyperparameter."""
    if isinstance(value, (np.generic, np.ndarray)) and value.shape == ():
        value = value.item()
    if callable(value):
        option = f'opt.param_groups[0]["{where.split()[-1]}"]'
        raise TypeError(
            f"{needed}, got {value!r}. A schedule, such as those of fastopt.schedules, is asked before each step: "
            f"{option} = schedule(step). For tensors there is torch.optim.lr_scheduler.LambdaLR, too."
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{needed}, got {value!r}.")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # an integer of hundreds of digits


def several(ranges: tuple[Range, ...]) -> Range:
    """Tuples of numbers, each in its range."""

    def checked(value: Any, where: str) -> tuple[float, ...]:
        try:
            values = tuple(value)
        except TypeError:
            values = ()
        if len(values) != len(ranges):
            count = "two" if len(ranges) == 2 else len(ranges)
            raise TypeError(f"{where} must be {count} numbers, got {value!r}.")
        return tuple(check(x, f"{where}[{k}]") for k, (check, x) in enumerate(zip(ranges, values, strict=True)))

    return checked


def boolean(value: Any, where: str) -> bool:
    """The value as a bool; other things that are true are refused."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{where} must be True or False, got {value!r}.")


def optional(check: Range) -> Range:
    """None, or what is in a range."""
    return lambda value, where: None if value is None else check(value, where)


def range_of(said: Any, default: Any) -> Range:
    """The range of an option by what a record says of it: an interval, a tuple of them, bool, or such a function."""
    if isinstance(said, tuple):
        check = several(tuple(map(interval, said)))
    else:
        check = boolean if said is bool else said if callable(said) else interval(said)
    return optional(check) if default is None else check


SCALE = interval("[1e-37, 1e37]")  # its inverse is a float32
NORM = optional(interval("[0, inf]"))
USUAL = dict.fromkeys(("lr", "weight_decay", "eps"), NONNEGATIVE)
"""Ranges of options that mean the same in all classes."""

EMA_OPTIONS: Mapping[str, Option] = {"ema_decay": Option(None, BELOW_ONE, keyword=True), "ema_warmup": SWITCH}
"""Options of every class, in both front ends."""


def ranges_of(options: Mapping[str, Option]) -> dict[str, Range]:
    """The range of each option. A record need not say those of flags, and of numbers that only must be finite."""
    usual = {name: USUAL.get(name, _usual(o.default)) for name, o in options.items()}
    said = {name: usual[name] if o.range is None else o.range for name, o in options.items()}
    return {name: range_of(said[name], o.default) for name, o in options.items() if said[name] is not None}


def _usual(default: Any) -> Any:
    if isinstance(default, tuple):
        parts = tuple(map(_usual, default))
        return None if {None, bool} & {*parts} else parts
    return bool if isinstance(default, bool) else "(-inf, inf)" if isinstance(default, numbers.Real) else None


FIXED = float, bool, int, str, type(None)


def is_fixed(value: Any) -> bool:
    """Whether the object of an option cannot say something else later."""
    kind = type(value)
    return kind in FIXED or (kind is tuple and all(map(is_fixed, value)))


def as_now(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they are, whatever becomes of a list or an array among them."""
    return {name: value if is_fixed(value) else copy.deepcopy(value) for name, value in options.items()}


STEP_OPTIONS = ("max_grad_norm", "skip_nonfinite", "zero_grads")
OF_THE_OPTIMIZER = {*STEP_OPTIONS, "master_weights", "flatten"}
"""What is chosen for all param groups together."""


def step_option(name: str, check: Range) -> Any:
    """An option of every step: an attribute, checked when it is set, that a field of the optimizer's request holds."""

    def ask(opt: Any, value: Any) -> None:
        opt._request = replace(opt._request, **{name: check(value, f"{type(opt).__name__}: {name}")})

    return property(lambda opt: getattr(opt._request, name), ask)


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

    __signature__: ClassVar[inspect.Signature]

    max_grad_norm: float | None = step_option("max_grad_norm", NORM)
    skip_nonfinite: bool = step_option("skip_nonfinite", boolean)
    zero_grads: bool = step_option("zero_grads", boolean)

    _request: Request  # what every step is asked to do

    def __new__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        """Say which keyword is meant, where one is wrong."""
        taken = cls.__signature__.parameters
        unknown = [name for name in kwargs if name not in taken]
        if unknown and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            options = [name for name in taken if name != "params"]
            raise TypeError(f"{cls.__name__}: {no_option(unknown[0], options)}")
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have tools see the arguments of the constructor, not those of ``__new__``."""
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        cls.__signature__ = signature.replace(parameters=parameters)

    def _step_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STEP_OPTIONS}

    def select_rule(self, options: Options) -> Rule:
        """The update rule for a param group with these options."""
        if self.rule is None:
            raise NotImplementedError(f"{type(self).__name__} must have a rule, or override select_rule.")
        return variant(self.rule, options)

    def structure(self, options: Options) -> tuple[Any, ...]:
        """The part of the options that decides on kernels and states."""
        rule = self.select_rule(options)
        layers = (options["adapt"], options.get("decay_1d")) if rule.layerwise else ()
        return rule, bool(options.get("maximize")), options.get("ema_decay") is not None, *layers

    def check(self, options: Options, where: str) -> None:
        """Refuse options that do not go together; a subclass may say which beside those of its rule."""
        conflict = None if self.rule is None or self.rule.conflict is None else self.rule.conflict(options)
        if conflict is not None:
            raise ValueError(f"{where}{conflict}")
