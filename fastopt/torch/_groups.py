"""What an optimizer knows of its param groups: rules, and options in their ranges."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.classes import constructor, keywords_of, option_arguments
from ..engine.device import check_apart
from ..engine.options import (
    EMA_OPTIONS,
    NORM,
    Range,
    RuleOptimizer,
    boolean,
    is_fixed,
    range_of,
    ranges_of,
    refuse_extras,
    step_option,
)
from ..engine.step import Request, StepInfo
from ..kernels.registry import RULES
from ..kernels.rules.rule import SWITCH, Option, Rule
from . import _devices
from ._devices import DeviceRates
from ._flat import FlatGroups
from ._options import plain
from ._state import LIBRARY, Names, State
from ._tensors import FLOATING, PLAIN, parameter_memory

if TYPE_CHECKING:
    from ._stepper import Steppers


SWITCHES = dict.fromkeys(("maximize", "differentiable"), SWITCH)
SWITCHES |= dict.fromkeys(("foreach", "fused"), Option(None, bool, keyword=True))
"""What torch's classes have, for those that torch does not have."""


def _any_number(default: Any) -> Range:
    """The range of an option that torch's constructor checks, and nobody later."""
    return range_of(("[-inf, inf]",) * len(default) if isinstance(default, tuple) else "[-inf, inf]", default)


def _no_gradient(value: Any, where: str) -> bool:
    """The range of ``differentiable``."""
    if value:
        raise NotImplementedError(f"{where}=True is not supported, because kernels have no gradient. Use torch.optim.")
    return False


class GroupOptions(RuleOptimizer, torch.optim.Optimizer):
    """Rules and options. Its constructor makes all that a copy of an optimizer must have anew."""

    names: ClassVar[Names] = LIBRARY
    """What may be in ``state``."""

    rule_options: ClassVar[Mapping[str, Any]] = {}
    """Flags of the rules that torch's class does not have; in a param group only where they differ from this. They are
    arguments of the constructor, or stand here."""

    option_names: ClassVar[frozenset[str]] = frozenset()
    """What is read of a param group; all else there is the user's."""

    counts_steps: ClassVar[bool] = True
    """Whether ``state`` has a step count, as in torch."""

    _is_torchs: ClassVar[bool] = True  # whether torch has the class

    state: Any  # a State, until somebody puts another dict in its place
    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]

    max_grad_norm: float | None = step_option("max_grad_norm", lambda value, where: NORM(plain(value, where), where))

    def __init__(self, master_weights: bool = False, flatten: bool = False, **step_options: Any) -> None:
        self._request, self.last_info = Request(), StepInfo()
        for name, value in step_options.items():
            setattr(self, name, value)
        self._master = boolean(master_weights, f"{type(self).__name__}: master_weights")
        self._flat = FlatGroups() if boolean(flatten, f"{type(self).__name__}: flatten") else None
        self._users: list[object] = []  # who is using this optimizer now
        self._complete = False  # whether the constructor is done, or there was none
        self._derived: Steppers | None = None  # ``state`` knows it, too, but does not keep it alive
        self._read: list[tuple[list[str], Callable[[Any], Any], Any]] | None = None  # what groups held, if it is fixed
        self._seen: list[dict[str, Any]] = []
        self._options: list[dict[str, Any]] = []
        self._structure: list[Any] = []
        self._rates = DeviceRates()
        self._rules: list[Rule] = []
        self._slices: Any = None  # set by a ShardedOptimizer
        self._part: str | None = None  # a parameter of whose whole there are no sums, and why

    def __init_subclass__(cls) -> None:
        """Make the constructor, where the class writes none; find out what is read of a param group."""
        if "rule" in vars(cls) and cls.rule is not None and cls.rule.options:
            inherited = [*inspect.signature(super().__init__).parameters.values()][1:]  # of torch's class
            cls._is_torchs = not any(p.kind is p.VAR_KEYWORD for p in inherited)
            flags = {"capturable": SWITCH, **dict.fromkeys(cls.flags, SWITCH), **EMA_OPTIONS}
            if cls._is_torchs:
                flags = {name: o for name, o in cls.rule.options.items() if o.keyword} | flags
                cls.ranges = {
                    p.name: _any_number(p.default) for p in inherited if type(p.default) in (int, float, tuple)
                }
            else:
                inherited = option_arguments({**cls.rule.options, **SWITCHES}, ParamsT, float | Tensor)
                cls.ranges = ranges_of(cls.rule.options)
            names = {p.name for p in inherited} - {"params"}
            added = {name: o.default for name, o in flags.items() if name not in names}
            cls.rule_options = {**cls.rule_options, **added}
            cls.ranges |= dict.fromkeys(cls.rule_options, boolean) | ranges_of(EMA_OPTIONS)
            cls.ranges["differentiable"] = _no_gradient
            cls.option_names = frozenset({*names, *cls.rule_options, "initial_lr"})
            if RULES.get(cls.rule.name) is not cls.rule:
                cls.names = Names.of(cls.rule)
            if "__init__" not in vars(cls):
                base: Any = next(b for b in cls.__mro__ if "_plain_step" in vars(b))
                arguments = [*inherited, *option_arguments(flags, ParamsT), *keywords_of(base.__init__)]
                cls.__init__ = constructor(cls.__qualname__, arguments, base.__init__)  # type: ignore[method-assign]
        super().__init_subclass__()

    def _parameters(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _extras(self) -> dict[str, Any]:
        """What is the whole optimizer's."""
        return {**self._step_options(), "master_weights": self._master, "flatten": self._flat is not None}

    def __repr__(self) -> str:
        head, groups = super().__repr__().split("\n", 1)
        return "\n".join([head, *(f"{name}: {value}" for name, value in self._extras().items()), groups])

    def begin_group(self, group: dict[str, Any]) -> None:
        """Note what an option needs to know of the start of a group."""

    def complete(self, options: dict[str, Any], index: int) -> dict[str, Any]:
        """The options of a group with those that torch does not have; refuses what cannot be computed with."""
        options = {**self.rule_options, **options}
        where = f"{type(self).__name__}: group {index}: "
        options |= {name: check(options[name], where + name) for name, check in self.ranges.items() if name in options}
        if not self._is_torchs:
            self.check(options, where)
        return options

    def _current_options(self) -> list[dict[str, Any]]:
        """Options of every group as numbers."""
        # Reading every option takes as long as a small step; but the same objects say the same, unless they can change.
        if self._read is not None and len(self._read) == len(self.param_groups):
            for group, (keys, take, values) in zip(self.param_groups, self._read, strict=True):
                if list(group) != keys or not all(map(is_, take(group), values)):
                    break
            else:
                return self._options
        where = type(self).__name__
        extras = self._extras()
        for index, group in enumerate(self.param_groups):
            refuse_extras(group, extras, f"{where}: group {index}")
        known = [{name: group[name] for name in group if name in self.option_names} for group in self.param_groups]
        current = [
            {name: plain(value, f"{where}: group {index}: {name}") for name, value in group.items()}
            for index, group in enumerate(self._rates.placed(known))
        ]
        if current != self._seen:
            options = [self.complete(o, i) for i, o in enumerate(current)]
            structure = [self.structure(o) for o in options]
            if structure != self._structure and isinstance(self.state, State):
                self.state.watch.drop()
            self._options, self._structure, self._seen = options, structure, current
        self._read = None
        repeats = any(extras.keys() & group.keys() for group in self.param_groups)
        if not repeats and all(is_fixed(value) for group in known for value in group.values()):
            takers = zip(self.param_groups, (itemgetter("params", *names) for names in known), strict=True)
            self._read = [(list(group), take, take(group)) for group, take in takers]
        return self._options

    def _accept(self, first: int) -> None:
        """Refuse early what a step would refuse in groups from this one on, and flatten them.

        Other devices and layouts may still change before the first step.
        """
        where = type(self).__name__
        for index, group in enumerate(self.param_groups[first:], first):
            refuse_extras(group, self._extras(), f"{where}: group {index}")
        named = [
            (f"parameter {i} of group {g}", p, g >= first)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if type(p) in PLAIN
            and p.device.type in ("cpu", "cuda")
            and p.layout is torch.strided
            and p.dtype in FLOATING
        ]
        for device in {_devices.device_of(p) for _, p, new in named if new}:
            if device.on_gpu:
                device.require()
        memories = [parameter_memory(p, f"{where}: {name}") if new else p for name, p, new in named]
        starts = np.array([m.data_ptr() for m in memories], np.uint64)
        check_apart(starts, np.array([m.nbytes for m in memories], np.int64), lambda k: named[k][0], where)
        for group in self.param_groups[first:]:
            self.begin_group(group)
            if self._flat is not None:
                self._flat.add(group["params"], where)
