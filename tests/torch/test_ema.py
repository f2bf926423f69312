"""Averages of torch's parameters: beside torch's own, with masters, in checkpoints, in the place of the parameters."""

import copy

import pytest

torch = pytest.importorskip("torch")
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn  # noqa: E402 - needs torch
from torch_problem import SCALERS, every_class, make, set_gradients, train  # noqa: E402


def bits_of(params, opt):
    shown = ({k: v.clone() for k, v in opt.state[p].items()} for p in params)
    return [{"p": p.detach().clone(), **state} for p, state in zip(params, shown, strict=True)]


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in b)


@every_class
def test_averages_are_those_of_averaged_model_and_change_nothing_else(name, place):
    (params, opt), (others, plain) = make(name, ema_decay=0.75), make(name)
    model = torch.nn.ParameterList(others)
    own = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    place(params)
    for t in range(4):
        train(params, opt, 1, t)
        train(others, plain, 1, t)
        own.update_parameters(model)
    for p, q, wanted in zip(params, others, own.module, strict=True):
        assert torch.equal(p.cpu(), q)
        assert torch.allclose(opt.state[p]["ema"].cpu(), wanted, rtol=1e-6, atol=1e-6)
        assert opt.state[p]["ema_step"] == 4


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_master_is_averaged_and_takes_no_swap_for_a_write(dtype, master, flatten):
    options = {"dtype": dtype, "master_weights": master, "flatten": flatten, "ema_warmup": True, "ema_decay": 0.25}
    (params, opt), (others, other) = (make("AdamW", **options) for _ in range(2))
    e = None
    for t in range(4):
        train(params, opt, 1, t)
        train(others, other, 1, t)
        w = opt.state[params[0]].get("master_param", params[0].detach()).float()
        e = w.clone() if e is None else e + (1 - min(0.25, (1 + t) / (10 + t))) * (w - e)
        with opt.swap_ema():
            assert torch.equal(params[0], e.to(dtype))
        assert_same([{"e": opt.state[params[0]]["ema"]}], [{"e": e}])
    assert_same(bits_of(params, opt), bits_of(others, other))


def test_parameters_come_back_after_an_exception_and_all_else_refuses():
    params, opt = make("NAdam", ema_decay=0.5)
    with pytest.raises(ValueError, match="swap_ema: no param group has averages"), make("NAdam")[1].swap_ema():
        pass
    saved = train(params, opt) and opt.state_dict()
    before = bits_of(params, opt)
    more = {"params": [torch.nn.Parameter(torch.ones(2))]}
    calls = [opt.step, opt.state_dict, opt.reset_ema, lambda: opt.swap_ema().__enter__(), opt.init_state]
    with pytest.raises(ZeroDivisionError), opt.swap_ema():  # noqa: PT012 - refusals inside, and then an exception
        for refused in [*calls, lambda: opt.load_state_dict(saved), lambda: opt.add_param_group(more)]:
            with pytest.raises(RuntimeError, match="the parameters hold their averages"):
                refused()
        assert torch.equal(params[0], before[0]["ema"])
        params[0].data[0] = 1 / 0
    assert_same(bits_of(params, opt), before)
    opt.load_state_dict(saved)


@pytest.mark.parametrize("name", ["SGD", "ASGD"])
def test_training_resumes_with_the_same_bits_and_a_lacking_average_begins_as_a_copy(name):
    (params, opt), (others, plain) = make(name, ema_decay=0.5), make(name)
    train(params, opt)
    train(others, plain)
    runs = [make(name, **options) for options in ({}, {"ema_decay": 0.9}, {"ema_decay": 0.5})]
    for own, other in runs:
        with torch.no_grad():
            for p, q in zip(own, params, strict=True):
                p.copy_(q)
        other.load_state_dict((plain if other is runs[2][1] else opt).state_dict())
    runs.append(copy.deepcopy((params, opt)))
    for own, other in [(params, opt), *runs]:
        train(own, other, 1, 3)
    assert torch.equal(runs[2][1].state[runs[2][0][0]]["ema"], params[0])
    for k in (0, 1, 3):
        assert_same(bits_of(*runs[k]), bits_of(params, opt))


def test_an_average_that_was_switched_off_or_reset_begins_anew():
    params, opt = make("AdamW", dtype=torch.bfloat16, master_weights=True, ema_decay=0.5)
    train(params, opt)
    for decay, averagings in ((None, 0), (0.5, 1), (0.5, 2)):
        opt.param_groups[0]["ema_decay"] = decay
        train(params, opt, 1)
        state = opt.state[params[0]]
        assert state["ema_step"] == averagings
        assert torch.equal(state["ema"], state["master_param"]) == (averagings == 1)
    with torch.no_grad():
        params[0].fill_(3.0)  # the master follows in the next step
    opt.reset_ema()
    assert opt.state[params[0]]["ema"].tolist() == [[3.0] * 7] * 5
    train(params, opt, 1)
    assert opt.state[params[0]]["ema_step"] == 2


@pytest.mark.parametrize("scaler", SCALERS)
def test_a_skipped_step_is_not_averaged(scaler):
    params, opt = make("AdamW", ema_decay=0.5)
    train(params, opt, 2)
    before, scale = bits_of(params, opt), SCALERS[scaler]("cpu", init_scale=4.0)
    set_gradients(params, 2, 4.0)
    params[0].grad[0] = torch.inf
    scale.scale(torch.ones(()))
    scale.step(opt)
    assert_same(bits_of(params, opt), before)


def test_averages_exist_before_the_first_step_where_tools_want_states():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    (params, opt), (others, other) = (make("AdamW", ema_decay=0.5) for _ in range(2))
    train(params, opt)
    saved = get_optimizer_state_dict(torch.nn.ParameterList(params), opt)
    assert torch.equal(saved["state"]["0"]["ema"], opt.state[params[0]]["ema"])
    other.init_state()
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    set_optimizer_state_dict(torch.nn.ParameterList(others), other, saved)
    for own, each in ((params, opt), (others, other)):
        train(own, each, 2, 3)
    assert_same(bits_of(others, other), bits_of(params, opt))


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_decays_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: ema_decay must be in \[0, 1\), got 1.0"):
        make(name, ema_decay=1.0)
    params, opt = make(name)
    opt.param_groups[0]["ema_decay"] = "0.9"
    with pytest.raises(TypeError, match="group 0: ema_decay must be a number"):
        train(params, opt)
