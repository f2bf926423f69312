"""The command line of the benchmark for GPUs, and bench/gpu.sh, without one."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("cupy")

from gpu_fake import ADAM, SMALL, FakeGpu, Raises

import fastopt
from bench.__main__ import main
from bench.gpu import command as bench_gpu
from bench.gpu import contenders as gpu_contenders
from bench.gpu import registers, smoke
from bench.gpu.cases import STAGES, SUITE, Bar, Case
from bench.gpu.contenders import CONTENDERS
from bench.gpu.data import WrongAnswer
from bench.gpu.device import Gpu, NoGpu
from bench.gpu.measure import measure

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]


# --- the command line ------------------------------------------------------------------------------------------------

TINY = (
    Case("copies", "device", "Adam", ADAM, {"w": (9,)}, ("copy", "torch copy")),
    Case("flat", "device", "Adam", ADAM, {"w": (40,)}, ("fastopt", "copy", "torch fused", "torch foreach"), flat=True,
         bars=(Bar("fastopt", "fraction", 1e-12, "copy"), Bar("fastopt", "ratio", 1e-9, "torch fused"))),
    Case("bf16", "device", "AdamW", ADAM, {"w": (40,)}, ("fastopt",), dtype="bfloat16", flat=True),
    Case("arrays", "wall", "SGD", {"lr": 0.1, "momentum": 0.9}, SMALL, ("fastopt", "fastopt flat", "torch fused")),
    Case("host", "host", "Adam", ADAM, SMALL, ("fastopt",), bars=(Bar("fastopt", "microseconds", 1e9),)),
    Case("lars", "device", "LARS", {"lr": 0.1}, {"w": (9, 8)}, ("fastopt", "momentum")),
    Case("clip", "device", "Adam", ADAM, {"w": (50,)}, ("fastopt", "plain"), flat=True,
         step={"max_norm": 0.1, "skip_nonfinite": True, "grad_scale": 8.0}),
    Case("graph", "device", "Adam", ADAM, {"w": (10, 5)}, ("graph", "kernels")),
    Case("check", "check", "SGD", {"lr": 0.5}, {"w": (50,)}, ("fastopt",), dtype="bfloat16"),
    Case("norm", "device", "SGD", {"lr": 8.0}, {"w": (50,), "b": (3,)}, ("norm", "copy"),
         step={"max_norm": 0.1, "skip_nonfinite": True}),
    Case("half", "device", "SGD", {"lr": 8.0}, {"w": (50,)}, ("fastopt", "torch foreach"), dtype="bfloat16", flat=True),
    Case("amp", "wall", "Adam", ADAM, SMALL, ("fastopt.torch amp", "torch amp")),
)  # fmt: skip


def gpu(arguments: list[str]) -> int:
    return main(["gpu", *arguments])


@pytest.fixture
def suite(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    cases = {case.name: case for case in TINY}
    monkeypatch.setattr(bench_gpu, "SUITE", cases)
    monkeypatch.setattr(bench_gpu, "Gpu", lambda: fake)
    monkeypatch.setattr(bench_gpu, "ROUNDS", 2)
    monkeypatch.setattr(bench_gpu, "STAGES", {"bandwidth": ("clip", "check")})
    monkeypatch.setattr(bench_gpu, "measure", lambda *args: measure(*args, period=7))
    return fake


@pytest.mark.usefixtures("suite")
def test_every_kind_of_case_runs_and_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    file = tmp_path / "gpu.json"
    status = gpu(["--out", str(file)])
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
    assert gpu(["--show", str(file)]) == 0
    assert table in capsys.readouterr().out


@pytest.mark.usefixtures("suite")
def test_a_case_that_fails_is_a_row_and_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(CONTENDERS, "momentum", Raises)
    file = tmp_path / "gpu.json"
    assert gpu(["lars", "check", "--out", str(file)]) == 1
    assert "error: MemoryError: no room" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert list(record["cases"]) == ["lars", "check"]
    assert list(record["cases"]["lars"]["contenders"]) == ["fastopt"]


def test_a_gpu_that_broke_ends_the_process_and_the_next_one_goes_on(suite, tmp_path, monkeypatch, capsys):
    class Breaks(gpu_contenders.Fastopt):
        def make(self) -> Any:
            suite.broken = True
            return super().make()

    file = tmp_path / "gpu.json"
    monkeypatch.setitem(CONTENDERS, "fastopt flat", Breaks)
    arguments = ["check", "arrays", "bf16", "--out", str(file), "--resume"]
    assert gpu(arguments) == bench_gpu.BROKEN == 3
    assert "--resume" in capsys.readouterr().err
    assert list(json.loads(file.read_text())["cases"]) == ["check", "arrays"]
    suite.broken = False
    assert gpu(arguments) == 1
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
        gpu(["check", "--out", str(file)])
    assert gpu(["--show", str(file)]) == 1
    assert "died" in json.loads(file.read_text())["cases"]["check"]["error"]


@pytest.mark.usefixtures("suite")
def test_a_stage_is_its_cases_and_a_limit_leaves_cases_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu(["bandwidth", "--limit", "-1"]) == 0
    shown = capsys.readouterr().out
    assert "clip: not measured, -1 s are over" in shown
    assert "check: not measured" in shown
    assert "lars" not in shown


def test_every_case_belongs_to_a_stage() -> None:
    assert sorted(SUITE) == sorted(name for stage in STAGES.values() for name in stage)


def test_without_cupy_or_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu([]) == 2
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
    assert gpu([]) == 2
    assert "fastopt info" in capsys.readouterr().err


# --- smoke and registers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [smoke.CASES[k] for k in (0, 3, 5)], ids=lambda case: case[0])  # the quick ones here
def test_smoke_steps_have_the_bits_of_the_cpu(stand_in: Any, monkeypatch: pytest.MonkeyPatch, case: Any) -> None:
    monkeypatch.setattr(smoke, "CHUNK", 40)
    monkeypatch.setattr(smoke, "SHAPES", {"one": (1,), "odd": (3, 7), "empty": (0,)})
    smoke.run(case, stand_in.put, stand_in.get)


def test_a_wrong_bit_fails_the_smoke_stage(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(array: Any) -> Any:
        return np.nextafter(stand_in.get(array), np.float32(9))

    monkeypatch.setattr(smoke, "SHAPES", {"one": (1,)})
    with pytest.raises(WrongAnswer, match="one differs from the CPU's"):
        smoke.run(smoke.CASES[0], stand_in.put, get)


def test_registers_are_told_and_a_kernel_that_cannot_be_loaded(tmp_path, monkeypatch, capsys):
    class RawModule:
        def __init__(self, path: str) -> None:
            if "bad" in path:
                raise RuntimeError("no")

        def get_function(self, symbol: str) -> Any:
            return types.SimpleNamespace(num_regs=76 if symbol == "large" else 64, local_size_bytes=8)

    for name in ("bad", "large", "other"):
        (tmp_path / f"{name}.ptx").touch()
    monkeypatch.setattr("fastopt.engine.cuda.kernels.prebuilt_folder", lambda: tmp_path)
    monkeypatch.setattr("cupy.RawModule", RawModule)
    assert registers.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bad: FAILED: RuntimeError: no"
    assert lines[1:3] == [
        f"{name} blocks of 256, 8 bytes spilled" for name in ("large: 76 registers, 3", "other: 64 registers, 4")
    ]


# --- bench/gpu.sh ----------------------------------------------------------------------------------------------------

STUB = """#!/bin/bash
echo "{name} $*" >>"$CALLS"
while [ $# -gt 0 ]; do [ "$1" != --out ] || echo {{}} >"$2"; args+=" $1"; shift; done
case "$args" in *{failing}*) exit {status} ;; *"import fastopt"*) [ "{built}" = yes ] || exit 1 ;; esac
"""


def run_script(
    folder: Path, *stages: str, failing: str = "nothing at all", status: int = 1, built: str = "yes"
) -> tuple[int, str, list[str]]:
    """Status and output of gpu.sh with stand-ins for Python and compute-sanitizer, and the calls of those."""
    calls = folder / "calls"
    calls.touch()
    for name in ("python3", "compute-sanitizer"):
        stub = folder / name
        stub.write_text(STUB.format(name=name, failing=json.dumps(failing), status=status, built=built))
        stub.chmod(0o755)
    run = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", folder / "out", *stages],
        env={"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(calls), "HOME": os.environ.get("HOME", "/")},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    return run.returncode, run.stdout + run.stderr, calls.read_text().splitlines()


BUILD = ("pip install", "import fastopt")
CALLS = {
    "smoke": ("fastopt info", "bench.gpu.smoke"),
    "bits": ("pytest",),
    "bandwidth": ("bench gpu bandwidth --out", "bench gpu --show"),
    "rest": ("bench.gpu.registers", "bench gpu rest --out", "bench gpu --show", "--tool memcheck", "--tool racecheck"),
}


@pytest.mark.parametrize("stages", [(), ("smoke",), ("bandwidth",), ("rest", "bits")], ids=str)
def test_the_script_runs_its_stages_in_order_and_each_leaves_its_results(tmp_path, stages):
    status, said, calls = run_script(tmp_path, *stages)
    assert status == 0, said
    assert all(x in calls[0] for x in ("pip install", "--no-build-isolation", "--no-deps", "FASTOPT_CUDA=ON"))
    for expected in (*BUILD, *(call for stage in stages or CALLS for call in CALLS[stage])):
        place = next(k for k, call in enumerate(calls) if expected in call)
        calls = calls[place + 1 :]
    assert not [call for call in calls if "bench gpu --show" not in call]  # and no others
    verdicts = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in verdicts] == ["build", *(stages or CALLS)]
    assert all("passed" in line for line in verdicts)
    assert said.endswith("\n".join(verdicts) + "\n")
    assert len(list((tmp_path / "out").iterdir())) <= 8


@pytest.mark.parametrize("status", [1, 124, 3])
@pytest.mark.parametrize(
    ("failing", "stage"),
    [
        ("bench.gpu.smoke", "smoke: FAILED: steps"), ("-m pytest", "bits: FAILED: tests"),
        ("bandwidth --out", "bandwidth: FAILED: benchmark"), ("--tool racecheck", "rest: FAILED: racecheck"),
        ("registers", "rest: FAILED: registers"),
    ],
)  # fmt: skip
def test_a_failing_stage_stops_nothing_and_is_the_exit_status(tmp_path, failing, stage, status):
    code, said, calls = run_script(tmp_path, failing=failing, status=status)
    assert code == 1
    assert f"\n{stage} ({'out of time' if status == 124 else f'status {status}'})" in said
    # compute-sanitizer runs the steps of the smoke stage.
    assert (tmp_path / "out" / "summary.txt").read_text().count("passed") == (3 if "smoke" in failing else 4)
    assert "--tool racecheck" in calls[-1]
    # A GPU that broke for a process is tried again in a new one.
    assert sum("bandwidth --out" in call for call in calls) == (3 if "bandwidth" in failing and status == 3 else 1)


@pytest.mark.parametrize("lacking", [{"built": "no"}, {"failing": "pip install"}], ids=str)
def test_without_prebuilt_kernels_the_script_warns_and_builds_again(tmp_path: Path, lacking: dict[str, Any]) -> None:
    status, said, calls = run_script(tmp_path, **lacking)
    assert status == 1
    tried = [x for call in calls for x in ("=ON", "=AUTO", "=OFF") if f"FASTOPT_CUDA{x}" in call]
    assert tried == ["=ON", "=AUTO", "=OFF"]
    assert "WARNING" in said
    assert "build: FAILED: no compiled library (status 1)" in said
    assert any("bandwidth --out" in call for call in calls)


@pytest.mark.parametrize("arguments", [["somewhere", "all"], []], ids=str)
def test_bad_arguments_of_the_script_are_one_line_and_status_2(arguments: list[str], tmp_path: Path) -> None:
    run = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "smoke bits bandwidth rest" in run.stderr
