"""The bits of a step do not depend on instruction set, number of threads, or how the data are cut into arrays."""

import itertools
import math

import numpy as np
import pytest
from cases import gradients, parameters
from compare import CASE, DTYPES, assert_same_bits, build, padding, snapshot
from fastopt.kernels.dtypes import PAIRS
from fastopt.kernels.layout import CHUNK
from fastopt.kernels.registry import RULES
from isas import native_isas

import fastopt

THREADS = (1, 2, 3)
WAYS = tuple(itertools.product(THREADS, (False, True)))  # the latter: in a flat buffer

# Around every vector width, the block of 64 elements, and the rows of 32 that a norm adds.
SMALL = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000)
LARGE = (CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)
SPECIAL = (np.nan, np.inf, -np.inf, 1e-40, -5e-324)  # subnormal in float32 and float64, zero in 16 bits

pytestmark = pytest.mark.usefixtures("always_threaded")
every_rule = pytest.mark.parametrize("rule", RULES)
every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def make_data(sizes, pair, *, special=False):
    """Parameters and the gradients of two steps; two arrays also have elements that are not finite or subnormal."""
    rng = np.random.default_rng(7)
    shapes = {f"{n} elements": (1, n) if k % 2 else (n,) for k, n in enumerate(sizes)}  # LARS adapts every second one
    params = parameters(rng, shapes, DTYPES[pair[0]])
    steps = [gradients(rng, shapes, DTYPES[pair[1]], tiny=1e-15) for _ in range(2)]
    for name in ("127 elements", "1000 elements") if special else ():
        params[name].reshape(-1)[50::17][:5] = SPECIAL
        steps[0][name].reshape(-1)[60::13][:5] = SPECIAL
    return params, steps


def run(rule, params, steps, *, flat=False, **options):
    """The state of things after some steps on a copy of the parameters."""
    own = fastopt.FlatBuffer.from_arrays(params) if flat else {name: p.copy() for name, p in params.items()}
    opt = build(CASE[rule], own)
    for grads in steps:
        opt.step(fastopt.FlatBuffer.from_arrays(grads) if flat else grads, **options)
    assert not flat or not padding(own).any()  # it was walked with the arrays
    return snapshot(own, opt)


def check_all_ways(rule, pair, sizes, backend, *, isas=None, ways=WAYS, special=False, **options):
    """The oldest instruction set with one thread on separate arrays is what all others must agree with."""
    params, steps = make_data(sizes, pair, special=special)
    want = None
    for isa in isas or native_isas():
        backend(isa)
        for threads, flat in ways:
            fastopt.set_num_threads(threads)
            got = run(rule, params, steps, flat=flat, **options)
            want = got if want is None else want
            assert_same_bits(got, want, f"{rule} {isa}, {threads} threads, {'flat' if flat else 'separate'}")


@every_rule
@every_pair
def test_small_arrays(rule, pair, backend):
    check_all_ways(rule, pair, SMALL, backend, special=True)


@every_rule
@pytest.mark.parametrize("pair", [PAIRS[0], PAIRS[-1]], ids="-".join)
def test_arrays_of_several_chunks(rule, pair, backend):
    # Fewer ways, because these arrays are large; test_small_arrays goes through all of them.
    ways = ((1, False), (2, True), (3, False))
    check_all_ways(rule, pair, LARGE, backend, ways=ways)


@pytest.mark.parametrize(
    ("rule", "pair"),
    [
        ("lars", ("float32", "float16")),
        pytest.param("sgd", ("float64", "float64"), marks=pytest.mark.full),
        pytest.param("adamw", ("float16", "float16"), marks=pytest.mark.full),
        pytest.param("rprop", ("bfloat16", "bfloat16"), marks=pytest.mark.full),
    ],
)
def test_numba(rule, pair, backend):
    """Without the library everything is compiled on first use, the scheduler too."""
    isas = [*native_isas()[:1], "numba"]
    check_all_ways(rule, pair, SMALL, backend, isas=isas, special=True)
    check_all_ways(rule, pair, LARGE[2:], backend, isas=isas)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.ratio is None])
@every_pair
def test_one_array_and_its_pieces(rule, pair, isa):
    """One array in one piece, and cut into views that begin anywhere, aligned to nothing but their elements.

    Not for LARS: the norm of a layer is that of the whole layer.
    """
    total = sum(SMALL)
    params, steps = make_data((total,), pair)
    (name,) = params
    whole = run(rule, params, steps)[name]
    cuts = np.cumsum(SMALL)[:-1]

    def pieces(array):
        return {str(k): piece for k, piece in enumerate(np.split(array, cuts))}

    own = params[name].copy()
    opt = build(CASE[rule], pieces(own))
    for grads in steps:
        opt.step(pieces(grads[name]))
    got = snapshot(pieces(own), opt)
    want = {k: {"step": whole["step"]} for k in got}
    for key, value in whole.items():
        for k, piece in pieces(value).items() if isinstance(value, np.ndarray) else ((k, value) for k in got):
            want[k][key] = piece
    assert_same_bits(got, want, rule)


def test_optimizers_take_the_kernels_that_are_chosen(backend):
    """Or else all tests here would compare kernels of one instruction set with themselves."""
    for isa in [*native_isas(), "numba"]:
        backend(isa)
        opt = fastopt.SGD([np.zeros(1)])
        opt.step([np.zeros(1)])
        assert opt._plan.backend.isa == isa


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [SMALL, LARGE, (0,)], ids=["small", "large", "empty"])
def test_gradient_norm(dtype, sizes, backend):
    """The bits of the norm that clipping and the finite check take, and its value beside the exact sum."""
    params, (grads, _) = make_data(sizes, (dtype, dtype))
    squares = np.concatenate([np.square(g.ravel(), dtype=np.float64) for g in grads.values()])
    truth = math.sqrt(math.fsum(squares))
    seen = set()
    for isa in [*native_isas(), "numba"]:
        backend(isa)
        for threads, flat in WAYS:
            fastopt.set_num_threads(threads)
            own, given = ((fastopt.FlatBuffer.from_arrays(x) if flat else x) for x in (params, grads))
            seen.add(fastopt.SGD(own, lr=0.0).step(given, max_norm=math.inf).grad_norm.hex())
    assert len(seen) == 1, seen
    # Float64 sums of 32 lanes, 64 rows and up to 392 blocks: each rounds by half an eps, so some 1e-13 at worst.
    assert float.fromhex(seen.pop()) == pytest.approx(truth, rel=1e-12)


@every_rule
def test_clipped_steps(rule, backend):
    """With clipping the norm decides over every bit."""
    check_all_ways(rule, PAIRS[0], SMALL, backend, grad_scale=3.0, max_norm=0.7)
