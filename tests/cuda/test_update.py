"""The updates for CUDA, in Numba's simulator: the bits of the CPU's, and nothing touched beyond them."""

import dataclasses
import functools
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba_cuda")

import cuda_simulator
from cases import gradients, parameters
from compare import DTYPES, PARAMETER, assert_intact, assert_same_bits, bits, guarded, options_of
from cuda_simulator import UPDATE_THREADS, BadAccess, Segment, Tables, allow, kernel_of
from fastopt.kernels.cuda.toolchain import THREADS
from fastopt.kernels.cuda.update import PARTS, update_loop
from fastopt.kernels.dtypes import COMPUTE, PAIRS, cuda_symbol
from fastopt.kernels.epilogues import AVERAGE, KINDS, kinds_of
from fastopt.kernels.layout import CHUNK, GRADIENT, SIGN, UPDATE, WEIGHT
from fastopt.kernels.registry import RULES

from fastopt.engine import backend as _backend
from fastopt.engine.table import Table

pytestmark = pytest.mark.full

# Around the vectors of 4 (float64: 2) elements, and 64 (32): two vectors of each of 8 threads.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 31, 33, 63, 64, 95, 131)
SPECIAL = (np.nan, np.inf, -np.inf, 1e-40, -5e-324, 3e38, -1e308)  # subnormal or infinite in one dtype or another

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


# --- data ------------------------------------------------------------------------------------------------------------


@functools.cache
def scalars(rule):
    """What a rule computes with in each scalar group: what its case does, and numbers that are not 0 or 1 by chance."""
    options = options_of(rule)
    formed = rule.scalars(3, options, rule.carry(options))[0] if rule.carry else rule.scalars(3, options)
    constants = {"zero": 0.0, "one": 1.0, "stretch": 1.0}
    return np.array([formed, [constants.get(name, 0.3 + 0.05 * k) for k, name in enumerate(formed._fields)]])


def make_values(rng, pair, n, states, *, special=True):
    """Parameter, gradient and states of one array; states are not negative, since many of them are squares."""
    (p,) = parameters(rng, {"": (n,)}, DTYPES[pair[0]]).values()
    (g,) = gradients(rng, {"": (n,)}, DTYPES[pair[1]], tiny=1e-15).values()
    if special and n > 30:
        with np.errstate(over="ignore"):
            p[n - 2 * len(SPECIAL) :: 2], g[n - 3 * len(SPECIAL) :: 3] = SPECIAL, SPECIAL
    more = [abs(gradients(rng, {"": (n,)}, DTYPES[COMPUTE[pair[0]]])[""]) for _ in range(states)]
    return [p, g, *more]


def make_segments(rule, pair, sizes=SIZES, **options):
    """One segment for each size, of changing scalar group and sign, then some with an array that is not aligned."""
    rng = np.random.default_rng(7)
    kinds = [(n, None, 0) for n in sizes] + [(33, k, 1) for k in range(2 + len(rule.state))] + [(33, 0, 2), (33, 1, 2)]
    choices = itertools.cycle([(0, 1), (0, -1), (1, 1), (1, -1)])  # scalar group and sign
    segments = []
    for (n, moved, shift), choice in zip(kinds, choices, strict=False):
        values = make_values(rng, pair, n, len(rule.state), **options)
        arrays = [allow(guarded(v, shift * (k == moved))) for k, v in enumerate(values)]
        segments.append(Segment(arrays, *choice, adapts=len(segments) % 3 != 0))
    return segments


def copied(segments):
    """The same again elsewhere, aligned to nothing, for the CPU."""
    return [dataclasses.replace(s, arrays=[a.copy() for a in s.arrays]) for s in segments]


# --- the update on both ----------------------------------------------------------------------------------------------


def ratios(rule, segments):
    """Of those that adapt, one of them beyond float32."""
    values = np.linspace(0.3, 1.7, len(segments))
    values[2] = 1e50
    return np.where([rule.ratio is not None and s.adapts for s in segments], values, 1.0)


def update_on_cpu(rule, pair, segments, multiplier, zero):
    backend, table = _backend.current(), Table([s.arrays[GRADIENT].size for s in segments])
    kernel, h = backend.kernel("update", rule, *pair), scalars(rule)
    for row, segment, ratio in zip(table.segments, segments, ratios(rule, segments), strict=True):
        row["update"], row["scalars"] = kernel, h[segment.scalar_group].ctypes.data
        row["arrays"][: len(segment.arrays)] = [a.ctypes.data for a in segment.arrays]
        row["own"], row["zeroed"] = (segment.sign * multiplier, ratio), zero * segment.arrays[GRADIENT].itemsize
    backend.run(table.record_at, UPDATE, 0, 1)


def update_on_cuda(
    rule, pair, segments, multiplier, zero, *, kernel=None, threads=UPDATE_THREADS, skip=False, change=None
):
    tables = Tables(segments, len(scalars(rule)))
    tables.scalars[:, : scalars(rule).shape[1]], tables.scalars[:, WEIGHT] = scalars(rule), 0.25
    for row, segment, ratio in zip(tables.factors, segments, ratios(rule, segments), strict=True):
        row[:] = rule.factors(ratio * scalars(rule)[segment.scalar_group, -1]) if segment.adapts else (7.0, 7.0)
    tables.set_header(multiplier, skip=skip)
    if change:
        change(tables)
    kernel = kernel or kernel_of(cuda_symbol("update", rule.name, *pair))[0]
    tables.update(kernel, zero=zero, threads=threads)


def snapshot(rule, segments):
    keys = (PARAMETER, "gradient", *rule.state)
    return {f"segment {k}": dict(zip(keys, s.arrays, strict=True)) for k, s in enumerate(segments)}


def assert_same(rule, segments, expected):
    assert_same_bits(snapshot(rule, segments), snapshot(rule, expected), rule.name)
    for array in itertools.chain.from_iterable(s.arrays for s in segments):
        assert_intact(array)


def check(rule, pair, segments, *, multiplier=1 / 3, zeros=(False, True), **options):
    """Take one step for each of `zeros` on both, and compare everything."""
    expected = copied(segments)
    for zero in zeros:
        update_on_cpu(rule, pair, expected, multiplier, zero)
        update_on_cuda(rule, pair, segments, multiplier, zero, **options)
        assert_same(rule, segments, expected)


# --- tests -----------------------------------------------------------------------------------------------------------


@every_rule
@every_pair
def test_every_rule_has_the_bits_of_the_cpu(rule, pair):
    check(rule, pair, make_segments(rule, pair))


@every_pair
@pytest.mark.parametrize("rule", ["sgd", "amsgradw"])
def test_parts_of_a_chunk(rule, pair):
    part = CHUNK // PARTS
    check(RULES[rule], pair, make_segments(RULES[rule], pair, [part - 1, part + 3]), zeros=(True,))


@pytest.mark.parametrize("threads", [UPDATE_THREADS, THREADS])
@pytest.mark.parametrize(("rule", "pair"), [("adamw", PAIRS[0]), ("sgd", PAIRS[-1]), ("lion", PAIRS[1])])
def test_more_than_a_chunk(rule, pair, threads):
    rule = RULES[rule]
    kernel = update_loop(rule, *pair, cuda_simulator, threads=threads)
    check(rule, pair, make_segments(rule, pair, [CHUNK + 5]), zeros=(True,), kernel=kernel, threads=threads)


@pytest.mark.parametrize("multiplier", [np.nan, np.inf, 0.0, 1e-40, 1e30])
@pytest.mark.parametrize("pair", PAIRS[:3], ids="-".join)
def test_multipliers_that_are_not_ordinary(pair, multiplier):
    rule = RULES["adam"]
    check(rule, pair, make_segments(rule, pair, [5, 33], special=False), multiplier=multiplier, zeros=(False,))


@every_pair
@pytest.mark.parametrize("zero", [False, True])
def test_a_skipped_step_only_zeroes_gradients(pair, zero):
    rule = RULES["momentum"]
    segments = make_segments(rule, pair)
    expected = copied(segments)
    for segment in expected if zero else []:
        segment.arrays[GRADIENT][:] = 0
    update_on_cuda(rule, pair, segments, 1.0, zero, skip=True)
    assert_same(rule, segments, expected)


# --- epilogues: 16-bit copies of float32 parameters, averages --------------------------------------------------------


def give_targets(segments, p):
    """Targets of every kind that there is, some of which are not aligned to vectors, for two segments in three."""
    kinds = kinds_of(p)
    for k, segment in enumerate(segments):
        for kind in {kinds[k % len(kinds)], kinds[-1]} if k % 3 else ():
            values = np.full(segment.arrays[0].size, 7, DTYPES[KINDS[kind][1]])
            segment.targets[kind] = allow(guarded(values, shift=(0, 4, 1, 2)[k // 3 % 4]))
    return segments


@every_pair
@pytest.mark.parametrize("rule", ["sgd", "adamw", "lars"])
def test_epilogues_write_their_targets_and_change_nothing_else(rule, pair):
    rule = RULES[rule]
    segments = give_targets(make_segments(rule, pair, [*SIZES, CHUNK // PARTS + 3]), pair[0])
    check(rule, pair, segments, zeros=(True,))
    for segment in segments:
        for kind, target in segment.targets.items():
            with np.errstate(over="ignore", invalid="ignore"):
                values, compute = segment.arrays[0].astype(COMPUTE[pair[0]]), DTYPES[COMPUTE[pair[0]]].type
                if KINDS[kind][0] is AVERAGE:
                    values = compute(7) + compute(0.25) * (values - compute(7))
                assert (bits(target) == bits(values.astype(target.dtype))).all()
            assert_intact(target)


# --- negative controls -----------------------------------------------------------------------------------------------


def momentum_upwards(p, g, b, h):
    d = h.inner * (g + h.weight_decay * p)
    b = h.mu * b + d
    return p + h.outer * (d + h.mu * b if h.nesterov else b), b


def momentum_in_another_order(p, g, b, h):
    g = h.weight_decay * p + g if h.weight_decay else g
    d = h.inner * g
    b = d + h.mu * b
    return p - (h.mu * b + d if h.nesterov else b) * h.outer, b


def momentum_with_another_sum(p, g, b, h):
    d = h.inner * g + h.inner * (h.weight_decay * p)
    b = (h.mu * b + h.inner * g) + h.inner * (h.weight_decay * p)
    return p - h.outer * (d + h.mu * b if h.nesterov else b), b


def check_momentum(step=RULES["momentum"].step, pair=PAIRS[0], sizes=SIZES, access=cuda_simulator, **options):
    """The update of momentum with another step or access against the CPU's."""
    rule = RULES["momentum"]
    changed = update_loop(dataclasses.replace(rule, step=step), *pair, access, threads=UPDATE_THREADS)
    check(rule, pair, make_segments(rule, pair, sizes), kernel=changed, **options)


@pytest.mark.parametrize("step", [momentum_upwards, momentum_with_another_sum])
@every_pair
def test_a_wrong_rule_is_found(step, pair):
    with pytest.raises(AssertionError, match="differs in"):
        check_momentum(step, pair)


def test_operands_may_be_swapped():
    """It is the mistake, not the change, that the test before finds."""
    check_momentum(momentum_in_another_order)


CHANGES = {
    "the last element left out": lambda tables: np.subtract(tables.chunks[:, 2], 1, out=tables.chunks[:, 2]),
    "the neighbour's gradient": lambda tables: tables.gradients.put([0, 1], tables.gradients[[1, 0]]),
    "without signs": lambda tables: tables.segments[:, SIGN].fill(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_wrong_table_is_found(change):
    with pytest.raises(AssertionError, match="differs in"):
        check_momentum(sizes=[33, 33], change=change)


class AlwaysAligned(cuda_simulator.Arrays):
    def aligned(self, count):
        return lambda pointers: True


def test_an_access_beyond_the_end_is_found():
    with pytest.raises(BadAccess, match="not inside one array"):
        check_momentum(change=lambda tables: np.add(tables.chunks[:, 2], 1, out=tables.chunks[:, 2]))


class CutsInsteadOfRounding(cuda_simulator.Arrays):
    def store(self, count):
        store = super().store(count)

        def cut(parameter, *states):
            return ((np.array(parameter).view(np.uint32) & 0xFFFF_0000).view(np.float32)[()], *states)

        return lambda pointers, i, results: store(pointers, i, [cut(*r) for r in results])


@pytest.mark.parametrize(
    ("arrays", "pair", "error"),
    [
        (AlwaysAligned, PAIRS[0], pytest.raises(BadAccess, match="are not aligned")),
        (CutsInsteadOfRounding, ("bfloat16", "bfloat16"), pytest.raises(AssertionError, match="differs in")),
    ],
)
def test_a_wrong_access_is_found(arrays, pair, error):
    with error:
        check_momentum(pair=pair, access=SimpleNamespace(**{**vars(cuda_simulator), "Arrays": arrays}))
