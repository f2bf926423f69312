"""State dicts that go to torch.optim and come from it; copies and pickles."""

from __future__ import annotations

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


class _Boxed:
    """Keeps a state from ``torch.optim.Optimizer.load_state_dict``, which would cast it to the parameter's dtype.

    For step counts, too, torch would look for each parameter in the lists of all groups.
    """

    __slots__ = ("state",)

    def __init__(self, state: Any) -> None:
        self.state = state


def _box(opt: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    """Check a state dict before it is loaded, and put its states in boxes."""
    assert isinstance(opt, Checkpoints)
    return {**opt._checked(loaded), "state": {key: _Boxed(state) for key, state in loaded["state"].items()}}


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
        return self._copied(super().state_dict(), torch.clone)

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
        return self._copied(super().state_dict(), _whole)

    def _copied(self, exported: dict[str, Any], copy: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        if isinstance(self.state, State):
            self.state.watch.settle()
        exported["state"] = {
            key: {k: copy(v) if isinstance(v, Tensor) else v for k, v in state.items()}
            if isinstance(state, dict)
            else state
            for key, state in exported["state"].items()
        }
        return exported

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
        hooks = self._optimizer_load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _box]:  # left by an interrupted load
            del hooks[key]
        handle = self.register_load_state_dict_pre_hook(_box)  # after those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _checked(self, loaded: Mapping[str, Any]) -> dict[str, Any]:
        """A state dict that is about to be loaded; refuses one of another class, and states that cannot be right.

        Flags that torch's class does not have stay as they are where the state dict has none.
        """
        where, groups = f"{type(self).__name__}.load_state_dict:", list(loaded["param_groups"])
        for index, (saved, own) in enumerate(zip(groups, self.param_groups, strict=False)):
            place = f"{where} group {index} of the state dict"
            refuse_extras(saved, self._extras(), place)
            kept = {name: own[name] for name in self.rule_options if name in own and name not in saved}
            group = groups[index] = {**saved, **kept}
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
            for key, p in zip(group["params"], own["params"], strict=False):
                state = loaded["state"].get(key)
                if isinstance(state, dict) and state:
                    self._check_state(state, p, rule, where, key)
        return {**loaded, "param_groups": groups}

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
        state, groups = dict(state), state["param_groups"]
        if "extras" in state:  # unpickled or copied: there was no constructor
            self._made_anew(**state.pop("extras"))
            self._complete = True
            self._flatten_again(groups)
        self._load_state_dict(state)

    @exclusive
    def _load_state_dict(self, state: dict[str, Any]) -> None:
        items = {p: x.state if type(x) is _Boxed else x for p, x in state["state"].items()}
        moved = State.moved(items, state["param_groups"], self.names, flat=self._flat is not None)

        def take_over() -> None:
            super(Checkpoints, self).__setstate__({**state, "state": {}})  # torch's classes look at each of them
            self.state = moved

        finish(take_over)

    def _flatten_again(self, groups: list[dict[str, Any]]) -> None:
        """Move the parameters of a copy as those of the original were, or let it be an optimizer that is not flat."""
        try:
            for group in groups if self._flat is not None else ():
                self._flat.add(group["params"], type(self).__name__)  # type: ignore[union-attr]
        except ValueError:  # parameters that came from another process are shared with it
            self._flat = None


@functools.cache
def _foreign(rule: Rule) -> frozenset[str]:
    """States that only rules of other classes have; none for a rule of the user's own."""
    return LIBRARY.states - family_states(rule) - {MASTER, EMA} if RULES.get(rule.name) is rule else frozenset()


def _whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, at least float32."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
    is_low = tensor.is_floating_point() and tensor.itemsize < 4
    return tensor.float() if is_low else tensor
