"""Options as torch's users write them: numbers of NumPy, and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


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
