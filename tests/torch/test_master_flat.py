"""fastopt.torch: master_weights=True and flatten=True."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
import fastopt.torch as front  # noqa: E402 - needs torch

SHAPES = ((5, 7), (3,), (), (0, 2), (33,), (2, 3, 4, 5))
CLASSES = [name for name in front.__all__ if name not in ("TensorOptimizer", "GradScaler")]


def params_of(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]


def gradients(t, dtype=torch.float32):
    torch.manual_seed(100 + t)
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def set_gradients(params, t):
    for p, g in zip(params, gradients(t, params[0].dtype), strict=True):
        p.grad = g


# --- master weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_are_the_float32_run_and_parameters_their_rounding(name, dtype):
    low, full = params_of(dtype), [torch.nn.Parameter(p.detach().float()) for p in params_of(dtype)]
    a, b = getattr(front, name)(low, lr=0.01, master_weights=True), getattr(front, name)(full, lr=0.01)
    for t in range(4):
        set_gradients(low, t)
        for p, q in zip(low, full, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
        for p, q in zip(low, full, strict=True):
            assert torch.equal(a.state[p]["master_param"], q)
            assert torch.equal(p, q.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"zero_grads": True, "max_grad_norm": 0.5}], ids=str)
def test_parameters_are_written_in_the_pass_itself(dtype, options, monkeypatch):
    p = [torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)) for n in (5, 70_000)]
    opt = front.AdamW(p, lr=0.1, master_weights=True, **options)
    for t in range(3):
        if t == 1:  # the masters are there
            for home, name in ((torch, "_foreach_copy_"), (torch, "where"), (torch.Tensor, "copy_")):
                monkeypatch.setattr(home, name, None, raising=False)
        for x in p:
            x.grad.fill_(t + 1) if options.get("flatten") else setattr(x, "grad", torch.full_like(x, t + 1))
        before = [x._version for x in p]
        opt.step()
        assert all(x._version > version for x, version in zip(p, before, strict=True))  # autograd must know
        assert all(torch.equal(x, opt.state[x]["master_param"].to(dtype)) for x in p)


def test_masters_of_other_layouts():
    p = torch.nn.Parameter(torch.randn(4, 3, 5, 5).to(torch.bfloat16, memory_format=torch.channels_last))
    q = torch.nn.Parameter(torch.randn(7, 9).bfloat16().t())
    part = torch.zeros(101, dtype=torch.bfloat16)[1:]  # begins at an odd multiple of two bytes
    opt = front.SGD([p, q, r := torch.nn.Parameter(part)], lr=0.5, master_weights=True)
    for _ in range(2):
        for x in (p, q, r):
            x.grad = torch.randn(x.shape).bfloat16()
        wanted = [x.detach().float() if not opt.state[x] else opt.state[x]["master_param"].clone() for x in (p, q, r)]
        opt.step()
        for x, master in zip((p, q, r), wanted, strict=True):
            assert torch.equal(x, (master - 0.5 * x.grad.float()).bfloat16())


def test_a_skipped_step_writes_neither_parameters_nor_masters():
    p = params_of(torch.bfloat16)
    opt, scaler = front.AdamW(p, master_weights=True), front.GradScaler("cpu", init_scale=1.0)

    def step(number):
        set_gradients(p, 0)
        p[0].grad[0, 0] = number
        scaler.scale(torch.ones(()))
        scaler.step(opt)
        scaler.update()
        return [x.detach().clone() for x in p], [opt.state[x]["master_param"].clone() for x in p]

    before, after = step(1.0), step(float("inf"))
    assert opt.last_info.skipped
    assert all(torch.equal(x, y) for x, y in zip(before[0] + before[1], after[0] + after[1], strict=True))


def test_flat_masters_are_one_segment():
    p = params_of(torch.bfloat16)
    opt = front.AdamW(p, master_weights=True, flatten=True)
    set_gradients(p, 0)
    opt.step()
    assert len(opt.state.watch.derived.plan.updates.sizes) == 1


def test_weights_move_where_those_of_torch_stay_stuck():
    w, v = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    a, b = front.SGD([w], lr=1e-4, master_weights=True), torch.optim.SGD([v], lr=1e-4)
    for _ in range(200):
        w.grad, v.grad = torch.ones(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
        a.step()
        b.step()
    assert v.tolist() == [1.0] * 4
    assert w.tolist() == [0.98046875] * 4  # 0.98 to the nearest bfloat16


@pytest.mark.parametrize("traced", [True, False])
def test_parameters_that_somebody_writes_are_taken_over(traced):
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    opt = front.SGD([w], lr=1e-4, master_weights=True)
    for _ in range(3):
        w.grad = torch.ones(2, dtype=torch.bfloat16)
        opt.step()
    (w.detach() if traced else w.data)[1] = 5.0
    if not traced:
        opt.refresh()
    w.grad = torch.ones(2, dtype=torch.bfloat16)
    opt.step()
    torch.testing.assert_close(opt.state[w]["master_param"], torch.tensor([0.9996, 4.9999]), rtol=1e-6, atol=0)


def test_masters_are_saved_and_resumed():
    def run(stop):
        p = params_of(torch.bfloat16)
        opt = front.AdamW(p, lr=1e-4, master_weights=True)
        for t in range(6):
            if t == stop:
                saved = copy.deepcopy(([x.detach() for x in p], opt.state_dict()))
                p = [torch.nn.Parameter(x) for x in saved[0]]
                opt = front.AdamW(p, lr=1e-4, master_weights=True)
                opt.load_state_dict(saved[1])
            set_gradients(p, t)
            opt.step()
        return p, opt

    (p, a), (q, b) = run(None), run(3)
    for x, y in zip(p, q, strict=True):
        assert torch.equal(x, y)
        assert all(torch.equal(a.state[x][k], b.state[y][k]) for k in a.state[x])


def test_float32_parameters_have_no_master():
    p = params_of()
    opt = front.AdamW(p, master_weights=True)
    set_gradients(p, 0)
    opt.step()
    assert set(opt.state[p[0]]) == {"step", "exp_avg", "exp_avg_sq"}


# --- flatten ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["in place", "new tensors", "set to None"])
def test_flat_has_the_same_bits(name, dtype, how):
    p, q = params_of(dtype), params_of(dtype)
    groups = [{"params": q[:3], "lr": 0.02}, {"params": q[3:], "lr": 0.01}]
    others = [{"params": p[:3], "lr": 0.02}, {"params": p[3:], "lr": 0.01}]
    a = getattr(front, name)(others, lr=0.01, max_grad_norm=5.0)
    b = getattr(front, name)(groups, lr=0.01, max_grad_norm=5.0, flatten=True)
    for t in range(4):
        set_gradients(p, t)
        if how == "set to None":
            for x in q:
                x.grad = None
        else:
            b.zero_grad()
        for x, g in zip(q, gradients(t, dtype), strict=True):
            if how == "in place":
                x.grad += g
            else:
                x.grad = g
        a.step()
        b.step()
        assert all(torch.equal(x, y) for x, y in zip(p, q, strict=True))
        assert all(torch.equal(x.grad, y.grad) for x, y in zip(p, q, strict=True))
    assert a.last_info == b.last_info


def test_flat_is_one_segment():
    p = params_of()
    opt = front.AdamW(p, flatten=True)
    set_gradients(p, 0)
    opt.step()
    assert len(opt.state.watch.derived.plan.updates.sizes) == 1


def test_flat_training_with_autograd():
    def run(home, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        opt = home.AdamW(model.parameters(), lr=0.01, **options)
        for t in range(5):
            opt.zero_grad()
            if t == 3:
                model.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward()
            opt.step()
        return list(model.parameters())

    for p, q in zip(run(front, flatten=True), run(torch.optim), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_flat_survives_moved_parameters_and_eps_of_zero():
    p, q = params_of(), params_of()
    a, b = front.AdamW(p, eps=0.0), front.AdamW(q, eps=0.0, flatten=True)
    for t in range(4):
        if t == 2:
            q[1].data = q[1].data.clone()
        set_gradients(p, t)
        set_gradients(q, t)
        a.step()
        b.step()
    assert all(torch.equal(x, y) for x, y in zip(p, q, strict=True))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LARS"])
def test_flat_leaves_frozen_parameters_where_they_are_until_they_are_unfrozen(name):
    def run(**options):
        p = params_of()
        p[1].requires_grad_(False)
        place = p[1].data_ptr()
        opt = getattr(front, name)(p, lr=0.1, weight_decay=0.5, **options)
        for t in range(8):
            if t == 3:
                assert p[1].grad is None
                assert p[1] not in opt.state
                assert torch.equal(p[1], params_of()[1])
                p[1].requires_grad_(True)
            if t == 6:
                p[0].requires_grad_(False)  # as freezing does in torch, it takes effect with zero_grad
            opt.zero_grad(set_to_none=t % 2 == 0)
            sum((x.square() * (i + t)).sum() for i, x in enumerate(p) if x.requires_grad).backward()
            opt.step()
        assert p[1].data_ptr() == place
        return p

    assert all(map(torch.equal, run(flatten=True), run()))


def test_flat_checkpoint_goes_to_torch():
    p = params_of()
    opt = front.AdamW(p, flatten=True)
    set_gradients(p, 0)
    opt.step()
    q = params_of()
    other = torch.optim.AdamW(q)
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[q[0]]["exp_avg"], opt.state[p[0]]["exp_avg"])
