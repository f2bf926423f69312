"""Param groups: what is known of them, their options, and what an optimizer does with its groups in every step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .engine.device import Array, Device, Layout
from .engine.options import (
    EMA_OPTIONS,
    USUAL,
    Range,
    RuleChoice,
    RuleOptimizer,
    check_options,
    choice,
    ranges_of,
)
from .engine.step import Request, StepInfo
from .kernels.dtypes import COMPUTE
from .kernels.rules.rule import SWITCH, Option, Options

if TYPE_CHECKING:
    from .engine.plan import Parameter, Plan
    from .inputs import Pattern


@dataclass(eq=False)
class Group:
    """What is known of a param group: its parameters, the arrays that a step of them writes, and its options.

    Of a flat buffer a step writes its whole data, and only that is looked at again: views are windows on it. As in
    NumPy, one made read-only does not make its base so, and to look at ten thousand of them takes a sixth of the step.
    """

    index: int
    device: Device
    arrays: Mapping[str, Array]
    members: list[Parameter]
    written: list[Parameter]
    layout: Layout  # in the flat state arrays
    is_flat: bool
    dtypes: set[str]
    seen: dict[str, Any] = field(default_factory=dict)  # the options as they were seen
    options: dict[str, Any] = field(default_factory=dict)  # and as they are computed with
    foreign: Collection[str] = ()  # keys of the user's own


class Groups(RuleOptimizer):
    """The param groups of an optimizer, and its options."""

    ranges: ClassVar[Mapping[str, Range]] = ranges_of(
        {**dict.fromkeys(USUAL, Option(0.0)), "maximize": SWITCH, "capturable": SWITCH, **EMA_OPTIONS}
    )

    _device: Device  # where the first group's arrays live, and all others must

    def __init__(self, defaults: Mapping[str, Any], **step_options: Any) -> None:
        self._name = type(self).__name__
        self._request, self.last_info = Request(), StepInfo()
        self._users: list[object] = []
        for name, value in step_options.items():
            setattr(self, name, value)
        self.defaults = dict(defaults)
        self._known_options = {**self.defaults, **self.ranges}  # those with a default first
        self._normalise(self.defaults, (), 0)
        self.param_groups: list[dict[str, Any]] = []
        self._groups: list[Group] = []
        self._parameters: list[Parameter] = []
        self._pattern: Pattern | None = None  # the gradients of the last step, and their plan

    @property
    def _plan(self) -> Plan | None:
        return None if self._pattern is None else self._pattern.plan

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

    def _normalise(
        self, options: Mapping[str, Any], dtypes: Iterable[str], index: int, device: Device | None = None
    ) -> dict[str, Any]:
        """The options of a group as they are computed with, checked."""
        where = self._place(index)
        checked = check_options(options, self.defaults, self.ranges, {COMPUTE[name] for name in dtypes}, where)
        self.check(checked, where)
        if checked.get("capturable") and device is not None and device.name == "cpu":
            raise ValueError(f"{where}capturable=True is for CUDA graphs, but these parameters are in host memory.")
        return checked

    def choose(self, options: Options, parameter: Array) -> RuleChoice:
        """What is done to one parameter of a group; LARS leaves some out of the trust ratio."""
        return choice(self.select_rule(options), options, parameter.ndim)

    def _current_options(self) -> list[dict[str, Any]]:
        """Options of every group, checked again where somebody changed them."""
        raise NotImplementedError

    def _rebuild(self) -> None:
        """Parameters or states changed: what was derived from them is derived anew."""
        raise NotImplementedError

    def _allocate(
        self, known: Group, options: Options, saved: Iterable[tuple[str, str]] = ()
    ) -> list[tuple[Parameter, str, Array]]:
        """The flat state arrays that members of a group lack, one per state name and compute dtype.

        ``saved`` are such pairs, too: states that the rule does not use now, because momentum, say, was switched off.
        """
        device, total = known.device, known.layout.total
        flats: dict[tuple[str, str], Array] = {}
        lacking = []
        for p in known.members:
            dtype = COMPUTE[p.dtype]
            starts = {name: 0.0 for name, of in saved if of == dtype}
            starts |= self.choose(options, p.array).start(options)
            for name, start in starts.items():
                if name in p.states:
                    continue
                if (name, dtype) not in flats:
                    flats[name, dtype] = device.zeros(total, np.dtype(dtype), f"{self._name}: state {name!r}")
                flat = flats[name, dtype]
                lacking.append((p, name, flat))
                if start:
                    device.assign(flat[p.offset : p.offset + p.extent], start)
        return lacking

    def __getstate__(self) -> Any:
        raise TypeError(
            f"{self._name} cannot be pickled or copied: it updates the arrays it was given. Make another over other "
            "arrays and load_state_dict what this one's state_dict() returns; fastopt.save writes that to a file."
        )

    def __repr__(self) -> str:
        step = ", ".join(f"{name}={value!r}" for name, value in self._step_options().items())
        lines = [f"{self._name} (", f"  {step}"]
        for i, group in enumerate(self.param_groups):
            shown = ", ".join(f"{name}={value!r}" for name, value in self._options_of(group).items())
            count = len(group["params"])
            lines.append(f"  group {i}: {count} array{'s' * (count > 1)}, {shown}")
        return "\n".join([*lines, ")"])
