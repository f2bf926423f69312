"""The state of an optimizer: what it shows, exports and takes in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .arrays import Array, Device
from .engine.exclusive import exclusive, finish
from .engine.options import EMA_RANGES
from .engine.plan import Parameter, Plan, RuleChoice, StepCount
from .group_options import Base
from .kernels.dtypes import COMPUTE
from .kernels.rules.rule import Options
from .states import StateView, check_states, export_state, import_state


@dataclass(eq=False)
class GroupSnapshot:
    """What is known of a param group: its arrays, its options as they were seen and as they are computed with, and the
    elements of its flat state arrays."""

    index: int
    arrays: Mapping[str, Array]
    dtypes: set[str]
    seen: dict[str, Any]
    options: dict[str, Any]
    members: list[Parameter]
    written: list[Parameter]
    total: int
    foreign: Collection[str]  # keys of the user's own


class StateDicts(Base):
    """What can be done with the state of an optimizer."""

    _parameters: list[Parameter]
    _groups: list[GroupSnapshot]
    _plan: Plan | None
    _users: list[object]
    _name: str

    def _current_options(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _rebuild(self) -> None:
        raise NotImplementedError

    def choose(self, options: Options, parameter: Array) -> RuleChoice:
        """What is done to one parameter of a group."""
        raise NotImplementedError

    def _allocate(
        self, known: GroupSnapshot, options: Options, device: Device, saved: Iterable[tuple[str, str]] = ()
    ) -> list[tuple[Parameter, str, Array]]:
        raise NotImplementedError

    @property
    def state(self) -> StateView:
        """State of each parameter by name: "step", host scalars, and views of its state arrays."""
        if self._plan is not None:
            self._plan.recount()  # a CUDA graph may have been replayed
        shown = {
            p.name: StateView({"step": p.step_count.steps, **(p.step_count.carry or {}), **p.views}, self._name)
            for p in self._parameters
        }
        return StateView(shown, self._name)

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a later ``load_state_dict`` needs to go on with the same bits.

        Returns:
            A dict like torch's: "state" (by index of the parameter over all groups: "step" and arrays by their names in
            torch), "param_groups" (options, "params" as indices, "param_names"), and "optimizer" and "version".
        """
        return self._exported(self._device.copy)

    def _exported(self, copy_of: Callable[[Array], Array]) -> dict[str, Any]:
        groups = [{"params": group["params"], **self._options_of(group)} for group in self.param_groups]
        return export_state(self._name, groups, self.state, copy_of)

    def full_state_dict(self) -> dict[str, Any]:
        """The states as plain arrays, for other programs: "state" and "param_groups" of ``state_dict``.

        Arrays are float32 (float64 for float64 parameters) and whole, however the optimizer stores them.
        """
        return {key: value for key, value in self.state_dict().items() if key in ("state", "param_groups")}

    @exclusive
    def init_state(self) -> None:
        """Have all states exist, as before the first step. They do from the constructor on, so it changes nothing.

        Raises:
            TypeError, ValueError: Options that are wrong.
        """
        self._current_options()

    def refresh(self) -> None:
        """Say that somebody else wrote the parameters: what was kept of them (LARS's norms) is taken anew."""
        if self._plan is not None:
            self._plan.forget_weights()

    @exclusive
    def _snapshot(
        self, arrays: Mapping[str, Array], copy_of: Callable[[Array], Array]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """For ``fastopt.save``: copies of arrays and a state dict of the same moment, which can be loaded again."""
        self._current_options()
        copies = {name: copy_of(array) for name, array in arrays.items()}
        exported = self._exported(copy_of)
        import_state(exported, self._name, self.param_groups, self._name)
        return copies, exported

    @exclusive
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over step counts, states and options that ``state_dict`` of the same optimizer returned.

        Args:
            state_dict: As returned by ``state_dict``; it is copied, never kept.

        Raises:
            TypeError, ValueError: It belongs to another optimizer, other parameters or another version; nothing was
                changed.
        """
        where = f"{self._name}.load_state_dict"
        saved = import_state(state_dict, self._name, self.param_groups, where)
        entries = iter(saved.parameters)
        loaded: list[tuple[GroupSnapshot, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        states: list[tuple[Parameter, str, Array]] = []
        for known, options in zip(self._groups, saved.groups, strict=True):
            if "capturable" in known.options:  # it is about this machine, not about what was saved
                options["capturable"] = known.options["capturable"]
            options = {**self.defaults, **options}
            if options.get("ema_decay") is None:  # averages may begin at any time
                options |= {name: known.options[name] for name in EMA_RANGES if name in known.options}
            self.complete(options)
            checked = self._normalise(options, known.dtypes, known.index)
            held = set()
            for p, entry in zip(known.members, entries, strict=False):
                check_states(entry, p, self.choose(checked, p.array).rule, checked, where)
                held |= {(name, COMPUTE[p.dtype]) for name in entry.arrays}
            loaded.append((known, options, copy.deepcopy(options), checked))
            states += self._allocate(known, checked, self._device, held)
        reached: dict[tuple[Any, ...], StepCount] = {}

        def take_over() -> None:
            for known, options, seen, checked in loaded:
                known.seen, known.options = seen, checked
                group = self.param_groups[known.index]
                group.update(options)
                for name in self._options_of(group).keys() - options.keys():
                    del group[name]
            for p, name, state in states:
                p.states[name] = state
            for p, entry in zip(self._parameters, saved.parameters, strict=True):
                for name, view in p.views.items():
                    self._device.assign(view, entry.arrays.get(name, 0))
                key = entry.step, *entry.carry.items()
                p.step_count = reached.setdefault(key, StepCount(entry.step, entry.carry or None))
            self._rebuild()

        finish(take_over)
