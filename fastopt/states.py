"""State dicts: what an optimizer exports, and the checks before it takes one in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .arrays import Array, check_dtype, is_array
from .engine.plan import MAX_STEP, Parameter
from .kernels.dtypes import COMPUTE
from .kernels.epilogues import EMA, EMA_STEP
from .kernels.registry import family_states
from .kernels.rules.rule import Options, Rule

VERSION = 1


class StateView(Mapping[str, Any]):
    """What an optimizer shows of its states, and of one parameter's: arrays can be written, entries not replaced."""

    __slots__ = ("_entries", "_owner")

    def __init__(self, entries: Mapping[str, Any], owner: str) -> None:
        self._entries, self._owner = entries, owner

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, name: str, value: object) -> None:
        raise TypeError(
            f"{self._owner}.state[...]: {name!r} cannot be assigned. Write into an array with [...] = values; all else "
            "is changed by load_state_dict."
        )

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{self._owner}.state[...]: {name!r} cannot be deleted; states are changed by load_state_dict.")

    def _refuse(self, *_: object, **__: object) -> None:
        raise TypeError(f"{self._owner}.state[...] has the entries that its rule has; load_state_dict changes them.")

    clear = pop = popitem = setdefault = update = _refuse

    def __repr__(self) -> str:
        return repr(self._entries)


class SavedParameter(NamedTuple):
    """Progress and state arrays of one parameter."""

    step: int
    carry: dict[str, float]
    arrays: dict[str, Array]


class Saved(NamedTuple):
    """A state dict whose form was checked: options of each group, and each parameter in order."""

    groups: list[dict[str, Any]]
    parameters: list[SavedParameter]


def export_state(
    optimizer: str,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[str, Mapping[str, Any]],
    copy_of: Callable[[Array], Array],
) -> dict[str, Any]:
    """A state dict; arrays are copied."""
    exported: dict[str, Any] = {"version": VERSION, "optimizer": optimizer, "state": {}, "param_groups": []}
    for group in groups:
        first = len(exported["state"])
        for name in group["params"]:
            exported["state"][len(exported["state"])] = {
                key: copy_of(value) if is_array(value) else value for key, value in state[name].items()
            }
        options = {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        indices = list(range(first, len(exported["state"])))
        exported["param_groups"].append({**options, "params": indices, "param_names": list(group["params"])})
    return exported


def import_state(
    state_dict: Mapping[str, Any], optimizer: str, groups: Sequence[Mapping[str, Any]], where: str
) -> Saved:
    """Refuse a state dict of another version, optimizer or list of parameters; its arrays are not copied yet."""
    if not isinstance(state_dict, Mapping) or not {"version", "optimizer", "state", "param_groups"} <= set(state_dict):
        raise TypeError(f"{where}: needed is what state_dict() returns, got {type(state_dict).__name__}.")
    if state_dict["version"] != VERSION:
        raise ValueError(f"{where}: version {state_dict['version']!r} is not {VERSION}, which this fastopt reads.")
    if state_dict["optimizer"] != optimizer:
        raise ValueError(f"{where}: the state is of {state_dict['optimizer']!r}, not of {optimizer!r}.")
    saved_groups, states = state_dict["param_groups"], state_dict["state"]
    if not isinstance(saved_groups, Sequence) or not isinstance(states, Mapping):
        raise TypeError(f'{where}: "param_groups" must be a list and "state" a dict.')
    if len(saved_groups) != len(groups):
        raise ValueError(f"{where}: the state has {len(saved_groups)} param groups, the optimizer {len(groups)}.")
    result = Saved([], [])
    for index, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        if not isinstance(saved, Mapping) or not {"params", "param_names"} <= set(saved):
            raise TypeError(f'{where}: group {index} of the state must be a dict with "params" and "param_names".')
        names, own, indices = list(saved["param_names"]), list(group["params"]), list(saved["params"])
        if names != own or len(indices) != len(own):
            raise ValueError(
                f"{where}: parameters of group {index} are {_shorten(names)} in the state, {_shorten(own)} here."
            )
        options = {k: v for k, v in saved.items() if k not in ("params", "param_names")}
        result.groups.append(copy.deepcopy(options))
        for name, key in zip(names, indices, strict=True):
            if not isinstance(states.get(key), Mapping):
                raise ValueError(f"{where}: there is no state for parameter {name!r}.")
            result.parameters.append(_parameter(states[key], name, where))
    return result


def _parameter(entry: Mapping[str, Any], name: str, where: str) -> SavedParameter:
    step, arrays, carry = entry.get("step"), {}, {}
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)) or not 0 <= step <= MAX_STEP:
        raise ValueError(f"{where}: the step of parameter {name!r} must be an integer in [0, 2^53], got {step!r}.")
    for key, value in entry.items():
        if is_array(value):
            arrays[key] = value
        elif key != "step":
            if type(value) not in (int, float) or not -1e308 <= value <= 1e308:
                raise TypeError(f"{where}: {key} of parameter {name!r} must be an array or a number, got {value!r}.")
            carry[key] = float(value)
    if EMA not in arrays:
        carry.pop(EMA_STEP, None)  # the average begins anew
    return SavedParameter(int(step), carry, arrays)


def check_states(saved: SavedParameter, p: Parameter, rule: Rule, options: Options, where: str) -> None:
    """Refuse states of the wrong names, shapes or dtypes for a parameter."""
    dtype = COMPUTE[p.dtype]
    missing = set(rule.state) - set(saved.arrays) - set(rule.late)
    unknown = set(saved.arrays) - {EMA, *p.states} - family_states(rule)  # of a variant that an option chose before
    if missing or unknown:
        raise ValueError(
            f"{where}: parameter {p.name!r} has the states {sorted(saved.arrays)}, but its rule needs "
            f"{sorted(rule.state)}."
        )
    for name, array in saved.arrays.items():
        if array.dtype.name == dtype:
            check_dtype(array.dtype, f"{where}: {name} of parameter {p.name!r}")  # its byte order
        if array.shape != p.array.shape or array.dtype != dtype:
            raise ValueError(
                f"{where}: {name} of parameter {p.name!r} is {array.dtype.name} of shape {array.shape}; needed is "
                f"{dtype} of shape {p.array.shape}."
            )
    known = set(rule.carry(options)._fields) if rule.carry else set()
    if saved.carry.keys() - {EMA_STEP, *known} or (saved.step and known - saved.carry.keys()):
        raise ValueError(
            f"{where}: parameter {p.name!r} has the host scalars {sorted(saved.carry)}, but its rule needs "
            f"{sorted(known)}."
        )


def _shorten(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return f"[{shown}, ... {len(names)} in all]" if len(names) > 5 else f"[{shown}]"
