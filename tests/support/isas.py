"""The instruction sets that tests run through."""

import ctypes
from typing import Any

import numpy as np
from fastopt.kernels.rules.rule import Rule

from fastopt.engine import backend as _backend


def native_isas():
    """The instruction sets of the compiled library that this machine runs, the oldest first."""
    best = _backend.load().isa
    return [isa for isa in _backend.ISAS if isa <= best] if best in _backend.ISAS else [best]


def run_epilogue(isa: str, epilogue: Rule, values: Any, target: Any, *ranges: tuple[int, int], h: float = 0) -> None:
    """Call the kernel of an epilogue for ranges of elements of parameters and their target."""
    signature = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_void_p] * 3)
    kernel = signature(_backend.load(isa).kernel("update", epilogue, target.dtype.name, values.dtype.name))
    arrays, numbers = np.array([target.ctypes.data, values.ctypes.data]), np.array([1.0, 1.0, h])
    for lo, hi in ranges:
        kernel(lo, hi, arrays.ctypes.data, numbers[2:].ctypes.data, numbers.ctypes.data)
