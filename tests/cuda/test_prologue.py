"""The prologue for CUDA, in Numba's simulator: norms with the bits of the CPU's, and all that follows from them."""

import ctypes
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba_cuda")

import cuda_simulator
from cases import problem
from compare import CASE, DTYPES, PARAMETER, assert_same_bits, build, options_of, snapshot
from cuda_simulator import Segment, Tables, allow, kernel_of
from fastopt.kernels import layout
from fastopt.kernels.cuda.prologue import prologue
from fastopt.kernels.dtypes import PAIRS, cuda_symbol
from fastopt.kernels.registry import RULES

from fastopt.engine import backend as _backend
from fastopt.engine.table import Table

pytestmark = pytest.mark.full

# Around a row, a block and a chunk.
SIZES = (1, layout.LANES + 1, 0, layout.BLOCK - 1, layout.CHUNK + layout.BLOCK + layout.LANES + 3)


def kernel(rule="sgd"):
    return kernel_of(cuda_symbol("prologue", rule))[0]


def make_segments(sizes, pairs=PAIRS, *, adapts=True):
    """Arrays of changing storage dtypes; their numbers differ in size, so that the order of addition matters."""
    rng = np.random.default_rng(3)
    segments = []
    for k, n in enumerate(sizes):
        values = rng.standard_normal((2, n)) * np.exp(2 * rng.standard_normal((2, n)))
        arrays = [allow(v.astype(DTYPES[dtype])) for v, dtype in zip(values, pairs[k % len(pairs)], strict=True)]
        segments.append(Segment(arrays, adapts=adapts and k % 3 != 0))
    return segments


def squares_on_cpu(segments, which):
    """The table that holds them, as the CPU's kernels fill it, and their sum."""
    backend, table = _backend.current(), Table([s.arrays[layout.PARAMETER].size for s in segments])
    for row, segment in zip(table.segments, segments, strict=True):
        row["squares"] = [backend.kernel("squares", a.dtype.name) for a in segment.arrays]
        row["arrays"][:2] = [a.ctypes.data for a in segment.arrays]
    backend.run(table.record_at, layout.NORM, which, 1)
    return table, float(table.total)


def skips(tables):
    return tables.header.view(np.int64)[layout.SKIP]


def counters_of(tables):
    return [tables.header.view(np.int64)[layout.ALL_DONE], *tables.segments[:, layout.DONE]]


# --- norms -----------------------------------------------------------------------------------------------------------


def check_norms(segments, *, run=None, orders=(None,)):
    """Every sum must have the bits of the CPU's, in a launch for each order of the blocks."""
    tables, (grads, total) = Tables(segments), squares_on_cpu(segments, layout.GRADIENT)
    for order in orders:
        tables.squares[:], tables.partials[:], tables.result[:] = 0.0, np.nan, -1.0
        tables.prologue(run or kernel(), order=order, multiplier=0.5)
        assert tables.squares.tolist() == grads.segments["sums"][:, layout.GRADIENT].tolist()
        assert tables.result.tolist() == [math.sqrt(total) * 0.5, 0.0]
        assert not any(counters_of(tables))
    assert not skips(tables)
    assert tables.header[layout.MULTIPLIER64] == 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_and_norm(dtype):
    check_norms(make_segments(SIZES, [(dtype, dtype)]))


def test_more_chunks_than_lanes():
    check_norms(make_segments([39 * layout.CHUNK + 100], [("float16", "bfloat16")], adapts=False))


def test_more_arrays_than_lanes():
    segments = make_segments([1] * (2 * layout.LANES + 3))
    tables, (table, total) = Tables(segments), squares_on_cpu(segments, layout.GRADIENT)
    tables.squares[:] = table.segments["sums"][:, layout.GRADIENT]
    tables.prologue(kernel(), sums=False)
    assert tables.result[0] == math.sqrt(total)


def test_the_order_of_blocks_does_not_matter():
    segments = make_segments([33, layout.CHUNK + 1, layout.CHUNK + 1, 0, 5])
    blocks = [*range(6)]
    check_norms(segments, orders=(blocks[::-1], blocks[1::2] + blocks[::2]))


def add_rows_from_the_last(dtype, rows):
    add = cuda_simulator.add_rows(dtype, 1)
    places = [k * layout.LANES for k in reversed(range(rows))]
    return lambda total, x, i: functools.reduce(lambda t, k: add(t, x, i + k), places, total)


@pytest.mark.parametrize(
    ("sizes", "functions"),
    [([layout.BLOCK], {"add_rows": add_rows_from_the_last}), ([5, 6], {"count_up": lambda address, index: 0})],
    ids=["another order of addition", "a lost count"],
)
def test_a_mistake_is_found(sizes, functions):
    access = SimpleNamespace(**{**vars(cuda_simulator), **functions})
    with pytest.raises(AssertionError):
        check_norms(make_segments(sizes, adapts=False), run=prologue(RULES["sgd"], access))


# --- decisions -------------------------------------------------------------------------------------------------------


def tables_with_squares(squares):
    """Tables whose sum of squares is there already: a launch that sums nothing takes it."""
    tables = Tables(make_segments([3]))
    tables.squares[:] = squares
    return tables


@pytest.mark.parametrize("squares", [0.0, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 5.0, math.inf])
def test_clipping(max_norm, squares):
    tables, multiplier = tables_with_squares(squares), 1 / 3
    norm = math.sqrt(squares) * multiplier
    tables.prologue(kernel(), sums=False, max_norm=max_norm, multiplier=multiplier)
    np.testing.assert_array_equal(tables.result, [norm, 0.0])
    if max_norm != math.inf:
        coefficient = max_norm / (norm + 1e-6)
        multiplier *= 1.0 if coefficient > 1.0 else coefficient  # NaN stays
    np.testing.assert_array_equal(tables.header[layout.MULTIPLIER64], multiplier)
    assert not skips(tables)


def test_a_loss_scale_on_the_device():
    tables, scale = tables_with_squares(2.0), allow(np.array([3.0], np.float32))
    tables.prologue(kernel(), sums=False, scale=scale.ctypes.data, multiplier=7.0)
    assert tables.header[layout.MULTIPLIER64] == 1 / 3
    assert tables.result[0] == math.sqrt(2.0) * (1 / 3)


BAD = [(dtype, value) for dtype in DTYPES for value in (math.inf, math.nan)] + [("float64", 1e200)]


@pytest.mark.parametrize(("dtype", "value"), BAD)
def test_gradients_that_are_not_finite(dtype, value):
    """Their step is skipped: nothing is formed and no step counted; the one after is taken."""
    rule, segments = RULES["momentum"], make_segments([40], [(dtype, dtype)], adapts=False)
    segments[0].arrays[layout.GRADIENT][37] = value
    tables = Tables(segments)
    put_scalar_group(tables, 0, rule, options_of(rule), steps=4)
    for skipped in (True, False):
        tables.prologue(kernel(rule.name), check=True, form=True, max_norm=1.0)
        assert tables.result[1] == skips(tables) == skipped
        assert math.isfinite(tables.result[0]) != skipped
        assert tables.scalar_groups[0, layout.STEPS] == (4 if skipped else 5)
        assert tables.scalars.any() != skipped
        assert not any(counters_of(tables))
        segments[0].arrays[layout.GRADIENT][37] = 1.0


# --- scalars and trust ratios ----------------------------------------------------------------------------------------


def put_scalar_group(tables, c, rule, options, *, number=0, steps=0, lr=None):
    """Write a scalar group into its table; an array `lr` is where the device finds that option."""
    words = tables.scalar_groups[c]
    words[layout.STEPS], words[layout.RULE] = steps, number
    if lr is not None:
        words[layout.LR], words[layout.LR_BYTES] = lr.ctypes.data, lr.itemsize
    numbers = np.hstack([options[name] for name in rule.counts])
    tables.options[c, : len(numbers)] = numbers
    if rule.carry:
        carry = rule.carry(options)
        words.view(np.float64)[layout.CARRY : layout.CARRY + len(carry)] = carry


@pytest.mark.parametrize("rule", list(RULES.values())[::2], ids=list(RULES)[::2])  # test_compiled.py takes all
def test_scalars_formed_on_the_device(rule):
    """Four scalar groups: one from its options, two whose lr lies on the device, one of another rule."""
    options, count = options_of(rule), len(rule.Scalars._fields)
    rates = [None, allow(np.array([0.1])), allow(np.array([0.1], np.float32))] if "lr" in rule.counts else [None] * 3
    steps, carries = [0, 5, 9], [rule.carry and rule.carry(options)] * 3
    tables = Tables(make_segments([3]), scalar_groups=4)
    for c, (taken, lr) in enumerate(zip(steps, rates, strict=True)):
        put_scalar_group(tables, c, rule, options, steps=taken, lr=lr)
    put_scalar_group(tables, 3, rule, options, number=1)
    for step in range(1, 4):
        for lr in rates[1:] if rates[1] is not None else []:
            lr /= step  # a schedule
        tables.prologue(kernel(rule.name), sums=False, decide=False, form=True)
        for c, (taken, lr) in enumerate(zip(steps, rates, strict=True)):
            t, given = taken + step, options if lr is None else {**options, "lr": float(lr[0])}
            if rule.carry:
                h, carries[c] = rule.scalars(t, given, carries[c])
            else:
                h = rule.scalars(t, given)
            assert tables.scalar_groups[c, layout.STEPS] == t
            assert tables.scalars[c, :count].tolist() == list(h)
        assert tables.scalar_groups[3, layout.STEPS] == 0
        assert not tables.scalars[3].any()


def ratio_on_cpu(rule, squares, multiplier, h):
    kind, own = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3), np.array([multiplier, 0.0])
    kind(_backend.current().kernel("ratio", rule))(np.array(squares).ctypes.data, h.ctypes.data, own.ctypes.data)
    return own[1]


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES.values() if rule.ratio and not rule.sources], ids=lambda rule: rule.name
)
def test_trust_ratios(rule):
    """The ratio of each layer has the bits of the CPU's times the last scalar; others are what they were."""
    segments = make_segments([33, 1, 0, layout.CHUNK + 33, 5, 5, 5], [("float32", "bfloat16")])
    for segment, kind in zip(segments[4:6], (layout.PARAMETER, layout.GRADIENT), strict=True):
        segment.arrays[kind][:] = 0.0  # of layers that adapt
    tables, h = Tables(segments), np.array(rule.scalars(1, options_of(rule)))
    tables.scalars[0, : len(h)] = h
    tables.set_header(-0.7)
    adapts = [s for s, segment in enumerate(segments) if segment.adapts]
    (weights, _), (grads, _) = (squares_on_cpu(segments, kind) for kind in (layout.PARAMETER, layout.GRADIENT))
    squares = weights.segments["sums"][:, layout.PARAMETER], grads.segments["sums"][:, layout.GRADIENT]
    expected = np.zeros((len(segments), 2))
    for s in {1, 4, 5} & {*adapts}:
        expected[s] = rule.factors(ratio_on_cpu(rule, [x[s] for x in squares], 0.7, h) * h[-1])
    chunks = np.flatnonzero(np.isin(tables.chunks[:, 0], adapts))
    tables.sums(kernel_of(cuda_symbol("terms", rule.name, "float32", "bfloat16"))[0], chunks[::-1])
    assert tables.factors.tolist() == expected.tolist()
    assert not any(counters_of(tables))


def test_a_second_launch_for_another_rule():
    """It takes the header as the first launch left it, and counts the steps of its own scalar groups."""
    rules, segments = (RULES["adam"], RULES["lars"]), make_segments([40, 50, 60])
    for segment, scalar_group in zip(segments, (1, 0, 1), strict=True):
        segment.scalar_group = scalar_group
    tables = Tables(segments, scalar_groups=2)
    for c, rule in enumerate(rules):
        put_scalar_group(tables, c, rule, options_of(rule), number=c)
    for skipped in (False, True):
        tables.prologue(kernel("adam"), form=True, check=True, max_norm=0.5)
        before = tables.header.tobytes(), tables.result.tobytes()
        tables.prologue(kernel("lars"), number=1, sums=False, decide=False, form=True, max_norm=0.1)
        assert (tables.header.tobytes(), tables.result.tobytes()) == before
        assert skips(tables) == skipped
        assert tables.scalar_groups[:, layout.STEPS].tolist() == [1, 1]
        segments[1].arrays[layout.GRADIENT][:] = np.nan


# --- sums over processes ---------------------------------------------------------------------------------------------


def test_sums_over_processes_are_taken_between_two_launches():
    """Two processes, of which the second has one chunk, find what one finds that has all."""
    rule, pair = RULES["lars"], ("float32", "float32")
    terms = kernel_of(cuda_symbol("terms", rule.name, *pair))[0]
    segments = make_segments([layout.CHUNK + 33, 0, 0, 40], [pair])
    h = np.array(rule.scalars(1, options_of(rule)))
    nothing = slice(0)
    cuts = [slice(layout.CHUNK), nothing, nothing, slice(40)], [slice(layout.CHUNK, None), *[nothing] * 3]
    parts = [
        [Segment([allow(x[c].copy()) for x in s.arrays]) for s, c in zip(segments, of, strict=True)] for of in cuts
    ]
    one, *several = every = [Tables(of) for of in (segments, *parts)]
    for tables, own in zip(
        several, ([5, 7, 7, 7], [6, 7, 7, 7]), strict=True
    ):  # rows of sums; five are of other arrays
        tables.segments[:, layout.SHIFT] = own - tables.segments[:, layout.FIRST_CHUNK]
        tables.segments[:, layout.FIRST_CHUNK], tables.segments[:, layout.CHUNKS] = [5, 7, 7, 7], [2, 0, 0, 1]
        tables.partials = allow(np.zeros((8, layout.SUMS)))

    def norm(tables, act):
        tables.prologue(kernel(), max_norm=0.5, act=act)

    def ratios(tables, act):
        tables.scalars[0, : len(h)] = h
        tables.sums(terms, [0, 3] if act == layout.DECIDE else range(len(tables.chunks)), act)

    for launch in (norm, ratios):
        launch(one, 0)
        for tables in several:
            tables.partials[:] = 0.0
            launch(tables, layout.SUM)
        assert [np.flatnonzero(tables.partials.any(axis=1)).tolist() for tables in several] == [[5, 7], [6]]
        total = several[0].partials + several[1].partials
        for tables in several:
            tables.partials[:] = total
            launch(tables, layout.DECIDE)
    found = [(t.header.tobytes(), t.result.tobytes(), t.squares.tobytes(), t.factors.tobytes()) for t in every]
    assert len({*found}) == 1
    assert one.result[0] > 0.5
    assert len({*one.factors[:, 1]}) == 3
    assert not any(any(counters_of(tables)) for tables in several)


# --- whole steps -----------------------------------------------------------------------------------------------------

WHOLE = {"momentum": PAIRS[5], "amsgradw": PAIRS[1], "nadam": PAIRS[2], "asgd": PAIRS[3], "lars": PAIRS[0]}


@pytest.mark.parametrize(("rule", "pair"), WHOLE.items(), ids=WHOLE)
def test_steps_are_those_of_the_optimizer(rule, pair):
    """Prologue and update, clipped, unscaled and zeroed, against the optimizer's steps; the second is skipped."""
    case, rule, shapes = CASE[rule], RULES[rule], {"a": (3, 11), "b": (1, 70)}
    params, steps = problem(np.random.default_rng(2), shapes, DTYPES[pair[0]], 3, grad_dtype=DTYPES[pair[1]])
    steps[1]["b"][0, 69] = np.inf
    own, grads = ({name: allow(a.copy()) for name, a in arrays.items()} for arrays in (params, steps[0]))
    opt = build(case, params)
    sign = -1 if opt.param_groups[0].get("maximize") else 1
    states = {name: {k: allow(opt.state[name][k].copy()) for k in rule.state} for name in shapes}
    arrays = [[own[name], grads[name], *states[name].values()] for name in shapes]
    tables = Tables([Segment(each, sign=sign, adapts=rule.ratio is not None) for each in arrays])
    put_scalar_group(tables, 0, rule, options_of(rule))
    for k, given in enumerate(steps):
        for name, gradient in given.items():
            grads[name][...] = gradient
        info = opt.step(given, grad_scale=8.0, max_norm=2.0, skip_nonfinite=True, zero_grads=True)
        tables.prologue(kernel(rule.name), form=True, check=True, max_norm=2.0, multiplier=1 / 8)
        if rule.ratio:
            tables.sums(kernel_of(cuda_symbol("terms", rule.name, *pair))[0], range(len(tables.chunks)))
        tables.update(kernel_of(cuda_symbol("update", rule.name, *pair))[0], zero=True)
        assert tables.result.tolist() == [info.grad_norm, info.skipped]
        assert info.skipped == (k == 1)
        assert not any(gradient.any() for gradient in grads.values())
        count = int(tables.scalar_groups[0, layout.STEPS])
        got = {name: {PARAMETER: own[name], "step": count, **states[name]} for name in own}
        want = {n: {key: v for key, v in s.items() if key in got[n]} for n, s in snapshot(params, opt).items()}
        assert_same_bits(got, want, rule.name)
