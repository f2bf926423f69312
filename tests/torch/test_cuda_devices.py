"""fastopt.torch with parameters on several devices, and states that move between them. See torch_stand_in.py."""

import functools
import math

import pytest
from torch_compare import assert_same, copy_into, default_dtype, unchanged
from torch_problem import (
    CLASSES,
    SCALERS,
    check_checkpoint,
    every_class,
    every_torch_class,
    front,
    make,
    params_of,
    saved_and_loaded,
    set_gradients,
    torch,
    train,
)

SHAPES = ((5, 7), (3,), (2, 2), (4,))
four = functools.partial(params_of, SHAPES)
EXTRAS = [{}, {"max_grad_norm": 0.5}, {"zero_grads": True}, {"flatten": True, "max_grad_norm": 0.5}]


def two(kind, p, q, **options):
    return getattr(front, kind)(p, **options), getattr(front, kind)(q, **options)


def spread(gpus, params):
    """Two parameters on the CPU, one on each GPU."""
    gpus.put(params[1:2])
    gpus.put(params[3:], device=1)
    return params


# --- several devices -------------------------------------------------------------------------------------------------


@every_class
def test_an_optimizer_may_have_parameters_on_several_devices(gpus, name):
    there, here = spread(gpus, four()), four()
    a, b = two(name, there, here, **CLASSES[name])
    train(there, a, 3)
    train(here, b, 3)
    assert gpus.downloads(0) == gpus.downloads(1) == 0
    assert_same(there, here, a, b)


@pytest.mark.parametrize("extra", EXTRAS, ids=str)
@pytest.mark.parametrize("name", ["AdamW", "LARS"])
def test_norms_are_those_of_all_gradients(gpus, name, extra):
    there, here = spread(gpus, four()), four()
    groups = [[{"params": p[:2], "lr": 0.1}, {"params": p[2:], "lr": 0.01}] for p in (there, here)]
    a, b = two(name, *groups, lr=0.1, **extra)
    for t in range(3):
        for p, opt in ((there, a), (here, b)):
            set_gradients(p, t)
            p[t].grad = None
            opt.step()
        for p, q in zip(there, here, strict=True):
            torch.testing.assert_close(p.cpu(), q, rtol=1e-6, atol=1e-7)  # a sum has an order
        assert a.last_info.skipped is False
        if "max_grad_norm" in extra:
            assert a.last_info.grad_norm == pytest.approx(b.last_info.grad_norm, rel=1e-12)
    if "zero_grads" in extra:
        assert not any(p.grad is not None and p.grad.any() for p in there)


@pytest.mark.parametrize("scaler", SCALERS.values(), ids=SCALERS)
@pytest.mark.parametrize(("place", "zero"), [(0, True), (3, False)])
def test_an_overflow_anywhere_skips_the_step_everywhere(stand_ins, scaler, place, zero):
    there, here = spread(stand_ins, four()), four()
    a, b = two("AdamW", there, here, lr=0.1, zero_grads=zero)
    scale = scaler("cpu", init_scale=8.0)
    scale.scale(torch.ones(()))
    for t in range(3):
        set_gradients(there, t, 8.0)
        if t == 1:
            there[place].grad.view(-1)[0] = math.inf
        else:
            train(here, b, 1, first=t)
        scale.step(a)
        scale.update()
        assert a.last_info.skipped is (t == 1)
        assert not zero or not any(p.grad.any() for p in there)
        if t == 1:
            assert scale.get_scale() == 4.0
            scale._scale.fill_(8.0)
    assert_same(there, here, a, b)


def test_a_norm_that_is_not_finite_stays_so_without_scaler(gpus):
    there, here = spread(gpus, four()), four()
    optimizers = two("SGD", there, here, lr=0.1, max_grad_norm=1.0, flatten=True)
    for p, opt in zip((there, here), optimizers, strict=True):
        set_gradients(p, 0)
        p[3].grad[0] = math.nan
        opt.step()
        assert all(x.isnan().all() for x in p)
        assert not any(group._values[-1].isnan() for group in opt._flat._groups if group._values[-1] is not None)


def test_a_refusal_on_one_device_writes_on_none(gpus):
    p = spread(gpus, four())
    opt = front.AdamW(p, lr=0.1)
    train(p, opt, 3)
    for bad in range(4):
        set_gradients(p, 3)
        p[bad].grad = torch.ones(SHAPES[bad], device=p[bad].device).to_sparse()
        refusal = f"sparse gradients: that of parameter {bad} of group 0"
        with unchanged(p, opt), pytest.raises(RuntimeError, match=refusal):
            opt.step()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_graph_of_several_devices_is_refused(gpus):
    p = spread(gpus, four())
    opt = front.AdamW(p, lr=0.1, capturable=True)
    train(p, opt, 2)
    with unchanged(p), gpus.capture(), pytest.raises(RuntimeError, match="parameters that are all on one GPU"):
        opt.step()


# --- moving ----------------------------------------------------------------------------------------------------------


@every_class
def test_parameters_that_move_take_their_state_along(gpus, name):
    p, q = four()[:2], four()[:2]
    a, b = two(name, p, q, **CLASSES[name])
    train(p, a, 2)
    for x in gpus.put(p):  # model.cuda()
        x.data = x.data.clone()
    train(p, a, 2, first=2)
    assert gpus.launched()
    for x in gpus.take_back(p[:1]):
        x.data = x.data.clone()
    train(p, a, 1, first=4)
    train(q, b, 5)
    assert_same(p, q, a, b)


@every_class
@pytest.mark.parametrize("way", ["to a GPU", "from a GPU"])
def test_checkpoints_move_between_devices(gpus, name, way):
    first, second, through = (make(name) for _ in range(3))
    gpus.put((second if way == "to a GPU" else first)[0])
    train(*first, 2)
    second[1].load_state_dict(saved_and_loaded(first[1].state_dict()))
    copy_into(second[0], first[0])
    train(*second, 2, first=2)
    train(*through, 4)
    assert_same(second[0], through[0], second[1], through[1])


@every_torch_class
@pytest.mark.parametrize("way", ["from torch", "to torch"])
def test_checkpoints_of_torch(gpus, name, way):
    with default_dtype(torch.float64):  # torch then keeps eta, mu and mu_product as exactly as fastopt does
        ours, theirs = (make(name, home=home, dtype=torch.float64) for home in (front, torch.optim))
        gpus.put(ours[0])
        check_checkpoint(*((theirs, ours) if way == "from torch" else (ours, theirs)))


def test_a_graphs_counts_are_saved(gpus):
    p = gpus.put(four())
    opt = front.AdamW(p, lr=0.1, capturable=True)
    train(p, opt, 1)
    with gpus.capture() as replay:
        opt.step()
    for _ in range(3):
        replay()
    saved = opt.state_dict()
    assert [state["step"].item() for state in saved["state"].values()] == [4.0] * 4
    q = four()
    other = torch.optim.AdamW(q)
    other.load_state_dict(saved)
    assert other.state[q[0]]["step"].item() == 4.0
