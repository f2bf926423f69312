"""Twenty steps beside torch.optim's for-loop: parameters and every state, after each step, no element excepted."""

import numpy as np
import pytest
from cases import CASES, torch_hyper
from compare import PARAMETER, assert_close, build, case_problem, snapshot
from torch_compare import default_dtype
from torch_problem import torch

import fastopt

TORCH_CASES = [case for case in CASES if torch_hyper(case) is not None]
STEPS = 20
# Some cases also with lr changing from step to step, 0 included; the first stays, because Rprop takes it at different
# times: when the optimizer is made, torch's in the first step.
FACTORS = {"constant lr": (1.0,), "changing lr": (1.0, 0.5, 2.0, 0.0, 0.25, 0.3, 0.7)}


@pytest.fixture(autouse=True)
def _float64_by_default():
    """torch keeps host scalars (ASGD's eta, NAdam's mu_product) in its default dtype: here float64, as fastopt does."""
    with default_dtype(torch.float64):
        yield


def torch_snapshot(tensors, opt):
    """As compare.snapshot; torch makes the state of a parameter in its first step."""
    return {
        name: {PARAMETER: tensor.detach().numpy()} | {k: np.asarray(v) for k, v in opt.state[tensor].items()}
        for name, tensor in tensors.items()
    }


every_case = pytest.mark.parametrize("case", TORCH_CASES, ids=lambda case: case.id)


def both_of(case, params):
    """Our optimizer, tensors with the same values, and torch's optimizer of them."""
    tensors = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in params.items()}
    return build(case, params), tensors, getattr(torch.optim, case.optimizer)(tensors.values(), **torch_hyper(case))


def step_both(opt, tensors, torch_opt, grads):
    opt.step(grads)
    for name, tensor in tensors.items():
        tensor.grad = torch.from_numpy(grads[name].copy())
    torch_opt.step()


@every_case
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol", "awkward"),
    [
        # On values near one: twenty roundings of half of 1.2e-7 each, and as many of torch's. Largest seen: 0.55 of it.
        ("float32", 1e-5, 1e-6, False),
        ("float64", 2e-14, 2e-15, False),  # the same number of eps
        ("float64", 1e-12, 1e-12, True),  # values up to 1e4 that may cancel: half an eps of them is 1e-12
    ],
)
def test_steps_are_those_of_torch(case, factors, dtype, rtol, atol, awkward):
    params, gradients = case_problem(case, dtype, STEPS, awkward=awkward)
    opt, tensors, torch_opt = both = both_of(case, params)
    lr = opt.param_groups[0]["lr"]
    assert torch_opt.param_groups[0]["lr"] == lr
    for t, grads in enumerate(gradients, 1):
        for group in (opt.param_groups[0], torch_opt.param_groups[0]):
            group["lr"] = lr * factors[(t - 1) % len(factors)]
        step_both(*both, grads)
        got, want = snapshot(params, opt), torch_snapshot(tensors, torch_opt)
        for state in want.values():
            state.setdefault("step", np.asarray(t))  # SGD has none
        assert_close(got, want, rtol=rtol, atol=atol, where=f"{case.id}, step {t}")


@every_case
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_infinite_parameters_and_huge_gradients(case, dtype, isa):
    """Every parameter meets every gradient, whose squares overflow; the states of a NaN are not compared."""
    huge = {"float32": (1e20, 1e30), "float64": (1e160, 1e250)}[dtype]
    p, g = np.meshgrid([np.inf, -np.inf, 1.0, 0.0], [0.0, 0.5, -0.5, *huge, -huge[1], np.nan])
    params, grads = {"w": p.astype(dtype)}, g.astype(dtype)
    if case.optimizer == "NAdam":  # torch divides v by 1 - beta2^t, which makes g^2 of it
        grads[3] = 1.0
    opt, tensors, torch_opt = both = both_of(case, params)
    for t in range(8):  # RAdam rectifies from the sixth on
        grads[-1] = np.nan if t == 0 else 0.5  # after a NaN Rprop goes on
        step_both(*both, {"w": grads})
        got, want = snapshot(params, opt)["w"], torch_snapshot(tensors, torch_opt)["w"]
        compared = ~np.isnan(want[PARAMETER])
        for key in want.keys() - {"step", "eta", "mu", "mu_product"}:
            values = [np.where(compared | (key == PARAMETER), x[key], 0.0) for x in (got, want)]
            np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6, err_msg=f"{case.id}, step {t + 1}: {key}")


@pytest.mark.parametrize("optimizer", sorted({case.optimizer for case in TORCH_CASES}))
def test_defaults_are_those_of_torch(optimizer):
    own = getattr(fastopt, optimizer)([np.zeros(1)]).param_groups[0]
    theirs = getattr(torch.optim, optimizer)([torch.zeros(1, requires_grad=True)]).param_groups[0]
    for name, value in own.items():
        if name != "params" and name in theirs:
            assert value == theirs[name], name
    missing = set(theirs) - set(own) - {"foreach", "fused", "capturable", "differentiable"}
    assert missing <= {"decoupled_weight_decay"}, missing  # of Adam: here that is AdamW
