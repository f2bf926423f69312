"""Sums of a rule's terms, which a rule of these tests alone keeps honest, beside NumPy; and LAMB's norms of zero."""

import collections
import math
from typing import NamedTuple

import numpy as np
import pytest
from compare import DTYPES
from fastopt.kernels.dtypes import PAIRS
from fastopt.kernels.layout import BLOCK, CHUNK, LANES
from isas import native_isas

import fastopt
from fastopt.engine.table import WAVE

SIZES = (1, 0, LANES + 1, BLOCK - 1, BLOCK + 5, CHUNK + 1, 40 * CHUNK + 7, WAVE)


class Scalars(NamedTuple):
    lr: float
    mu: float
    ratio: float


def terms(p, g, b, h):
    b = h.mu * b + g
    return b, p - b


def step(p, g, b, h):
    b = h.mu * b + g
    return p - h.lr * h.ratio * b, b


def ratio(sums, h):
    return math.sqrt(sums[0] / (sums[1] + sums[3])) if sums[1] + sums[3] > 0.0 else 1.0


def carry(options):
    return collections.namedtuple("Carry", "a b c d e")(0.0, 0.0, 0.0, 0.0, 0.0)


RECORD = "with_terms", step, Scalars, lambda t, options: Scalars(options["lr"], 0.5, 1.0), ("b",)
SUMS = {"terms": terms, "products": ((1, 1), (0, 0), ("p", 0), ("g", "g")), "ratio": ratio}
RULE = fastopt.Rule(*RECORD, **SUMS)


class WithTerms(fastopt.Optimizer):
    def select_rule(self, options):
        return RULE


def data(pair, steps):
    rng = np.random.default_rng(1)
    return ({str(n): rng.standard_normal(n).astype(DTYPES[d]) for n in SIZES} for d in (pair[0], *[pair[1]] * steps))


def run(pair, *, flat=False, split=False, steps=2, clip=None):
    """Parameters, sums of the last step and norms."""
    params, *grads = (fastopt.FlatBuffer.from_arrays(x) if flat else x for x in data(pair, steps))
    opt = WithTerms(params, {"lr": 0.125}, max_grad_norm=clip)
    norms = [opt.step(grads[0]).grad_norm]
    opt._plan.combine_ratios = (lambda *_: None) if split else None
    norms += [opt.step(g).grad_norm for g in grads[1:]]
    return [np.array(params[name]) for name in params], opt._plan._table(norms=True).segments["sums"].tolist(), norms


@pytest.mark.parametrize("pair", [PAIRS[0], *(pytest.param(x, marks=pytest.mark.full) for x in PAIRS[1:])])
def test_bits_are_those_of_one_thread_wave_after_wave(pair, backend, always_threaded):
    backend(native_isas()[0])
    fastopt.set_num_threads(1)
    params, *sums_and_norms = run(pair, clip=3.0)
    for isa in (*native_isas(), *["numba"] * (pair == PAIRS[1])):
        backend(isa)
        for threads, flat, split in ((1, False, True), (2, False, False), (2, True, True), (3, True, False)):
            fastopt.set_num_threads(threads)
            p, *rest = run(pair, clip=3.0, flat=flat, split=split)
            assert all(map(np.array_equal, p, params)), (isa, threads, flat, split)
            assert rest == sums_and_norms, (isa, threads, flat, split)


def test_sums_and_steps_are_those_of_numpy():
    params, sums, _ = run(("float64", "float64"), clip=3.0, steps=3)
    p, *grads = ([*x.values()] for x in data(("float64", "float64"), 3))
    b = [0 * x for x in p]
    for g in grads:
        factor = min(1.0, 3.0 / (math.sqrt(sum(np.sum(x * x) for x in g)) + 1e-6))
        b = [0.5 * x + factor * y for x, y in zip(b, g, strict=True)]
        wanted = [[(x - u) @ (x - u), u @ u, x @ u, y @ y] for x, u, y in zip(p, b, g, strict=True)]
        ratios = [ratio([*s[:3], factor**2 * s[3]], None) for s in wanted]
        p = [x - 0.125 * r * u for x, r, u in zip(p, ratios, b, strict=True)]
    # Sums of up to 655,000 products of float64, by lanes, chunks and pairs: far less than an eps for each.
    np.testing.assert_allclose(sums, wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.concatenate(params), np.concatenate(p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"products": ()}, "give both or neither"),
        ({"products": ((2, 2),)}, "got 2"),
        ({"products": ((0, 0),) * 5}, "at most 4 products, got 5"),
        ({"carry": carry}, "at most 4 carried numbers, got 5"),
    ],
)
def test_records_that_cannot_be_right_are_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"Rule 'with_terms': .*{message}"):
        fastopt.Rule(*RECORD, **SUMS | changes)


@pytest.mark.parametrize(("clip", "moved"), [(None, 0.5), (0.25, 0.125)])
def test_the_ratio_of_lamb_is_1_where_a_norm_is_0_and_is_cut_all_the_same(clip, moved):
    zero, idle = np.zeros((2, 2)), np.full((2, 2), 3.0)
    fastopt.LAMB([zero, idle], lr=0.5, eps=1e-30, trust_clip=clip).step([np.ones((2, 2)), np.zeros((2, 2))])
    np.testing.assert_allclose(zero, -moved, rtol=1e-12)  # u is 1: a fresh moment over its root
    assert (idle == 3.0).all()
