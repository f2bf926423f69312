"""fastopt.torch: every class and option has the bits of the NumPy optimizers, and stays beside torch's for-loop."""

import inspect

import numpy as np
import pytest
from cases import CASES, torch_hyper
from compare import DTYPES, PARAMETER, assert_close, assert_same_bits, build, case_problem, snapshot
from torch_compare import default_dtype
from torch_problem import both, every_class, every_torch_class, front, torch

FRONT_CASES = [case for case in CASES if not case.hyper.get("keep_weight_norms")]
every_case = pytest.mark.parametrize("case", FRONT_CASES, ids=lambda case: case.id)


def tensor_of(array):
    """A tensor with the values of an array, of the same dtype."""
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def step(opt, tensors, grads):
    for name, tensor in tensors.items():
        tensor.grad = tensor_of(grads[name])
    opt.step()


def array_of(tensor):
    """An array with the values of a tensor, of the same dtype."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bfloat16"]).copy()
    return tensor.numpy().copy()


def make_tensors(params):
    return {name: torch.nn.Parameter(tensor_of(p)) for name, p in params.items()}


def front_snapshot(tensors, opt, t):
    """As compare.snapshot; a class without step count has none in its state."""
    shown = {}
    for name, tensor in tensors.items():
        state = {k: v.item() if v.ndim == 0 and k in NUMBERS else array_of(v) for k, v in opt.state[tensor].items()}
        assert state.get("step", t) == t
        shown[name] = {PARAMETER: array_of(tensor)} | state | {"step": t}
    return shown


NUMBERS = ("step", "eta", "mu", "mu_product")


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_the_numpy_optimizers(case, dtype):
    params, gradients = case_problem(case, dtype, 4)
    tensors = make_tensors(params)
    opt = getattr(front, case.optimizer)(list(tensors.values()), **case.hyper)
    reference = build(case, params)
    for t, grads in enumerate(gradients, 1):
        reference.step(grads)
        step(opt, tensors, grads)
        assert_same_bits(front_snapshot(tensors, opt, t), snapshot(params, reference), f"{case.id}, step {t}")
        for name, tensor in tensors.items():
            assert array_of(tensor.grad).tobytes() == grads[name].tobytes(), "gradients are only read"


@pytest.mark.parametrize("case", [c for c in FRONT_CASES if torch_hyper(c) is not None], ids=lambda case: case.id)
@pytest.mark.parametrize(("dtype", "rtol", "atol"), [("float32", 1e-5, 1e-6), ("float64", 2e-14, 2e-15)])
def test_twenty_steps_beside_the_loop_of_torch(case, dtype, rtol, atol):
    # Tolerances of test_beside_torch.py, which tells their origin. torch keeps host scalars in its default dtype.
    with default_dtype(torch.float64):
        params, gradients = case_problem(case, dtype, 20, awkward=False)
        ours, theirs = make_tensors(params), make_tensors(params)
        opt = getattr(front, case.optimizer)(list(ours.values()), **case.hyper)
        loop = getattr(torch.optim, case.optimizer)(list(theirs.values()), **torch_hyper(case))
        for t, grads in enumerate(gradients, 1):
            for each, tensors in ((opt, ours), (loop, theirs)):
                each.param_groups[0]["lr"] *= (0.5, 1.5, 1.0)[t % 3] if t > 1 else 1.0  # Rprop takes it at first
                step(each, tensors, grads)
            assert [set(opt.state[p]) for p in ours.values()] == [set(loop.state[p]) for p in theirs.values()]
            got, want = front_snapshot(ours, opt, t), front_snapshot(theirs, loop, t)
            assert_close(got, want, rtol=rtol, atol=atol, where=f"{case.id}, step {t}")


@every_torch_class
def test_signature_and_defaults_are_those_of_torch(name):
    kinds = getattr(front, name), getattr(torch.optim, name)
    own, theirs = ({k: (p.kind, p.default) for k, p in inspect.signature(x.__init__).parameters.items()} for x in kinds)
    assert [(k, x) for k, x in own.items() if k in theirs] == list(theirs.items())
    assert issubclass(*kinds)


@every_torch_class
@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"weight_decay": -1.0}, {"eps": -1.0}, {"betas": (1.0, 0.9)}])
def test_bad_options_have_the_error_of_torch(name, bad):
    if not set(bad) <= set(inspect.signature(getattr(torch.optim, name)).parameters):
        pytest.skip("not an option of this class")

    def refusal(home):
        with pytest.raises(ValueError, match=r".") as caught:
            getattr(home, name)([torch.nn.Parameter(torch.ones(2))], **bad)
        return str(caught.value)

    assert refusal(front) == refusal(torch.optim)


@pytest.mark.parametrize("case", [c for c in FRONT_CASES if "eps" in c.hyper and torch_hyper(c)], ids=lambda c: c.id)
def test_eps_may_be_zero(case):
    def run(home):
        w = torch.nn.Parameter(torch.ones(3))
        w.grad = torch.tensor([1.0, -2.0, 3.0])
        opt = getattr(home, case.optimizer)([w], **torch_hyper(case) | {"eps": 0.0})
        for _ in range(3):
            opt.step()
        return w

    torch.testing.assert_close(*both(run))


@every_class
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters_are_pairs_of_real_ones(name, dtype):
    torch.manual_seed(0)
    z = torch.nn.Parameter(torch.randn(4, 3, dtype=dtype))
    pair = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    a, b = (getattr(front, name)([p], lr=0.1) for p in (z, pair))
    for _ in range(3):
        z.grad = torch.randn(4, 3, dtype=dtype).conj()
        pair.grad = torch.view_as_real(z.grad.resolve_conj()).clone()
        a.step()
        b.step()
    assert torch.equal(torch.view_as_real(z.detach()), pair)
    for key, value in a.state[z].items():
        assert torch.equal(torch.view_as_real(value) if value.is_complex() else value, b.state[pair][key])
        assert value.is_complex() == (value.ndim > 0)
