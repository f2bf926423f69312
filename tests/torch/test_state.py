"""fastopt.torch: state, checkpoints in both directions, copies, and surgery on state and groups."""

import collections
import copy

import pytest
from torch_compare import assert_same, assert_same_bits, copy_into, default_dtype, unchanged
from torch_problem import (
    check_checkpoint,
    every_class,
    every_copy,
    every_torch_class,
    front,
    make,
    saved_and_loaded,
    set_gradients,
    torch,
    train,
)


def assert_equal(a, b):
    """Parameters, states and groups of two pairs of parameters and optimizer have the same bits."""
    assert_same(a[0], b[0], a[1], b[1])


@every_class
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resume_is_bit_exact(name, dtype, masters):
    through, first, second = (make(name, dtype=dtype, seed=s, master_weights=masters) for s in (0, 0, 5))
    train(*through, 6)
    train(*first, 3)
    copy_into(second[0], first[0])
    second[1].load_state_dict(saved_and_loaded(first[1].state_dict()))
    assert_equal(second, first)
    train(*second, 3, first=3)
    assert_equal(second, through)


@every_class
def test_states_of_16_bit_parameters_are_float32_and_stay_so(name):
    (params, opt), (again, other) = make(name, dtype=torch.float16), make(name, dtype=torch.float16)
    train(params, opt, 2)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params, again, strict=True):
        for key in set(opt.state[p]) - {"step", "eta", "mu", "mu_product"}:
            assert opt.state[p][key].dtype == torch.float32
            assert torch.equal(other.state[q][key], opt.state[p][key])


@every_torch_class
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_checkpoints_go_both_ways(name, direction):
    with default_dtype(torch.float64):  # torch then keeps eta, mu and mu_product as exactly as fastopt does
        homes = (torch.optim, front) if direction == "from torch" else (front, torch.optim)
        check_checkpoint(*(make(name, home=home, dtype=torch.float64) for home in homes))


@every_class
def test_saved_tensors_are_copies_of_their_own_size(name):
    params, opt = make(name)
    train(params, opt, 2)
    saved = opt.state_dict()
    assert {type(saved["state"]), *map(type, saved["state"].values())} == {dict}
    before = copy.deepcopy(saved)
    train(params, opt, 1, first=2)
    torch.testing.assert_close(saved, before, rtol=0, atol=0)
    for value in (value for state in saved["state"].values() for value in state.values()):
        assert value.untyped_storage().nbytes() == value.nbytes


@every_torch_class
def test_older_checkpoints_lack_keys_and_have_numbers_as_steps(name):
    through, second = make(name), make(name, seed=3)
    train(*through, 2)
    saved = through[1].state_dict()
    for group in saved["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            group.pop(key, None)
    for state in saved["state"].values():
        for key in {"step", "mu_product", "eta", "mu"} & set(state):
            state[key] = int(state[key]) if key == "step" else state[key].item()
    copy_into(second[0], through[0])
    second[1].load_state_dict(saved)
    train(*through, 2, first=2)
    train(*second, 2, first=2)
    assert_equal(through, second)


@every_class
@every_copy
def test_copies_go_on_by_themselves(name, how):
    params, opt = first = make(name, max_grad_norm=0.5)
    train(*first, 2)
    second = how((params, opt))
    assert type(second[1]) is type(opt)
    with unchanged(second[0]):  # the copy has memory of its own
        train(*first, 2, first=2)
    train(*second, 2, first=2)
    assert_equal(first, second)
    assert second[1].last_info.grad_norm == opt.last_info.grad_norm


def test_a_state_of_another_shape_is_refused_and_nothing_changes():
    params, opt = make("AdamW")
    train(params, opt, 2)
    bad = opt.state_dict()
    bad["state"][0]["exp_avg"] = torch.zeros(4)
    with unchanged(params, opt):
        with pytest.raises(ValueError, match=r"exp_avg of parameter 0 has shape \(4,\), but the parameter .* \(5, 7\)"):
            opt.load_state_dict(bad)
        with pytest.raises(ValueError, match="different number of parameter groups"):
            opt.load_state_dict({"state": {}, "param_groups": []})


def test_hooks_of_load_and_save_see_tensors_and_may_replace_what_is_loaded_and_subclasses_may_add_to_it():
    class Own(front.AdamW):
        def __setstate__(self, state):
            super().__setstate__({**state, "own": len(state["state"])})

    opt = Own(params := make("AdamW")[0])
    train(params, opt, 1)
    seen = []
    opt.register_state_dict_post_hook(lambda o, d: seen.append(d["state"][0]["exp_avg"].shape))
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(d["state"][0]["exp_avg"].shape))
    opt.register_load_state_dict_pre_hook(lambda o, d: o.zero_grad() or {**d, "state": {7: "whose", **d["state"]}})
    opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["exp_avg"].shape))
    opt.load_state_dict(opt.state_dict())
    assert seen == [(5, 7)] * 3
    assert (opt.own, opt.state[7]) == (5, "whose")


# --- surgery: what users do to the state of torch's optimizers -------------------------------------------------------


def assert_close(ours, theirs):
    for p, q in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        states = dict(ours[1].state.get(p, {})), dict(theirs[1].state.get(q, {}))
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-6)


def grow(params, opt):
    """What Gaussian splatting does: a parameter is replaced by a longer one, and its state with it."""
    old = params[1]
    state = opt.state.get(old)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = torch.cat([state[key], torch.zeros(2)])
    del opt.state[old]
    opt.param_groups[0]["params"][1] = params[1] = torch.nn.Parameter(torch.cat([old.detach(), torch.ones(2)]))
    opt.state[params[1]] = state


def append(params, opt):
    params.append(torch.nn.Parameter(torch.ones(4)))
    opt.param_groups[0]["params"].append(params[-1])


def offload(params, opt):
    for state in opt.state.values():
        for key, value in state.items():
            state[key] = value.to("cpu", copy=True)
        state.update(step=state["step"] + 1)


MADE = {"step": 3.0, "exp_avg": (1.0,) * 3, "exp_avg_sq": (1.0,) * 3}
SURGERY = {
    "clear": lambda p, opt: opt.state.clear(),
    "replace the state": lambda p, opt: setattr(opt, "state", collections.defaultdict(dict)),
    "delete one": lambda p, opt: opt.state.__delitem__(p[0]),
    "zero in place": lambda p, opt: (opt.state[p[0]]["exp_avg"].zero_(), opt.state[p[1]]["step"].zero_()),
    "set a state": lambda p, opt: opt.state[p[0]].__setitem__("exp_avg", torch.full((5, 7), 0.5)),
    "set a step": lambda p, opt: opt.state[p[1]].__setitem__("step", torch.tensor(7.0)),
    "step back one by one": lambda p, opt: [s.__setitem__("step", s["step"].sub_(1)) for s in map(opt.state.get, p)],
    "assign a state": lambda p, opt: opt.state.__setitem__(p[1], {k: torch.tensor(v) for k, v in MADE.items()}),
    "share": lambda p, opt: opt.state[p[0]]["exp_avg"].share_memory_(),
    "grow": grow,
    "move data": lambda p, opt: [setattr(x, "data", x.data.clone()) for x in p],
    "append": append,
    "offload": offload,
    "remove": lambda p, opt: opt.param_groups[0]["params"].pop(0),
    "maximize": lambda p, opt: opt.param_groups[0].update(maximize=True),
}


@pytest.mark.parametrize("surgery", SURGERY.values(), ids=SURGERY)
def test_surgery_has_the_effect_it_has_in_torch(surgery):
    ours, theirs = make("AdamW"), make("AdamW", home=torch.optim)
    for params, opt in (ours, theirs):
        train(params, opt, 3)
        surgery(params, opt)
        train(params, opt, 3, first=3)
    assert_close(ours, theirs)


@every_class
def test_momentum_and_states_begin_with_the_first_gradient(name):
    (params, opt), (alone, other) = make(name), make(name)
    for t in range(4):
        set_gradients(params, t)
        for p in params[1:] if t < 2 else ():
            p.grad = None
        opt.step()
        if t < 2 and name != "Adagrad":
            assert not opt.state.get(params[1])
    for t in range(2, 4):
        set_gradients(alone, t)
        alone[0].grad = None
        other.step()
    assert_same_bits(params[1:], alone[1:])


def test_sgd_damps_from_the_second_step_on_also_when_momentum_comes_later():
    ours, theirs = make("SGD"), make("SGD", home=torch.optim)
    for params, opt in (ours, theirs):
        opt.param_groups[0]["momentum"] = 0.0
        train(params, opt, 2)
        opt.param_groups[0]["momentum"] = 0.9
        train(params, opt, 3, first=2)
    assert_close(ours, theirs)
