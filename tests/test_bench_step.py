"""``python -m bench step``: it checks answers before it times, and says clearly what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from bench import step
from bench.__main__ import main
from bench.cases import Bar, Case
from bench.shapes import resnet50

SMALL = Case(
    "small", "Adam", {"lr": 1e-3}, {"w": (5, 7), "b": (3,)}, ("fastopt", "fastopt arrays", "fastopt moving", "numpy"),
    bars=(Bar("fastopt", 1e9), Bar("fastopt", 1e-9, "numpy"), Bar("torch fused", 1.0)),
)  # fmt: skip
# The NumPy contender has betas of its own: here it is not the optimizer that the case asks for.
WRONG = Case("wrong", "Adam", {"lr": 1e-3, "betas": (0.5, 0.5)}, {"w": (50,)}, ("fastopt", "numpy"))


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> dict[str, Case]:
    cases = {"small": SMALL, "wrong": WRONG}
    monkeypatch.setattr(step, "SUITE", cases)
    return cases


@pytest.mark.usefixtures("suite")
def test_a_case_is_checked_timed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main(["step", "small", "--rounds", "3", "--threads", "1", "--json", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "reached: fastopt ≤ 1e+09 µs" in shown
    assert "MISSED: fastopt ≤ 1e-09 × numpy" in shown
    assert "not measured: torch fused" in shown
    samples: dict[str, Any] = json.loads(file.read_text())["cases"]["small"]["samples"]
    assert set(samples) == set(SMALL.contenders)
    assert all(len(values) == 3 and min(values) > 0 for values in samples.values())


@pytest.mark.usefixtures("suite")
def test_a_wrong_answer_is_shown_and_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.json"
    assert main(["step", "wrong", "--rounds", "1", "--json", str(file)]) == 0
    assert "wrong answer" in capsys.readouterr().out
    found = json.loads(file.read_text())["cases"]["wrong"]
    assert "wrong answer: w is off by" in found["problems"]["numpy"]
    assert list(found["samples"]) == ["fastopt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no case 'nothing'; cases are adam, "),
        (["adam", "--rounds", "0"], "--rounds and --threads must be at least 1"),
        (["adam", "--json", "/no/such/folder/x.json"], "the folder of /no/such/folder/x.json does not exist"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["step", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_resnet50_has_the_parameters_of_the_paper() -> None:
    shapes = resnet50()
    assert len(shapes) == 161
    assert Case("x", "SGD", {}, shapes, ()).elements == 25_557_032
