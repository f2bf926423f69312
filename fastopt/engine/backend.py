"""Finds kernels and runs tables of them: the compiled library where there is one, Numba where there is not."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernels.cpu import team
from ..kernels.dtypes import symbol
from ..kernels.registry import PREBUILT
from ..kernels.rules.rule import Rule
from .library import library_path, open_library

SERIAL_BELOW = 65_536
"""Elements below which one thread does it all: a second one would save some 20 µs, but where a threaded BLAS has just
spun on its core, waiting for it to be scheduled costs milliseconds."""


NUMBA = 'install Numba: pip install "fastopt[jit]".'


class Backend:
    """What runs a table, and finds the kernels whose addresses a table is made of.

    Attributes:
        isa: The instruction set of its kernels.
        compiles: Why a kernel is compiled on first use.
        default_threads: How many threads a step uses at most, if nobody says it.
        run: Function ``(address of a table's record, act, flags, threads)``: a team of threads does with the table what
            ``UPDATE`` and others in kernels/layout.py say.
    """

    isa = "numba"
    default_threads: int
    run: Callable[[int, int, int, int], None]

    def __init__(self, compiles: str) -> None:
        self.compiles = compiles

    def require(self) -> None:
        """Refuse to go on where no kernel can be had."""

    def address(self, name: str) -> int | None:
        """Address of a function of the compiled library."""
        return None

    def kernel(self, kind: str, *of: Any) -> int:
        """Address of a kernel, by what ``KERNELS`` in kernels/cpu/compile.py says it is of."""
        own = any(isinstance(x, Rule) and x not in PREBUILT for x in of)
        prebuilt = None if own else self.address(symbol(kind, *of, self.isa))
        if prebuilt is not None:
            return prebuilt
        try:
            from ..kernels.cpu import compile as compiler

            return int(compiler.compiled(compiler.converts_half("native"), kind, *of).address)
        except ImportError as error:
            named = f"the {kind} kernel for {', '.join(getattr(x, 'name', x) for x in of)}"
            raise ImportError(f"fastopt: {self.compiles} To compile {named} now, {NUMBA} ({error})") from error


class Native(Backend):
    """The library that CMake built: kernels of every rule, and OpenMP's threads."""

    def __init__(self, path: str, isa: str | None = None) -> None:
        super().__init__("the compiled library has only the rules and dtypes of fastopt.")
        library = open_library(path)
        library.fastopt_isa.restype = ctypes.c_char_p
        library.fastopt_run.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_int]
        library.fastopt_run.restype = None
        self._library = library
        best = library.fastopt_isa().decode()
        if isa is not None and isa != best and (isa not in ISAS or best not in ISAS or isa > best):
            raise ValueError(
                f"FASTOPT_ISA: {isa!r} cannot run here; this processor runs "
                f"{', '.join(x for x in ISAS if x <= best) if best in ISAS else best}, or numba."
            )
        self.isa = isa or best
        self.default_threads = int(library.fastopt_default_threads())
        self.run = functools.partial(library.fastopt_run, self.kernel("schedule"))

    def address(self, name: str) -> int | None:
        function = getattr(self._library, name, None)
        return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


class Numba(Backend):
    """Everything compiled on first use; the threads are Python's."""

    def __init__(self, compiles: str) -> None:
        super().__init__(compiles)
        # As GNU OpenMP reads it: a number, or a list with one for each level of nesting; anything else is ignored.
        wanted = re.fullmatch(r"\s*([0-9]+)\s*(,\s*[0-9]+\s*)*", os.environ.get("OMP_NUM_THREADS", ""))
        self.run = lambda *given: team.run(self.kernel("schedule"), *given)
        self.default_threads = (wanted and int(wanted[1])) or len(os.sched_getaffinity(0))

    def require(self) -> None:
        if importlib.util.find_spec("numba") is None:
            raise ImportError(f"fastopt: {self.compiles} To have kernels compiled on first use, {NUMBA}")


ISAS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


UNBUILT = "this build has no kernels (it was built without a C compiler): install gcc, then install fastopt again."
LIBGOMP = "It needs GNU OpenMP (libgomp.so.1): apt-get install libgomp1, dnf install libgomp or apk add libgomp."


def load(isa: str | None = None) -> Backend:
    """The backend for an instruction set: one of the library's, "numba", or by default the best there is.

    Without the library, or where the system cannot load it, kernels are compiled on first use.
    """
    if isa == "numba":
        return Numba("FASTOPT_ISA=numba asks for it.")
    path = library_path()
    if path is None:
        if isa is not None:
            raise ImportError(f"FASTOPT_ISA={isa}: {UNBUILT}")
        return Numba(UNBUILT)
    try:
        return Native(path, isa)
    except OSError as error:
        why = f"the compiled library cannot be loaded ({error}). {LIBGOMP}"
        if isa is not None:
            raise ImportError(f"FASTOPT_ISA={isa}: {why}") from error
        if importlib.util.find_spec("numba") is not None:
            warnings.warn(f"fastopt: {why} Kernels are compiled on first use instead.", stacklevel=2)
        return Numba(why)


@functools.cache
def current() -> Backend:
    """The backend of this process; FASTOPT_ISA chooses it."""
    return load(os.environ.get("FASTOPT_ISA") or None)


_threads: int | None = None


def get_num_threads() -> int:
    """Number of threads that a step uses at most.

    By default OMP_NUM_THREADS where it is set, else one thread per core that this process may use. In the child of a
    fork a step runs in one thread, because GNU OpenMP cannot start threads there.

    Example:
        >>> import fastopt
        >>> fastopt.set_num_threads(2)
        >>> fastopt.get_num_threads()
        2
    """
    return current().default_threads if _threads is None else _threads


def set_num_threads(threads: int) -> None:
    """Set the number of threads that a step uses at most; results do not depend on it.

    Raises:
        TypeError: ``threads`` is not an integer.
        ValueError: ``threads`` is below 1 or above 1024.
    """
    global _threads
    if isinstance(threads, bool) or not isinstance(threads, (int, np.integer)):
        raise TypeError(f"set_num_threads: threads must be an integer, got {threads!r}.")
    if not 1 <= threads <= 1024:
        raise ValueError(f"set_num_threads: threads must be in [1, 1024], got {threads}.")
    _threads = int(threads)
