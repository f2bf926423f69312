"""What an optimizer is beside arrays and steps: names of options, what it shows, what cannot be done with it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from .arrays import HOST, Device
from .engine.options import EMA_RANGES, STEP_OPTIONS, USUAL, Range, boolean, check_options, naming_options, ranges_of
from .kernels.dtypes import COMPUTE
from .kernels.rules.rule import Options, Rule
from .step_options import StepOptions


class Base(StepOptions):
    """Options by name, and refusals."""

    rule: ClassVar[Rule | None] = None
    """The rule of the class, which knows ranges and variants; a subclass may override ``select_rule`` instead."""

    ranges: ClassVar[Mapping[str, Range]] = {**USUAL, "maximize": boolean, "capturable": boolean, **EMA_RANGES}
    """Range of each option, beside those that the rule knows."""

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    _name: str
    _known_options: Mapping[str, Any]  # the names of all options: those with a default first

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have keywords that the constructor lacks refused with those that it has."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = naming_options(cls.__init__)  # type: ignore[method-assign]
        if cls.rule is not None and "rule" in vars(cls):
            arguments = inspect.signature(cls.__init__).parameters.values()
            defaults = {p.name: p.default for p in arguments if p.name not in STEP_OPTIONS}
            cls.ranges = {**cls.ranges, **ranges_of(defaults, cls.rule.ranges)}

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":
            raise TypeError(f"{type(self).__name__}.state is changed by load_state_dict.")
        if name in vars(self).get("defaults", ()) and not hasattr(type(self), name):
            where = f'opt.param_groups[0]["{name}"]'
            raise AttributeError(
                f"{type(self).__name__}: {name!r} is an option of the param groups: {where} = {value!r}"
            )
        super().__setattr__(name, value)

    def _options_of(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """A group without "params" and what is the user's own."""
        known = self._known_options
        return {name: value for name, value in group.items() if name in known}

    def _place(self, index: int) -> str:
        """The beginning of an error about a group."""
        return f"{self._name}: group {index}: " if index else f"{self._name}: "

    def complete(self, group: dict[str, Any]) -> None:
        """Fill in options of a group that follow from its others."""

    def check(self, options: Options, where: str) -> None:
        """Refuse options that do not go together; a subclass says which."""

    def _normalise(self, options: Mapping[str, Any], dtypes: Iterable[str], index: int) -> dict[str, Any]:
        """The options of a group as they are computed with, checked."""
        where = self._place(index)
        checked = check_options(options, self.defaults, self.ranges, {COMPUTE[name] for name in dtypes}, where)
        self.check(checked, where)
        return checked

    @staticmethod
    def _check_capturable(options: Options, device: Device, where: str) -> None:
        if options.get("capturable") and device is HOST:
            raise ValueError(f"{where}: capturable=True is for CUDA graphs, but these parameters are in host memory.")

    def __getstate__(self) -> Any:
        raise TypeError(
            f"{self._name} cannot be pickled or copied: it updates the arrays it was given. Make another over other "
            "arrays and load_state_dict what this one's state_dict() returns; fastopt.save writes that to a file."
        )

    def __repr__(self) -> str:
        step = ", ".join(f"{name}={getattr(self, name)!r}" for name in STEP_OPTIONS)
        lines = [f"{self._name} (", f"  {step}"]
        for i, group in enumerate(self.param_groups):
            shown = ", ".join(f"{name}={value!r}" for name, value in self._options_of(group).items())
            count = len(group["params"])
            lines.append(f"  group {i}: {count} array{'s' * (count > 1)}, {shown}")
        return "\n".join([*lines, ")"])
