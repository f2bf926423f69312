"""Kernels for CUDA in Numba's simulator, over host memory: the functions of kernels/cuda/access.py, and launches.

Addresses are those of NumPy arrays, and so is the arithmetic, which shares nothing with the compiler's. What a GPU
refuses is refused here, too: an access that is not aligned to its size, or not inside an array that `allow` was told
of. NUMBA_ENABLE_CUDASIM=1 must be set before Numba is imported (conftest.py does it).
"""

import contextlib
import ctypes
import functools
import itertools
import math
import sys
import threading
import types
from dataclasses import dataclass, field

import greenlet
import numpy as np
import pytest
from allowed import BadAccess, allow, is_allowed
from blocks import shared_array, take_turns
from compare import DTYPES
from fastopt.kernels import layout
from fastopt.kernels.cuda.prologue import prologue
from fastopt.kernels.cuda.terms import terms_loop
from fastopt.kernels.cuda.toolchain import THREADS, cuda
from fastopt.kernels.cuda.update import PARTS, update_loop
from fastopt.kernels.dtypes import CODES, COMPUTE, cuda_symbol
from fastopt.kernels.registry import RULES
from numba.cuda.core import config
from numba.cuda.simulator import kernel as simulator
from numba.cuda.simulator import kernelapi
from numba.cuda.simulator.kernelapi import Dim3

from fastopt.engine.table import Table

if not config.ENABLE_CUDASIM:
    raise ImportError("cuda_simulator: NUMBA_ENABLE_CUDASIM=1 must be set before Numba is imported.")


UPDATE_THREADS = 8
"""Threads per block of the update here: enough for every path, and much faster than as many as on a GPU."""

# --- memory ----------------------------------------------------------------------------------------------------------


@functools.cache  # of one launch: all its threads read the same tables
def _at(address, dtype, count=1, *, aligned_to=None):
    """The elements at an address, accessed at once."""
    size = dtype.itemsize * count
    if not is_allowed(address, size):
        raise BadAccess(f"{size} bytes at {address:#x} are not inside one array")
    if address % (aligned_to or size):
        raise BadAccess(f"{size} bytes at {address:#x} are not aligned")
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype)


# --- kernels/cuda/access.py ------------------------------------------------------------------------------------------


def _loader(name, result):
    dtype = np.dtype(name)
    return lambda address, index: result(_at(address + dtype.itemsize * index, dtype)[0])


def _storer(name):
    dtype = np.dtype(name)

    def store(address, index, number):
        _at(address + dtype.itemsize * index, dtype)[0] = number

    return store


word, put_word = _loader("int64", int), _storer("int64")
real, put_real = _loader("float64", np.float64), _storer("float64")
# Next to float64 a float32 becomes float64 in Numba, while NumPy would make float32 of a Python float.
single = _loader("float32", np.float64)
fresh_real = real


def opaque(number):
    return number


def count_up(address, number):
    before = word(address, 0)  # no other thread runs meanwhile, see _Block
    put_word(address, 0, before + number)
    return before


def rounded(compute):
    def load(address, index):
        return real(address, index).astype(compute)

    return load


def scalars_loader(rule, compute):
    number, names = rounded(compute), rule.Scalars._fields

    def load(scalars, ratio):
        places = {name: (scalars, k) for k, name in enumerate(names)}
        if rule.ratio is not None:
            places |= {name: (ratio, k) for k, name in enumerate(("stretch", "ratio")) if name in names}
        return rule.Scalars(*(number(*place) for place in places.values()))

    return load


def add_rows(dtype, rows):
    stored = DTYPES[dtype]

    def add(total, x, i):
        span = (rows - 1) * layout.LANES + 1
        elements = _at(x + stored.itemsize * i, stored, span, aligned_to=stored.itemsize)
        for number in elements[:: layout.LANES].astype(np.float64).tolist():
            total += number * number
        return total

    return add


def scalars_former(rule):
    counts = rule.counts.items()

    def form(t, scalar_group, options, formed):
        numbers = (float(real(options, k)) for k in itertools.count())
        given = {name: next(numbers) if n == 1 else tuple(itertools.islice(numbers, n)) for name, n in counts}
        if rule.carry is None:
            scalars = rule.scalars(t, given)
        else:
            carry = rule.carry(given)  # for its class
            carry = type(carry)(*(float(real(scalar_group, layout.CARRY + k)) for k in range(len(carry))))
            scalars, carry = rule.scalars(t, given, carry)
            for k, number in enumerate(carry):
                put_real(scalar_group, layout.CARRY + k, number)
        for k, number in enumerate(scalars):
            put_real(formed, k, number)

    return form


def ratio_caller(rule):
    ratio = in_numpy(rule.ratio)

    def scaled(total, product, multiplier):
        if product != ("g", "g"):
            return np.float64(total) * multiplier ** product.count("g")
        norm = abs(multiplier) * np.sqrt(np.float64(total))
        return norm * norm

    def call(sums, multiplier, scalars):
        of_products = [(real(sums, k), product) for k, product in enumerate(rule.products)]
        h = rule.Scalars(*(real(scalars, k) for k in range(len(rule.Scalars._fields))))
        return float(ratio(tuple(scaled(total, product, multiplier) for total, product in of_products), h))

    return call


def in_numpy(function):
    """A rule that takes its math from NumPy, which has it under the same names and keeps the dtype."""
    assert isinstance(function, types.FunctionType)
    names = dict(function.__globals__)
    for name in function.__code__.co_names:
        value = names.get(name)
        if value is math:
            names[name] = np
        elif isinstance(value, types.FunctionType):
            names[name] = in_numpy(value)
    return types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


class Arrays:
    def __init__(self, rule, p, g):
        self.compute = DTYPES[COMPUTE[p]]
        self.dtypes = [DTYPES[p], DTYPES[g]] + [self.compute] * len(rule.state)
        self.written = [0, *range(2, len(self.dtypes))]
        self.rule, self.step = rule, in_numpy(rule.step)

    def _elements(self, pointers, k, i, count):
        return _at(pointers[k] + self.dtypes[k].itemsize * i, self.dtypes[k], count)

    def pointers_of(self):
        places = range(len(self.dtypes))
        return lambda segment, gradient: tuple(gradient if k == layout.GRADIENT else word(segment, k) for k in places)

    def aligned(self, count):
        sizes = [count * dtype.itemsize for dtype in self.dtypes]
        return lambda pointers: not any(x % size for x, size in zip(pointers, sizes, strict=True))

    def moved(self):
        return lambda pointers, i: [x + dtype.itemsize * i for x, dtype in zip(pointers, self.dtypes, strict=True)]

    def load(self, count):
        def load(pointers, i, multiplier, h):
            values = [self._elements(pointers, k, i, count).astype(self.compute) for k in range(len(self.dtypes))]
            values[layout.GRADIENT] *= self.compute.type(multiplier)
            return [(*element, h) for element in zip(*values, strict=True)]

        return load

    def apply(self, count):
        return lambda elements: [self.step(*arguments) for arguments in elements]

    def add_products(self):
        terms, load = self.rule.terms and in_numpy(self.rule.terms), self.load(1)

        def add(totals, pointers, i, multiplier, h):
            factors = dict(enumerate(terms(*load(pointers, i, multiplier, h)[0]))) if terms else {}
            factors |= {"pg"[k]: self._elements(pointers, k, i, 1).astype(self.compute)[0] for k in range(2)}
            pairs = [(float(factors[a]), float(factors[b])) for a, b in self.rule.products]
            return tuple(total + x * y for total, (x, y) in zip(totals, pairs, strict=True))

        return add

    def store(self, count):
        def store(pointers, i, results):
            for k, values in zip(self.written, zip(*results, strict=True), strict=True):
                assert {type(value) for value in values} == {self.compute.type}
                self._elements(pointers, k, i, count)[...] = np.array(values)

        return store

    def clear(self, count):
        return lambda pointers, i: self._elements(pointers, layout.GRADIENT, i, count).fill(0)


# --- launches --------------------------------------------------------------------------------------------------------

_launching = threading.Lock()  # the simulator runs one kernel at a time


class _Thread(greenlet.greenlet):
    """A thread of a block: what the simulator asks of ``threading.current_thread()``."""

    def __init__(self, run, block, number):
        super().__init__(run)
        self.blockIdx, self.threadIdx, self.thread_id = Dim3(*block), Dim3(number, 0, 0), number

    def syncthreads(self):
        assert self.parent is not None
        self.parent.switch()


class _Block:
    """In place of the simulator's, whose operating system's threads take 20 times as long."""

    def __init__(self, order, f, grid, block, debug):
        self._f, self._order, (self._count, _, _) = f, order, block

    def run(self, block, *args):
        block = (self._order[block[0]], 0, 0)
        take_turns([_Thread(lambda: self._f(*args), block, k) for k in range(self._count)])


def launch(kernel, grid, args, threads=THREADS, order=None):
    """Run the blocks of a kernel, as `update_loop` and `prologue` return them, in an order; done when this returns."""
    with _launching, pytest.MonkeyPatch.context() as patch:
        _at.cache_clear()
        real, done = cuda, contextlib.nullcontext()

        def swap_once(function, module):  # not in every call of every thread
            if function.__globals__.get("cuda") is real:
                patch.setitem(function.__globals__, "cuda", module)
            return done

        patch.setattr(simulator, "swapped_cuda_module", swap_once)
        patch.setattr(simulator, "BlockManager", functools.partial(_Block, order or range(grid)))
        patch.setattr(kernelapi.FakeCUDAShared, "array", shared_array)
        patch.setattr(kernelapi, "threading", types.SimpleNamespace(current_thread=greenlet.getcurrent))
        function = cuda.jit(device=True)(kernel)

        def run(*args):
            with np.errstate(all="ignore"):  # every thread has a state of its own
                function(*args)

        cuda.jit(run)[grid, threads](*args)


@functools.cache
def kernel_of(symbol):
    """The kernel of this name (kernels/dtypes.py), and with how many threads per block to launch it."""
    access = sys.modules[__name__]
    for rule in RULES.values():
        if symbol == cuda_symbol("prologue", rule.name):
            return prologue(rule, access), THREADS
        for pair in itertools.product(COMPUTE, repeat=2):
            if symbol == cuda_symbol("terms", rule.name, *pair):
                return terms_loop(rule, *pair, access), THREADS
            if symbol == cuda_symbol("update", rule.name, *pair):
                return update_loop(rule, *pair, access, threads=UPDATE_THREADS), UPDATE_THREADS
    raise LookupError(f"no kernel is called {symbol}")


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """One array to update, and what the table of segments says of it."""

    arrays: list  # parameter, gradient, states
    scalar_group: int = 0
    sign: int = 1
    adapts: bool = False
    targets: dict[int, np.ndarray] = field(default_factory=dict)  # of epilogues, by their place in KINDS


class Tables:
    """What kernels walk (kernels/layout.py), for some segments."""

    def __init__(self, segments, scalar_groups=1):
        count, table = len(segments), Table([s.arrays[layout.PARAMETER].size for s in segments])

        def zeros(*shape, dtype="float64"):
            return allow(np.zeros(shape, dtype))

        self.chunks = allow(table.chunks)
        self.segments = zeros(count, layout.SEGMENT_WORDS, dtype="int64")
        self.gradients = allow(np.array([s.arrays[layout.GRADIENT].ctypes.data for s in segments], np.int64))
        self.numbers = zeros(layout.HEADER_WORDS + layout.NUMBERS * scalar_groups)
        self.header, rows = self.numbers[: layout.HEADER_WORDS], self.numbers[layout.HEADER_WORDS :]
        self.scalars, self.options = np.split(rows.reshape(-1, layout.NUMBERS), [layout.SCALARS], axis=1)
        self.factors = self.segments.view(np.float64)[:, layout.FACTORS : layout.FACTORS + 2]
        self.squares = self.segments.view(np.float64)[:, layout.SQUARES]
        self.partials = zeros(table.count, layout.SUMS)
        self.scalar_groups = zeros(scalar_groups, layout.SCALAR_GROUP_WORDS, dtype="int64")
        self.result = zeros(2)
        chunks = np.bincount(table.chunks[:, 0], minlength=count)
        for k, (words, segment) in enumerate(zip(self.segments, segments, strict=True)):
            words[: len(segment.arrays)] = [a.ctypes.data for a in segment.arrays]
            words[layout.GRADIENT] = 0  # its address is in a list of its own
            words[[layout.SCALAR_GROUP, layout.SIGN, layout.ADAPTS]] = (
                segment.scalar_group,
                segment.sign,
                segment.adapts,
            )
            words[layout.G_CODE] = CODES[segment.arrays[layout.GRADIENT].dtype.name]
            for kind, target in segment.targets.items():
                words[layout.TARGETS + kind] = target.ctypes.data
            words[layout.FIRST_CHUNK], words[layout.CHUNKS] = chunks[:k].sum(), chunks[k]
        self.places = [t.ctypes.data for t in (self.chunks, self.segments, self.gradients, self.numbers)]

    def set_header(self, multiplier, *, skip=False):
        self.header[layout.MULTIPLIER64] = multiplier
        self.header.view(np.int64)[layout.SKIP] = skip

    def update(self, kernel, *, zero, threads=UPDATE_THREADS):
        """Launch an update over every chunk."""
        launch(kernel, PARTS * len(self.chunks), [*self.places, zero], threads)

    def sums(self, kernel, mine, act=0):
        """Launch a terms kernel over some chunks, or segments."""
        mine = allow(np.array(mine, np.int64))
        launch(kernel, len(mine), [*self.places, self.partials.ctypes.data, act, mine.ctypes.data])

    def prologue(
        self, kernel, *, sums=True, number=0, multiplier=1.0, scale=0, max_norm=math.inf, check=False, form=False,
        decide=True, order=None, act=0,
    ):  # fmt: skip
        """Launch a prologue: a block for each chunk if sums are asked for, else one block."""
        count = sums * len(self.segments if act == layout.DECIDE else self.chunks)
        places = [*self.places, self.partials.ctypes.data, self.scalar_groups.ctypes.data]
        args = act, count, number, multiplier, scale, max_norm, check, form, decide, self.result.ctypes.data
        launch(kernel, max(count, 1), [*places, len(self.segments), len(self.scalar_groups), *args], order=order)
