"""Numba's CUDA package, imported here and nowhere else, and the one function that makes PTX with it.

numba-cuda is in maintenance mode, so whatever takes its place has to fit behind this file.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from numba import cuda
from numba.cuda import types
from numba.cuda.cudadrv import nvvm
from numba.cuda.extending import intrinsic

from .. import emit
from ..layout import THREADS

__all__ = ["THREADS", "cuda", "device_function", "emitted", "ptx", "types"]

emitted = functools.partial(emit.emitted, intrinsic=intrinsic)
device_function = cuda.jit(device=True, inline="always")

BASELINE = (7, 5)
"""Compute capability that PTX is made for; drivers translate it for every newer one."""

PTX_VERSION = "7.0"
"""PTX version that is written into the text. NVVM writes its own, newer one, which drivers older than it refuse; but
nothing in these kernels needs more than 7.0 (CUDA 11), and ptxas proves it in the tests."""


@contextlib.contextmanager
def _no_contraction() -> Iterator[None]:
    """NVVM would fuse multiplications and additions; Numba has no option to forbid it."""
    compile_ir = nvvm.compile_ir
    nvvm.compile_ir = lambda ir, **options: compile_ir(ir, **{**options, "fma": 0})
    try:
        yield
    finally:
        nvvm.compile_ir = compile_ir


def ptx(kernel: Callable[..., None], signature: Any, symbol: str) -> str:
    """PTX of a kernel, which is called ``symbol`` there. Needs NVVM, but no GPU."""
    with _no_contraction():
        text, _ = cuda.compile(
            kernel, signature, device=False, cc=BASELINE, output="ptx", abi="numba", launch_bounds=THREADS
        )
    (name,) = re.findall(r"\.entry\s+(\w+)", text)
    text = text.replace(name, symbol)
    text = re.sub(r"^\.common .*NumbaEnv.*\n", "", text, flags=re.MULTILINE)  # of use to Numba's own launcher only
    return re.sub(r"^\.version .*$", f".version {PTX_VERSION}", text, count=1, flags=re.MULTILINE)
