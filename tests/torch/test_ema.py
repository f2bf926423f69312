"""Averages of torch's parameters: beside torch's own, with masters, in checkpoints, in the place of the parameters."""

import copy

import pytest
from torch_compare import assert_same, copy_into, unchanged
from torch_problem import every_class, make, torch, train


@every_class
def test_averages_are_those_of_averaged_model_and_change_nothing_else(name, place):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    (params, opt), (others, plain) = make(name, ema_decay=0.75), make(name)
    model, _ = torch.nn.ParameterList(others), place(params)
    own = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    for t in range(4):
        train(params, opt, 1, t)
        train(others, plain, 1, t)
        own.update_parameters(model)
    for p, q, wanted in zip(params, others, own.module, strict=True):
        assert torch.equal(p.cpu(), q)
        torch.testing.assert_close(opt.state[p]["ema"].cpu(), wanted.data, rtol=1e-6, atol=1e-6)
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
        assert torch.equal(opt.state[params[0]]["ema"], e)
        with opt.swap_ema():
            assert torch.equal(params[0], e.to(dtype))
    assert_same(params, others, opt, other)


def test_parameters_come_back_after_an_exception_and_all_else_refuses():
    params, opt = make("NAdam", ema_decay=0.5)
    with pytest.raises(ValueError, match="swap_ema: no param group has averages"):
        make("NAdam")[1].swap_ema().__enter__()
    saved = train(params, opt) and opt.state_dict()
    more = {"params": [torch.nn.Parameter(torch.ones(2))]}
    calls = [opt.step, opt.state_dict, opt.reset_ema, lambda: opt.swap_ema().__enter__(), opt.init_state]
    with unchanged(params, opt), pytest.raises(ZeroDivisionError), opt.swap_ema():  # noqa: PT012
        for refused in [*calls, lambda: opt.load_state_dict(saved), lambda: opt.add_param_group(more)]:
            with pytest.raises(RuntimeError, match="the parameters hold their averages"):
                refused()
        params[0].data[0] = 1 / 0


@pytest.mark.parametrize("name", ["SGD", "ASGD"])
def test_training_resumes_with_the_same_bits_and_a_lacking_average_begins_as_a_copy(name):
    (params, opt), (others, plain) = make(name, ema_decay=0.5), make(name)
    train(params, opt)
    train(others, plain)
    runs = [make(name, **options) for options in ({}, {"ema_decay": 0.9}, {"ema_decay": 0.5})]
    for (own, other), saved in zip(runs, (opt, opt, plain), strict=True):
        copy_into(own, params)
        other.load_state_dict(saved.state_dict())
    runs.insert(0, copy.deepcopy((params, opt)))
    for own, other in [(params, opt), *runs]:
        train(own, other, 1, 3)
    lacking, without = runs.pop()
    for own, other in runs:
        assert_same(own, params, other, opt)
    assert torch.equal(without.state[lacking[0]]["ema"], params[0])


def test_an_average_that_was_switched_off_or_reset_begins_anew():
    params, opt = make("AdamW", dtype=torch.bfloat16, master_weights=True, ema_decay=0.5)
    train(params, opt)
    for decay, averagings in ((None, 0), (0.5, 1), (0.5, 2)):
        opt.param_groups[0]["ema_decay"] = decay
        train(params, opt, 1)
        state = opt.state[params[0]]
        assert state["ema_step"] == averagings
        assert torch.equal(state["ema"], state["master_param"]) == (averagings == 1)
    copy_into(params[:1], [torch.full((5, 7), 3.0)])  # the master follows in the next step
    opt.reset_ema()
    assert opt.state[params[0]]["ema"].tolist() == [[3.0] * 7] * 5
    train(params, opt, 1)
    assert opt.state[params[0]]["ema_step"] == 2


def test_averages_go_through_the_helpers_of_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    (params, opt), (others, other) = (make("AdamW", ema_decay=0.5) for _ in range(2))
    train(params, opt)
    saved = get_optimizer_state_dict(torch.nn.ParameterList(params), opt)
    set_optimizer_state_dict(torch.nn.ParameterList(others), other, saved)
    copy_into(others, params)
    for own, each in ((params, opt), (others, other)):
        train(own, each, 2, 3)
    assert_same(others, params, other, opt)


@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_decays_that_cannot_be_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: ema_decay must be in \[0, 1\), got 1.0"):
        make(name, ema_decay=1.0)
    params, opt = make(name)
    opt.param_groups[0]["ema_decay"] = "0.9"
    with pytest.raises(TypeError, match="group 0: ema_decay must be a number"):
        train(params, opt)
