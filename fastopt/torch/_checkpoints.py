"""State dicts that go to torch.optim and come from it; copies and pickles."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..engine.exclusive import exclusive, finish, makes_many
from ..engine.options import refuse_extras
from ..kernels.epilogues import EMA
from ..kernels.registry import RULES, family_states
from ..kernels.rules.rule import Rule
from ._groups import GroupOptions
from ._master import MASTER
from ._state import LIBRARY, STEP, State, number


class Checkpoints(GroupOptions):
    """``state_dict``, ``load_state_dict``, ``copy.deepcopy`` and ``pickle``."""

    @_disable_dynamo
    @exclusive
    @makes_many
    def state_dict(self) -> dict[str, Any]:
        """A dict as torch.optim's class of the same name returns it, and loads it.

        Tensors are copies of one moment: later steps do not change them. States of float16 and bfloat16 parameters are
        float32.

        Raises:
            RuntimeError: Another thread steps this optimizer.
        """
        return self._exported(torch.clone)

    @_disable_dynamo
    @exclusive
    def full_state_dict(self) -> dict[str, Any]:
        """States and masters in float32 (float64 for parameters of float64), whole where processes hold parts of them.

        For exports; ``state_dict`` is what ``load_state_dict`` resumes from. With distributed parameters all processes
        must call it, and all get all of it.

        Returns:
            {"state": {index: {name: tensor}}, "param_groups": [...]}, as ``state_dict``.

        Raises:
            RuntimeError: Another thread steps this optimizer.
        """
        return self._exported(_whole)

    def _exported(self, copy_of: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        def copied(state: Any) -> Any:
            if not isinstance(state, dict):  # what a user put there
                return state
            return {name: copy_of(x) if isinstance(x, Tensor) else x for name, x in state.items()}

        exported = super().state_dict()
        return {**exported, "state": {key: copied(state) for key, state in exported["state"].items()}}

    @_disable_dynamo
    @makes_many
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class or of torch.optim's class of the same name.

        Tensors are copied once, into the memory that steps work on. States stay as precise as they were saved: torch
        would round those of 16-bit parameters to 16 bits.

        Raises:
            ValueError: It has another number of groups or of parameters, or a state has another shape than its
                parameter; nothing was changed.
            KeyError: The state of a parameter lacks its step count or something else that its rule needs; nothing was
                changed.
            RuntimeError: Another thread steps this optimizer.
        """
        loaded = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, loaded)
            loaded = loaded if changed is None else changed
        groups = self._checked_groups(loaded)
        keys = (key for group in groups for key in group["params"])
        params = dict(zip(keys, self._parameters(), strict=True))
        states = {params.get(key, key): state for key, state in loaded["state"].items()}
        groups = [{**group, "params": own["params"]} for group, own in zip(groups, self.param_groups, strict=True)]
        self.__setstate__({"state": states, "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _checked_groups(self, loaded: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Copies of the groups of a state dict; refuses one of another class, and states that cannot be right.

        What a state dict has none of stays as it is: names of parameters, and flags that torch's class does not have.
        """
        where, saved_groups = f"{type(self).__name__}.load_state_dict:", loaded["param_groups"]
        sizes, own_sizes = ([len(g["params"]) for g in groups] for groups in (saved_groups, self.param_groups))
        if sizes != own_sizes:
            raise ValueError(
                f"{where} the state dict has a different number of parameter groups, or of parameters: {sizes}, not "
                f"{own_sizes}."
            )
        groups = []
        for index, (saved, own) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            place = f"{where} group {index} of the state dict"
            refuse_extras(saved, self._extras(), place)
            kept = [name for name in (*self.rule_options, "param_names") if name in own and name not in saved]
            group = {**copy.deepcopy(saved), **{name: own[name] for name in kept}}
            # Flags are younger than some checkpoints.
            needed = [n for n, v in self.defaults.items() if v is not None and not isinstance(v, bool)]
            missing = [name for name in needed if name not in group]
            if missing:
                options = ", ".join(sorted(set(group) - {"params", "param_names"}))
                raise ValueError(
                    f"{place} lacks {', '.join(missing)}: it is of another class, with the options {options}. Load it "
                    "into an optimizer of that class."
                )
            rule = self.select_rule({**self.rule_options, **self.defaults, **group})
            for key, p in zip(group["params"], own["params"], strict=True):
                state = loaded["state"].get(key)
                if isinstance(state, dict) and state:
                    self._check_state(state, p, rule, where, key)
            groups.append(group)
        return groups

    def _check_state(self, state: dict[str, Any], parameter: Tensor, rule: Rule, where: str, key: Any) -> None:
        """Refuse a state that lacks something, or that has what only others have."""
        if not _foreign(rule).isdisjoint(state):
            raise ValueError(
                f"{where} parameter {key} has {', '.join(sorted(_foreign(rule) & state.keys()))}, which is of another "
                "class. Load it into an optimizer of that class."
            )
        needed = [STEP] * self.counts_steps + [*rule.carried, *rule.state]
        if not state.keys() >= {*needed}:
            begun = STEP in state and number(state[STEP]) > 0
            optional = {*rule.late, *(() if begun else rule.state)}
            missing = [name for name in needed if name not in state and name not in optional]
            if missing:
                raise KeyError(f"{where} parameter {key} has a state that lacks {missing[0]!r}.")
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape != parameter.shape and value.dim():
                raise ValueError(
                    f"{where} {name} of parameter {key} has shape {tuple(value.shape)}, but the parameter has shape "
                    f"{tuple(parameter.shape)}."
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self.state, "extras": self._extras()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_users" not in vars(self):  # unpickled or copied: there was no constructor
            extras = state.pop("extras", {})
            if extras.get("flatten") and isinstance(state["state"], State):  # a deep copy and a pickle have a dict
                raise TypeError(
                    f"{type(self).__name__}: copy.copy of an optimizer with flatten=True would move the parameters of "
                    "the original once more. Use copy.deepcopy."
                )
            GroupOptions.__init__(self, **extras)
            self._complete = True
            if self._flat is not None:
                try:
                    for group in state["param_groups"]:
                        self._flat.add(group["params"], type(self).__name__)
                except ValueError:  # parameters that came from another process are shared with it
                    self._flat = None
        self._load_state_dict(state)

    @exclusive
    def _load_state_dict(self, state: dict[str, Any]) -> None:
        moved = State.moved(state["state"], state["param_groups"], self.names, flat=self._flat is not None)

        def take_over() -> None:
            super(Checkpoints, self).__setstate__({**state, "state": {}})  # torch's classes look at each of them
            self.state = moved

        finish(take_over)


@functools.cache
def _foreign(rule: Rule) -> frozenset[str]:
    """States that only rules of other classes have; none for a rule of the user's own."""
    return LIBRARY.states - family_states(rule) - {MASTER, EMA} if RULES.get(rule.name) is rule else frozenset()


def _whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, at least float32."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
    is_low = tensor.is_floating_point() and tensor.itemsize < 4
    return tensor.float() if is_low else tensor
