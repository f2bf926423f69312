"""The command line of the benchmark for GPUs, and bench/gpu.sh, without one."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("cupy")

from gpu_fake import ADAM, SMALL, Raises

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


@pytest.fixture
def suite(fake, monkeypatch):
    replaced = {
        "SUITE": {case.name: case for case in TINY}, "STAGES": {"bandwidth": ("clip", "check")}, "ROUNDS": 2,
        "Gpu": lambda: fake, "measure": lambda *args: measure(*args, period=7),
    }  # fmt: skip
    for name, value in replaced.items():
        monkeypatch.setattr(bench_gpu, name, value)
    return fake


@pytest.fixture
def gpu(tmp_path):
    """Runs ``bench gpu`` with a file for its results; the exit status, and the cases in the file."""

    def run(*arguments):
        file = tmp_path / "gpu.json"
        status = main(["gpu", *arguments, "--out", str(file)])
        return status, json.loads(file.read_text())["cases"] if file.exists() else None

    return run


@pytest.mark.usefixtures("suite")
def test_every_kind_of_case_runs_and_is_written(tmp_path, capsys):
    pytest.importorskip("torch")
    file = tmp_path / "gpu.json"
    status = main(["gpu", "--out", str(file)])
    shown = capsys.readouterr().out
    record = json.loads(file.read_text())
    cases = record["cases"]
    outcomes = {name: (case["problems"], case["error"]) for name, case in cases.items()}
    assert outcomes == {case.name: ({}, None) for case in TINY}
    assert status == 0
    for case in TINY:
        found = cases[case.name]["contenders"]
        assert set(found) == set(case.contenders if case.kind != "check" else ())
        for contender in found.values():
            assert len(contender["samples"]) == 2
            assert min(contender["samples"]) > 0
            assert contender["quartiles"][0] <= contender["median"] <= contender["quartiles"][1]
        assert f"{case.name}: " in shown
    assert cases["flat"]["sets"] == math.ceil(8 * 100 / (40 * 16)) == 2
    assert (record["machine"]["gpu"], record["machine"]["fastopt"]) == ("stand-in", fastopt.__version__)
    table = shown[shown.rindex("bars") :]
    for said in ("reached", "MISSED", "≤ 1e-09 × torch fused"):
        assert said in table
    assert main(["gpu", "--show", str(file)]) == 0
    assert table in capsys.readouterr().out


@pytest.mark.usefixtures("suite")
def test_a_case_that_fails_is_a_row_and_the_exit_status(gpu, monkeypatch, capsys):
    monkeypatch.setitem(CONTENDERS, "momentum", Raises)
    status, cases = gpu("lars", "check")
    assert status == 1
    assert "error: MemoryError: no room" in capsys.readouterr().out
    assert list(cases) == ["lars", "check"]
    assert list(cases["lars"]["contenders"]) == ["fastopt"]


def test_a_gpu_that_broke_ends_the_process_and_the_next_one_goes_on(suite, gpu, monkeypatch, capsys):
    class Breaks(gpu_contenders.Fastopt):
        def make(self):
            suite.broken = True
            return super().make()

    monkeypatch.setitem(CONTENDERS, "fastopt flat", Breaks)
    arguments = ["check", "arrays", "bf16", "--resume"]
    status, cases = gpu(*arguments)
    assert status == bench_gpu.BROKEN == 3
    assert "--resume" in capsys.readouterr().err
    assert list(cases) == ["check", "arrays"]
    suite.broken = False
    status, cases = gpu(*arguments)
    assert status == 1
    assert list(cases) == ["check", "arrays", "bf16"]
    assert "illegal memory access" in str(cases["arrays"]["problems"])
    assert cases["bf16"]["error"] is None


@pytest.mark.usefixtures("suite")
def test_a_process_that_died_leaves_a_row(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(bench_gpu, "measure", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        gpu("check")
    file = tmp_path / "gpu.json"
    assert main(["gpu", "--show", str(file)]) == 1
    assert "died" in json.loads(file.read_text())["cases"]["check"]["error"]


@pytest.mark.usefixtures("suite")
def test_a_stage_is_its_cases_and_a_limit_leaves_cases_out(capsys):
    assert main(["gpu", "bandwidth", "--limit", "-1"]) == 0
    shown = capsys.readouterr().out
    assert "clip: not measured, -1 s are over" in shown
    assert "check: not measured" in shown
    assert "lars" not in shown


def test_every_case_belongs_to_a_stage():
    assert sorted(SUITE) == sorted(name for stage in STAGES.values() for name in stage)


def test_without_cupy_or_a_gpu_it_says_so(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cupy", None)
        assert main(["gpu"]) == 2
    error = capsys.readouterr().err
    assert 'bench gpu: CuPy is missing: pip install -e ".[cuda12]"' in error
    assert error.count("\n") == 1
    import cupy

    none = Mock(side_effect=cupy.cuda.runtime.CUDARuntimeError(35))
    for count, said in ((none, "insufficient"), (lambda: 0, "there is no GPU")):
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", count)
        with pytest.raises(NoGpu, match=said):
            Gpu()
    assert main(["gpu"]) == 2
    assert "fastopt info" in capsys.readouterr().err


# --- smoke and registers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [smoke.CASES[k] for k in (0, 3, 5)], ids=lambda case: case[0])  # the quick ones here
def test_smoke_steps_have_the_bits_of_the_cpu(stand_in, monkeypatch, case):
    monkeypatch.setattr(smoke, "CHUNK", 40)
    monkeypatch.setattr(smoke, "SHAPES", {"one": (1,), "odd": (3, 7), "empty": (0,)})
    smoke.run(case, stand_in.put, stand_in.get)


def test_a_wrong_bit_fails_the_smoke_stage(stand_in, monkeypatch):
    monkeypatch.setattr(smoke, "SHAPES", {"one": (1,)})
    with pytest.raises(WrongAnswer, match="one differs from the CPU's"):
        smoke.run(smoke.CASES[0], stand_in.put, lambda array: np.nextafter(stand_in.get(array), np.float32(9)))


def test_registers_are_told_and_a_kernel_that_cannot_be_loaded(tmp_path, monkeypatch, capsys):
    functions = [types.SimpleNamespace(num_regs=n, local_size_bytes=8) for n in (76, 64)]
    modules = [RuntimeError("no"), *(Mock(get_function=Mock(return_value=function)) for function in functions)]
    for name in ("bad", "large", "other"):
        (tmp_path / f"{name}.ptx").touch()
    monkeypatch.setattr("fastopt.engine.cuda.kernels.prebuilt_folder", lambda: tmp_path)
    monkeypatch.setattr("cupy.RawModule", Mock(side_effect=modules))
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


def run_script(folder, *stages, failing="nothing at all", status=1, built="yes"):
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
def test_without_prebuilt_kernels_the_script_warns_and_builds_again(tmp_path, lacking):
    status, said, calls = run_script(tmp_path, **lacking)
    assert status == 1
    tried = [x for call in calls for x in ("=ON", "=AUTO", "=OFF") if f"FASTOPT_CUDA{x}" in call]
    assert tried == ["=ON", "=AUTO", "=OFF"]
    assert "WARNING" in said
    assert "build: FAILED: no compiled library (status 1)" in said
    assert any("bandwidth --out" in call for call in calls)


@pytest.mark.parametrize("arguments", [["somewhere", "all"], []], ids=str)
def test_bad_arguments_of_the_script_are_one_line_and_status_2(arguments, tmp_path):
    command = ["bash", ROOT / "bench" / "gpu.sh", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert "smoke bits bandwidth rest" in run.stderr
