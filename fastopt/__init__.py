"""fastopt: the update step of training as fast as memory allows.

Optimizers with torch's names and defaults for NumPy arrays. Every update rule is one Numba function, compiled ahead of
time for several instruction sets; a step is one pass over memory, whatever the number of arrays, and its bits do not
depend on instruction set or number of threads.

Example:
    >>> import numpy as np, fastopt
    >>> params = fastopt.FlatBuffer.from_arrays({"w": np.ones((2, 2), np.float32), "b": np.zeros(2, np.float32)})
    >>> opt = fastopt.AdamW(params, lr=1e-3, weight_decay=0.01)
    >>> grads = params.zeros_like()
    >>> opt.step(grads).skipped
    False
"""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

if importlib.util.find_spec("fastopt.kernels") is None:
    raise ImportError(
        "fastopt is being imported from its source folder, which lacks the compiled kernels and hides an installed "
        "fastopt. Start Python elsewhere, or install with `pip install -e .` to work in the repository."
    )

from . import optimizers, schedules
from .arrays import FlatBuffer
from .base import Optimizer
from .engine.backend import get_num_threads, set_num_threads
from .engine.step import StepInfo
from .kernels.rules.rule import Rule
from .optimizers import *
from .own_rules import optimizer, rule

__version__ = "0.1.0"

if importlib.util.find_spec("fastopt._native") is None and importlib.util.find_spec("numba") is None:
    warnings.warn(
        "fastopt was installed without compiled kernels, because there was no C compiler with OpenMP, and Numba is "
        "missing to compile them on first use: no optimizer can take a step. Install gcc and then fastopt again, or "
        "Numba: pip install numba",
        stacklevel=2,
    )

__all__ = [
    "CheckpointError",
    "FlatBuffer",
    "Optimizer",
    "Rule",
    "StepInfo",
    "get_num_threads",
    "load",
    "optimizer",
    "rule",
    "save",
    "schedules",
    "set_num_threads",
]
__all__ += optimizers.__all__


def __getattr__(name: str) -> Any:
    if name in ("CheckpointError", "load", "save"):  # imported when used: json and hashlib are not needed to step
        from . import checkpoint

        return getattr(checkpoint, name)
    if name == "torch":  # a module of this package, which imports the one of that name
        return importlib.import_module("fastopt.torch")
    raise AttributeError(f"module 'fastopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "torch"})
