"""Traps that other libraries fell into, one test each: what options mean, norms of layers, state."""

import pickle

import numpy as np
import pytest
from cases import RULE_CASES
from compare import assert_same_bits, build, case_problem, snapshot

import fastopt


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


# --- what an option means --------------------------------------------------------------------------------------------


def test_weight_decay_in_the_wrong_place_for_maximize():
    w = np.array([1.0])
    fastopt.SGD([w], lr=1.0, weight_decay=0.25, maximize=True).step([np.array([0.5])])
    assert w.tolist() == [1.0 - (-0.5 + 0.25)]  # the gradient is negated, the decay is not
    for case in RULE_CASES:
        if "weight_decay" in build(case, [np.ones(1)]).defaults:
            a, b = np.ones((2, 2)), np.ones((2, 2))
            for p, maximize in ((a, False), (b, True)):
                opt = getattr(fastopt, case.optimizer)([p], **case.hyper | {"weight_decay": 0.1, "maximize": maximize})
                opt.step([np.zeros((2, 2))])
            assert (a < 1).all(), case.id
            assert (a == b).all(), case.id


@pytest.mark.parametrize(
    ("options", "end"), [({}, -(1 + 2.5)), ({"nesterov": True}, -(1.5 + 3.25)), ({"dampening": 0.5}, -(1 + 1.5))]
)
def test_nesterov_or_dampening_accepted_and_ignored(options, end):
    w = np.zeros(1)
    opt = fastopt.SGD([w], lr=1.0, momentum=0.5, **options)
    for g in (1.0, 2.0):
        opt.step([np.array([g])])
    assert w.item() == end


# --- norms of layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_zero_norm_layers(nesterov):
    zero_w, zero_g = np.zeros((2, 2)), np.ones((2, 2))
    opt = fastopt.LARS([zero_w, zero_g], lr=0.5, momentum=0.5, weight_decay=0.25, nesterov=nesterov)
    opt.step([np.ones((2, 2)), np.zeros((2, 2))])  # the ratio of both is 1
    factor = 1.5 if nesterov else 1.0
    assert (zero_w == -0.5 * factor).all()
    assert (zero_g == 1 - 0.5 * 0.25 * factor).all()


@pytest.mark.parametrize("kind", [dict, fastopt.FlatBuffer.from_arrays])
def test_layer_wise_norms_taken_over_the_whole_flat_buffer(kind):
    params = kind({"small": np.full((4, 4), 1.0), "large": np.full((4, 4), 128.0)})
    before = copies(params)
    opt = fastopt.LARS(params, lr=1.0, trust_coefficient=2.0**-10)
    opt.step(kind({name: np.ones((4, 4)) for name in params}))
    steps = [float((before[name] - params[name])[0, 0]) for name in params]
    assert steps == [2.0**-10, 128 * 2.0**-10]


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [fastopt.Adam, fastopt.AdamW])
def test_amsgrad_maximum_never_stored(cls):
    opt = cls([np.ones(3)], amsgrad=True, betas=(0.5, 0.5))
    for g in (2.0, 0.0, 0.0):
        opt.step([np.full(3, g)])
    assert opt.state["0"]["exp_avg_sq"].tolist() == [0.5] * 3
    assert opt.state["0"]["max_exp_avg_sq"].tolist() == [2.0] * 3


def test_eps_that_rounds_to_zero():
    for dtype, eps in (("float16", 1e-50), ("float32", 1e-50), ("float64", -5e-324)):
        with pytest.raises(ValueError, match="eps"):
            fastopt.Adam([np.ones(3, dtype)], eps=eps)
    fastopt.Adam([np.ones(3)], eps=1e-50)
    w = np.ones(3, np.float16)
    fastopt.Adam([w], eps=1e-8).step([np.zeros(3, np.float16)])  # zero in float16, but computed with in float32
    assert (w == 1).all()


def test_saved_views_that_pickle_the_whole_buffer():
    params = fastopt.FlatBuffer({"small": (2,), "large": (100_000,)})
    opt = fastopt.Adam(params)
    opt.step(params.zeros_like())
    saved = opt.state_dict()
    for entry in saved["state"].values():
        for array in (entry["exp_avg"], entry["exp_avg_sq"]):
            assert array.base is None
            assert not np.shares_memory(array, opt.state["large"]["exp_avg"])
    assert len(pickle.dumps(saved["state"][0])) < 1000
    saved["state"][1]["exp_avg"][:] = 7.0
    assert not opt.state["large"]["exp_avg"].any()
    opt.load_state_dict(saved)
    saved["state"][1]["exp_avg"][:] = 8.0
    assert (opt.state["large"]["exp_avg"] == 7.0).all()


def test_two_optimizers():
    cases = [case for case in RULE_CASES if case.optimizer in ("Adam", "SGD", "LARS", "NAdam")]
    problems = [case_problem(case, "float32", 3, seed=i) for i, case in enumerate(cases)]
    params = [copies(own) for own, _ in problems]
    together = [build(case, p) for case, p in zip(cases, params, strict=True)]
    for t in range(3):
        for opt, (_, gradients) in zip(together, problems, strict=True):
            opt.step(gradients[t])
    for case, opt, p, (own, gradients) in zip(cases, together, params, problems, strict=True):
        alone = build(case, own)
        for grads in gradients:
            alone.step(grads)
        assert_same_bits(snapshot(p, opt), snapshot(own, alone), case.id)


@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_host_scalars_frozen_at_the_first_step(kind):
    w, g = np.zeros(1), np.ones(1)
    opt = fastopt.SGD([w], lr=kind(1.0))
    for lr in (1.0, 0.5, 0.25):
        opt.param_groups[0]["lr"] = kind(lr)
        opt.step([g])
    assert w.item() == -1.75


def test_options_changed_in_place():
    w, g, lr, betas = np.zeros(1), np.ones(1), np.array(1.0), [0.5, 0.5]
    opt = fastopt.Lion([w], lr=lr, betas=betas)
    opt.step([g])
    lr[...], betas[1] = 0.25, 0.0
    opt.step([g])
    assert (w.item(), opt.state["0"]["exp_avg"].item()) == (-1.25, 1.0)
    opt.param_groups[0]["betas"][1] = 1.0
    with pytest.raises(ValueError, match="betas"):
        opt.step([g])


def test_gradients_that_come_from_a_generator_are_zeroed_in_a_skipped_step():
    grads = [np.full(3, np.nan), np.ones(3)]
    opt = fastopt.SGD([np.ones(3), np.ones(3)])
    assert opt.step((g for g in grads), skip_nonfinite=True, zero_grads=True).skipped
    assert not any(g.any() for g in grads)


def test_a_numpy_scalar_is_a_gradient_of_a_0d_parameter():
    w = np.ones((), np.float32)
    opt = fastopt.SGD([w], lr=0.5)
    opt.step([w * np.float32(2)])  # NumPy makes a scalar of this product
    assert w == 0
