"""fastopt.torch: groups, freezing, hooks, closures, schedulers, layouts, and refusals before anything is written."""

import copy

import pytest
from torch_compare import assert_close, assert_same_bits, unchanged
from torch_problem import LAYOUTS, both, check_layout, front, params_of, set_gradients, torch, train

# --- groups and gradients --------------------------------------------------------------------------------------------


def test_groups_have_options_of_their_own():
    def run(home):
        p = params_of()
        groups = [{"params": p[:2], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": p[2:], "weight_decay": 0.5}]
        opt = home.AdamW(groups, lr=0.01)
        for t in range(4):
            opt.param_groups[1]["lr"] *= 0.5
            train(p, opt, 1, first=t)
        return p

    assert_close(*both(run))


def test_groups_may_have_rules_of_their_own():
    def run(home):
        p = params_of()
        groups = [{"params": p[:2], "momentum": 0.9}, {"params": p[2:], "maximize": True}]
        return train(p, home.SGD(groups, lr=0.1))

    assert_close(*both(run))


def test_freezing_adding_and_unfreezing():
    def run(home):
        p = params_of()
        opt = home.AdamW(p[:2], lr=0.1)
        for t in range(8):
            set_gradients(p, t)
            if t in (2, 3):
                p[0].requires_grad_(False)
                p[0].grad = None
            if t == 4:
                p[0].requires_grad_(True)
                opt.add_param_group({"params": p[2:], "lr": 0.01})
            opt.step()
        return [*p, *(state["step"] for state in opt.state.values())]

    assert_close(*both(run))


def test_mixed_dtypes_are_one_step():
    p = [params_of(((9,),), dtype=dtype)[0] for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
    alone = [copy.deepcopy(x) for x in p]
    opt = front.AdamW(p, lr=0.1)
    for t in range(3):
        for x in p:
            set_gradients([x], t)
        opt.step()
    assert_same_bits(p, [train([x], front.AdamW([x], lr=0.1))[0] for x in alone])


def test_no_gradients_is_no_step():
    opt = front.AdamW(params_of())
    opt.step()
    assert not opt.state
    assert not opt.last_info.skipped


@pytest.mark.parametrize("fresh", [True, False])
def test_accumulated_gradients(fresh):
    def run(home):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        opt = home.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            for _ in range(2):
                model(torch.randn(5, 4)).square().mean().backward()
            opt.step()
            opt.zero_grad(set_to_none=fresh)
        return list(model.parameters())

    assert_close(*both(run))


def test_zero_grads_in_the_same_pass():
    p, strided = params_of(), torch.ones(7, 5).t()
    opt = front.SGD(p, lr=0.1, zero_grads=True)
    for t in range(2):
        set_gradients(p, t)
        p[0].grad = strided.fill_(1.0)
        before = p[0].detach().clone()
        opt.step()
        assert torch.equal(p[0], before - torch.tensor(0.1))
        assert all(not x.grad.any() for x in p)
    p[1].grad = torch.full((3,), torch.inf)
    front.SGD(p, lr=0.1, zero_grads=True).step()
    assert not p[1].grad.any()


def test_tensor_lr_is_read_at_each_step():
    def run(home):
        p, lr = params_of(), torch.tensor(0.1)
        opt = home.AdamW(p, lr=lr)
        for t in range(3):
            lr.mul_(0.5)
            train(p, opt, 1, first=t)
        return p

    assert_close(*both(run))


def test_version_counters_tell_autograd_of_the_step():
    w = torch.nn.Parameter(torch.ones(2))
    y = (w * w).sum()
    w.grad = torch.ones(2)
    front.SGD([w], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- what torch.optim.Optimizer promises -----------------------------------------------------------------------------


def test_closure_and_hooks():
    w = torch.nn.Parameter(torch.ones(2))
    opt, seen = front.SGD([w], lr=0.1), []
    assert opt.step(lambda: seen.append("no hook") or 3.0) == 3.0
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
    opt.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))

    def closure():
        opt.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        seen.append("closure")
        return loss

    assert opt.step(closure).item() == 2.0
    assert opt.step(closure=closure).item() == pytest.approx(1.28)
    assert seen == ["no hook", *["before", "closure", "after"] * 2]


SCHEDULERS = {
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 10},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "LambdaLR": {"lr_lambda": lambda t: 1 / (t + 1)},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "ReduceLROnPlateau": {"patience": 1, "factor": 0.1},
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9})], ids=["AdamW", "SGD"])
def test_schedulers(scheduler, name, options):
    def run(home):
        p = params_of()
        opt = getattr(home, name)(p, lr=0.05, **options)
        schedule = getattr(torch.optim.lr_scheduler, scheduler)(opt, **SCHEDULERS[scheduler])
        for t in range(8):
            train(p, opt, 1, first=t)
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        return p, opt.param_groups[0]["lr"]

    (p, lr), (q, wanted) = both(run)
    assert_close(p, q)
    assert lr == wanted


def test_swa_and_names_of_parameters():
    model = torch.nn.Linear(3, 2)
    opt = front.AdamW(model.named_parameters())
    swa = torch.optim.swa_utils.SWALR(opt, swa_lr=0.5, anneal_epochs=1)
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    swa.step()
    assert opt.param_groups[0]["lr"] == 0.5
    for groups in (opt.param_groups, opt.state_dict()["param_groups"]):
        assert groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("keyword", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False}])
def test_choices_of_implementation_make_no_difference(keyword):
    p, q = params_of(), params_of()
    assert_same_bits(train(p, front.AdamW(p)), train(q, front.AdamW(q, **keyword)))


# --- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [*LAYOUTS, "expanded", "sliced"])
@pytest.mark.parametrize("parameter", LAYOUTS)
def test_layouts(parameter, gradient):
    check_layout(LAYOUTS[parameter], gradient)


def test_only_the_parameter_is_written():
    base = torch.arange(40.0)
    w = torch.nn.Parameter(base[7:33])
    w.grad = torch.ones(26)
    front.AdamW([w], lr=0.5).step()
    written = base != torch.arange(40.0)
    assert written.tolist() == [False] * 7 + [True] * 26 + [False] * 7


def test_a_lazily_negated_gradient_of_one_element():
    w = torch.nn.Parameter(torch.tensor([1.0]))
    w.grad = torch.tensor([1.0 + 2.0j]).conj().imag
    assert w.grad.is_neg()
    front.SGD([w], lr=0.5).step()
    assert w.item() == 2.0


def test_gradients_of_other_dtypes():
    w, v = (torch.nn.Parameter(torch.ones(9)) for _ in range(2))
    g = torch.randn(9).to(torch.bfloat16)
    w.grad, v.grad = torch.zeros(9), g.float()
    w.grad.data = g
    for x in (w, v):
        front.AdamW([x], lr=0.1).step()
    assert torch.equal(w, v)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["first step", "later step", "later step without torch's C interface"])
def problem(request, monkeypatch):
    if "without" in request.param:
        monkeypatch.setattr(front._patterns._interface, "library", lambda: None)
    p = params_of()
    opt = front.AdamW(p, lr=0.1, zero_grads=True)
    train(p, opt, 0 if request.param == "first step" else 4)
    set_gradients(p, 1)
    return p, opt


BAD = [  # gradients of parameter 1, which has three elements
    (lambda p: torch.ones(3).to_sparse(), RuntimeError, "AdamW does not support sparse gradients"),
    (lambda p: torch.ones(2), ValueError, r"parameter 1 of group 0 has shape \(3,\), but its gradient has shape \(2"),
    (lambda p: p[0].detach()[0, :3], ValueError, "gradient of parameter 1 of group 0 shares memory with a parameter"),
    (lambda p: p[0].grad[0, :3], ValueError, "gradients of parameter 0 of group 0 and parameter 1 of group 0 share"),
]


@pytest.mark.parametrize(("make", "error", "words"), BAD, ids=[words for *_, words in BAD])
def test_gradients_that_no_step_can_take_are_refused(problem, make, error, words):
    p, opt = problem
    gradient = make(p)
    if gradient.shape == (2,):  # which torch refuses as a gradient
        p[1].grad.data = gradient
    else:
        p[1].grad = gradient
    with unchanged(p, opt), pytest.raises(error, match=words):
        opt.step()


@pytest.mark.parametrize("lr", [float("nan"), "fast", None, torch.ones(2), (0.1,) * 2, torch.ones(2, 2)], ids=str)
def test_options_that_are_no_numbers_are_refused(problem, lr):
    p, opt = problem
    opt.param_groups[0]["lr"] = lr
    with unchanged(p, opt), pytest.raises((TypeError, ValueError), match="lr"):
        opt.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameters_that_share_memory_are_refused():
    w = torch.nn.Parameter(torch.ones(4))
    v = torch.nn.Parameter(w.detach()[2:])
    opt = front.AdamW([w])
    for refused in (lambda: front.AdamW([w, v]), lambda: front.AdamW([w, w])):
        with pytest.raises(ValueError, match="parameter 0 of group 0 and parameter 1 of group 0 share memory"):
            refused()
    with pytest.raises(ValueError, match="share memory"):
        opt.add_param_group({"params": [v]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("bad", [torch.ones(1).expand(3), torch.ones(6)[::2], torch.ones(4, 4)[:, :2]])
def test_parameters_that_are_not_dense_are_refused(bad):
    with pytest.raises(ValueError, match="elements overlap or leave gaps"):
        front.AdamW([torch.nn.Parameter(bad)])


def test_differentiable_is_refused():
    w = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(NotImplementedError, match="differentiable=True is not supported"):
        front.AdamW([w], differentiable=True)
