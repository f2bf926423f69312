"""Options of optimizers: keywords of constructors, attributes, values in param groups, and checkpoints of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

FIXED = (bool, int, float, str)
"""Types whose objects never change."""

OTHER_NAMES = {
    "beta1": "betas",
    "beta2": "betas",
    "clip_grad_norm": "max_grad_norm",
    "epsilon": "eps",
    "learning_rate": "lr",
    "max_norm": "max_grad_norm",
}
"""What other libraries call arguments."""


def check_keywords(cls: type, keywords: Iterable[str]) -> None:
    """Refuse a keyword that the constructor of a class does not take, and name the one that may be meant."""
    taken = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        return
    for name in keywords:
        if name not in taken:
            near = [OTHER_NAMES.get(name, name)]
            if near[0] not in taken:
                near = difflib.get_close_matches(name, taken, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{cls.__name__}.__init__() got an unexpected keyword argument {name!r}.{hint}")


def check_rate(lr: Any, where: str) -> None:
    """Refuse an lr that torch's constructors would compare with 0 in vain."""
    if (callable(lr) and not isinstance(lr, Tensor)) or isinstance(lr, str) or lr is None:
        hint = " For a function of the step use torch.optim.lr_scheduler.LambdaLR." if callable(lr) else ""
        raise TypeError(f"{where}: lr must be a number or a tensor of one element, got {lr!r}.{hint}")


def refuse_extras(group: Mapping[str, Any], own: Mapping[str, Any], where: str) -> None:
    """Refuse a param group with an option that only the whole optimizer has, unless it says the same.

    ``ZeroRedundancyOptimizer`` gives its keywords both to the constructor and to every group.
    """
    for name in own.keys() & group.keys():
        value = group[name]
        if value is not own[name] and not (isinstance(value, (bool, int, float)) and value == own[name]):
            raise ValueError(
                f"{where}: {name} is an option of the whole optimizer, not of a param group. Pass it to the "
                f"constructor, as {name}=..."
            )


def without_numpy(value: Any) -> Any:
    """An argument with NumPy's numbers, which cannot change, as Python's: torch's constructors refuse some of them."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) in (list, tuple) and any(isinstance(x, (np.generic, np.ndarray)) for x in value):
        return type(value)(plain(x, "") for x in value)
    return value


def plain(value: Any, where: str) -> Any:
    """An option as Python's numbers; lists, arrays and tensors of several as tuples, since their items may change."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if value.ndim == 0 or value.shape == (1,):
            return value.item()
        if value.ndim > 1:
            raise TypeError(f"{where} must be a number, got an array of shape {tuple(value.shape)}.")
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(plain(x, where) for x in value)
    return value


def is_fixed(value: Any) -> bool:
    """Whether the object cannot say something else later."""
    return value is None or type(value) in FIXED or (type(value) is tuple and all(map(is_fixed, value)))
