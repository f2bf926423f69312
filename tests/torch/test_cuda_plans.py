"""What fastopt.torch asks of plans beyond a step: norms that the host adds up, counts after a graph, mixed rules."""

import numpy as np
import pytest
from fastopt.kernels.registry import RULES

import fastopt

F32 = np.float32


class Mixed(fastopt.LARS):
    """LARS for some groups, plain descent for others."""

    def select_rule(self, options):
        return RULES["sgd" if options["clip"] else "lars"]


def problem(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(F32) for name, shape in (("a", (3, 4)), ("b", (2, 3)), ("c", (0,)))}


@pytest.mark.parametrize("scale", [1.0, np.inf, np.nan])
def test_the_norm_alone(gpu, scale):
    params, grads = problem(), problem(1)
    grads["b"][1, 1] *= F32(scale)
    there = {name: gpu.put(array) for name, array in params.items()}
    grads_there = {name: gpu.put(array) for name, array in grads.items()}
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
    params = {name: stand_in.put(array) for name, array in problem().items()}
    grads = {name: stand_in.put(array) for name, array in problem(1).items()}
    opt = fastopt.NAdam(params, capturable=True)
    opt.step(grads)
    with stand_in.device().capture() as graph:
        opt.step(grads)
    for steps in (2, 3):
        for launch in graph:
            launch()
        opt._plan.recount()
        assert opt.state["a"]["step"] == steps


def test_groups_with_and_without_trust_ratios(gpu):
    params, grads = problem(), problem(1)
    there = {name: gpu.put(array) for name, array in params.items()}
    grads_there = {name: gpu.put(array) for name, array in grads.items()}

    def make(arrays):
        return Mixed([{"params": {"a": arrays["a"]}, "clip": True}, {"params": {"b": arrays["b"]}}], lr=0.1)

    opt, on_gpu = make(params), make(there)
    for _ in range(2):
        opt.step({name: grads[name] for name in "ab"})
        on_gpu.step({name: grads_there[name] for name in "ab"})
    for name in "ab":
        assert gpu.get(there[name]).tobytes() == params[name].tobytes(), name
