"""Finds kernels and runs tables of them: the compiled library where there is one, Numba where there is not."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import warnings
from typing import Any, Protocol

import numpy as np

from ..kernels.dtypes import epilogue_symbol, ratio_symbol, squares_symbol, terms_symbol, update_symbol
from ..kernels.epilogues import Epilogue
from ..kernels.registry import RULES
from ..kernels.rules.rule import Rule
from .library import library_path, open_library
from .table import Table

SERIAL_BELOW = 65_536
"""Elements below which one thread does it all: a second one would save some 20 µs, but where a threaded BLAS has just
spun on its core, waiting for it to be scheduled costs milliseconds."""


class Backend(Protocol):
    """What runs a table, and finds the addresses that a table is made of."""

    isa: str
    default_threads: int
    compiles: str
    """Why a kernel is compiled on first use."""

    def require(self) -> None:
        """Refuse to go on where no kernel can be had."""

    def update_kernel(self, rule: Rule, p: str, g: str) -> int:
        """Address of the update of a rule for parameters stored as p and gradients stored as g."""

    def epilogue_kernel(self, epilogue: Epilogue, p: str, target: str) -> int:
        """Address of an epilogue for parameters stored as p and a target stored as target."""

    def squares_kernel(self, dtype: str) -> int:
        """Address of the sum of squares of a storage dtype."""

    def ratio_kernel(self, rule: Rule) -> int:
        """Address of a rule's ratio."""

    def terms_kernel(self, rule: Rule, p: str, g: str) -> int:
        """Address of the sums of products of a rule's terms, for parameters and gradients stored so."""

    def update(self, table: Table, threads: int) -> None:
        """Update every chunk, and commit the counts."""

    def squares(self, table: Table, which: int, threads: int) -> float:
        """Sum of squares of parameters (0) or gradients (1) into each segment, and the sum over all."""

    def sums(self, table: Table, known: int, threads: int) -> None:
        """The sums of every segment with a ratio."""

    def ratios(self, table: Table) -> None:
        """The ratios of all segments by their sums; an update must follow."""

    def waves(self, table: Table, known: int, threads: int) -> None:
        """Sums, ratios and update, wave after wave; then commit the counts."""


NUMBA = 'install Numba: pip install "fastopt[jit]".'


class Jit:
    """Kernels compiled on first use for this processor."""

    def __init__(self) -> None:
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def address(self, why: str, what: str, *key: Any) -> int:
        """Address of the kernel that ``compile.<what>_kernel(*key)`` describes; ``why`` says why it is compiled now."""
        kernel = self._compiled.get((what, *key))
        if kernel is None:
            try:
                from ..kernels.cpu import compile as compiler
            except ImportError as error:
                kernel_name = f"the {what} kernel for {', '.join(_names(key))}"
                raise ImportError(f"fastopt: {why} To compile {kernel_name} now, {NUMBA} ({error})") from error
            described = getattr(compiler, f"{what}_kernel")(*key, "native", compiler.features_of("native"))
            kernel = self._compiled[(what, *key)] = compiler.jit(described)
        return int(kernel.address)


def _names(key: tuple[Any, ...]) -> list[str]:
    return [f"rule {x.name!r}" if isinstance(x, Rule) else getattr(x, "name", x) for x in key]


JIT = Jit()


class Native:
    """The library that CMake built: kernels of every rule, and the scheduler in C."""

    compiles = "the compiled library has only the rules and dtypes of fastopt."

    def __init__(self, path: str, isa: str | None = None) -> None:
        library = open_library(path)
        library.fastopt_isa.restype = ctypes.c_char_p
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        library.fastopt_update.argtypes = [pointer, pointer, count, pointer, count, number]
        library.fastopt_squares.argtypes = [pointer, count, pointer, count, pointer, number, number]
        library.fastopt_sums.argtypes = [pointer, pointer, count, pointer, number, number]
        library.fastopt_ratios.argtypes = [pointer, count]
        library.fastopt_waves.argtypes = [
            *(pointer, pointer, count, pointer, count, pointer, number),
            *(pointer, count, number),
        ]
        for function in (library.fastopt_update, library.fastopt_sums, library.fastopt_ratios, library.fastopt_waves):
            function.restype = None
        library.fastopt_squares.restype = ctypes.c_double
        self._library = library
        best = library.fastopt_isa().decode()
        if isa is not None and isa != best and (isa not in ISAS or best not in ISAS or isa > best):
            raise ValueError(
                f"FASTOPT_ISA: {isa!r} cannot run here; this processor runs "
                f"{', '.join(x for x in ISAS if x <= best) if best in ISAS else best}, or numba."
            )
        self.isa: str = isa or best
        self.default_threads = int(library.fastopt_default_threads())

    def _address(self, symbol: str) -> int | None:
        try:
            function = getattr(self._library, symbol)
        except AttributeError:
            return None
        return ctypes.cast(function, ctypes.c_void_p).value

    def require(self) -> None:
        pass

    def update_kernel(self, rule: Rule, p: str, g: str) -> int:
        prebuilt = RULES.get(rule.name) is rule
        found = self._address(update_symbol(rule.name, p, g, self.isa)) if prebuilt else None
        return found or JIT.address(self.compiles, "update", rule, p, g)

    def epilogue_kernel(self, epilogue: Epilogue, p: str, target: str) -> int:
        prebuilt = self._address(epilogue_symbol(epilogue.name, p, target, self.isa))
        return prebuilt or JIT.address(self.compiles, "epilogue", epilogue, p, target)

    def squares_kernel(self, dtype: str) -> int:
        return self._address(squares_symbol(dtype, self.isa)) or JIT.address(self.compiles, "squares", dtype)

    def terms_kernel(self, rule: Rule, p: str, g: str) -> int:
        prebuilt = RULES.get(rule.name) is rule
        found = self._address(terms_symbol(rule.name, p, g, self.isa)) if prebuilt else None
        return found or JIT.address(self.compiles, "terms", rule, p, g)

    def ratio_kernel(self, rule: Rule) -> int:
        prebuilt = RULES.get(rule.name) is rule
        found = self._address(ratio_symbol(rule.name, self.isa)) if prebuilt else None
        return found or JIT.address(self.compiles, "ratio", rule)

    def update(self, table: Table, threads: int) -> None:
        counts = table.counts
        self._library.fastopt_update(
            table.segments_at, table.chunks_at, table.count, counts.address, counts.half, threads
        )

    def squares(self, table: Table, which: int, threads: int) -> float:
        segments, chunks = (table.segments_at, len(table.sizes)), (table.chunks_at, table.count)
        return float(self._library.fastopt_squares(*segments, *chunks, table.partials_at, which, threads))

    def sums(self, table: Table, known: int, threads: int) -> None:
        chunks = table.chunks_at, table.count
        self._library.fastopt_sums(table.segments_at, *chunks, table.partials_at, known, threads)

    def ratios(self, table: Table) -> None:
        self._library.fastopt_ratios(table.segments_at, len(table.sizes))

    def waves(self, table: Table, known: int, threads: int) -> None:
        waves, counts = table.waves, table.counts
        self._library.fastopt_waves(
            *(table.segments_at, table.chunks_at, table.count, waves.ctypes.data, len(waves), table.partials_at, known),
            *(counts.address, counts.half, threads),
        )


class Numba:
    """Everything compiled on first use; the scheduler is Python's."""

    isa = "numba"

    def __init__(self, why: str) -> None:
        self.compiles = why
        # As GNU OpenMP reads it: a number, or a list with one for each level of nesting; anything else is ignored.
        wanted = re.fullmatch(r"\s*([0-9]+)\s*(,\s*[0-9]+\s*)*", os.environ.get("OMP_NUM_THREADS", ""))
        self.default_threads = (wanted and int(wanted[1])) or len(os.sched_getaffinity(0))

    def require(self) -> None:
        if importlib.util.find_spec("numba") is None:
            raise ImportError(f"fastopt: {self.compiles} To have kernels compiled on first use, {NUMBA}")

    def update_kernel(self, rule: Rule, p: str, g: str) -> int:
        return JIT.address(self.compiles, "update", rule, p, g)

    def epilogue_kernel(self, epilogue: Epilogue, p: str, target: str) -> int:
        return JIT.address(self.compiles, "epilogue", epilogue, p, target)

    def squares_kernel(self, dtype: str) -> int:
        return JIT.address(self.compiles, "squares", dtype)

    def terms_kernel(self, rule: Rule, p: str, g: str) -> int:
        return JIT.address(self.compiles, "terms", rule, p, g)

    def ratio_kernel(self, rule: Rule) -> int:
        return JIT.address(self.compiles, "ratio", rule)

    @functools.cached_property
    def _scheduler(self) -> Any:
        from ..kernels.cpu import scheduler

        return scheduler

    def update(self, table: Table, threads: int) -> None:
        self._scheduler.update(table, threads)

    def squares(self, table: Table, which: int, threads: int) -> float:
        return float(self._scheduler.squares(table, which, threads))

    def sums(self, table: Table, known: int, threads: int) -> None:
        self._scheduler.sums(table, known, threads)

    def ratios(self, table: Table) -> None:
        self._scheduler.ratios(table)

    def waves(self, table: Table, known: int, threads: int) -> None:
        self._scheduler.waves(table, known, threads)


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
