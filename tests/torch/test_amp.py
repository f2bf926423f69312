"""fastopt.torch: GradScaler's protocol, clipping inside the step, and what a skipped step leaves alone."""

import inspect
import math
import types

import pytest
from torch_compare import assert_close, assert_same, assert_same_bits
from torch_problem import (
    SCALERS,
    check_overflow,
    every_class,
    front,
    loss_of,
    params_of,
    scaled_step,
    set_gradients,
    step_of_loss,
    torch,
)

every_scaler = pytest.mark.parametrize("scaler", SCALERS)


def make(name="AdamW", **options):
    w = params_of(((40, 30), (7,)))
    return w, getattr(front, name)(w, lr=0.1, **options)


@every_scaler
@every_class
def test_a_scale_that_is_a_power_of_two_changes_no_bit(name, scaler):
    (w, opt), plain = make(name), make(name)
    scale = SCALERS[scaler]("cpu", init_scale=1024.0)
    for t in range(3):
        scaled = scaled_step(scale, w, opt, t)
        assert_same_bits([p.grad for p in w], [g / 1024.0 for g in scaled])
        step_of_loss(*plain, t)
    assert_same_bits(w, plain[0])
    assert not opt.last_info.skipped
    assert not hasattr(opt, "grad_scale")


NO_SCALER = types.SimpleNamespace(scale=lambda x: x, step=lambda o: o.step(), update=str, get_scale=lambda: 512.0)


@pytest.mark.parametrize("scaler", [*SCALERS, "skip_nonfinite"])
@every_class
@pytest.mark.parametrize("bad", [0, 2], ids=["first step", "third step"])
def test_an_overflow_skips_the_step_and_changes_nothing(name, scaler, bad):
    alone = scaler == "skip_nonfinite"
    (w, opt), (v, plain) = make(name, max_grad_norm=10.0, skip_nonfinite=alone), make(name, max_grad_norm=10.0)
    check_overflow((w, opt), (v, plain), NO_SCALER if alone else SCALERS[scaler]("cpu", init_scale=1024.0), bad)
    assert_same_bits(w, v)
    assert opt.last_info.grad_norm == plain.last_info.grad_norm


@every_scaler
def test_unscaling_before_the_step(scaler, place):
    (w, opt), (v, plain) = make(), make()
    place(w)
    scale = SCALERS[scaler]("cpu", init_scale=1024.0)
    for t in range(4):
        opt.zero_grad()
        scale.scale(loss_of(w, t)).backward()
        if t == 1:
            w[0].grad[2, 3] = torch.nan
        scale.unscale_(opt)
        if t == 1:
            w[0].grad.zero_()  # too late: torch skips this step
        torch.nn.utils.clip_grad_norm_(w, 5.0)
        scale.step(opt)
        scale.update()
        if t != 1:
            step_of_loss(v, plain, t, 5.0)
    assert_same(w, v, opt, plain)
    assert scale.get_scale() == 512.0


@every_scaler
def test_two_optimizers_and_one_scaler(scaler):
    (w, opt), (v, other) = make("AdamW"), make("SGD")
    theirs = torch.optim.SGD([x := torch.nn.Parameter(torch.ones(2))], lr=0.5)
    scale, before = SCALERS[scaler]("cpu", init_scale=4.0), w[0].detach().clone()
    scale.scale(loss_of(w, 0) + loss_of(v, 1) + x.sum()).backward()
    v[0].grad[0, 0] = torch.inf
    for optimizer in (opt, other, theirs):
        scale.step(optimizer)
    scale.update()
    assert (opt.last_info.skipped, other.last_info.skipped, scale.get_scale()) == (False, True, 2.0)
    assert not torch.equal(w[0], before)
    assert x.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("max_norm", [0.5, 1e6, float("inf")])
def test_clipping_is_that_of_torch(max_norm):
    (w, opt), (v, plain) = make(max_grad_norm=max_norm), make()
    for t in range(3):
        opt.zero_grad()
        loss_of(w, t).backward()
        kept = [p.grad.clone() for p in w]
        opt.step()
        assert_same_bits([p.grad for p in w], kept)
        norm = step_of_loss(v, plain, t, max_norm)
        assert opt.last_info.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert_close(w, v, rtol=1e-5, atol=1e-6)


@every_scaler
@pytest.mark.parametrize("theirs", [{"foreach": False}, {"fused": True}], ids=["for-loop", "fused"])
def test_gradients_are_left_as_by_torch(scaler, theirs):
    """Unscaled after a step; a skipped one leaves them scaled as fused does, where the for-loop has unscaled them."""
    (w, opt), (v, _) = make(), make()
    other = torch.optim.AdamW(v, lr=0.1, **theirs)
    scales = SCALERS[scaler]("cpu", init_scale=3.0), torch.amp.GradScaler("cpu", init_scale=3.0)
    for t in range(3):
        left = []
        for params, o, scale in ((w, opt, scales[0]), (v, other, scales[1])):
            scale.scale(torch.ones(()))
            set_gradients(params, t)
            if t == 1:
                params[1].grad[3] = torch.inf
            scale.step(o)
            scale.update(3.0)
            factor = 3.0 if t == 1 and o is other and "fused" not in theirs else 1.0
            left.append([p.grad * factor for p in params])
        torch.testing.assert_close(*left, rtol=1e-6, atol=0)


def test_the_scaler_may_leave_gradients_scaled_and_unscales_expanded_ones():
    own, theirs = (inspect.signature(cls).parameters for cls in (front.GradScaler, torch.amp.GradScaler))
    assert [(k, p.kind, p.default) for k, p in own.items()][:-1] == [(k, p.kind, p.default) for k, p in theirs.items()]
    for unscale in (True, False):
        scaler = front.GradScaler("cpu", 8.0, 2.0, 0.5, 10, True, unscale_grads=unscale)
        scaler.scale(torch.ones(()))
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.full((1,), 16.0).expand(3)
        scaler.step(front.SGD([p], lr=0.25))
        assert p.tolist() == [0.5] * 3
        assert p.grad.tolist() == [2.0 if unscale else 16.0] * 3


@pytest.mark.parametrize(("found", "gradient"), [(0.0, 1.0), (1.0, 1.0), (0.0, torch.inf), (1.0, torch.inf)])
def test_skip_nonfinite_and_the_verdict_of_a_scaler_skip_either_of_them(found, gradient):
    w = torch.nn.Parameter(torch.ones(2))
    opt = front.SGD([w], lr=0.5, skip_nonfinite=True)
    w.grad, opt.found_inf = torch.full((2,), gradient), torch.tensor(found)
    opt.step()
    assert opt.last_info.skipped is (found == 1.0 or gradient == torch.inf)
    assert math.isfinite(opt.last_info.grad_norm) is not opt.last_info.skipped
    assert w.tolist() == [1.0 if opt.last_info.skipped else 0.5] * 2


def test_without_scaler_infinities_pass_on_as_in_torch():
    w, opt = make()
    loss_of(w, 0).backward()
    w[1].grad[0] = torch.nan
    opt.step()
    assert w[1].isnan().tolist() == [True] + [False] * 6
    assert not w[0].isnan().any()
