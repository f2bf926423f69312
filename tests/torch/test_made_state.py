"""fastopt.torch: states that are made, missing, read or written while there is no step, or while one is interrupted."""

import copy
import sys

import pytest
from torch_compare import assert_same, unchanged
from torch_problem import every_class, front, gradients, make, torch, train
from work import work


def by_helper(params, opt):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    get_optimizer_state_dict(torch.nn.ParameterList(params), opt)


def by_name(params, opt):
    opt.init_state()
    opt.init_state()


@pytest.mark.parametrize("make_states", [by_helper, by_name])
@every_class
def test_training_has_the_same_bits_with_states_made_before(name, make_states):
    flat = [{"flatten": True}] if make_states is by_name else []  # gradients exist, so torch's helper asks for nothing
    for options in ({}, {"dtype": torch.bfloat16, "master_weights": True}, *flat):
        (p, a), (q, b) = make(name, **options), make(name, **options)
        with unchanged(p):
            make_states(p, a)
        if name not in ("SGD", "LARS", "Lion"):
            assert all(a.state[x]["step"] == 0 for x in p)
        for params, opt in ((p, a), (q, b)):
            opt.param_groups[0]["lr"] = 0.05  # what states begin with may depend on it
            train(params, opt, 3)
        assert_same(p, q, a, b)


def test_init_state_leaves_states_and_frozen_parameters_alone():
    params, opt = make("SGD")
    params[2].requires_grad_(False)
    params[0].grad = gradients(params, 0)[0]
    opt.step()
    kept, bits = opt.state[params[0]]["momentum_buffer"], opt.state[params[0]]["momentum_buffer"].clone()
    opt.init_state()
    assert opt.state[params[0]]["momentum_buffer"] is kept
    assert torch.equal(kept, bits)
    assert [x in opt.state for x in params] == [True, True, False, True]
    opt.state[params[1]]["momentum_buffer"].fill_(1.0)  # no longer what was made: momentum goes on from it
    train([params[1]], opt, 1)
    assert torch.equal(opt.state[params[1]]["momentum_buffer"], 0.9 + 0.5 * gradients([params[1]], 0)[0])


@every_class
def test_init_state_after_steps_changes_nothing(name):
    (p, a), (q, b) = make(name), make(name)
    for t in range(4):
        train(p, a, 1, first=t)
        train(q, b, 1, first=t)
        a.init_state()
    assert_same(p, q, a, b)


@pytest.mark.parametrize("how", ["load_state_dict", "by hand"])
@every_class
def test_a_state_with_a_hole_is_refused_before_anything_is_written(name, how):
    params, opt = make(name)
    train(params, opt, 2)
    for key in list(opt.state[params[0]]):
        params, opt = make(name)
        train(params, opt, 2)

        def go_on(params=params, opt=opt, key=key):
            if how == "by hand":
                del opt.state[params[0]][key]
            else:
                saved = opt.state_dict()
                del saved["state"][0][key]
                opt.load_state_dict(saved)
            train(params, opt, 1, first=2)

        if key == "max_exp_avg_sq" or name in ("SGD", "Lion", "LARS"):  # these begin anew
            go_on()
            assert key in opt.state[params[0]]
        else:
            with unchanged(params), pytest.raises(KeyError, match=f"{name}.*: parameter 0 .*lacks '{key}'"):
                go_on()
            assert (key in opt.state[params[0]]) == (how == "load_state_dict")  # refused before it was loaded


def test_full_state_dict_is_float32_with_masters():
    params, opt = make("AdamW", dtype=torch.bfloat16, master_weights=True)
    train(params, opt, 2)
    full = opt.full_state_dict()
    assert set(full) == {"state", "param_groups"}
    assert full["param_groups"] == opt.state_dict()["param_groups"]
    for i, p in enumerate(params):
        assert set(full["state"][i]) == {"step", "exp_avg", "exp_avg_sq", "master_param"}
        for key, value in full["state"][i].items():
            assert value.dtype == torch.float32
            assert torch.equal(value, opt.state[p][key])
            assert value.data_ptr() != opt.state[p][key].data_ptr() or not value.numel()


# --- interrupts and other threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["NAdam", "SGD"])
@pytest.mark.parametrize("first", [0, 3])
def test_after_an_interrupt_state_agrees_with_the_parameters(name, first):
    """Interrupted before each function of fastopt.torch that a step calls, and after the plan took its step."""
    lines = 0

    class Interrupt(BaseException):
        pass

    def interrupted_at(place):
        (p, a), (q, b) = make(name, max_grad_norm=1.0), make(name, max_grad_norm=1.0)
        for params, opt in ((p, a), (q, b)):
            train(params, opt, first)
        for x, y, g in zip(p, q, gradients(p, first), strict=True):
            x.grad, y.grad = g, g.clone()
        calls = 0

        def trace(frame, event, arg):
            nonlocal calls
            if event == "call" and "fastopt/torch" in frame.f_code.co_filename and frame.f_code.co_name != "<genexpr>":
                calls += 1
                if calls == place:
                    raise Interrupt

        sys.setprofile(trace)
        try:
            a.step()
        except Interrupt:
            pass
        finally:
            sys.setprofile(None)
        assert not a._users
        before = make(name)[0] if first == 0 else None
        b.step()
        changed = not torch.equal(p[0], before[0]) if before else torch.equal(p[0], q[0])
        if "step" in b.state[q[0]]:
            assert a.state[p[0]].get("step", torch.tensor(0.0)) == first + changed, place
        if not changed:
            a.step()
        for t in range(first + 1, first + 3):
            for params, opt in ((p, a), (q, b)):
                train(params, opt, 1, first=t)
        assert all(torch.equal(x, y) for x, y in zip(p, q, strict=True)), place
        return calls < place

    while not interrupted_at(lines := lines + 1):
        pass
    assert lines > 20


def test_a_shallow_copy_of_what_is_flattened_is_refused_and_an_old_pickle_is_not_taken_for_a_load():
    params, opt = make("AdamW", flatten=True)
    with unchanged(params), pytest.raises(TypeError, match=r"AdamW: copy.copy .* Use copy.deepcopy"):
        copy.copy(opt)
    old = front.AdamW.__new__(front.AdamW)
    old.__setstate__({key: value for key, value in opt.__getstate__().items() if key != "extras"})
    train(params, old, 1)


def test_while_one_thread_steps_others_are_refused():
    params, opt = make("AdamW")
    saved = opt.state_dict()
    group = {"params": [torch.nn.Parameter(torch.ones(1))]}
    calls = [opt.step, opt.state_dict, opt.full_state_dict, opt.upload_options, opt.init_state, opt.refresh]
    calls += [lambda: opt.load_state_dict(saved), lambda: opt.add_param_group(group)]
    opt._users.append("another thread")
    for call in calls:
        with pytest.raises(RuntimeError, match=r"AdamW.*: another thread is using this optimizer"):
            call()
    opt._users.clear()
    assert len(opt.param_groups) == 1
    train(params, opt, 1)


# --- growth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
def test_the_work_grows_with_the_number_of_tensors_and_groups(grouped):
    def run(count):
        params = [torch.nn.Parameter(torch.ones(2)) for _ in range(count)]
        opt = front.AdamW([{"params": [p]} for p in params] if grouped else params)
        train(params, opt, 1)
        opt.load_state_dict(opt.state_dict())
        opt.step()

    run(2)  # what is imported or found late
    small, middle, large = (work(lambda n=n: run(n), "fastopt") for n in (20, 40, 60))
    assert large - middle <= 1.05 * (middle - small)
