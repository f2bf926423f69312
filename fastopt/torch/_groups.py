"""What an optimizer knows of its param groups: rules, and options in their ranges."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import is_, itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.classes import EMA, constructor, keyword, keywords_of, option_arguments
from ..engine.options import EMA_RANGES, NORM, STEP_OPTIONS, Range, boolean, range_of, ranges_of, step_option
from ..engine.step import Request, StepInfo
from ..kernels.registry import RULES, variant
from ..kernels.rules.rule import Options, Rule
from . import _devices
from ._flat import FlatGroups
from ._lr import DeviceRates
from ._options import is_fixed, plain, refuse_extras
from ._state import LIBRARY, Names, State
from ._tensors import FLOATING, PLAIN, check_apart, parameter_memory

if TYPE_CHECKING:
    from ._stepper import Steppers


SWITCHES = [keyword(name, False) for name in ("maximize", "capturable", "differentiable")]
SWITCHES += [keyword(name, None, bool | None) for name in ("foreach", "fused")]
"""What torch's classes have, for those that torch does not have."""


def _any_number(default: Any) -> Range:
    """The range of an option that torch's constructor checks, and nobody later."""
    return range_of(("[-inf, inf]",) * len(default) if isinstance(default, tuple) else "[-inf, inf]", default)


class GroupOptions(torch.optim.Optimizer):
    """Rules and options. Its constructor makes all that a copy of an optimizer must have anew."""

    rule: ClassVar[Rule | None] = None
    """The rule of the class, which knows variants; a subclass may override ``select_rule`` instead."""

    ranges: ClassVar[Mapping[str, Range]] = {}
    """Ranges of options that no constructor of torch checks."""

    names: ClassVar[Names] = LIBRARY
    """What may be in ``state``."""

    rule_options: ClassVar[Mapping[str, Any]] = {}
    """Flags of the rules that torch's class does not have; in a param group only where they differ from this. They are
    arguments of the constructor, or stand here."""

    flags: ClassVar[tuple[str, ...]] = ()
    """Options beside those of torch's class and the rule, keywords that are False by default."""

    option_names: ClassVar[frozenset[str]] = frozenset()
    """What is read of a param group; all else there is the user's."""

    counts_steps: ClassVar[bool] = True
    """Whether ``state`` has a step count, as in torch."""

    _torch_names: ClassVar[frozenset[str]] = frozenset()  # the arguments of torch's class
    _is_torchs: ClassVar[bool] = True  # whether torch has the class

    state: Any  # a State, until somebody puts another dict in its place
    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]

    max_grad_norm: float | None = step_option("max_norm", lambda value, where: NORM(plain(value, where), where))
    skip_nonfinite: bool = step_option("skip_nonfinite", boolean)
    zero_grads: bool = step_option("zero_grads", boolean)

    def __init__(
        self,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        self._request = Request()
        self.max_grad_norm, self.skip_nonfinite, self.zero_grads = max_grad_norm, skip_nonfinite, zero_grads
        self.last_info = StepInfo()
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

    def _made_anew(self, **extras: Any) -> None:
        """An optimizer was unpickled or copied, without a constructor."""
        GroupOptions.__init__(self, **extras)

    def __init_subclass__(cls) -> None:
        """Make the constructor, where the class writes none; find out what is read of a param group."""
        base: Any = next((b for b in cls.__bases__ if "_plain_step" in vars(b)), None)
        if base is not None:
            inherited = dict(inspect.signature(super().__init__).parameters)  # of torch's class
            del inherited["self"]
            is_torchs = not any(p.kind is p.VAR_KEYWORD for p in inherited.values())
            shared = keywords_of(base.__init__)
            if cls.rule is not None and cls.rule.options:
                options = option_arguments(cls.rule, ParamsT, float | Tensor)
                if "__init__" not in vars(cls):
                    first = [*inherited.values()] if is_torchs else [*options, *SWITCHES]
                    flags = [p for p in options if p.kind is p.KEYWORD_ONLY]
                    flags += [keyword(name, False) for name in ("capturable", *cls.flags)]
                    cls.__init__ = constructor(cls.__qualname__, [*first, *flags, *EMA, *shared], base.__init__)  # type: ignore[method-assign]
                if RULES.get(cls.rule.name) is not cls.rule:
                    cls.names = Names.of(cls.rule)
            own = inspect.signature(cls.__init__).parameters
            names = inherited.keys() if is_torchs else own.keys() - {"capturable", *EMA_RANGES}
            cls._torch_names = frozenset(names - {"self", "params"})
            known = {"self", "foreach", "fused", *names, *(p.name for p in shared)}
            cls.rule_options = {**cls.rule_options, **{p.name: p.default for p in own.values() if p.name not in known}}
            numbers = {p.name: p.default for p in inherited.values() if type(p.default) in (int, float, tuple)}
            cls.ranges = {name: _any_number(default) for name, default in numbers.items()}
            cls.ranges |= {name: EMA_RANGES.get(name, boolean) for name in cls.rule_options.keys() - cls._torch_names}
            if cls.rule is not None and not is_torchs:
                cls.ranges |= ranges_of(cls.rule.options)
            cls._is_torchs = is_torchs
            cls.option_names = cls._torch_names.union(cls.rule_options, ["initial_lr"])
        signature = inspect.signature(cls.__init__)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def _ask(self, **fields: Any) -> None:
        self._request = replace(self._request, **fields)

    def _extras(self) -> dict[str, Any]:
        """What is the whole optimizer's."""
        step = {name: getattr(self, name) for name in STEP_OPTIONS}
        return {**step, "master_weights": self._master, "flatten": self._flat is not None}

    def __repr__(self) -> str:
        head, groups = super().__repr__().split("\n", 1)
        return "\n".join([head, *(f"{name}: {value}" for name, value in self._extras().items()), groups])

    def select_rule(self, options: Options) -> Rule:
        """The update rule for a param group with these options."""
        if self.rule is None:
            raise NotImplementedError(f"{type(self).__name__} must have a rule, or override select_rule.")
        return variant(self.rule, options)

    def begin_group(self, group: dict[str, Any]) -> None:
        """Note what an option needs to know of the start of a group."""

    def structure(self, options: Options) -> tuple[Any, ...]:
        """The part of the options that decides on kernels and states."""
        rule = self.select_rule(options)
        layers = (options["adapt"], options.get("decay_1d")) if rule.layerwise else ()
        return rule, bool(options.get("maximize")), options["ema_decay"] is not None, *layers

    def complete(self, options: dict[str, Any], index: int) -> dict[str, Any]:
        """The options of a group with those that torch does not have; refuses what cannot be computed with."""
        options = {**self.rule_options, **options}
        where = f"{type(self).__name__}: group {index}: "
        if options.get("differentiable"):
            raise NotImplementedError(f"{where}differentiable=True is not supported.")
        options |= {name: check(options[name], where + name) for name, check in self.ranges.items() if name in options}
        conflict = (
            None if self._is_torchs or self.rule is None or self.rule.conflict is None else self.rule.conflict(options)
        )
        if conflict is not None:
            raise ValueError(f"{where}{conflict}")
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
