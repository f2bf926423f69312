"""``python -m bench step`` and ``list``: answers are checked before times are taken; what cannot be done is said."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("altair")
pytest.importorskip("psutil")

from rich.console import Console

from bench import machine, measure, step, worker
from bench.__main__ import main
from bench.case import Bar, Case
from bench.contenders import CONTENDERS, Contender
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


class WrongBetas(Fastopt):
    """Adam with another beta2: right in the first step, a little wrong in the next."""

    def hyper(self, case: Case) -> dict[str, Any]:
        return {**case.hyper, "betas": (0.9, 0.998)}


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "SUITE", {"small": SMALL})


@pytest.mark.usefixtures("suite")
def test_a_case_is_checked_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def checked(kind: type[Contender], case: Case) -> None:
    if kind.package:
        pytest.importorskip(kind.package)
    params, grads = worker.data(case)
    expected = worker.expectation(case, params, grads)
    worker.check(kind(case, params, grads, 1), case, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["fastopt", "numpy", "torch fused", "torch loop", "torch foreach", "fastopt.torch"])
def test_answers_are_right_in_every_dtype(name: str, dtype: str) -> None:
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
def test_eager_numpy_has_every_optimizer(optimizer: str, hyper: dict[str, Any]) -> None:
    assert optimizer in CONTENDERS["numpy"].optimizers
    checked(CONTENDERS["numpy"], Case("x", optimizer, hyper, {"w": (40, 50), "b": (3,)}, (), "float64"))


@pytest.mark.parametrize("name", ["fastopt", "fastopt.torch", "torch fused", "torch foreach"])
def test_answers_with_zeroed_gradients(name: str) -> None:
    checked(CONTENDERS[name], Case("x", "Adam", {"lr": 1e-3}, {"w": (2000,)}, (), step={"zero_grads": True}))


def test_a_wrong_answer_is_noticed_although_the_first_step_is_right() -> None:
    with pytest.raises(worker.WrongAnswer, match="w is off by"):
        checked(WrongBetas, Case("x", "Adam", {"lr": 1e-3}, {"w": (50,)}, ()))


def test_a_wrong_answer_is_shown_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, FEW, "fastopt", "numpy")
    assert result.problems == {"numpy": "wrong answer: w is off by 1"}
    assert list(result.timings) == ["fastopt"]


class FakeWorker:
    """Says what it is told to."""

    def add(self, case: Case, contender: str, copies: int) -> worker.Ready:
        return worker.Ready("wrong answer: w is off by 1" if contender == "numpy" else None)

    def sample(self, contender: str) -> float:
        if contender == "stream":
            raise worker.Died("its process died")
        return 1.0

    def clear(self) -> None:
        pass

    def stop(self) -> None:
        pass


def measured(monkeypatch: pytest.MonkeyPatch, effort: Effort, *contenders: str) -> Result:
    """The result of contenders in a fake worker."""
    monkeypatch.setattr(measure, "Worker", lambda threads: FakeWorker())
    with Measurement(1, effort) as measurement:
        return measurement.run(Case("x", "Adam", {"lr": 1e-3}, {"w": (50,)}, contenders))


def test_a_contender_that_dies_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, FEW, "fastopt", "stream")
    assert result.problems == {"stream": "its process died"}
    assert len(result.timings["fastopt"].samples) == 3
    assert "stream" not in result.timings


def test_a_process_that_is_killed_is_noticed() -> None:
    process = worker.Worker(1)
    os.kill(process._process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process._process.join()
    with pytest.raises(worker.Died, match="its process died"):
        process.clear()
    process.stop()


def test_a_process_serves_one_case_after_another() -> None:
    cases = [Case(f"x{n}", "Adam", {"lr": 1e-3}, {"w": (n,)}, ("fastopt", "numpy")) for n in (10, 1000)]
    with Measurement(1, FEW) as measurement:
        results = [measurement.run(case) for case in cases]
        assert len(measurement._workers) == 2
    assert all(set(result.timings) == {"fastopt", "numpy"} for result in results)


def test_no_more_rounds_than_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured(monkeypatch, Effort(rounds=21), "fastopt")
    assert len(result.timings["fastopt"].samples) == measure.FEWEST  # they all agree


def test_small_cases_rotate_among_copies_that_exceed_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_level_cache", lambda: 160_000)
    case = Case("x", "Adam", {"lr": 1e-3}, {"w": (1000,)}, ("fastopt",), rotate=True)
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


def test_a_case_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = ["--optimizer", "momentum", "--size", "1k", "--arrays", "3", "--dtype", "float64"]
    assert main(["step", *arguments, "--contenders", "fastopt,numpy", "--rounds", "1", "--json", str(file)]) == 0
    (result,) = Record.read(file).results
    assert (result.optimizer, result.dtype, result.elements, result.arrays) == ("SGD", "float64", 1000, 3)
    assert list(result.timings) == ["fastopt", "numpy"]


def test_nothing_is_compared_with_what_is_too_unsteady(capsys: pytest.CaptureFixture[str]) -> None:
    bars = Bar("fastopt", 2.0, "stream"), Bar("fastopt", 2.0, "numpy")
    case = Case("x", "Adam", {"lr": 1e-3}, {"w": (50,)}, (), bars=bars)
    timings = {"fastopt": [1.0] * 5, "stream": [5.9, 6.0, 12.0, 21.7, 1e3], "numpy": [2.0] * 5}
    result = Result.of(case, 1, timings={name: Timing(samples) for name, samples in timings.items()})
    result.judge(bars)
    assert [verdict.reached for verdict in result.verdicts] == [None, True]
    assert words.ratio(result, "fastopt", "stream") is None
    step.show(result, Console(width=120))
    shown = capsys.readouterr().out
    assert "too unsteady to compare with, by the quartiles: stream. Is the machine busy?" in shown
    assert "too unsteady: fastopt ≥ 0.50 of stream's speed" in shown
    (row,) = (line for line in shown.splitlines() if "fastopt" in line and "│" in line)
    assert [cell.strip() for cell in row.split("│")][5] == ""


def test_without_arguments_it_is_the_one_case_that_help_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[Case] = []
    monkeypatch.setattr(step, "measure", lambda record, chosen, *rest: cases.extend(chosen))
    assert main(["step"]) == 0
    (case,) = cases
    assert (case.optimizer, case.dtype, case.elements, len(case.shapes)) == ("Adam", "float32", 16_000_000, 1)


def test_every_case_can_be_set_up_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_bytes_are_those_of_the_rule() -> None:
    shapes = {"w": (10,)}
    adam, sgd = ("Adam", {"lr": 1e-3}), ("SGD", {"lr": 1e-3})
    assert Case("x", *adam, shapes, ()).declared_bytes == 10 * (3 * 4 + 2 * 2 * 4)
    assert Case("x", *sgd, shapes, ()).declared_bytes == 10 * 3 * 4
    assert Case("x", *adam, shapes, (), "bfloat16").declared_bytes == 10 * (3 * 2 + 2 * 2 * 4)
    assert Case("x", *adam, shapes, (), "float64").declared_bytes == 10 * (3 * 8 + 2 * 2 * 8)
    clipped = Case("x", *sgd, shapes, (), step={"max_norm": 1.0, "zero_grads": True})
    assert clipped.declared_bytes == 10 * (3 + 1 + 1) * 4
    lars = Case("x", "LARS", {"lr": 1.0}, shapes, ())
    assert lars.declared_bytes == 10 * (3 + 2 + 2) * 4


def test_temporaries_of_a_numpy_step_are_seen() -> None:
    case = Case("x", "Adam", {"lr": 1e-3}, {"w": (1_000_000,)}, ())
    params, grads = worker.data(case)
    found = worker.temporaries(CONTENDERS["numpy"](case, params, grads, 1))
    assert 8e6 <= found <= 40e6  # at least two arrays of float32 at a time
    assert worker.temporaries(Fastopt(case, *worker.data(case), 1)) < 1e6
