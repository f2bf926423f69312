"""What an optimizer knows of its param groups: rules, and options in their ranges."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.classes import EMA, constructor, keyword, keywords_of, option_arguments
from ..engine.options import EMA_RANGES, Range, RuleChoice, boolean, choice, ranges_of
from ..engine.step import StepInfo
from ..kernels.registry import RULES, variant
from ..kernels.rules.rule import Options, Rule
from . import _devices
from ._flat import FlatGroups
from ._lr import DeviceRates
from ._options import StepOptions, check_loaded_group, check_loaded_state, checked_flag, refuse_extras
from ._shards import why_not_combined
from ._state import LIBRARY, Names
from ._tensors import FLOATING, PLAIN, check_apart, parameter_memory

if TYPE_CHECKING:
    from ._stepper import MultiDeviceStepper, Stepper


SWITCHES = [keyword(name, False) for name in ("maximize", "capturable", "differentiable")]
SWITCHES += [keyword(name, None, bool | None) for name in ("foreach", "fused")]
"""What torch's classes have, for those that torch does not have."""


class GroupOptions(StepOptions):
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

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]

    def __init__(
        self,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        StepOptions.__init__(self, max_grad_norm, skip_nonfinite, zero_grads)
        self._master = boolean(master_weights, f"{type(self).__name__}: master_weights")
        self._flat = FlatGroups() if boolean(flatten, f"{type(self).__name__}: flatten") else None
        self.last_info = StepInfo()
        self._users: list[object] = []  # who is using this optimizer now
        self._complete = False  # whether the constructor is done, or there was none
        self._derived: Stepper | MultiDeviceStepper | None = None  # ``state`` knows it, too, but does not keep it alive
        self._seen: list[dict[str, Any]] = []
        self._options: list[dict[str, Any]] = []
        self._structure: list[Any] = []
        self._rates = DeviceRates()
        self._part: str | None = None  # a parameter of whose whole there are no sums, and why

    def _made_anew(self, **extras: Any) -> None:
        """An optimizer was unpickled or copied, without a constructor."""
        GroupOptions.__init__(self, **extras)

    def __init_subclass__(cls) -> None:
        """Make the constructor, where the class writes none; find out what is read of a param group."""
        base: Any = next((b for b in cls.__bases__ if GroupOptions in b.__bases__), None)
        if base is not None:
            inherited = dict(inspect.signature(super(StepOptions, cls).__init__).parameters)  # of torch's class
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
                if not is_torchs:
                    cls.ranges = ranges_of(cls.rule.options)
                if RULES.get(cls.rule.name) is not cls.rule:
                    cls.names = Names.of(cls.rule)
            own = inspect.signature(cls.__init__).parameters
            names = inherited.keys() if is_torchs else own.keys() - {"capturable", *EMA_RANGES}
            cls._torch_names = frozenset(names - {"self", "params"})
            known = {"self", "foreach", "fused", *names, *(p.name for p in shared)}
            cls.rule_options = {**cls.rule_options, **{p.name: p.default for p in own.values() if p.name not in known}}
            cls.option_names = cls._torch_names.union(cls.rule_options, ["initial_lr"])
        signature = inspect.signature(cls.__init__)
        parameters = [p for p in signature.parameters.values() if p.name != "self"]
        cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]

    def _extras(self) -> dict[str, Any]:
        return {**super()._extras(), "master_weights": self._master, "flatten": self._flat is not None}

    def select_rule(self, options: Options) -> Rule:
        """The update rule for a param group with these options."""
        if self.rule is None:
            raise NotImplementedError(f"{type(self).__name__} must have a rule, or override select_rule.")
        return variant(self.rule, options)

    def choose(self, options: Options, parameter: Tensor) -> RuleChoice:
        """What is done to one parameter of a group; LARS leaves some out of the trust ratio."""
        rule = self.select_rule(options)
        why = why_not_combined(parameter) if rule.ratio is not None else None
        if why is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: a parameter is {why}, so the norm of its whole is not known. Use an optimizer "
                "whose rule has no norms, or DDP."
            )
        return choice(rule, options, parameter.ndim)

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
        for name in self.rule_options.keys() - self._torch_names:
            options[name] = checked_flag(name, options[name], where + name)
        options |= {name: check(options[name], where + name) for name, check in self.ranges.items() if name in options}
        if self.ranges and self.rule is not None and self.rule.conflict is not None:
            conflict = self.rule.conflict(options)
            if conflict is not None:
                raise ValueError(f"{where}{conflict}")
        rule = self.select_rule(options)
        for name in {*rule.options, *rule.initial.values()} & {*options, *self.defaults}:
            value, count = options.get(name), rule.counts.get(name, 1)
            if value is None and name in self.defaults and self.defaults[name] is None:
                continue
            numbers = value if isinstance(value, tuple) else (value,)
            if len(numbers) != count or not all(isinstance(x, (int, float)) for x in numbers):
                raise TypeError(f"{where}{name} must be {'a number' if count == 1 else 'two numbers'}, got {value!r}.")
            if any(map(math.isnan, numbers)):
                raise ValueError(f"{where}{name} must be a number, got {value!r}.")
        return options

    def check_loaded(self, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict that is about to be loaded, or an error where it is of another class.

        Flags that torch's class does not have stay as they are where the state dict has none.
        """
        where = f"{type(self).__name__}.load_state_dict: "
        groups = []
        for index, (group, now) in enumerate(zip(loaded["param_groups"], self.param_groups, strict=False)):
            refuse_extras(group, self._extras(), f"{where}group {index} of the state dict")
            kept = {name: now[name] for name in self.rule_options if name in now and name not in group}
            groups.append({**group, **kept})
            check_loaded_group(groups[-1], self.defaults, f"{where}group {index} of the state dict")
            rule = self.select_rule({**self.rule_options, **self.defaults, **groups[-1]})
            for key in group["params"]:
                state = loaded["state"].get(key)
                if isinstance(state, dict):
                    check_loaded_state(state, rule, f"{where}the state of parameter {key}")
        return {**loaded, "param_groups": groups + list(loaded["param_groups"])[len(groups) :]}

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
        starts, nbytes = [m.data_ptr() for m in memories], [m.nbytes for m in memories]
        check_apart(starts, nbytes, [name for name, *_ in named], where)
        for group in self.param_groups[first:]:
            self.begin_group(group)
            if self._flat is not None:
                self._flat.add(group["params"], where)
