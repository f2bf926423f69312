"""What fastopt.torch asks of plans beyond a step: norms that the host adds up, counts after a graph, mixed rules."""

import numpy as np
import pytest
from cuda_problem import assert_same, moved
from fastopt.kernels.registry import RULES

import fastopt

F32 = np.float32


class Mixed(fastopt.LARS):
    """LARS for some groups, plain descent for others."""

    def select_rule(self, options):
        return RULES["sgd" if options["clip"] else "lars"]


def problem(seed=0, shapes=(("a", (3, 4)), ("b", (2, 3)), ("c", (0,)))):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(F32) for name, shape in shapes}


@pytest.mark.parametrize("scale", [1.0, np.inf, np.nan])
def test_the_norm_alone(gpu, scale):
    params, grads = problem(), problem(1)
    grads["b"][1, 1] *= F32(scale)
    there, grads_there = moved(gpu, params), moved(gpu, grads)
    opt, on_gpu = fastopt.AdamW(params), fastopt.AdamW(there)
    for _ in range(2):
        opt.step(grads)
        on_gpu.step(grads_there)
        found, wanted = (o._plan.norm() for o in (on_gpu, opt))
        np.testing.assert_equal(found, wanted)  # NaN, too
    if scale == 1.0:
        assert found == pytest.approx(np.sqrt(sum((g.astype(float) ** 2).sum() for g in grads.values())))
    for name, array in params.items():
        assert np.array_equal(gpu.get(there[name]), array, equal_nan=True)
    assert on_gpu.step(dict.fromkeys(there)) == (False, None)
    assert on_gpu._plan.norm() == 0.0


def test_counts_after_replays_are_fetched_again(stand_in):
    params, grads = moved(stand_in, problem()), moved(stand_in, problem(1))
    opt = fastopt.NAdam(params, capturable=True)
    opt.step(grads)
    with stand_in.capture() as replay:
        opt.step(grads)
    for steps in (2, 3):
        replay()
        opt._plan.recount()
        assert opt.state["a"]["step"] == steps


def test_groups_with_and_without_trust_ratios(gpu):
    shapes = {"a": (3, 4), "b": (2, 3)}.items()
    params, grads = problem(0, shapes), problem(1, shapes)
    there, grads_there = moved(gpu, params), moved(gpu, grads)
    opt, on_gpu = (
        Mixed([{"params": {"a": p["a"]}, "clip": True}, {"params": {"b": p["b"]}}], lr=0.1) for p in (params, there)
    )
    for _ in range(2):
        opt.step(grads)
        on_gpu.step(grads_there)
    assert_same(gpu, there, params, on_gpu, opt)
