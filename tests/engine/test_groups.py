"""Param groups: own options, groups that come later, options that change, and what an optimizer shows of itself."""

import copy
import pickle
from operator import delitem, setitem

import numpy as np
import pytest
from compare import assert_same_bits, snapshot
from refusal import CLASSES, fingerprint, gradients, refused, short, trained

import fastopt
from fastopt.engine.plan import MAX_STEP

F32 = np.float32


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(F32) for name, shape in {"w": (5, 7), "b": (7,), "s": ()}.items()}


def series(steps):
    return [arrays(seed) for seed in range(100, 100 + steps)]


def part(named, names):
    return {name: named[name] for name in names}


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=short)
def test_every_group_has_its_own_options(cls):
    together, alone = arrays(), arrays()
    options = {"w": {"lr": 0.1}, "b": {"lr": 0.02, "maximize": True}, "s": {}}
    opt = cls([{"params": part(together, name), **options[name]} for name in together], lr=0.5)
    others = {name: cls(part(alone, name), **{"lr": 0.5} | options[name]) for name in alone}
    for grads in series(4):
        opt.step(grads)
        for name, other in others.items():
            other.step(part(grads, name))
    want = {name: snapshot(part(alone, name), others[name])[name] for name in alone}
    assert_same_bits(snapshot(together, opt), want, "groups")


def test_a_group_added_in_training():
    params, alone, late = arrays(), arrays(), {"lr": 0.02, "betas": (0.5, 0.9)}
    flat = fastopt.FlatBuffer.from_arrays(part(params, "wb"))
    opt = fastopt.NAdam(flat, lr=0.1)
    first, second = fastopt.NAdam(part(alone, "wb"), lr=0.1), fastopt.NAdam(part(alone, "s"), **late)
    for t, grads in enumerate(series(5)):
        if t == 2:
            opt.add_param_group({"params": part(params, "s"), **late})
            assert [list(group["params"]) for group in opt.param_groups] == [["w", "b"], ["s"]]
            assert opt.state["s"]["step"] == 0
        first.step(part(grads, "wb"))
        if t >= 2:
            second.step(part(grads, "s"))
        opt.step(fastopt.FlatBuffer.from_arrays(grads if t >= 2 else part(grads, "wb")))
    want = snapshot(part(alone, "wb"), first) | snapshot(part(alone, "s"), second)
    assert_same_bits(snapshot(dict(flat) | part(params, "s"), opt), want, "added")
    assert {name: entry["step"] for name, entry in opt.state.items()} == {"w": 5, "b": 5, "s": 3}


def test_groups_of_views_of_one_flat_buffer():
    flat, alone = fastopt.FlatBuffer.from_arrays(arrays()), arrays()
    groups = [{"params": part(flat, "ws")}, {"params": part(flat, "b"), "weight_decay": 0.0}]
    opt = fastopt.AdamW(groups, lr=0.1, weight_decay=0.1)
    decays = {"ws": 0.1, "b": 0.0}
    others = {names: fastopt.AdamW(part(alone, names), lr=0.1, weight_decay=decays[names]) for names in decays}
    for grads in series(4):
        opt.step(fastopt.FlatBuffer.from_arrays(grads), max_norm=100.0, zero_grads=True)
        for names, other in others.items():
            other.step(part(grads, names))
    for name in flat:
        assert flat[name].tobytes() == alone[name].tobytes()
    assert np.count_nonzero(flat.data) == flat.size  # the padding is still zero


def test_groups_of_different_dtypes():
    w, v, u = np.ones(3), np.ones(3, F32), np.ones(3, np.float16)
    opt = fastopt.SGD([{"params": [w]}, {"params": [v, u], "lr": 0.25}], lr=0.5, momentum=0.5)
    for _ in range(2):
        opt.step([np.ones_like(p) for p in (w, v, u)])
    assert (w.tolist(), v.tolist(), u.tolist()) == ([-0.25] * 3, [0.375] * 3, [0.375] * 3)
    assert [opt.state[name]["momentum_buffer"].dtype for name in "012"] == [np.float64, F32, F32]


def test_names_of_sequences_count_over_all_groups():
    made = (np.full(n, float(n)) for n in (1, 2, 3))
    opt = fastopt.SGD({"params": list(part)} for part in ([next(made), next(made)], [next(made)]))
    opt.add_param_group({"params": (np.ones(n) for n in (4, 5))})
    assert [list(group["params"]) for group in opt.param_groups] == [["0", "1"], ["2"], ["3", "4"]]
    assert [opt.param_groups[g]["params"][n].size for g, n in ((0, "0"), (0, "1"), (1, "2"), (2, "4"))] == [1, 2, 3, 5]
    assert list(opt.state) == ["0", "1", "2", "3", "4"]


def test_parameters_are_the_users_own_arrays():
    params = arrays()
    group = fastopt.SGD(params).param_groups[0]["params"]
    assert all(group[name] is array for name, array in params.items())


# --- options that change ---------------------------------------------------------------------------------------------


def test_maximize_turned_between_steps():
    w, b = np.zeros(3), np.zeros(2)
    opt = fastopt.SGD([{"params": [w], "maximize": True}, {"params": [b]}], lr=1.0, momentum=0.5)
    grads = [np.ones(3), np.ones(2)]
    opt.step(grads)
    assert (w.tolist(), b.tolist()) == ([1.0] * 3, [-1.0] * 2)
    opt.param_groups[0]["maximize"], opt.param_groups[1]["maximize"] = False, True
    opt.step(grads, max_norm=100.0)  # the buffers are -1 and 1; half of that stays
    assert (w.tolist(), b.tolist()) == ([1.0 - (1 - 0.5)] * 3, [-1.0 - (-1 + 0.5)] * 2)


def test_momentum_switched_on_in_training():
    w = np.zeros(3)
    opt = fastopt.SGD([w], lr=1.0)
    opt.step([np.ones(3)])
    assert opt.state["0"] == {"step": 1}
    for momentum, buffer, weight in ((0.5, 1.0, -2.0), (0.5, 1.5, -3.5), (0.0, 1.5, -4.5)):
        opt.param_groups[0]["momentum"] = momentum
        opt.step([np.ones(3)])
        assert w.tolist() == [weight] * 3
        assert opt.state["0"]["momentum_buffer"].tolist() == [buffer] * 3
    assert opt.state["0"]["step"] == 4


def test_the_first_gradient_of_a_late_momentum_is_damped():
    opt = fastopt.SGD([np.zeros(3)], lr=1.0)
    opt.step([np.ones(3)])
    opt.param_groups[0].update(momentum=0.5, dampening=0.5)
    opt.step([np.ones(3)])  # torch would start the buffer undamped; SGD's docstring tells the difference
    assert opt.state["0"]["momentum_buffer"].tolist() == [0.5] * 3


STATES = [  # what an option makes, and how it is switched off
    (fastopt.SGD, {"momentum": 0.9}, {"momentum": 0.0}, "momentum_buffer"),
    (fastopt.RMSprop, {"momentum": 0.9}, {"momentum": 0.0}, "momentum_buffer"),
    (fastopt.RMSprop, {"centered": True}, {"centered": False}, "grad_avg"),
    (fastopt.Adam, {"amsgrad": True}, {"amsgrad": False}, "max_exp_avg_sq"),
    (fastopt.AdamW, {"amsgrad": True}, {"amsgrad": False}, "max_exp_avg_sq"),
]
every_state = pytest.mark.parametrize(("cls", "on", "off", "state"), STATES, ids=short)


@every_state
def test_states_appear_when_an_option_asks_for_them(cls, on, off, state):
    opt = trained(cls)
    kept = {name: array.copy() for name, array in opt.state["w"].items() if name != "step"}
    opt.param_groups[0].update(on)
    assert state not in opt.state["w"]
    opt.step(gradients(), skip_nonfinite=True)
    assert opt.state["w"][state].any()
    assert opt.state["w"][state].shape == (3, 2)
    assert all((opt.state["w"][name] != array).any() for name, array in kept.items())


def copy_parameters(source, target):
    for name, array in target.param_groups[0]["params"].items():
        array[...] = source.param_groups[0]["params"][name]


@every_state
def test_a_state_that_is_no_longer_used_can_be_saved_and_loaded(cls, on, off, state):
    opt, fresh = trained(cls, **on), trained(cls)
    opt.param_groups[0].update(off)
    opt.step(gradients())
    copy_parameters(opt, fresh)
    fresh.load_state_dict(opt.state_dict())
    for options in ({}, on):  # and taken up again
        for each in (opt, fresh):
            each.param_groups[0].update(options)
            each.step(gradients())
        assert fingerprint(fresh) == fingerprint(opt)


def test_loading_forgets_states_that_were_not_saved():
    plain, other = trained(fastopt.SGD), trained(fastopt.SGD, momentum=0.9)
    copy_parameters(plain, other)
    other.load_state_dict(plain.state_dict())
    for opt in (plain, other):
        opt.param_groups[0]["momentum"] = 0.9
        opt.step(gradients())
    assert fingerprint(other) == fingerprint(plain)


def test_amsgrad_switched_on_in_a_state_dict_begins_its_maximum_there():
    here, there = trained(fastopt.Adam), trained(fastopt.Adam)
    saved = here.state_dict()
    saved["param_groups"][0]["amsgrad"] = True
    there.load_state_dict(saved)
    assert not there.state["w"]["max_exp_avg_sq"].any()
    here.step(gradients())
    there.step(gradients())  # v grew, so it is the maximum
    assert (there.state["w"]["max_exp_avg_sq"] == here.state["w"]["exp_avg_sq"]).all()
    for name in ("exp_avg", "exp_avg_sq"):
        del saved["state"][1][name]
        with pytest.raises(ValueError, match="parameter 'b' has the states"):
            there.load_state_dict(saved)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_states_in_full_and_from_the_beginning(cls):
    opt, other = trained(cls), trained(cls)
    for _ in range(2):
        opt.init_state()
        opt.refresh()
    opt.step(gradients())
    other.step(gradients())
    assert fingerprint(opt) == fingerprint(other)
    full, saved = opt.full_state_dict(), opt.state_dict()
    assert full.keys() == {"state", "param_groups"}
    assert full["param_groups"] == saved["param_groups"]
    for place, entry in saved["state"].items():
        assert all(np.array_equal(full["state"][place][name], value) for name, value in entry.items())
        assert all(array.dtype == F32 for array in full["state"][place].values() if isinstance(array, np.ndarray))


@pytest.mark.parametrize("take", [pickle.dumps, copy.copy, copy.deepcopy], ids=short)
def test_an_optimizer_cannot_be_copied(take):
    with pytest.raises(TypeError, match=r"AdamW cannot be pickled or copied.*state_dict"):
        take(trained())


def test_steps_are_counted_to_2_53_and_no_further():
    opt = trained(fastopt.Adam)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry["step"] = MAX_STEP - 1
    opt.load_state_dict(saved)
    opt.step(gradients())
    with refused(OverflowError, "2^53", opt=opt):
        opt.step(gradients())
    opt.load_state_dict(opt.state_dict())


def test_fully_decoupled_switched_on_in_training():
    w = np.ones(3)
    opt = fastopt.AdamW([w], lr=0.5, weight_decay=0.5)
    # Relative to the first lr, which is still in force in the second step: the factor is 1 - 0.5.
    for change, weight in (({}, 0.75), ({"fully_decoupled": True}, 0.375), ({"lr": 0.25}, 0.375 * 0.75)):
        opt.param_groups[0].update(change)
        opt.step([np.zeros(3)])
        assert w.tolist() == [weight] * 3


def test_two_groups_change_at_once_and_one_is_wrong():
    opt = fastopt.SGD([{"params": [np.ones(3)]}, {"params": [np.ones(3)]}])
    opt.param_groups[0]["momentum"], opt.param_groups[1]["lr"] = 0.9, -1.0
    with pytest.raises(ValueError, match=r"^SGD: group 1: lr must be in \[0, inf\), got -1.0"):
        opt.step([np.ones(3), np.ones(3)])
    assert opt.state == {"0": {"step": 0}, "1": {"step": 0}}
    opt.param_groups[1]["lr"] = 0.1
    opt.step([np.ones(3), np.ones(3)])
    assert [sorted(entry) for entry in opt.state.values()] == [["momentum_buffer", "step"], ["step"]]


def test_a_change_of_a_number_is_not_asked_of_every_parameter(monkeypatch):
    opt = trained()
    monkeypatch.setattr(opt, "choose", None)
    opt.param_groups[0]["lr"] = 0.5
    opt.step(gradients())


def test_options_that_trade_places_are_seen():
    w = np.zeros(1)
    opt = fastopt.SGD([w], lr=1.0, maximize=True)
    opt.step([np.ones(1)])
    group = opt.param_groups[0]
    del group["maximize"], group["lr_in_momentum"]
    group["lr_in_momentum"], group["maximize"] = True, False  # the same values, in another order
    opt.step([np.ones(1)])
    assert w.tolist() == [0.0]


# --- state -----------------------------------------------------------------------------------------------------------


def test_states_are_views():
    opt = trained(fastopt.Adam)
    moment = opt.state["w"]["exp_avg"]
    before = moment.copy()
    opt.step(gradients())
    assert (moment != before).all()
    moment[...] = 0.0
    assert not opt.state["w"]["exp_avg"].any()
    assert set(opt.state["w"]) == {"step", "exp_avg", "exp_avg_sq"}
    before = fingerprint(opt)
    changes = [("", setattr, opt, "state", {})]
    for shown in (opt.state, opt.state["w"]):
        changes += [(n, *change) for n in shown for change in ((setitem, shown, n, 7), (delitem, shown, n))]
        changes += [("", shown.clear), ("", shown.popitem), ("", shown.update, {"exp_avg": 7})]
    for name, change, *arguments in changes:
        with pytest.raises(TypeError, match=rf"Adam.state.*{name}.*load_state_dict"):
            change(*arguments)
    assert fingerprint(opt) == before


def test_state_dict_of_several_groups():
    w, b, s = np.ones((2, 3), F32), np.ones(3, F32), np.ones((), F32)
    opt = fastopt.ASGD([{"params": {"w": w}, "lr": 0.5}, {"params": {"b": b, "s": s}}])
    opt.step([np.ones_like(w), None, np.ones_like(s)])
    fresh = fastopt.ASGD([{"params": {n: p.copy() for n, p in g["params"].items()}} for g in opt.param_groups])
    saved = opt.state_dict()
    assert (saved["version"], saved["optimizer"]) == (1, "ASGD")
    groups = [(g["params"], g["param_names"], g["lr"]) for g in saved["param_groups"]]
    assert groups == [([0], ["w"], 0.5), ([1, 2], ["b", "s"], 0.01)]
    assert [saved["state"][i]["step"] for i in range(3)] == [1, 0, 1]
    assert saved["state"][0]["ax"].shape == (2, 3)
    assert type(saved["state"][0]["eta"]) is float
    fresh.load_state_dict(saved)
    for each in (opt, fresh):
        each.step([np.ones_like(w), np.ones_like(b), None])
    assert fingerprint(fresh) == fingerprint(opt)


def test_repr_shows_groups_and_options():
    opt = fastopt.Lion([{"params": [np.ones(2)]}, {"params": [np.ones(3), np.ones(4)], "lr": 0.5}])
    rest = "weight_decay=0.0, maximize=False, capturable=False, ema_decay=None, ema_warmup=False"
    assert repr(opt) == (
        "Lion (\n"
        "  max_grad_norm=None, skip_nonfinite=False, zero_grads=False\n"
        f"  group 0: 1 array, lr=0.0001, betas=(0.9, 0.99), {rest}\n"
        f"  group 1: 2 arrays, lr=0.5, betas=(0.9, 0.99), {rest}\n"
        ")"
    )
