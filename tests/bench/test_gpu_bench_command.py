"""The command line of the benchmark for GPUs, and bench/gpu.sh, without one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")
pytest.importorskip("cupy")

from gpu_fake import ADAM, SMALL, FakeGpu, Raises

import fastopt
from bench.gpu import command as bench_gpu
from bench.gpu import contenders as gpu_contenders
from bench.gpu import measure as gpu_measure
from bench.gpu.cases import SUITE, Bar, Case
from bench.gpu.contenders import CONTENDERS
from bench.gpu.device import Gpu, NoGpu
from bench.gpu.measure import measure

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(gpu_measure, "SAMPLE_SECONDS", {"device": 1e-9, "wall": 1e-9})
    monkeypatch.setattr(gpu_measure, "HOST_STEPS", 2)
    monkeypatch.setattr(gpu_measure, "TRIALS", 1)
    return FakeGpu(stand_in)


# --- the command line ------------------------------------------------------------------------------------------------

TINY = (
    Case("copies", "device", "Adam", ADAM, {"w": (9,)}, ("copy", "torch copy")),
    Case("flat", "device", "Adam", ADAM, {"w": (40,)}, ("fastopt", "copy", "torch fused", "torch foreach"), flat=True,
         bars=(Bar("fastopt", "fraction", 1e-12, "copy"), Bar("fastopt", "ratio", 1e-9, "torch fused"))),
    Case("bf16", "device", "AdamW", ADAM, {"w": (40,)}, ("fastopt",), dtype="bfloat16", flat=True),
    Case("arrays", "wall", "SGD", {"lr": 0.1, "momentum": 0.9}, SMALL, ("fastopt", "fastopt flat", "torch fused")),
    Case("host", "host", "Adam", ADAM, SMALL, ("fastopt",), bars=(Bar("fastopt", "microseconds", 1e9),)),
    Case("lars", "device", "LARS", {"lr": 0.1}, {"w": (9, 8)}, ("fastopt", "momentum")),
    Case("clip", "device", "Adam", ADAM, {"w": (50,)}, ("fastopt", "plain"), flat=True, quick=True,
         step={"max_norm": 0.1, "skip_nonfinite": True, "grad_scale": 8.0}),
    Case("graph", "device", "Adam", ADAM, {"w": (10, 5)}, ("graph", "kernels")),
    Case("check", "check", "SGD", {"lr": 0.5}, {"w": (50,)}, ("fastopt",), dtype="bfloat16"),
)  # fmt: skip


@pytest.fixture
def suite(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    cases = {case.name: case for case in TINY}
    monkeypatch.setattr(bench_gpu, "SUITE", cases)
    monkeypatch.setattr(bench_gpu, "Gpu", lambda: fake)
    monkeypatch.setattr(bench_gpu, "ROUNDS", 2)
    monkeypatch.setattr(bench_gpu, "QUICK_ROUNDS", 1)
    monkeypatch.setattr(bench_gpu, "measure", lambda *args: measure(*args, period=7))
    return fake


@pytest.mark.usefixtures("suite")
def test_every_kind_of_case_runs_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    file = tmp_path / "gpu.json"
    status = bench_gpu.main(["--out", str(file)])
    shown = capsys.readouterr().out
    record = json.loads(file.read_text())
    assert {name: case["problems"] for name, case in record["cases"].items()} == {case.name: {} for case in TINY}
    assert [case["error"] for case in record["cases"].values()] == [None] * len(TINY)
    assert status == 0
    for case in TINY:
        found = record["cases"][case.name]
        assert set(found["contenders"]) == set(case.contenders if case.kind != "check" else ())
        for contender in found["contenders"].values():
            assert len(contender["samples"]) == 2
            assert min(contender["samples"]) > 0
            assert contender["quartiles"][0] <= contender["median"] <= contender["quartiles"][1]
        assert f"{case.name}: " in shown
    assert record["cases"]["flat"]["sets"] == math.ceil(8 * 100 / (40 * 16)) == 2
    assert record["machine"]["gpu"] == "stand-in"
    assert record["machine"]["fastopt"] == fastopt.__version__
    table = shown[shown.rindex("bars") :]
    assert "reached" in table
    assert "MISSED" in table
    assert "≤ 1e-09 × torch fused" in table
    assert bench_gpu.main(["--show", str(file)]) == 0
    assert table in capsys.readouterr().out


@pytest.mark.usefixtures("suite")
def test_a_case_that_fails_is_a_row_and_the_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONTENDERS, "momentum", Raises)
    file = tmp_path / "gpu.json"
    assert bench_gpu.main(["lars", "check", "--out", str(file)]) == 1
    assert "error: MemoryError: no room" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert list(record["cases"]) == ["lars", "check"]
    assert list(record["cases"]["lars"]["contenders"]) == ["fastopt"]


def test_a_gpu_that_broke_ends_the_process_and_the_next_one_goes_on(
    suite: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Breaks(gpu_contenders.Fastopt):
        def make(self) -> Any:
            suite.broken = True
            return super().make()

    file = tmp_path / "gpu.json"
    monkeypatch.setitem(CONTENDERS, "fastopt flat", Breaks)
    arguments = ["check", "arrays", "bf16", "--out", str(file), "--resume"]
    assert bench_gpu.main(arguments) == bench_gpu.BROKEN == 3
    assert "--resume" in capsys.readouterr().err
    assert list(json.loads(file.read_text())["cases"]) == ["check", "arrays"]
    suite.broken = False
    assert bench_gpu.main(arguments) == 1
    record = json.loads(file.read_text())
    assert list(record["cases"]) == ["check", "arrays", "bf16"]
    assert "illegal memory access" in str(record["cases"]["arrays"]["problems"])
    assert record["cases"]["bf16"]["error"] is None


@pytest.mark.usefixtures("suite")
def test_a_process_that_died_leaves_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_gpu, "measure", die)
    file = tmp_path / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.main(["check", "--out", str(file)])
    assert bench_gpu.main(["--show", str(file)]) == 1
    assert "died" in json.loads(file.read_text())["cases"]["check"]["error"]


@pytest.mark.usefixtures("suite")
def test_quick_and_limit_leave_cases_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_gpu.main(["--quick", "--limit", "-1"]) == 0
    shown = capsys.readouterr().out
    assert "clip: not measured, -1 s are over" in shown
    assert "lars" not in shown
    assert len([case for case in SUITE.values() if case.quick]) < len(SUITE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no case 'nothing'; cases are copy, adam-100m, "),
        (["--out", "/no/such/folder/x.json"], "the folder of /no/such/folder/x.json does not exist"),
        (["--show", "/no/such/file"], "there is no file /no/such/file"),
    ],
)
def test_bad_arguments_of_gpu_are_one_line_and_status_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench_gpu.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_cupy_or_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert bench_gpu.main([]) == 2
    error = capsys.readouterr().err
    assert 'bench gpu: CuPy is missing: pip install -e ".[cuda12]"' in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    import cupy

    def none() -> int:
        raise cupy.cuda.runtime.CUDARuntimeError(35)

    for count, said in ((none, "insufficient"), (lambda: 0, "there is no GPU")):
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", count)
        with pytest.raises(NoGpu, match=said):
            Gpu()
    assert bench_gpu.main([]) == 2
    assert "fastopt info" in capsys.readouterr().err


# --- bench/gpu.sh ----------------------------------------------------------------------------------------------------

STUB = """#!/bin/bash
echo "{name} $*" >>"$CALLS"
case "$*" in *{failing}*) exit 1 ;; *"import fastopt"*) [ "{built}" = yes ] || exit 1 ;; esac
"""


def run_script(folder: Path, failing: str = "nothing at all", built: str = "yes") -> tuple[int, str, list[str]]:
    """Status and output of gpu.sh with stand-ins for Python and compute-sanitizer, and the calls of those."""
    calls = folder / "calls"
    for name in ("python3", "compute-sanitizer"):
        stub = folder / name
        stub.write_text(STUB.format(name=name, failing=json.dumps(failing), built=built))
        stub.chmod(0o755)
    run = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", folder / "out"],
        env={"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(calls), "HOME": os.environ.get("HOME", "/")},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr, calls.read_text().splitlines()


def test_the_script_runs_every_stage_and_ends_with_the_table(tmp_path: Path) -> None:
    status, said, calls = run_script(tmp_path)
    assert status == 0, said
    stages = ["pip install", "import fastopt", "fastopt info", "pytest", "bench.gpu --out"]
    stages += ["compute-sanitizer --tool memcheck", "compute-sanitizer --tool racecheck", "bench.gpu --show"]
    places = [next(k for k, call in enumerate(calls) if stage in call) for stage in stages]
    assert places == sorted(places)
    assert places[-1] == len(calls) - 1
    install = calls[places[0]]
    assert all(x in install for x in ("--no-build-isolation", "--no-deps", "FASTOPT_CUDA=ON"))
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.mark.parametrize(
    ("failing", "stage"), [("-m pytest", "tests"), ("bench.gpu --out", "benchmark"), ("--tool racecheck", "racecheck")]
)
def test_a_failing_stage_stops_nothing_and_is_the_exit_status(tmp_path: Path, failing: str, stage: str) -> None:
    status, said, calls = run_script(tmp_path, failing=failing)
    assert status == 1
    assert f"\nFAILED: {stage}\n" in said
    assert any("bench.gpu --out" in call for call in calls)
    assert "bench.gpu --show" in calls[-1]


def test_without_prebuilt_kernels_the_script_warns_and_builds_again(tmp_path: Path) -> None:
    _, said, calls = run_script(tmp_path, built="no")
    assert [x for call in calls for x in ("=ON", "=AUTO") if f"FASTOPT_CUDA{x}" in call] == ["=ON", "=AUTO"]
    assert "WARNING" in said
    assert any("bench.gpu --out" in call for call in calls)
