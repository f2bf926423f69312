"""Param groups: own options, groups that come later, options that change, and what an optimizer shows of itself."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from compare import assert_same_bits, snapshot
from refusal import CLASSES, fingerprint, gradients, refused, short, trained

import fastopt
from fastopt.engine.plan import MAX_STEP

F32 = np.float32


def arrays(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(F32) for name, shape in {"w": (5, 7), "b": (7,), "s": ()}.items()}


def series(steps: int) -> list[dict[str, Any]]:
    return [arrays(seed) for seed in range(100, 100 + steps)]


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_group_has_its_own_options(cls: Any) -> None:
    together, alone = arrays(), arrays()
    options: dict[str, dict[str, Any]] = {"w": {"lr": 0.1}, "b": {"lr": 0.02, "maximize": True}, "s": {}}
    opt = cls([{"params": {name: together[name]}, **options[name]} for name in together], lr=0.5)
    others = {name: cls({name: alone[name]}, **{"lr": 0.5} | options[name]) for name in alone}
    for grads in series(4):
        opt.step(grads)
        for name, other in others.items():
            other.step({name: grads[name]})
    want = {name: snapshot({name: alone[name]}, others[name])[name] for name in alone}
    assert_same_bits(snapshot(together, opt), want, "groups")


def test_a_group_added_in_training() -> None:
    params, alone = arrays(), arrays()
    flat = fastopt.FlatBuffer.from_arrays({name: params[name] for name in ("w", "b")})
    opt = fastopt.NAdam(flat, lr=0.1)
    first = fastopt.NAdam({name: alone[name] for name in ("w", "b")}, lr=0.1)
    second = fastopt.NAdam({"s": alone["s"]}, lr=0.02, betas=(0.5, 0.9))
    for t, grads in enumerate(series(5)):
        if t == 2:
            opt.add_param_group({"params": {"s": params["s"]}, "lr": 0.02, "betas": (0.5, 0.9)})
            assert [list(group["params"]) for group in opt.param_groups] == [["w", "b"], ["s"]]
            assert opt.state["s"]["step"] == 0
        late = grads.pop("s")
        first.step(grads)
        if t >= 2:
            second.step([late])
            grads["s"] = late
        opt.step(fastopt.FlatBuffer.from_arrays(grads))
    want = snapshot({name: alone[name] for name in ("w", "b")}, first) | snapshot({"s": alone["s"]}, second)
    assert_same_bits(snapshot(dict(flat) | {"s": params["s"]}, opt), want, "added")
    assert {name: entry["step"] for name, entry in opt.state.items()} == {"w": 5, "b": 5, "s": 3}


def test_groups_of_views_of_one_flat_buffer() -> None:
    flat, alone = fastopt.FlatBuffer.from_arrays(arrays()), arrays()
    groups = [{"params": {"w": flat["w"], "s": flat["s"]}}, {"params": {"b": flat["b"]}, "weight_decay": 0.0}]
    opt = fastopt.AdamW(groups, lr=0.1, weight_decay=0.1)
    decayed = fastopt.AdamW({name: alone[name] for name in ("w", "s")}, lr=0.1, weight_decay=0.1)
    plain = fastopt.AdamW({"b": alone["b"]}, lr=0.1, weight_decay=0.0)
    for grads in series(4):
        opt.step(fastopt.FlatBuffer.from_arrays(grads), max_norm=100.0, zero_grads=True)
        decayed.step({name: grads[name] for name in ("w", "s")})
        plain.step({"b": grads["b"]})
    for name in flat:
        assert flat[name].tobytes() == alone[name].tobytes()
    assert np.count_nonzero(flat.data) == flat.size  # the padding is still zero


def test_groups_of_different_dtypes() -> None:
    w, v, u = np.ones(3), np.ones(3, F32), np.ones(3, np.float16)
    opt = fastopt.SGD([{"params": [w]}, {"params": [v, u], "lr": 0.25}], lr=0.5, momentum=0.5)
    for _ in range(2):
        opt.step([np.ones_like(p) for p in (w, v, u)])
    assert (w.tolist(), v.tolist(), u.tolist()) == ([-0.25] * 3, [0.375] * 3, [0.375] * 3)
    assert [opt.state[name]["momentum_buffer"].dtype for name in "012"] == [np.float64, F32, F32]


def test_names_of_sequences_count_over_all_groups() -> None:
    made = (np.full(n, float(n)) for n in (1, 2, 3))
    opt = fastopt.SGD({"params": list(part)} for part in ([next(made), next(made)], [next(made)]))
    opt.add_param_group({"params": (np.ones(n) for n in (4, 5))})
    assert [list(group["params"]) for group in opt.param_groups] == [["0", "1"], ["2"], ["3", "4"]]
    assert [opt.param_groups[g]["params"][n].size for g, n in ((0, "0"), (0, "1"), (1, "2"), (2, "4"))] == [1, 2, 3, 5]
    assert list(opt.state) == ["0", "1", "2", "3", "4"]


def test_parameters_are_the_users_own_arrays() -> None:
    params = arrays()
    opt = fastopt.SGD(params)
    assert all(opt.param_groups[0]["params"][name] is array for name, array in params.items())
    opt.param_groups[0]["params"]["w"][...] = 7.0
    assert (params["w"] == 7).all()


# --- options that change ---------------------------------------------------------------------------------------------


def test_maximize_turned_between_steps() -> None:
    w, b = np.zeros(3), np.zeros(2)
    opt = fastopt.SGD([{"params": [w], "maximize": True}, {"params": [b]}], lr=1.0, momentum=0.5)
    grads = [np.ones(3), np.ones(2)]
    opt.step(grads)
    assert (w.tolist(), b.tolist()) == ([1.0] * 3, [-1.0] * 2)
    opt.param_groups[0]["maximize"], opt.param_groups[1]["maximize"] = False, True
    opt.step(grads, max_norm=100.0)  # the buffers are -1 and 1; half of that stays
    assert (w.tolist(), b.tolist()) == ([1.0 - (1 - 0.5)] * 3, [-1.0 - (-1 + 0.5)] * 2)


def test_momentum_switched_on_in_training() -> None:
    w = np.zeros(3)
    opt = fastopt.SGD([w], lr=1.0)
    opt.step([np.ones(3)])
    assert opt.state["0"] == {"step": 1}
    opt.param_groups[0]["momentum"] = 0.5
    opt.step([np.ones(3)])
    assert opt.state["0"]["momentum_buffer"].tolist() == [1.0] * 3
    opt.step([np.ones(3)])
    assert opt.state["0"]["momentum_buffer"].tolist() == [1.5] * 3
    assert w.tolist() == [-3.5] * 3
    opt.param_groups[0]["momentum"] = 0.0
    opt.step([np.ones(3)])
    assert w.tolist() == [-4.5] * 3
    assert opt.state["0"]["step"] == 4


def test_the_first_gradient_of_a_late_momentum_is_damped() -> None:
    w = np.zeros(3)
    opt = fastopt.SGD([w], lr=1.0)
    opt.step([np.ones(3)])
    opt.param_groups[0].update(momentum=0.5, dampening=0.5)
    opt.step([np.ones(3)])  # torch would start the buffer undamped; SGD's docstring tells the difference
    assert opt.state["0"]["momentum_buffer"].tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("cls", "option", "state"),
    [
        (fastopt.RMSprop, {"momentum": 0.9}, "momentum_buffer"),
        (fastopt.RMSprop, {"centered": True}, "grad_avg"),
        (fastopt.Adam, {"amsgrad": True}, "max_exp_avg_sq"),
        (fastopt.AdamW, {"amsgrad": True}, "max_exp_avg_sq"),
    ],
    ids=short,
)
def test_states_appear_when_an_option_asks_for_them(cls: Any, option: dict[str, Any], state: str) -> None:
    opt = trained(cls)
    kept = {name: array.copy() for name, array in opt.state["w"].items() if name != "step"}
    opt.param_groups[0].update(option)
    assert state not in opt.state["w"]
    opt.step(gradients(), skip_nonfinite=True)
    assert opt.state["w"][state].any()
    assert opt.state["w"][state].shape == (3, 2)
    assert all((opt.state["w"][name] != array).any() for name, array in kept.items())


@pytest.mark.parametrize(
    ("cls", "on", "off"),
    [
        (fastopt.SGD, {"momentum": 0.9}, {"momentum": 0.0}),
        (fastopt.RMSprop, {"centered": True}, {"centered": False}),
        (fastopt.Adam, {"amsgrad": True}, {"amsgrad": False}),
    ],
    ids=short,
)
def test_a_state_that_is_no_longer_used_can_be_saved_and_loaded(cls: Any, on: Any, off: Any) -> None:
    opt = trained(cls, **on)
    opt.param_groups[0].update(off)
    opt.step(gradients())
    fresh = trained(cls)
    for name, array in fresh.param_groups[0]["params"].items():
        array[...] = opt.param_groups[0]["params"][name]
    fresh.load_state_dict(opt.state_dict())
    for options in ({}, on):  # and taken up again
        for each in (opt, fresh):
            each.param_groups[0].update(options)
            each.step(gradients())
        assert fingerprint(fresh) == fingerprint(opt)


def test_loading_forgets_states_that_were_not_saved() -> None:
    plain, other = trained(fastopt.SGD), trained(fastopt.SGD, momentum=0.9)
    for name, array in other.param_groups[0]["params"].items():
        array[...] = plain.param_groups[0]["params"][name]
    other.load_state_dict(plain.state_dict())
    for opt in (plain, other):
        opt.param_groups[0]["momentum"] = 0.9
        opt.step(gradients())
    assert fingerprint(other) == fingerprint(plain)


def test_amsgrad_switched_on_in_a_state_dict_begins_its_maximum_there() -> None:
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
def test_states_in_full_and_from_the_beginning(cls: Any) -> None:
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
def test_an_optimizer_cannot_be_copied(take: Any) -> None:
    with pytest.raises(TypeError, match=r"AdamW cannot be pickled or copied.*state_dict"):
        take(trained())


def test_steps_are_counted_to_2_53_and_no_further() -> None:
    opt = trained(fastopt.Adam)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry["step"] = MAX_STEP - 1
    opt.load_state_dict(saved)
    opt.step(gradients())
    with refused(OverflowError, "2^53", opt=opt):
        opt.step(gradients())
    opt.load_state_dict(opt.state_dict())


def test_fully_decoupled_switched_on_in_training() -> None:
    w = np.ones(3)
    opt = fastopt.AdamW([w], lr=0.5, weight_decay=0.5)
    opt.step([np.zeros(3)])
    assert w.tolist() == [0.75] * 3
    opt.param_groups[0]["fully_decoupled"] = True
    opt.step([np.zeros(3)])  # relative to the first lr, which is still in force: the factor is 1 - 0.5
    assert w.tolist() == [0.375] * 3
    opt.param_groups[0]["lr"] = 0.25
    opt.step([np.zeros(3)])
    assert w.tolist() == [0.375 * 0.75] * 3


def test_two_groups_change_at_once_and_one_is_wrong() -> None:
    opt = fastopt.SGD([{"params": [np.ones(3)]}, {"params": [np.ones(3)]}])
    opt.param_groups[0]["momentum"], opt.param_groups[1]["lr"] = 0.9, -1.0
    with pytest.raises(ValueError, match=r"^SGD: group 1: lr must be in \[0, inf\), got -1.0"):
        opt.step([np.ones(3), np.ones(3)])
    assert opt.state == {"0": {"step": 0}, "1": {"step": 0}}
    opt.param_groups[1]["lr"] = 0.1
    opt.step([np.ones(3), np.ones(3)])
    assert [sorted(entry) for entry in opt.state.values()] == [["momentum_buffer", "step"], ["step"]]


def test_options_that_trade_places_are_seen() -> None:
    w = np.zeros(1)
    opt = fastopt.SGD([w], lr=1.0, maximize=True)
    opt.step([np.ones(1)])
    group = opt.param_groups[0]
    del group["maximize"], group["lr_in_momentum"]
    group["lr_in_momentum"], group["maximize"] = True, False  # the same values, in another order
    opt.step([np.ones(1)])
    assert w.tolist() == [0.0]


# --- state -----------------------------------------------------------------------------------------------------------


def test_states_are_views() -> None:
    opt = trained(fastopt.Adam)
    moment = opt.state["w"]["exp_avg"]
    before = moment.copy()
    opt.step(gradients())
    assert (moment != before).all()
    moment[...] = 0.0
    assert not opt.state["w"]["exp_avg"].any()
    assert set(opt.state["w"]) == {"step", "exp_avg", "exp_avg_sq"}
    before = fingerprint(opt)
    for changed in (opt.state, opt.state["w"]):
        for name in list(changed):
            with pytest.raises(TypeError, match=rf"Adam.state.*{name}.*load_state_dict"):
                changed[name] = 7  # type: ignore[index]
            with pytest.raises(TypeError, match=rf"Adam.state.*{name}.*load_state_dict"):
                del changed[name]  # type: ignore[attr-defined]
        for change in (changed.clear, changed.popitem, lambda c=changed: c.update(exp_avg=7)):  # type: ignore[attr-defined]
            with pytest.raises(TypeError, match=r"Adam.state.*load_state_dict"):
                change()
    with pytest.raises(TypeError, match=r"Adam.state.*load_state_dict"):
        opt.state = {}
    assert fingerprint(opt) == before


def test_state_dict_of_several_groups() -> None:
    groups = [
        {"params": {"w": np.ones((2, 3), F32)}, "lr": 0.5},
        {"params": {"b": np.ones(3, F32), "s": np.ones((), F32)}},
    ]
    opt = fastopt.ASGD(groups)
    opt.step([np.ones((2, 3), F32), None, np.ones((), F32)])
    saved = opt.state_dict()
    assert (saved["version"], saved["optimizer"]) == (1, "ASGD")
    assert [(g["params"], g["param_names"], g["lr"]) for g in saved["param_groups"]] == [
        ([0], ["w"], 0.5),
        ([1, 2], ["b", "s"], 0.01),
    ]
    assert [saved["state"][i]["step"] for i in range(3)] == [1, 0, 1]
    assert saved["state"][0]["ax"].shape == (2, 3)
    assert type(saved["state"][0]["eta"]) is float
    fresh = fastopt.ASGD([{"params": {n: p.copy() for n, p in g["params"].items()}} for g in opt.param_groups])
    fresh.load_state_dict(saved)
    for each in (opt, fresh):
        each.step([np.ones((2, 3), F32), np.ones(3, F32), None])
    assert fingerprint(fresh) == fingerprint(opt)


def test_repr_shows_groups_and_options() -> None:
    opt = fastopt.Lion([{"params": [np.ones(2)]}, {"params": [np.ones(3), np.ones(4)], "lr": 0.5}])
    rest = "weight_decay=0.0, maximize=False, capturable=False, ema_decay=None, ema_warmup=False"
    assert repr(opt) == (
        "Lion (\n"
        "  max_grad_norm=None, skip_nonfinite=False, zero_grads=False\n"
        f"  group 0: 1 array, lr=0.0001, betas=(0.9, 0.99), {rest}\n"
        f"  group 1: 2 arrays, lr=0.5, betas=(0.9, 0.99), {rest}\n"
        ")"
    )
