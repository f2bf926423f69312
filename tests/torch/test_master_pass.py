"""16-bit copies of float32 parameters, written in the pass that steps the parameters."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from compare import DTYPES, assert_intact, bits, every_kind, guarded, options_of, rounded
from fastopt.kernels.dtypes import COPIES
from fastopt.kernels.epilogues import ROUND
from fastopt.kernels.layout import BLOCK, CHUNK
from fastopt.kernels.registry import RULES
from isas import native_isas, run_epilogue

import fastopt
from fastopt.engine.device import HOST
from fastopt.engine.host import HostPlan
from fastopt.engine.options import RuleChoice
from fastopt.engine.plan import Copy, Parameter
from fastopt.engine.step import Request

UNTOUCHED = 0xA5A5

# Around every vector width, the block of 64 elements, that of 2048 after which the copy is written, and chunks.
SIZES = (0, 1, 2, 7, 8, 9, 31, 33, 63, 64, 65, 127, 1000, BLOCK - 1, BLOCK, BLOCK + 65, CHUNK - 1, CHUNK + 1)

every_dtype = pytest.mark.parametrize("dtype", COPIES)
pytestmark = pytest.mark.usefixtures("always_threaded")


def memory_for(size, shift=0):
    return guarded(np.full(size, UNTOUCHED, np.uint16), shift)


def assert_copy(copy, values, dtype):
    """The copy holds the values rounded, and what surrounds it is untouched."""
    assert (bits(copy.view(DTYPES[dtype])) == bits(rounded(values, dtype))).all()
    assert_intact(copy)


# --- rounding --------------------------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("isa", [*native_isas(), "numba"])
def test_every_kind_of_number_is_rounded_to_nearest_even(isa, dtype):
    values = every_kind()
    copy = memory_for(values.size)
    ranges = itertools.pairwise([0, 1000, 1000, BLOCK, values.size])
    run_epilogue(isa, ROUND, values, copy.view(DTYPES[dtype]), *ranges)
    assert_copy(copy, values, dtype)
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    assert ((copy[np.isnan(values)] & 0x7FFF) > infinity).all()


def test_the_reference_rounds_ties_to_even():
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 2**-134, 3 * 2**-134], np.float32)
    assert rounded(ties, "bfloat16").tolist() == [1.0, 1 + 2**-6, 0.0, float(ml_dtypes.bfloat16(2**-132))]


# --- steps -----------------------------------------------------------------------------------------------------------


def run(rule, dtype, sizes, *, copies, request=None, gradient="float32", poison=False):
    """Two steps of a plan over arrays of these sizes; parameters, states, and copies."""
    rng = np.random.default_rng(0)
    options = options_of(rule)
    offsets = np.cumsum([0, *(-(-n // 32) * 32 for n in sizes)]).tolist()
    states = {name: np.full(offsets[-1], 0.5, np.float32) for name in rule.state}
    arrays = [rng.standard_normal(n).astype(np.float32) for n in sizes]
    made = [memory_for(n, shift=k % 3) for k, n in enumerate(sizes)]
    parameters = [
        Parameter(str(k), p, p.size, "float32", 0, offsets[k], offsets[k + 1] - offsets[k], p.ctypes.data, states)
        for k, p in enumerate(arrays)
    ]
    for parameter, copy in zip(parameters, made, strict=True):
        parameter.copy = Copy(dtype, copy.ctypes.data) if copies else None
    choices = [RuleChoice(rule, k % 2 == 0) for k in range(len(sizes))]
    plan = HostPlan(parameters, [DTYPES[gradient]] * len(sizes), choices, False, [1.0], HOST)
    for _ in range(2):
        gradients = [rng.standard_normal(n).astype(DTYPES[gradient]) for n in sizes]
        for g in gradients if poison else ():
            g[:3] = [np.nan, np.inf, -np.inf][: g.size]
        plan.point_at(np.array([g.ctypes.data for g in gradients], np.uint64))
        info = plan.step(request or Request(), [options])
    return arrays, states, made, info


def assert_copies(arrays, copies, dtype):
    for p, copy in zip(arrays, copies, strict=True):
        assert_copy(copy, p, dtype)


@every_dtype
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_copy_is_the_rounding_and_changes_nothing_else(rule, dtype, backend):
    """Whatever the instruction set and the number of threads; for LARS, too, whose norms are summed in passing."""
    request = Request(keep_weights=True)  # the second step of LARS takes the norms that the first one summed
    want, want_states, *_ = run(rule, dtype, SIZES, copies=False, request=request)
    isas = [*native_isas(), *(["numba"] if rule.name in ("adamw", "lars") else [])]
    for isa, threads in itertools.product(isas, (1, 2)):
        backend(isa)
        fastopt.set_num_threads(threads)
        arrays, states, copies, _ = run(rule, dtype, SIZES, copies=True, request=request)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(arrays, want, strict=True))
        assert all(states[name].tobytes() == want_states[name].tobytes() for name in states)
        assert_copies(arrays, copies, dtype)


@every_dtype
def test_gradients_that_are_not_finite(dtype):
    arrays, _, copies, _ = run(RULES["adam"], dtype, SIZES, copies=True, gradient=dtype, poison=True)
    assert np.isnan(arrays[5][:3]).all()
    assert_copies(arrays, copies, dtype)


@every_dtype
@pytest.mark.parametrize("rule", ["adam", "lars"])
def test_a_skipped_step_writes_no_copy(rule, dtype):
    request = Request(skip_nonfinite=True, zero_grads=True)
    *_, copies, info = run(RULES[rule], dtype, SIZES, copies=True, request=request, poison=True)
    assert info.skipped
    assert all((copy.base == 0xA5).all() for copy in copies)


@every_dtype
def test_many_arrays(dtype):
    sizes = [n % 97 for n in range(0, 7 * 1500, 7)]
    arrays, _, copies, _ = run(RULES["lion"], dtype, sizes, copies=True)
    assert_copies(arrays, copies, dtype)


# --- runs of neighbours ----------------------------------------------------------------------------------------------


def runs_of(copies, first=40):
    """The runs of three flat neighbours of 40 elements (``first`` in the first), 64 apart, with these copies."""
    flat = np.zeros(192, np.float32)
    parameters = [
        Parameter(str(k), flat, 40, "float32", 0, 64 * k, 64, flat.ctypes.data + 256 * k, {}) for k in range(3)
    ]
    for parameter, copy in zip(parameters, copies, strict=True):
        parameter.copy = copy
    parameters[0].size = first
    choices = [RuleChoice(RULES["sgd"], True)] * 3
    return HostPlan(parameters, [np.dtype(np.float32)] * 3, choices, True, [1.0], HOST)._runs


def at(address, dtype="bfloat16"):
    return Copy(dtype, address)


@pytest.mark.parametrize(
    ("copies", "runs"),
    [
        ([None, None, None], [(0, 168)]),
        ([at(4096), at(4224), at(4352)], [(0, 168)]),
        ([at(4096), at(4176), at(4256)], [(0, 40), (1, 40), (2, 40)]),  # side by side, but without gaps
        ([at(4096), at(4224), at(8192)], [(0, 104), (2, 40)]),
        ([at(4096), at(4224), None], [(0, 104), (2, 40)]),
        ([None, at(4224), at(4352)], [(0, 40), (1, 104)]),
        ([at(4096), at(4224, "float16"), at(4352)], [(0, 40), (1, 40), (2, 40)]),
    ],
)
def test_neighbours_merge_where_their_copies_are_neighbours(copies, runs):
    assert runs_of(copies) == runs


def test_nothing_merges_with_an_empty_array_whose_copy_lies_elsewhere():
    assert runs_of([at(64), at(4224), at(4352)], first=0) == [(0, 0), (1, 104)]
