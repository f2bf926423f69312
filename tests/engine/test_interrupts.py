"""Ctrl-C at any moment: no optimizer stays locked, and parameters, states and counts agree."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from fresh import program

import fastopt

STORM = Path(__file__).parents[1] / "support" / "storm.py"


@pytest.mark.parametrize("interrupts", [150, pytest.param(400, marks=pytest.mark.full)])
@pytest.mark.parametrize("front_end", ["numpy", "torch"])
def test_a_storm_of_interrupts_leaves_nothing_locked_or_torn(front_end, interrupts):
    if front_end == "torch":
        pytest.importorskip("torch")
    done = program(STORM, front_end, interrupts, interrupts, OMP_NUM_THREADS="2", timeout=None)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert sum(report["interrupts"].values()) == interrupts
    assert (report["locked"], report["torn"]) == ([], [])


def test_a_signal_handler_in_the_middle_of_a_step_is_refused(monkeypatch):
    w, refused = np.zeros(3), []
    opt, select_rule = fastopt.SGD([w], lr=1.0), fastopt.SGD.select_rule

    def save(*_):
        with pytest.raises(RuntimeError) as caught:
            opt.state_dict()
        refused.append(str(caught.value))

    monkeypatch.setattr(
        fastopt.SGD, "select_rule", lambda *args: (signal.raise_signal(signal.SIGALRM), select_rule(*args))[1]
    )
    before = signal.signal(signal.SIGALRM, save)
    try:
        opt.step([np.ones(3)])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert refused == ["SGD.state_dict: another thread is using this optimizer."]
    assert opt.state_dict()["state"][0]["step"] == 1
    assert w.tolist() == [-1.0] * 3


def test_what_ends_a_call_before_it_began_is_what_is_raised():
    opt = fastopt.SGD([np.ones(3)])
    opt._users = type("Users", (list,), {"append": lambda *_: signal.raise_signal(signal.SIGINT)})()
    with pytest.raises(KeyboardInterrupt):
        opt.state_dict()


def test_weight_norms_are_kept_only_of_a_step_that_came_back(monkeypatch):
    def steps(interrupted):
        w = np.full((40, 40), 2.0, np.float32)
        opt = fastopt.LARS([w], lr=0.1, keep_weight_norms=True)
        opt.step([np.ones_like(w)])
        if interrupted:
            w *= 100  # by whoever caught the interrupt, before the kernels ran
            with monkeypatch.context() as patch:
                patch.setattr(opt._plan.backend, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
                with pytest.raises(KeyboardInterrupt):
                    opt.step([np.ones_like(w)])
        else:
            w *= 100
            opt.weights_written()
        opt.step([np.ones_like(w)])
        return w.tobytes()

    assert steps(True) == steps(False)
