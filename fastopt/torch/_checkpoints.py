"""State dicts that go to torch.optim and come from it; copies and pickles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..engine.exclusive import exclusive
from ..kernels.rules.rule import Options, Rule
from ._flat import FlatGroups
from ._state import STEP, Names, State


class _Boxed:
    """Keeps a tensor from ``torch.optim.Optimizer.load_state_dict``, which would cast it to the parameter's dtype.

    For step counts, too, torch would look for each parameter in the lists of all groups.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _boxed(state: Any) -> Any:
    """The state of one parameter with its tensors in boxes."""
    if not isinstance(state, dict):
        return state
    return {k: _Boxed(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def _box(opt: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    """Check a state dict before it is loaded, and put its tensors in boxes."""
    assert isinstance(opt, Checkpoints)
    loaded = {**opt.check_loaded(loaded)}
    opt.check_states(loaded)
    return {**loaded, "state": {key: _boxed(state) for key, state in loaded["state"].items()}}


def _taken(parameter: Any, state: Any, names: Names) -> Any:
    """The state of one parameter without boxes: states and numbers as they are, copies of other tensors."""
    if not isinstance(state, dict):
        return state
    taken = {}
    for name, value in state.items():
        if isinstance(value, _Boxed):
            value = value.tensor.detach()
            is_state = name in names.states and value.shape == parameter.shape
            if name != STEP and name not in names.numbers and not is_state:
                value = value.clone() if value.dim() == 0 else value.to(parameter.device, copy=True)
        elif name not in (STEP, *names.numbers) and isinstance(value, float):  # of an older checkpoint
            value = torch.tensor(value, dtype=torch.float64)
        taken[name] = value
    return taken


class Checkpoints(torch.optim.Optimizer):
    """``state_dict``, ``load_state_dict``, ``copy.deepcopy`` and ``pickle``."""

    _flat: FlatGroups | None
    _users: list[object]
    _complete: bool
    counts_steps: ClassVar[bool]
    rule_options: ClassVar[Mapping[str, Any]]
    names: ClassVar[Names]

    @_disable_dynamo
    @exclusive
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

    def check_states(self, loaded: dict[str, Any]) -> None:
        """Refuse states that lack something, or of other shapes."""
        where = f"{type(self).__name__}.load_state_dict"
        for own, group in zip(self.param_groups, loaded["param_groups"], strict=False):
            numbers = [STEP] * self.counts_steps
            rule = self.select_rule({**self.rule_options, **self.defaults, **group})
            numbers += rule.carried
            for index, p in zip(group["params"], own["params"], strict=False):
                state = loaded["state"].get(index) or {}
                steps = state.get(STEP)
                begun = (
                    [name for name in rule.state if name not in rule.late] if steps is not None and steps > 0 else []
                )
                missing = [name for name in (*numbers, *begun) if name not in state]
                if state and missing:
                    raise KeyError(f"{where}: parameter {index} has a state that lacks {missing[0]!r}.")
                for name, value in state.items():
                    if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                        raise ValueError(
                            f"{where}: {name} of parameter {index} has shape {tuple(value.shape)}, but the parameter "
                            f"has shape {tuple(p.shape)}."
                        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self.state, "extras": self._extras()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state, groups = dict(state), state["param_groups"]
        loaded = "extras" not in state
        if not loaded:  # unpickled or copied: there was no constructor
            self._made_anew(**state.pop("extras"))
            self._complete = True
            self._flatten_again(groups)
        self._load_state_dict(state, loaded)

    @exclusive
    def _load_state_dict(self, state: dict[str, Any], loaded: bool) -> None:
        taken = {p: _taken(p, s, self.names) for p, s in state["state"].items()}
        state["state"] = State.moved(taken, state["param_groups"], self.names, flat=self._flat is not None, copy=loaded)
        super().__setstate__(state)

    def _flatten_again(self, groups: list[dict[str, Any]]) -> None:
        """Move the parameters of a copy as those of the original were, or let it be an optimizer that is not flat."""
        try:
            for group in groups if self._flat is not None else ():
                self._flat.add(group["params"], type(self).__name__)  # type: ignore[union-attr]
        except ValueError:  # parameters that came from another process are shared with it
            self._flat = None

    def select_rule(self, options: Options) -> Rule:
        raise NotImplementedError

    def _extras(self) -> dict[str, Any]:
        raise NotImplementedError

    def _made_anew(self, *args: Any, **extras: Any) -> None:
        raise NotImplementedError

    def check_loaded(self, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict that is about to be loaded, or an error where it is of another class."""
        raise NotImplementedError


def _whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, at least float32."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
    is_low = tensor.is_floating_point() and tensor.itemsize < 4
    return tensor.float() if is_low else tensor
