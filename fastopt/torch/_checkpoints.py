"""State dicts that go to torch.optim and come from it; copies and pickles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ._state import STEP, State


class _Boxed:
    """Keeps a tensor from ``torch.optim.Optimizer.load_state_dict``, which would cast it to the parameter's dtype."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _boxed(state: Any) -> Any:
    """The state of one parameter with its tensors in boxes; "step" is not cast."""
    if not isinstance(state, dict):
        return state
    return {k: _Boxed(v) if isinstance(v, Tensor) and k != STEP else v for k, v in state.items()}


def _taken(parameter: Any, state: Any) -> Any:
    """The state of one parameter as copies of what is in its boxes, on the parameter's device."""
    if not isinstance(state, dict):
        return state
    taken = {}
    for name, value in state.items():
        if isinstance(value, _Boxed):
            tensor = value.tensor.detach()
            value = tensor.clone() if tensor.dim() == 0 else tensor.to(parameter.device, copy=True)
        elif name == STEP and isinstance(value, Tensor):
            value = value.detach().clone()
        elif name != STEP and isinstance(value, float):  # of an older checkpoint; torch would round it to float32
            value = torch.tensor(value, dtype=torch.float64)
        taken[name] = value
    return taken


class Checkpoints(torch.optim.Optimizer):
    """``state_dict``, ``load_state_dict``, ``copy.deepcopy`` and ``pickle``."""

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """A dict as torch.optim's class of the same name returns it, and loads it.

        Tensors are copies: saved, they take their own bytes, not those of the flat memory that holds all states. States
        of float16 and bfloat16 parameters are float32.
        """
        exported = super().state_dict()
        exported["state"] = {
            key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
            if isinstance(state, dict)
            else state
            for key, state in exported["state"].items()
        }
        return exported

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class or of torch.optim's class of the same name.

        States stay as precise as they were saved: torch would round those of 16-bit parameters to 16 bits.

        Raises:
            ValueError: It has another number of groups or of parameters, or a state has another shape than its
                parameter; nothing was changed.
        """

        def box(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            loaded = {**self.check_loaded(loaded)}
            self._check_shapes(loaded)
            return {**loaded, "state": {key: _boxed(state) for key, state in loaded["state"].items()}}

        handle = self.register_load_state_dict_pre_hook(box)  # after those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def _check_shapes(self, loaded: dict[str, Any]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in loaded["param_groups"] for i in group["params"]]
        for index, p in zip(indices, params, strict=False):
            for name, value in (loaded["state"].get(index) or {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape != p.shape:
                    raise ValueError(
                        f"{type(self).__name__}.load_state_dict: {name} of parameter {index} has shape "
                        f"{tuple(value.shape)}, but the parameter has shape {tuple(p.shape)}."
                    )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "state": self.state, "extras": self._extras()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "extras" in state:  # unpickled or copied: there was no constructor
            self._begin(**state.pop("extras"))
        state["state"] = State({p: _taken(p, s) for p, s in state["state"].items()})
        super().__setstate__(state)
        self.state = State(self.state)

    def _extras(self) -> dict[str, Any]:
        raise NotImplementedError

    def _begin(self, *args: Any, **extras: Any) -> None:
        raise NotImplementedError

    def check_loaded(self, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict that is about to be loaded, or an error where it is of another class."""
        raise NotImplementedError
