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

    Args:
        isa: "numba", or an instruction set of the library's kernels.
        compiles: See above.
        library: The compiled library, whose threads are OpenMP's; None where Numba compiles all, and they are Python's.
    """

    def __init__(self, isa: str, compiles: str, library: ctypes.CDLL | None = None) -> None:
        self.isa, self.compiles, self._library = isa, compiles, library
        self.run: Callable[[int, int, int, int], None]
        if library is not None:
            self.default_threads = int(library.fastopt_default_threads())
            self.run = functools.partial(library.fastopt_run, self.kernel("schedule"))
        else:
            # As GNU OpenMP reads it: a number, or a list with one for each level of nesting; anything else is ignored.
            wanted = re.fullmatch(r"\s*([0-9]+)\s*(,\s*[0-9]+\s*)*", os.environ.get("OMP_NUM_THREADS", ""))
            self.default_threads = (wanted and int(wanted[1])) or len(os.sched_getaffinity(0))
            self.run = lambda *given: team.run(self.kernel("schedule"), *given)

    def require(self) -> None:
        """Refuse to go on where no kernel can be had."""
        if self._library is None and importlib.util.find_spec("numba") is None:
            raise ImportError(f"fastopt: {self.compiles} To have kernels compiled on first use, {NUMBA}")

    def kernel(self, kind: str, *of: Any) -> int:
        """Address of a kernel, by what ``KERNELS`` in kernels/cpu/compile.py says it is of."""
        own = any(isinstance(x, Rule) and x not in PREBUILT for x in of)
        prebuilt = None if own else getattr(self._library, symbol(kind, *of, self.isa), None)
        if prebuilt is not None:
            return ctypes.cast(prebuilt, ctypes.c_void_p).value or 0
        try:
            from ..kernels.cpu import compile as compiler

            return int(compiler.compiled(compiler.converts_half("native"), kind, *of).address)
        except ImportError as error:
            named = f"the {kind} kernel for {', '.join(getattr(x, 'name', x) for x in of)}"
            raise ImportError(f"fastopt: {self.compiles} To compile {named} now, {NUMBA} ({error})") from error


ISAS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")


UNBUILT = "this build has no kernels (it was built without a C compiler): install gcc, then install fastopt again."
LIBGOMP = "It needs GNU OpenMP (libgomp.so.1): apt-get install libgomp1, dnf install libgomp or apk add libgomp."


def load(isa: str | None = None) -> Backend:
    """The backend for an instruction set: one of the library's, "numba", or by default the best there is.

    Without the library, or where the system cannot load it, kernels are compiled on first use.
    """
    if isa == "numba":
        return Backend(isa, "FASTOPT_ISA=numba asks for it.")
    path, why, cause = library_path(), UNBUILT, None
    if path is not None:
        try:
            return _native(open_library(path), isa)
        except OSError as error:
            why, cause = f"the compiled library cannot be loaded ({error}). {LIBGOMP}", error
    if isa is not None:
        raise ImportError(f"FASTOPT_ISA={isa}: {why}") from cause
    if cause is not None and importlib.util.find_spec("numba") is not None:
        warnings.warn(f"fastopt: {why} Kernels are compiled on first use instead.", stacklevel=2)
    return Backend("numba", why)


def _native(library: ctypes.CDLL, isa: str | None) -> Backend:
    best = library.fastopt_isa().decode()
    if isa is not None and isa != best and (isa not in ISAS or best not in ISAS or isa > best):
        raise ValueError(
            f"FASTOPT_ISA: {isa!r} cannot run here; this processor runs "
            f"{', '.join(x for x in ISAS if x <= best) if best in ISAS else best}, or numba."
        )
    return Backend(isa or best, "the compiled library has only the rules and dtypes of fastopt.", library)


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
