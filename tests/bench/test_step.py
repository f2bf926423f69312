"""``python -m bench step`` and ``list``: answers are checked before times are taken; what cannot be done is said."""

import os
import signal
from unittest.mock import Mock

import pytest

pytest.importorskip("rich")
pytest.importorskip("altair")
pytest.importorskip("psutil")

from rich.console import Console

from bench import machine, measure, step, worker
from bench.__main__ import main
from bench.case import Bar, Case
from bench.contenders import CONTENDERS
from bench.contenders.fastopt_core import Fastopt
from bench.measure import Effort, Measurement
from bench.page import words
from bench.results import Record, Result, Timing
from bench.suite import FAMILIES, QUICK, SUITE

pytestmark = pytest.mark.full
SMALL = Case(
    "small", "Adam", {"lr": 1e-3}, {"w": (5, 7), "b": (3,)}, ("fastopt", "fastopt arrays", "fastopt moving", "numpy"),
    bars=(Bar("fastopt", 1e9), Bar("fastopt", 1e-9, "numpy"), Bar("torch fused", 1.0)),
)  # fmt: skip
FEW = Effort(rounds=3, fixed=True)


def adam(size, *contenders, **more):
    return Case(f"adam-{size}", "Adam", {"lr": 1e-3}, {"w": (size,)}, contenders, **more)


class WrongBetas(Fastopt):
    """Adam with another beta2: right in the first step, a little wrong in the next."""

    def hyper(self, case):
        return {**case.hyper, "betas": (0.9, 0.998)}


@pytest.fixture
def suite(monkeypatch):
    monkeypatch.setattr(step, "SUITE", {"small": SMALL})


@pytest.mark.usefixtures("suite")
def test_a_case_is_checked_timed_and_written(tmp_path, capsys):
    file = tmp_path / "out.json"
    assert main(["step", "small", "--rounds", "3", "--threads", "1", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "reached: fastopt ≤ 1e+09 µs" in shown
    assert "MISSED: fastopt ≤ 1e-09 × numpy" in shown
    assert "not measured: torch fused" in shown
    result = Record.read(file)["small"]
    assert set(result.timings) == set(SMALL.contenders)
    assert all(len(t.samples) == 3 and min(t.samples) > 0 for t in result.timings.values())
    assert [verdict.reached for verdict in result.verdicts] == [True, False, None]
    assert result.bytes == 38 * 28
    assert result.threads == 1


def checked(kind, case):
    if kind.package:
        pytest.importorskip(kind.package)
    params, grads = worker.data(case)
    expected = worker.expectation(case, params, grads)
    worker.check(kind(case, params, grads, 1), case, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["fastopt", "numpy", "torch fused", "torch loop", "torch foreach", "fastopt.torch"])
def test_answers_are_right_in_every_dtype(name, dtype):
    kind = CONTENDERS[name]
    case = Case("x", "Adam", {"lr": 1e-3, "weight_decay": 0.1}, {"w": (40, 50), "b": (3,)}, (), dtype)
    if kind.refusal(case):
        pytest.skip(str(kind.refusal(case)))
    checked(kind, case)


@pytest.mark.parametrize(
    ("optimizer", "hyper"),
    [
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}), ("SGD", {"lr": 0.1}), ("Adagrad", {"lr": 0.1}),
        ("Adam", {"lr": 0.01, "betas": (0.8, 0.9)}), ("LAMB", {"lr": 0.1, "weight_decay": 0.1}),
        ("Adam", {"lr": 0.01, "weight_decay": 0.1}), ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("Lion", {"lr": 0.01, "weight_decay": 0.1}), ("LARS", {"lr": 0.1, "weight_decay": 0.1}),
        *((n, {"lr": 0.01}) for n in ("RMSprop", "AdamW", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")),
    ],
)  # fmt: skip
def test_eager_numpy_has_every_optimizer(optimizer, hyper):
    assert optimizer in CONTENDERS["numpy"].optimizers
    checked(CONTENDERS["numpy"], Case("x", optimizer, hyper, {"w": (40, 50), "b": (3,)}, (), "float64"))


@pytest.mark.parametrize("name", ["fastopt", "fastopt.torch", "torch fused", "torch foreach"])
def test_answers_with_zeroed_gradients(name):
    checked(CONTENDERS[name], adam(2000, step={"zero_grads": True}))


def test_a_wrong_answer_is_noticed_although_the_first_step_is_right():
    with pytest.raises(worker.WrongAnswer, match="w is off by"):
        checked(WrongBetas, adam(50))


def test_a_wrong_answer_is_shown_and_not_timed(monkeypatch):
    result = measured(monkeypatch, FEW, "fastopt", "numpy")
    assert result.problems == {"numpy": "wrong answer: w is off by 1"}
    assert list(result.timings) == ["fastopt"]


class FakeWorker(Mock):
    """Says what it is told to."""

    def add(self, case, contender, copies):
        return worker.Ready("wrong answer: w is off by 1" if contender == "numpy" else None)

    def sample(self, contender):
        if contender == "stream":
            raise worker.Died("its process died")
        return 1.0


def measured(monkeypatch, effort, *contenders):
    """The result of contenders in a fake worker."""
    monkeypatch.setattr(measure, "Worker", lambda threads: FakeWorker())
    with Measurement(1, effort) as measurement:
        return measurement.run(adam(50, *contenders))


def test_a_contender_that_dies_leaves_the_others(monkeypatch):
    result = measured(monkeypatch, FEW, "fastopt", "stream")
    assert result.problems == {"stream": "its process died"}
    assert len(result.timings["fastopt"].samples) == 3
    assert "stream" not in result.timings


def test_a_process_that_is_killed_is_noticed():
    process = worker.Worker(1)
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.join()
    with pytest.raises(worker.Died, match="its process died"):
        process.clear()
    process.stop()


def test_a_process_serves_one_case_after_another():
    with Measurement(1, FEW) as measurement:
        results = [measurement.run(adam(n, "fastopt", "numpy")) for n in (10, 1000)]
        assert len(measurement._workers) == 2
    assert all(set(result.timings) == {"fastopt", "numpy"} for result in results)


def test_no_more_rounds_than_are_needed(monkeypatch):
    result = measured(monkeypatch, Effort(rounds=21), "fastopt")
    assert len(result.timings["fastopt"].samples) == measure.FEWEST  # they all agree


def test_small_cases_rotate_among_copies_that_exceed_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "last_level_cache", lambda: 160_000)
    case = adam(1000, "fastopt", rotate=True)
    assert machine.copies(case) == 20
    with Measurement(1, FEW) as measurement:
        assert measurement.run(case).copies == 20


def test_a_case_beyond_memory_is_refused_before_anything_is_allocated(monkeypatch, capsys):
    monkeypatch.setattr(measure, "Worker", None)  # nobody may start one
    assert main(["step", "--size", "1000000G", "--contenders", "fastopt,numpy"]) == 2
    error = capsys.readouterr().err
    assert "needs about 64000000.0 GB for 2 contenders; " in error
    assert error.count("\n") == 1
    result = Measurement(1, FEW).run(Case("x", "Adam", {"lr": 1e-3}, {"w": (10**15,)}, ("fastopt",)))
    assert result.skipped is not None
    assert "GB are free" in result.skipped


def test_a_case_of_ones_own(tmp_path):
    file = tmp_path / "out.json"
    arguments = ["--optimizer", "momentum", "--size", "1k", "--arrays", "3", "--dtype", "float64"]
    assert main(["step", *arguments, "--contenders", "fastopt,numpy", "--rounds", "1", "--json", str(file)]) == 0
    (result,) = Record.read(file).results
    assert (result.optimizer, result.dtype, result.elements, result.arrays) == ("SGD", "float64", 1000, 3)
    assert list(result.timings) == ["fastopt", "numpy"]


def test_nothing_is_compared_with_what_is_too_unsteady(capsys):
    bars = Bar("fastopt", 2.0, "stream"), Bar("fastopt", 2.0, "numpy")
    timings = {"fastopt": [1.0] * 5, "stream": [5.9, 6.0, 12.0, 21.7, 1e3], "numpy": [2.0] * 5}
    result = Result.of(adam(50), 1, timings={name: Timing(samples) for name, samples in timings.items()})
    result.judge(bars)
    assert [verdict.reached for verdict in result.verdicts] == [None, True]
    assert words.ratio(result, "fastopt", "stream") is None
    step.show(result, Console(width=120))
    shown = capsys.readouterr().out
    assert "too unsteady to compare with, by the quartiles: stream. Is the machine busy?" in shown
    assert "too unsteady: fastopt ≥ 0.50 of stream's speed" in shown
    (row,) = (line for line in shown.splitlines() if "fastopt" in line and "│" in line)
    assert [cell.strip() for cell in row.split("│")][5] == ""


def test_without_arguments_it_is_the_one_case_that_help_tells(monkeypatch):
    cases = []
    monkeypatch.setattr(step, "measure", lambda record, chosen, *rest: cases.extend(chosen))
    assert main(["step"]) == 0
    (case,) = cases
    assert (case.optimizer, case.dtype, case.elements, len(case.shapes)) == ("Adam", "float32", 16_000_000, 1)


def test_every_case_can_be_set_up_and_is_told(capsys):
    assert set(QUICK) <= set(SUITE)
    for case in SUITE.values():
        assert case.family in FAMILIES
        assert set(case.contenders) <= set(CONTENDERS)
        assert case.declared_bytes > case.elements
        for bar in case.bars:
            assert {bar.contender, bar.against or bar.contender} <= set(case.contenders)
    assert main(["list"]) == 0
    shown = capsys.readouterr().out.split()
    assert "mobilenet-v3-large" in shown


@pytest.mark.parametrize(
    ("optimizer", "dtype", "options", "size"),
    [
        ("Adam", "float32", {}, 3 * 4 + 2 * 2 * 4),
        ("Adam", "bfloat16", {}, 3 * 2 + 2 * 2 * 4),
        ("Adam", "float64", {}, 3 * 8 + 2 * 2 * 8),
        ("SGD", "float32", {}, 3 * 4),
        ("SGD", "float32", {"max_norm": 1.0, "zero_grads": True}, (3 + 1 + 1) * 4),
        ("LARS", "float32", {}, (3 + 2 + 2) * 4),
    ],
)
def test_bytes_are_those_of_the_rule(optimizer, dtype, options, size):
    case = Case("x", optimizer, {"lr": 1e-3}, {"w": (10,)}, (), dtype, step=options)
    assert case.declared_bytes == 10 * size


def test_temporaries_of_a_numpy_step_are_seen():
    case = adam(1_000_000)
    eager, ours = (worker.temporaries(kind(case, *worker.data(case), 1)) for kind in (CONTENDERS["numpy"], Fastopt))
    assert 8e6 <= eager <= 40e6  # at least two arrays of float32 at a time
    assert ours < 1e6
