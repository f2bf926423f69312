"""The library that CMake built: where it is, whether it belongs to this code, and how its functions are called."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from ctypes import c_bool, c_char_p, c_int, c_int64, c_uint64, c_void_p, py_object
from typing import Any

from ..kernels.layout import layout_hash

FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "fastopt_layout": (c_int,),
    "fastopt_isa": (c_char_p,),
    "fastopt_default_threads": (c_int,),
    "fastopt_run": (None, c_void_p, c_void_p, c_int64, c_int64, c_int),
    "fastopt_look": (c_uint64, c_void_p),
    "fastopt_unchanged": (c_bool, c_void_p, py_object),
    "fastopt_gradients": (c_bool, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    "fastopt_release": (None, c_void_p, c_void_p, c_int64),
    "fastopt_bump_versions": (c_bool, c_void_p, c_void_p, c_int64),
}
"""By name the type of the result, then those of the arguments (kernels/cpu/\\*.c)."""


def library_path() -> str | None:
    """Where the library is; None in a build without one."""
    spec = importlib.util.find_spec("fastopt._native")
    return spec.origin if spec else None


def open_library(path: str, kind: type[ctypes.CDLL] | None = None) -> ctypes.CDLL:
    """The library, checked.

    Args:
        path: Where it is.
        kind: ``ctypes.CDLL``, or ``ctypes.PyDLL`` for functions that are called with Python's lock.

    Raises:
        OSError: The system cannot load it, for GNU OpenMP is missing.
        ImportError: It was built with other structures than this code has (kernels/layout.py).
    """
    library = (kind or ctypes.CDLL)(path)
    # A library from before this was asked has no such function.
    if not hasattr(library, "fastopt_layout") or library.fastopt_layout() != layout_hash():
        raise ImportError(f"fastopt: {path} belongs to another version of fastopt; install it again.")
    for name, (result, *arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@functools.cache
def locked_library() -> ctypes.CDLL | None:
    """The library, whose functions are called with Python's lock: meanwhile no other thread may change an object."""
    path = library_path()
    try:
        return None if path is None else open_library(path, ctypes.PyDLL)
    except OSError:
        return None
