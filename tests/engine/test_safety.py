"""What must not happen to memory and progress when things change under an optimizer, or something fails midway."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
from fastopt.kernels.registry import RULES
from refusal import fingerprint

import fastopt
from fastopt import _backend
from fastopt._plan import Treatment


def test_a_flat_buffer_keeps_its_memory() -> None:
    buffer = fastopt.FlatBuffer({"w": (3,)})
    for name in ("data", "layout"):
        with pytest.raises(AttributeError):
            setattr(buffer, name, None)


def test_a_parameter_cannot_be_resized() -> None:
    w = np.ones(1000, np.float32)
    opt = fastopt.SGD([w], lr=0.5)
    with pytest.raises(ValueError, match="resize"):
        w.resize(4, refcheck=False)
    opt.step([np.ones(1000, np.float32)])
    assert (w == 0.5).all()


def test_a_parameter_whose_dtype_is_changed_in_place_is_updated_as_it_was_checked() -> None:
    w = np.ones(8, np.float32)
    opt = fastopt.SGD([w], lr=0.5, momentum=0.9)
    bits = w.view(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of NumPy may discourage it
        w.dtype = np.float16
    with pytest.raises(ValueError, match="shape"):
        opt.step([np.ones(8, np.float32)])
    assert (bits == 1).all()


@pytest.mark.parametrize("steps_before", [0, 3])
def test_gradients_live_as_long_as_the_step(steps_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opt = fastopt.SGD({"w": np.ones(10)}, lr=0.5)
    grads = {"w": np.ones(10)}
    for _ in range(steps_before):  # then they are recognised
        opt.step(grads)
    alive = weakref.ref(grads["w"])
    seen = []

    def update(table: Any, threads: int) -> None:
        grads.clear()  # as another thread might, while the kernel runs
        gc.collect()
        seen.append(alive() is not None)

    monkeypatch.setattr(_backend.current(), "update", update)
    opt.step(grads)
    assert seen == [True]
    gc.collect()
    assert alive() is None  # and no longer than that


def test_a_step_that_fails_is_not_taken_for_known_by_the_next() -> None:
    class Picky(fastopt.SGD):
        broken = False

        def treat(self, options: Any, parameter: Any) -> Treatment:
            if self.broken:
                raise ZeroDivisionError
            return super().treat(options, parameter)

    a, b, g = np.ones(4), np.ones(4), np.ones(4)
    opt = Picky([a, b], lr=0.5)
    opt.step([g, None])
    opt.broken = True
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            opt.step([None, g])
    assert a.tolist() == [0.5] * 4
    assert b.tolist() == [1.0] * 4


def test_an_interrupt_after_the_kernel_finds_the_step_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = fastopt.Adam([np.ones(4)])
    update = _backend.current().update

    def interrupted(table: Any, threads: int) -> None:
        update(table, threads)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_backend.current(), "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step([np.ones(4)])
    assert opt.state["0"]["step"] == 1
    assert opt.state["0"]["exp_avg"].tolist() == pytest.approx([0.1] * 4)


def test_options_that_cannot_be_completed_are_refused_before_anything_is_loaded() -> None:
    opt = fastopt.AdamW([np.ones(4)], fully_decoupled=True)
    opt.step([np.ones(4)])
    saved = opt.state_dict()
    group = saved["param_groups"][0]
    del group["initial_lr"]
    group["lr"] = 0.0
    before = fingerprint(opt)
    with pytest.raises(ValueError, match="initial lr"):
        opt.load_state_dict(saved)
    assert fingerprint(opt) == before


def test_a_state_dict_shares_no_option() -> None:
    betas = [0.9, 0.99]
    opt = fastopt.Adam([np.ones(4)], betas=betas)  # type: ignore[arg-type]
    saved = opt.state_dict()
    betas[0] = 0.5
    assert saved["param_groups"][0]["betas"] == [0.9, 0.99]


def test_a_rule_has_room_for_six_states() -> None:
    def step(p: Any, g: Any, *state: Any) -> Any:
        return (p, *state[:-1])

    scalars = RULES["sgd"].Scalars
    with pytest.raises(ValueError, match="at most 6 state arrays, got 7"):
        fastopt.Rule("wide", step, scalars, step, tuple("abcdefg"))
