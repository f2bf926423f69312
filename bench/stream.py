"""Compiles stream.c for this processor and loads it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("stream.c")
COMMAND = ("cc", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC")


def stream(itemsize: int) -> Callable[..., Any]:
    """The stream for parameters of ``itemsize`` bytes: (n, states, p, g, a, b, c) with addresses for arrays."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "stream.so"
        command = [*COMMAND, str(SOURCE), "-o", str(library)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            command.remove("-mprefer-vector-width=512")  # only x86 has the choice
            subprocess.run(command, check=True)
        function: Any = getattr(ctypes.CDLL(str(library)), f"stream{itemsize}")
    function.argtypes = [ctypes.c_int64, ctypes.c_int] + [ctypes.c_void_p] * 5
    function.restype = None
    return function  # type: ignore[no-any-return]
