"""What must not happen to memory and progress when things change under an optimizer, or something fails midway."""

import gc
import weakref
from unittest.mock import Mock

import numpy as np
import pytest
from fastopt.kernels.registry import RULES
from refusal import refused

import fastopt
from fastopt import watch
from fastopt.engine import backend as _backend
from fastopt.engine.device import HOST


@pytest.mark.parametrize("name", ["data", "layout", "weights"])
def test_no_attribute_of_a_flat_buffer_can_be_set(name):
    with pytest.raises(AttributeError):
        setattr(fastopt.FlatBuffer({"w": (3,)}), name, None)


def test_a_parameter_cannot_be_resized():
    w = np.ones(1000, np.float32)
    opt = fastopt.SGD([w], lr=0.5)
    with pytest.raises(ValueError, match="resize"):
        w.resize(4, refcheck=False)
    g = np.ones(1000, np.float32)
    _ = [opt.step([g]) for _ in range(3)]
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(10,\)|resize"):
        _ = g.resize(10, refcheck=False), opt.step([g])  # refused by NumPy where only Python looks at arrays
    assert (w == -0.5).all()


CHANGES = {
    "read-only": lambda a: a.setflags(write=False),
    "dtype": lambda a: setattr(a, "dtype", np.int32),
    "shape": lambda a: setattr(a, "shape", (8, 8)),
    "memory": lambda a: a.__setstate__((1, a.shape, a.dtype, False, bytes(a.nbytes))),
}


@pytest.fixture(params=[True, False], ids=["library", "python"])
def watched(request, monkeypatch):
    """Arrays are looked at by the compiled library, or without it."""
    if not request.param:
        monkeypatch.setattr(watch, "_library", lambda: None)
    elif watch._library() is None:
        pytest.skip("built without the library")


@pytest.mark.usefixtures("watched")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter_that_was_changed_in_place_is_refused(change, steps_before):
    memory, other = np.ones(65, np.float32), np.ones(3)
    w = memory[1:]
    grads = {"o": np.ones(3), "w": np.ones(64, np.float32)}
    opt = fastopt.SGD({"o": other, "w": w}, lr=0.5, momentum=0.9)
    for _ in range(steps_before):
        opt.step(grads)
    CHANGES[change](w)
    opt.param_groups[0]["lr"] = 0.25
    before = memory.tolist(), other.tolist()
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"^SGD.step: parameter 'w' (is|was)"):
            opt.step(grads)
    assert (memory.tolist(), other.tolist()) == before
    assert {entry["step"] for entry in opt.state.values()} == {steps_before}
    if change == "read-only":
        w.flags.writeable = True
        opt.step(grads)


@pytest.mark.usefixtures("watched")
def test_of_a_flat_buffer_the_whole_is_written_and_looked_at():
    params = fastopt.FlatBuffer({"w": (4,), "b": (3,)})
    grads, opt = params.zeros_like(), fastopt.SGD(params, lr=0.5)
    for _ in range(4):
        params["w"].flags.writeable = False  # which does not make its base so, to NumPy either
        opt.step(grads)
    params.data.flags.writeable = False
    with pytest.raises(ValueError, match=r"^SGD.step: parameter 'FlatBuffer.data' is read-only"):
        opt.step(grads)


@pytest.mark.usefixtures("watched")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("change", ["dtype", "shape", "memory"])
def test_gradients_that_were_changed_in_place_are_looked_at_again(change, flat):
    params = fastopt.FlatBuffer({"w": (64,)})
    grads = params.zeros_like()
    grads.data[:] = 1.0
    opt = fastopt.SGD(params, lr=0.5)
    for _ in range(3):
        opt.step(grads if flat else [grads.data])
    given = grads.data
    CHANGES[change](given)
    if change == "memory":
        opt.step(grads if flat else [given])
    elif not flat:  # of a flat buffer memory and dtype count
        with pytest.raises((TypeError, ValueError), match=r"^SGD.step: grads\['w'\] (is|has)"):
            opt.step([given])
    assert (params.data == -1.5).all()  # other memory is all zeros


def test_gradients_that_stay_are_checked_twice_and_then_known(monkeypatch):
    plain = Mock(side_effect=HOST.plain)
    monkeypatch.setattr(type(HOST), "plain", plain)
    opt, grads = fastopt.SGD([np.ones(4), np.ones(4)], lr=0.5), [np.ones(4), None]
    for _ in range(6):
        opt.step(grads)
    assert plain.call_count == 2
    opt.step([np.ones(4), None])
    assert plain.call_count == 3


@pytest.mark.parametrize("steps_before", [0, 3])
def test_gradients_live_as_long_as_the_step(steps_before, monkeypatch):
    opt, grads, seen = fastopt.SGD({"w": np.ones(10)}, lr=0.5), {"w": np.ones(10)}, []
    for _ in range(steps_before):  # then they are recognised
        opt.step(grads)
    alive = weakref.ref(grads["w"])

    def run(*_):
        grads.clear()  # as another thread might, while the kernel runs
        gc.collect()
        seen.append(alive() is not None)

    monkeypatch.setattr(_backend.current(), "run", run)
    opt.step(grads)
    assert seen == [True]
    gc.collect()
    assert alive() is None  # and no longer than that


def test_a_step_that_fails_is_not_taken_for_known_by_the_next(monkeypatch):
    a, b, g = np.ones(4), np.ones(4), np.ones(4)
    opt = fastopt.SGD([a, b], lr=0.5)
    opt.step([g, None])
    monkeypatch.setattr(fastopt.SGD, "choose", Mock(side_effect=ZeroDivisionError))
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            opt.step([None, g])
    assert (a.tolist(), b.tolist()) == ([0.5] * 4, [1.0] * 4)


def test_an_interrupt_after_the_kernel_finds_the_step_counted(monkeypatch):
    opt, run = fastopt.Adam([np.ones(4)]), _backend.current().run

    def interrupted(*arguments):
        run(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_backend.current(), "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step([np.ones(4)])
    assert opt.state["0"]["step"] == 1
    assert opt.state["0"]["exp_avg"].tolist() == pytest.approx([0.1] * 4)


def test_options_that_cannot_be_completed_are_refused_before_anything_is_loaded():
    opt = fastopt.AdamW([np.ones(4)], fully_decoupled=True)
    opt.step([np.ones(4)])
    saved = opt.state_dict()
    del saved["param_groups"][0]["initial_lr"]
    saved["param_groups"][0]["lr"] = 0.0
    with refused(ValueError, "initial lr", opt=opt):
        opt.load_state_dict(saved)


def test_a_state_dict_shares_no_option():
    betas = [0.9, 0.99]
    opt = fastopt.Adam([np.ones(4)], betas=betas)
    saved = opt.state_dict()
    betas[0] = 0.5
    assert saved["param_groups"][0]["betas"] == [0.9, 0.99]


def test_a_rule_has_room_for_six_states():
    with pytest.raises(ValueError, match="at most 6 state arrays, got 7"):
        fastopt.Rule("wide", lambda p, g, *state: (p, *state[:-1]), RULES["sgd"].Scalars, len, tuple("abcdefg"))
