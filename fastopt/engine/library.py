"""The library that CMake built: where it is, and whether it belongs to this code."""

from __future__ import annotations

import ctypes
import importlib.util

from ..kernels.layout import layout_hash


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
    return library
