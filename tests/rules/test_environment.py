"""The floating-point environment changes no bit: flushed subnormals, other rounding, also in some threads only.

Options are formed into scalars on the host, so where rounding is another their scalars have to be exact.
"""

import contextlib
import ctypes
import functools
import platform

import numpy as np
import pytest
from cases import Case
from compare import CASE, DTYPES, assert_same_bits, build, snapshot
from fastopt.kernels import epilogues
from fastopt.kernels.dtypes import COPIES, PAIRS
from fastopt.kernels.layout import CHUNK, GRADIENT, NORM
from isas import native_isas, run_epilogue

pytestmark = [
    pytest.mark.usefixtures("always_threaded"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the mode is set in MXCSR, as glibc keeps it"),
]
EXACT = [
    Case("SGD", "momentum", {"lr": 0.5, "momentum": 0.75, "weight_decay": 0.25, "nesterov": True}),
    Case("RMSprop", "rmsprop_centered", {"lr": 2**-7, "alpha": 0.75, "eps": 2**-20, "centered": True}),
    Case("Lion", "lion", {"lr": 0.125, "betas": (0.5, 0.75), "weight_decay": 0.25}),
    Case("LARS", "lars", {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.25, "trust_coefficient": 0.5}),
]
FLUSH = {"results": 0x8000, "operands": 0x0040, "both": 0x8040}
ROUND = {"down": 0x2000, "up": 0x4000, "toward zero, flushed": 0xE040}


def get_environment():
    environment = (ctypes.c_uint32 * 8)()  # fenv_t: 28 bytes of the x87, then MXCSR
    ctypes.CDLL("libm.so.6").fegetenv(environment)
    return environment


@contextlib.contextmanager
def mode_of_this_thread(bits):
    """MXCSR with these bits, in this thread alone; what runs inside has to leave it so."""
    before, changed = get_environment(), get_environment()
    changed[7] = 0x1F80 | bits
    ctypes.CDLL("libm.so.6").fesetenv(changed)
    try:
        yield
        after = get_environment()
    finally:
        ctypes.CDLL("libm.so.6").fesetenv(before)
    assert after[7] & 0xFFC0 == 0x1F80 | bits


@functools.cache
def problem(pair):
    """Parameters and the gradients of two steps: numbers of which many are subnormal, or become so."""
    rng = np.random.default_rng(3)
    scale = np.array([1.0, 1e-4, 1e-7, 1e-20, 1e-30, 1e-39])
    shapes = {"w": (6, CHUNK // 2), "b": (6, 50)}
    return [
        {k: (rng.standard_normal(s) * rng.permuted(scale)[:, None]).astype(DTYPES[d]) for k, s in shapes.items()}
        for d in (pair[0], pair[1], pair[1])
    ]


def run(case, pair, bits=0):
    """What two steps make of it, and the sum of all squares."""
    p, *grads = problem(pair)
    p = {k: x.copy() for k, x in p.items()}
    opt = build(case, p)
    with mode_of_this_thread(bits):
        for g in grads:
            opt.step(g)
        opt._plan.backend.run(opt._plan._table(norms=True).record_at, NORM, GRADIENT, 2)
    return {**snapshot(p, opt), "sum": {"of squares": np.array(opt._plan._table(norms=True).total)}}


def check(case, pair, modes, backend, isas):
    backend(isas[0])
    want = run(case, pair)  # which also starts the threads
    for isa in isas:
        backend(isa)
        for name, bits in modes.items():
            assert_same_bits(run(case, pair, bits), want, f"{case.rule} {isa}, {name}")


@pytest.mark.parametrize(
    ("case", "modes"),
    [*((case, FLUSH) for case in CASE.values()), *((case, ROUND) for case in EXACT)],
    ids=[*(f"{rule}-flushed" for rule in CASE), *(f"{case.rule}-rounded" for case in EXACT)],
)
@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_compiled_library(case, modes, pair, backend):
    check(case, pair, modes, backend, native_isas())


@pytest.mark.parametrize("case", EXACT[2:], ids=lambda case: case.rule)
def test_kernels_and_scheduler_of_numba(case, backend):
    check(case, PAIRS[0], FLUSH | ROUND, backend, [native_isas()[0], "numba"])


@pytest.mark.parametrize("dtype", COPIES)
def test_copies(dtype):
    scales = [[1], [1e-5], [1e-7], [1e-39], [1e-44]]
    numbers = (np.random.default_rng(3).standard_normal((5, 200)) * scales).astype("f4")
    for isa in [*native_isas(), "numba"]:
        for bits in (FLUSH | ROUND).values():
            copy = np.zeros((5, 200), DTYPES[dtype])
            with mode_of_this_thread(bits):
                run_epilogue(isa, epilogues.ROUND, numbers, copy, (0, 1000))
            assert copy.tobytes() == numbers.astype(DTYPES[dtype]).tobytes(), isa
