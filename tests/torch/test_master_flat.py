"""fastopt.torch: master_weights=True and flatten=True."""

import functools

import pytest
from torch_compare import assert_same_bits, unchanged
from torch_problem import SHAPES, every_class, front, params_of, scaled_step, set_gradients, torch, train

every_shape = functools.partial(params_of, (*SHAPES, (33,), (2, 3, 4, 5)))
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


# --- master weights --------------------------------------------------------------------------------------------------


@every_class
@every_dtype
def test_masters_are_the_float32_run_and_parameters_their_rounding(name, dtype):
    low = every_shape(dtype=dtype)
    full = [torch.nn.Parameter(p.detach().float()) for p in low]
    a, b = getattr(front, name)(low, lr=0.01, master_weights=True), getattr(front, name)(full, lr=0.01)
    for t in range(4):
        train(low, a, 1, first=t)
        for p, q in zip(low, full, strict=True):
            q.grad = p.grad.float()
        b.step()
        assert_same_bits([a.state[p]["master_param"] for p in low], full)
        assert_same_bits(low, [q.to(dtype) for q in full])


@every_dtype
@pytest.mark.parametrize("options", [{}, {"flatten": True}, {"zero_grads": True, "max_grad_norm": 0.5}], ids=str)
def test_parameters_are_written_in_the_pass_itself(dtype, options, monkeypatch):
    p = params_of([(5,), (70_000,)], dtype=dtype)
    opt = front.AdamW(p, lr=0.1, master_weights=True, **options)
    for t in range(3):
        for x in p:
            x.grad.fill_(t + 1) if options.get("flatten") else setattr(x, "grad", torch.full_like(x, t + 1))
        if t == 1:  # the masters are there
            for home, name in ((torch, "_foreach_copy_"), (torch, "where"), (torch.Tensor, "copy_")):
                monkeypatch.setattr(home, name, None, raising=False)
        before = [x._version for x in p]
        opt.step()
        assert all(x._version > version for x, version in zip(p, before, strict=True))  # autograd must know
        assert_same_bits(p, [opt.state[x]["master_param"].to(dtype) for x in p])


def test_masters_of_other_layouts():
    part = torch.zeros(101, dtype=torch.bfloat16)[1:]  # begins at an odd multiple of two bytes
    laid_out = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(7, 9).t()
    p = [torch.nn.Parameter(x) for x in (*(x.bfloat16() for x in laid_out), part)]
    opt = front.SGD(p, lr=0.5, master_weights=True)
    for _ in range(2):
        for x in p:
            x.grad = torch.randn(x.shape).bfloat16()
        masters = [opt.state[x]["master_param"].clone() if opt.state[x] else x.detach().float() for x in p]
        opt.step()
        assert_same_bits(p, [(m - 0.5 * x.grad.float()).bfloat16() for x, m in zip(p, masters, strict=True)])


def test_a_skipped_step_writes_neither_parameters_nor_masters():
    p = every_shape(dtype=torch.bfloat16)
    opt, scaler = front.AdamW(p, master_weights=True), front.GradScaler("cpu", init_scale=1.0)
    scaled_step(scaler, p, opt, 0)
    with unchanged(p, opt):
        scaled_step(scaler, p, opt, 1, float("inf"))
    assert opt.last_info.skipped


def test_weights_move_where_those_of_torch_stay_stuck():
    def run(home, **options):
        w = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        w.grad = torch.ones_like(w)
        opt = home.SGD([w], lr=1e-4, **options)
        for _ in range(200):
            opt.step()
        return w.tolist()

    assert run(torch.optim) == [1.0] * 4
    assert run(front, master_weights=True) == [0.98046875] * 4  # 0.98 to the nearest bfloat16


@pytest.mark.parametrize("traced", [True, False])
def test_parameters_that_somebody_writes_are_taken_over(traced):
    w = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    w.grad = torch.ones_like(w)
    opt = front.SGD([w], lr=1e-4, master_weights=True)
    for _ in range(3):
        opt.step()
    (w.detach() if traced else w.data)[1] = 5.0
    if not traced:
        opt.refresh()
    opt.step()
    torch.testing.assert_close(opt.state[w]["master_param"], torch.tensor([0.9996, 4.9999]), rtol=1e-6, atol=0)


def test_float32_parameters_have_no_master():
    p = every_shape()
    train(p, opt := front.AdamW(p, master_weights=True), 1)
    assert set(opt.state[p[0]]) == {"step", "exp_avg", "exp_avg_sq"}


# --- flatten ---------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["in place", "new tensors", "set to None"])
def test_flat_has_the_same_bits(name, dtype, how):
    def make(**options):
        p = every_shape(dtype=dtype)
        groups = [{"params": p[:3], "lr": 0.02}, {"params": p[3:], "lr": 0.01}]
        return p, getattr(front, name)(groups, lr=0.01, max_grad_norm=5.0, **options)

    (p, a), (q, b) = make(), make(flatten=True)
    for t in range(4):
        train(p, a, 1, first=t)
        b.zero_grad(set_to_none=how == "set to None")
        if how == "in place":
            for x, y in zip(q, p, strict=True):
                x.grad += y.grad
        else:
            set_gradients(q, t)
        b.step()
        assert_same_bits(p, q)
        assert_same_bits([x.grad for x in p], [y.grad for y in q])
    assert a.last_info == b.last_info


@pytest.mark.parametrize("masters", [False, True])
def test_flat_is_one_segment(masters):
    p = every_shape(dtype=torch.bfloat16)
    train(p, opt := front.AdamW(p, master_weights=masters, flatten=True), 1)
    assert len(opt.state.watch.derived().only.serving.plan._tables[False].sizes) == 1


def test_flat_survives_moved_parameters_and_eps_of_zero():
    p, q = every_shape(), every_shape()
    a, b = front.AdamW(p, eps=0.0), front.AdamW(q, eps=0.0, flatten=True)
    train(q, b, 2)
    q[1].data = q[1].data.clone()
    assert_same_bits(train(p, a, 4), train(q, b, 2, first=2))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LARS"])
def test_flat_leaves_frozen_parameters_where_they_are_until_they_are_unfrozen(name):
    def run(**options):
        p = every_shape()
        p[1].requires_grad_(False)
        place = p[1].data_ptr()
        opt = getattr(front, name)(p, lr=0.1, weight_decay=0.5, **options)
        for t in range(8):
            if t == 3:
                assert p[1].grad is None
                assert p[1] not in opt.state
                assert torch.equal(p[1], every_shape()[1])
                p[1].requires_grad_(True)
            if t == 6:
                p[0].requires_grad_(False)  # as freezing does in torch, it takes effect with zero_grad
            opt.zero_grad(set_to_none=t % 2 == 0)
            sum((x.square() * (i + t)).sum() for i, x in enumerate(p) if x.requires_grad).backward()
            opt.step()
        assert p[1].data_ptr() == place
        return p

    assert_same_bits(run(flatten=True), run())


def test_flat_checkpoint_goes_to_torch():
    p, q = every_shape(), every_shape()
    train(p, opt := front.AdamW(p, flatten=True), 1)
    other = torch.optim.AdamW(q)
    other.load_state_dict(opt.state_dict())
    assert torch.equal(other.state[q[0]]["exp_avg"], opt.state[p[0]]["exp_avg"])
