"""Sums of a rule's terms: a rule of these tests alone keeps the mechanism honest, beside a reference in NumPy."""

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
LR, MU = 0.125, 0.5


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


RULE = fastopt.Rule(
    *("with_terms", step, Scalars, lambda t, options: Scalars(options["lr"], MU, 1.0), ("b",)),
    terms=terms,
    products=((1, 1), (0, 0), ("p", 0), ("g", "g")),
    ratio=ratio,
)


class WithTerms(fastopt.Optimizer):
    def __init__(self, params, lr=LR, **options):
        super().__init__(params, {"lr": lr}, **options)

    def select_rule(self, options):
        return RULE


def run(pair, *, flat=False, split=False, steps=2, **options):
    """Parameters, sums of the last step and norms."""
    rng = np.random.default_rng(1)
    params, *grads = (
        {str(n): rng.standard_normal(n).astype(DTYPES[d]) for n in SIZES} for d in (pair[0], *pair[1:] * steps)
    )
    params, *grads = (fastopt.FlatBuffer.from_arrays(x) if flat else x for x in (params, *grads))
    opt, norms = WithTerms(params, **options), []
    opt.step(grads[0])
    opt._plan.combine = (lambda sums: None) if split else None
    for g in grads[1:]:
        norms.append(opt.step(g).grad_norm)
    return [np.array(params[name]) for name in params], opt._plan.layers.segments["sums"].tolist(), norms


@pytest.mark.parametrize(
    ("pair", "clip"), [(PAIRS[0], 3.0), *(pytest.param(x, None, marks=pytest.mark.full) for x in PAIRS)]
)
def test_bits_are_those_of_one_thread_wave_after_wave(pair, clip, backend, always_threaded):
    backend(native_isas()[0])
    fastopt.set_num_threads(1)
    params, sums, norms = run(pair, max_grad_norm=clip)
    for isa in (*native_isas(), *["numba"] * (clip is None)):
        backend(isa)
        for threads, flat, split in ((1, False, True), (2, False, False), (2, True, True), (3, True, False)):
            fastopt.set_num_threads(threads)
            p, s, n = run(pair, max_grad_norm=clip, flat=flat, split=split)
            assert all(map(np.array_equal, p, params)), (isa, threads, flat, split)
            assert (s, n) == (sums, norms), (isa, threads, flat, split)


def test_sums_and_steps_are_those_of_numpy():
    params, sums, _ = run(("float64", "float64"), max_grad_norm=3.0, steps=3)
    rng = np.random.default_rng(1)
    p, *grads = ([rng.standard_normal(n) for n in SIZES] for _ in range(4))
    b, clip = [0 * x for x in p], 3.0
    for g in grads:
        factor = min(1.0, clip / (math.sqrt(sum(np.sum(x * x) for x in g)) + 1e-6))
        new = [MU * x + factor * y for x, y in zip(b, g, strict=True)]
        wanted = [[(x - u) @ (x - u), u @ u, x @ u, factor**2 * (y @ y)] for x, u, y in zip(p, new, g, strict=True)]
        p = [x - LR * ratio(s, None) * u for x, s, u in zip(p, wanted, new, strict=True)]
        b = new
    # Sums of up to 655,000 products of float64, 32 lanes and chunks added pairwise: far less than an eps for each.
    for got, want in (
        (sums, [[s[0], s[1], s[2], s[3] / factor**2] for s in wanted]),
        *((x[None], y[None]) for x, y in zip(params, p, strict=True)),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"products": ()}, "give both or neither"),
        ({"ratio": None}, "give both or neither"),
        ({"products": ((0, "x"),)}, "got 'x'"),
        ({"products": ((0, -1),)}, "got -1"),
        ({"terms": None}, "got 1"),
        ({"products": ((0, 0),) * 5}, "at most 4 products, got 5"),
    ],
)
def test_records_that_cannot_be_right_are_refused(changes, message):
    fields = {"terms": terms, "products": RULE.products, "ratio": ratio, **changes}
    with pytest.raises((TypeError, ValueError), match=f"Rule 'x': .*{message}"):
        fastopt.Rule("x", step, Scalars, RULE.scalars, ("b",), **fields)
