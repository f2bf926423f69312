"""The state of an optimizer: what it shows, exports and takes in, and what is done with averages of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn

import numpy as np

from .arrays import assign
from .engine.device import Array, check_dtype, is_array
from .engine.exclusive import exclusive, finish, makes_many, swapping
from .engine.options import EMA_OPTIONS, as_now
from .engine.plan import MAX_STEP, Parameter, StepCount
from .groups import Group, Groups
from .kernels.dtypes import COMPUTE
from .kernels.epilogues import EMA, EMA_STEP
from .kernels.registry import family_states
from .kernels.rules.rule import Options, Rule

VERSION = 1


class StateView(dict[str, Any]):
    """What an optimizer shows of its states, and of one parameter's: arrays can be written, entries not replaced."""

    def __init__(self, entries: Mapping[str, Any], owner: str) -> None:
        super().__init__(entries)
        self._owner = owner

    def _refuse(self, *changed: Any, **_: Any) -> NoReturn:
        raise TypeError(
            f"{self._owner}.state[...]: {changed[0] if changed else 'entries'!r} cannot be assigned or deleted. Write "
            "into an array with [...] = values; all else is changed by load_state_dict."
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


class SavedParameter(NamedTuple):
    """Step count, carried numbers and state arrays of one parameter."""

    step: int
    carry: dict[str, float]
    arrays: dict[str, Array]


def _parameter(entry: Any, p: Parameter, rule: Rule, options: Options, where: str) -> SavedParameter:
    """The state of a parameter, as a state dict has it; refuses names, shapes and dtypes that are wrong."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: there is no state for parameter {p.name!r}.")
    of, dtype, step = f"of parameter {p.name!r}", COMPUTE[p.dtype], entry.get("step")
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step <= MAX_STEP:
        raise ValueError(f"{where}: the step {of} must be an integer in [0, 2^53], got {step!r}.")
    arrays = {name: value for name, value in entry.items() if is_array(value)}
    carry = {name: value for name, value in entry.items() if name not in arrays and name != "step"}
    for name, value in carry.items():
        if type(value) not in (int, float) or not -1e308 <= value <= 1e308:
            raise TypeError(f"{where}: {name} {of} must be an array or a number, got {value!r}.")
    missing = set(rule.state) - set(arrays) - set(rule.late)
    unknown = set(arrays) - {EMA, *p.states} - family_states(rule)  # of a variant that an option chose before
    if missing or unknown:
        raise ValueError(
            f"{where}: parameter {p.name!r} has the states {sorted(arrays)}, but its rule needs {sorted(rule.state)}."
        )
    for name, array in arrays.items():
        if array.shape != p.array.shape or array.dtype != dtype:
            if array.dtype.name == dtype:
                check_dtype(array.dtype, f"{where}: {name} {of}")  # its byte order
            raise ValueError(
                f"{where}: {name} {of} is {array.dtype.name} of shape {array.shape}; needed is {dtype} of shape "
                f"{p.array.shape}."
            )
    if EMA not in arrays:
        carry.pop(EMA_STEP, None)  # the average begins anew
    known = set(rule.carry(options)._fields) if rule.carry else set()
    if carry.keys() - {EMA_STEP, *known} or (step and known - carry.keys()):
        raise ValueError(
            f"{where}: parameter {p.name!r} has the carried numbers {sorted(carry)}, but its rule needs "
            f"{sorted(known)}."
        )
    return SavedParameter(int(step), {name: float(value) for name, value in carry.items()}, arrays)


def _shorten(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"[{shown}, ... {len(names)} in all]" if len(names) > 5 else f"[{shown}]"


class States(Groups):
    """What can be done with the state of an optimizer."""

    @property
    def state(self) -> StateView:
        """State of each parameter by name: "step", carried numbers, and views of its state arrays."""
        if self._plan is not None:
            self._plan.recount()  # a CUDA graph may have been replayed
        shown = {}
        for p in self._parameters:
            carry, arrays = p.step_count.carry or {}, p.views
            if EMA_STEP not in carry:  # an average is made in the first step that is taken
                arrays.pop(EMA, None)
            shown[p.name] = StateView({"step": p.step_count.steps, **carry, **arrays}, self._name)
        return StateView(shown, self._name)

    @exclusive
    @makes_many
    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a later ``load_state_dict`` needs to go on with the same bits.

        Returns:
            A dict like torch's: "state" (by index of the parameter over all groups: "step" and arrays by their names in
            torch), "param_groups" (options, "params" as indices, "param_names"), and "optimizer" and "version".
        """
        return self._exported(self._device.copy)

    def _exported(self, copy_of: Callable[[Array], Array]) -> dict[str, Any]:
        exported: dict[str, Any] = {"version": VERSION, "optimizer": self._name, "state": {}, "param_groups": []}
        state, shown = exported["state"], self.state
        for group in self.param_groups:
            first = len(state)
            for name in group["params"]:
                entry = {key: copy_of(value) if is_array(value) else value for key, value in shown[name].items()}
                state[len(state)] = entry
            places = {"params": list(range(first, len(state))), "param_names": list(group["params"])}
            exported["param_groups"].append({**as_now(self._options_of(group)), **places})
        return exported

    def _accepted(
        self, state_dict: Mapping[str, Any], where: str
    ) -> list[tuple[Group, dict[str, Any], list[SavedParameter]]]:
        """Groups with their options and parameters in a state dict, whose arrays are not copied yet.

        Refuses one of another version, optimizer or list of parameters, and what cannot be computed with.
        """
        parts = {"version", "optimizer", "state", "param_groups"}
        if not isinstance(state_dict, Mapping) or parts - state_dict.keys():
            raise TypeError(f"{where}: needed is what state_dict() returns, got {type(state_dict).__name__}.")
        if state_dict["version"] != VERSION:
            raise ValueError(f"{where}: version {state_dict['version']!r} is not {VERSION}, which this fastopt reads.")
        if state_dict["optimizer"] != self._name:
            raise ValueError(f"{where}: the state is of {state_dict['optimizer']!r}, not of {self._name!r}.")
        saved_groups, states = state_dict["param_groups"], state_dict["state"]
        if not isinstance(saved_groups, Sequence) or not isinstance(states, Mapping):
            raise TypeError(f'{where}: "param_groups" must be a list and "state" a dict.')
        if len(saved_groups) != len(self._groups):
            raise ValueError(
                f"{where}: the state has {len(saved_groups)} param groups, the optimizer {len(self._groups)}."
            )
        accepted = []
        for known, saved in zip(self._groups, saved_groups, strict=True):
            if not isinstance(saved, Mapping) or not {"params", "param_names"} <= set(saved):
                raise TypeError(
                    f'{where}: group {known.index} of the state must be a dict with "params" and "param_names".'
                )
            options = {**self.defaults, **saved}
            indices, names, own = list(options.pop("params")), list(options.pop("param_names")), list(known.arrays)
            if names != own or len(indices) != len(own):
                raise ValueError(
                    f"{where}: parameters of group {known.index} are {_shorten(names)} in the state, {_shorten(own)} "
                    "here."
                )
            if "capturable" in known.options:  # it is about this machine, not about what was saved
                options["capturable"] = known.options["capturable"]
            if options.get("ema_decay") is None:  # averages may begin at any time
                options |= {name: known.options[name] for name in EMA_OPTIONS if name in known.options}
            self.complete(options)
            options = self._normalise(options, known.dtypes, known.index)
            parameters = [
                _parameter(states.get(key), p, self.choose(options, p.array).rule, options, where)
                for key, p in zip(indices, known.members, strict=True)
            ]
            accepted.append((known, options, parameters))
        return accepted

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
        for group, (_, options, _) in zip(exported["param_groups"], self._accepted(exported, self._name), strict=True):
            group.update(options)
        return copies, exported

    @exclusive
    @makes_many
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over step counts, states and options that ``state_dict`` of the same optimizer returned.

        Args:
            state_dict: As returned by ``state_dict``; it is copied, never kept.

        Raises:
            TypeError, ValueError: It belongs to another optimizer, other parameters or another version; nothing was
                changed.
        """
        accepted = self._accepted(state_dict, f"{self._name}.load_state_dict")
        states: list[tuple[Parameter, str, Array]] = []
        for known, options, parameters in accepted:
            pairs = zip(known.members, parameters, strict=True)
            stored = {(name, COMPUTE[p.dtype]) for p, saved in pairs for name in saved.arrays}
            states += self._allocate(known, options, stored)
        reached: dict[tuple[Any, ...], StepCount] = {}

        def take_over() -> None:
            for known, options, _ in accepted:
                known.seen, known.options = dict(options), options
                group = self.param_groups[known.index]
                group.update(options)
                for name in self._options_of(group).keys() - options.keys():
                    del group[name]
            for p, name, state in states:
                p.states[name] = state
            for known, _, parameters in accepted:
                for p, (step, carry, arrays) in zip(known.members, parameters, strict=True):
                    for name, view in p.views.items():
                        assign(self._device, view, arrays.get(name, 0))
                    p.step_count = reached.setdefault((step, *carry.items()), StepCount(step, carry or None))
            self._rebuild()

        finish(take_over)

    def swap_ema(self) -> AbstractContextManager[None]:
        """A block in which the parameters hold their averages, for validation: ``with opt.swap_ema(): ...``

        Averages are rounded once to 16-bit parameters. A parameter that was not averaged yet keeps its value. On
        leaving, also by an exception, the parameters become again what they were, bit for bit; what is written to them
        in the block is lost. It takes memory for a copy of the parameters.

        Inside, ``step``, ``state_dict``, ``load_state_dict``, ``add_param_group``, ``swap_ema``, ``reset_ema`` and
        ``fastopt.save`` of this optimizer raise RuntimeError.

        Raises:
            ValueError: No param group has ``ema_decay``.
            RuntimeError: A block of this kind is not over yet, or another thread is using this optimizer.

        Example:
            >>> import numpy as np, fastopt
            >>> w = np.array([1.0])
            >>> opt = fastopt.SGD([w], lr=1.0, ema_decay=0.5)
            >>> for _ in range(2):
            ...     info = opt.step([np.array([1.0])])
            >>> with opt.swap_ema():
            ...     print(w.tolist())
            [-0.5]
            >>> w.tolist()
            [-1.0]
        """

        def pairs() -> list[tuple[Array, Array]]:
            averaged = self._averaged("swap_ema")
            return [(p.array, p.views[EMA]) for p in averaged if EMA_STEP in (p.step_count.carry or {})]

        return swapping(self, pairs, self._device.copy, self._device.assign)

    @exclusive
    def reset_ema(self) -> None:
        """Let averages begin anew, as copies of the parameters as they are now.

        Raises:
            ValueError: No param group has ``ema_decay``.
            RuntimeError: Another thread is using this optimizer, or it is inside ``swap_ema``.
        """
        averaged = self._averaged("reset_ema")
        anew = {
            p.step_count: StepCount(p.step_count.steps, {**(p.step_count.carry or {}), EMA_STEP: 1.0}) for p in averaged
        }
        reset = [(p, anew[p.step_count]) for p in averaged]

        def take_over() -> None:
            for p, step_count in reset:
                self._device.assign(p.views[EMA], p.array)
                p.step_count = step_count
            self._rebuild()

        finish(take_over)

    def _averaged(self, method: str) -> list[Parameter]:
        """The parameters of groups with averages."""
        options = self._current_options()
        if all(o.get("ema_decay") is None for o in options):
            raise ValueError(f"{self._name}.{method}: no param group has averages; give one ema_decay.")
        if self._plan is not None:
            self._plan.recount()
        return [p for p in self._parameters if options[p.group].get("ema_decay") is not None]
