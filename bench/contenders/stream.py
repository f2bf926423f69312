"""The limit that the machine sets."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..case import Case, states
from .base import Arrays, Contender

SOURCE = Path(__file__).with_name("stream.c")
COMMAND = ("cc", "-O3", "-march=native", "-mprefer-vector-width=512", "-fopenmp", "-shared", "-fPIC")


@functools.cache
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


class Stream(Contender):
    """No optimizer: the same reads and writes with one addition each (stream.c), the limit that the machine sets."""

    dtypes = ("float32", "float64", "float16", "bfloat16")
    options = ("grad_scale", "max_norm", "skip_nonfinite", "zero_grads")  # which it does without
    checked = False

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import fastopt

        from .stream import stream

        count = states(case.optimizer, tuple(sorted(case.hyper.items())))
        self.params = fastopt.FlatBuffer.from_arrays(params)
        kind = "float64" if case.dtype == "float64" else "float32"
        self.arrays = [self.params.data, fastopt.FlatBuffer.from_arrays(grads).data]
        self.arrays += [self.params.zeros_like(kind).data for _ in range(count)]
        self.run = stream(self.params.dtype.itemsize)
        addresses = [array.ctypes.data for array in self.arrays] + [0] * 3
        self.arguments = (self.params.data.size, count, *addresses[:5])

    def step(self) -> None:  # noqa: D102
        self.run(*self.arguments)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]
