"""What holds for any data: Hypothesis looks for the case that breaks it."""

import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
from cases import CASES
from compare import PARAMETER, assert_same_bits, bits, build, rounded, snapshot
from fastopt.kernels.dtypes import PAIRS
from hypothesis import given
from hypothesis.extra.numpy import arrays

import fastopt

pytestmark = pytest.mark.usefixtures("always_threaded")

any_case = st.sampled_from(CASES)
element_wise = st.sampled_from([case for case in CASES if case.optimizer != "LARS"])  # which takes norms of layers
any_float = st.floats(width=32)  # NaN, infinities and subnormals too
moderate = st.floats(-1e6, 1e6, width=32)


@st.composite
def problems(draw, pairs=PAIRS, values=any_float, most=200):
    """A parameter of one dimension, and its gradients in a few steps."""
    p_dtype, g_dtype = draw(st.sampled_from(pairs))
    size = draw(st.integers(0, most))
    vector = arrays(np.float32, size, elements=values)
    steps = draw(st.integers(1, 3))
    return rounded(draw(vector), p_dtype), [rounded(draw(vector), g_dtype) for _ in range(steps)]


def run(case, p, steps, **options):
    """The state of things after some steps on a copy of one array."""
    params = {"w": p.copy()}
    opt = build(case, params)
    for g in steps:
        opt.step({"w": g}, **options)
    return snapshot(params, opt)


def assert_same_elements(got, want, pick, where):
    """Compare some elements of every array bit for bit."""
    for key, value in want["w"].items():
        if isinstance(value, np.ndarray):
            assert np.array_equal(bits(got["w"][key])[pick], bits(value)[pick]), f"{where}: {key}"


@given(case=element_wise, problem=problems(), cuts=st.lists(st.integers(0, 200)), threads=st.integers(1, 4), flat=...)
def test_neither_cuts_nor_threads_matter(case, problem, cuts, threads, flat: bool):
    p, steps = problem
    whole = run(case, p, steps)

    def pieces(array):
        named = {str(k): x for k, x in enumerate(np.split(array, sorted(c % (array.size + 1) for c in cuts)))}
        return fastopt.FlatBuffer.from_arrays(named) if flat else named

    fastopt.set_num_threads(threads)
    own = pieces(p.copy())
    opt = build(case, own)
    for g in steps:
        opt.step(pieces(g))
    parts = snapshot(own, opt).values()
    joined = {key: np.concatenate([part[key] for part in parts]) for key in whole["w"] if np.ndim(whole["w"][key])}
    assert_same_elements({"w": joined}, {"w": {k: whole["w"][k] for k in joined}}, slice(None), case.id)


@given(
    case=any_case,
    problem=problems(),
    grad_scale=st.sampled_from([1.0, 3.0]),
    max_norm=st.sampled_from([None, 0.5]),
    skip_nonfinite=st.booleans(),
)
def test_gradients_are_only_read_or_zeroed(case, problem, **options):
    p, steps = problem
    kept = [g.copy() for g in steps]
    for g in steps:
        g.flags.writeable = False
    want = run(case, p, steps, **options)
    for g, before in zip(steps, kept, strict=True):
        assert g.tobytes() == before.tobytes()
    assert_same_bits(run(case, p, kept, zero_grads=True, **options), want, case.id)
    assert not any(np.any(g) for g in kept)


@given(
    case=element_wise,
    problem=problems(values=moderate),
    bad=st.lists(st.tuples(st.integers(0, 199), st.sampled_from([np.nan, np.inf, -np.inf])), min_size=1),
    in_parameter=...,
)
def test_what_is_not_finite_stays_in_its_element(case, problem, bad, in_parameter: bool):
    p, steps = problem
    want = run(case, p, steps)
    other = np.ones(p.size, bool)
    for at, value in bad:
        if p.size:
            (p if in_parameter else steps[0])[at % p.size] = value
            other[at % p.size] = False
    got = run(case, p, steps)
    assert_same_elements(got, want, other, case.id)
    was_nan = np.isnan(p) | (np.isnan(steps[0]) & (case.optimizer != "Rprop"))  # to which it has no sign
    assert np.all(np.isnan(got["w"][PARAMETER])[was_nan]), f"{case.id}: a NaN was lost"


@given(case=element_wise, problem=problems(), data=st.data())
def test_permuted_elements_give_the_permuted_result(case, problem, data):
    p, steps = problem
    order = np.array(data.draw(st.permutations(range(p.size))), int)
    want = run(case, p, steps)
    got = run(case, p[order], [g[order] for g in steps])
    inverse = np.argsort(order)
    got = {"w": {k: v[inverse] if isinstance(v, np.ndarray) else v for k, v in got["w"].items()}}
    assert_same_bits(got, want, case.id)


@given(case=any_case, problem=problems(values=moderate, most=40), taken=st.integers(0, 8), flat=...)
def test_resuming_changes_no_bit(case, problem, taken, flat: bool):
    """Nine steps at once, and in two processes, as it were, of which the second knows nothing but the state dict."""
    p, steps = problem
    steps = [{"w": steps[t % len(steps)].reshape(1, -1), "b": steps[t % len(steps)]} for t in range(9)]
    params = {"w": p.reshape(1, -1).copy(), "b": p.copy()}  # LARS treats the two differently
    if flat:
        params, steps = fastopt.FlatBuffer.from_arrays(params), [fastopt.FlatBuffer.from_arrays(g) for g in steps]
    opt = build(case, params)
    for grads in steps[:taken]:
        opt.step(grads)
    saved = pickle.dumps(opt.state_dict())
    copy = fastopt.FlatBuffer.from_arrays(params) if flat else {name: a.copy() for name, a in params.items()}
    resumed = getattr(fastopt, case.optimizer)(copy, lr=0.7)  # options come from the state dict
    resumed.load_state_dict(pickle.loads(saved))
    assert_same_bits(snapshot(copy, resumed), snapshot(params, opt), case.id)
    for grads in steps[taken:]:
        opt.step(grads)
        resumed.step(grads)
    assert_same_bits(snapshot(copy, resumed), snapshot(params, opt), case.id)


# Away from underflow and overflow, where scaling by a power of two is exact.
scalable = st.floats(2.0**-20, 2.0**20, width=32) | st.floats(-(2.0**20), -(2.0**-20), width=32) | st.just(0.0)


@given(
    case=any_case,
    problem=problems(pairs=[pair for pair in PAIRS if pair[1] != "float16"], values=scalable),
    exponent=st.integers(-16, 32),
    max_norm=st.sampled_from([None, np.inf, 0.5]),
)
def test_a_loss_scale_of_a_power_of_two_changes_no_bit(case, problem, exponent, max_norm):
    p, steps = problem
    scale = 2.0**exponent
    want = run(case, p, steps, max_norm=max_norm)
    scaled = [(g.astype(np.float64) * scale).astype(g.dtype) for g in steps]
    assert_same_bits(run(case, p, scaled, grad_scale=scale, max_norm=max_norm), want, case.id)
