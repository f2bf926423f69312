"""The benchmark for GPUs without one: bars, numbers, answers and rows; and a whole run over the stand-in of the tests.

What only a GPU can do is in `Gpu` (bench/gpu_device.py), and `FakeGpu` does it over host memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("cupy")

import fastopt
from bench import gpu as bench_gpu
from bench import gpu_contenders, gpu_measure
from bench.gpu_cases import SUITE, Bar, Case, bytes_per_element, judge
from bench.gpu_contenders import CONTENDERS, Copy
from bench.gpu_data import Problem, Recipe, Values, pieces
from bench.gpu_device import Gpu, NoGpu
from bench.gpu_measure import measure
from bench.gpu_shapes import bert_large
from bench.gpu_waits import CONTROL, STEPS, tally

ROOT = Path(__file__).parents[1]


class FakeGpu(Gpu):
    """Memory of the host, kernels in Numba's simulator, and a clock in the place of events."""

    torch_device = "cpu"

    def __init__(self, stand_in: Any) -> None:
        self._stand_in = stand_in
        self.default_stream = None
        self.l2, self.copy_bytes = 100, 4096
        self.broken = False

    def properties(self) -> dict[str, Any]:
        numbers = {"totalGlobalMem": 2**30, "multiProcessorCount": 2, "major": 9, "minor": 0}
        return {"name": b"stand-in", **numbers}

    def versions(self) -> dict[str, Any]:
        return {"cuda driver": 13000, "cuda runtime": 13000, "cupy": "14.2.0"}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._stand_in.put(np.full(shape, 7, dtype))

    def copy(self, to: int, source: int, nbytes: int, stream: Any = None) -> None:
        ctypes.memmove(to, source, nbytes)

    def write(self, to: int, array: Any) -> None:
        ctypes.memmove(to, array.ctypes.data, array.nbytes)

    def read(self, source: int, count: int, dtype: Any) -> Any:
        array = np.empty(count, dtype)
        ctypes.memmove(array.ctypes.data, source, array.nbytes)
        return array

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    def idle(self) -> bool:
        return False

    def stream(self) -> Any:
        return contextlib.nullcontext()

    def capture(self, stream: Any, step: Callable[[], object]) -> Callable[[], None]:
        with self._stand_in.device().capture() as graph:
            step()

        def replay() -> None:
            for launch in graph:
                launch()

        return replay

    def seconds(self, work: Callable[[], None], before: Callable[[Any], None], stream: Any = None) -> float:
        before(stream)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def free(self) -> None:
        pass


@pytest.fixture
def fake(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    monkeypatch.setattr(gpu_measure, "SAMPLE_SECONDS", {"device": 1e-9, "wall": 1e-9})
    monkeypatch.setattr(gpu_measure, "HOST_STEPS", 2)
    monkeypatch.setattr(gpu_measure, "TRIALS", 1)
    return FakeGpu(stand_in)


# --- bars ------------------------------------------------------------------------------------------------------------

# The table of the issue, line by line: case, whose number, what it is, its limit, and against what.
ISSUE = {
    *(
        (f"{name}-{size}", "fastopt", *bar)
        for name in ("adam", "momentum", "adamw")
        for size in ("100m", "1g")
        for bar in (("fraction", 0.92, "copy"), ("ratio", 1.0, "torch fused"))
    ),
    ("adam-bfloat16", "fastopt", "fraction", 0.88, "copy"),
    ("adam-resnet50", "fastopt", "ratio", 0.35, "torch fused"),
    ("adam-1000x1000", "fastopt", "ratio", 0.35, "torch fused"),
    ("host-resnet50", "fastopt", "microseconds", 40.0, ""),
    ("lars-resnet50", "fastopt", "ratio", 1.3, "momentum"),
    ("lars-bert-large", "fastopt", "ratio", 1.3, "momentum"),
    ("adam-clip", "fastopt", "ratio", 1.25, "plain"),
    ("adam-clip-waits", "fastopt", "count", 0, ""),
    ("graph-resnet50", "graph", "ratio", 1.05, "kernels"),
}


def test_the_bars_are_those_of_the_issue() -> None:
    found = {
        (name, b.contender, b.quantity, b.limit, b.against) for name, case in SUITE.items() for b in case.bars
    }  # fmt: skip
    assert found == ISSUE
    for case in SUITE.values():
        assert {name for b in case.bars for name in (b.contender, b.against) if name} <= set(case.contenders)
        assert set(case.contenders) <= set(CONTENDERS)


def test_the_cases_are_of_the_sizes_of_the_issue() -> None:
    elements = {name: case.elements for name, case in SUITE.items()}
    assert {elements[f"{name}-100m"] for name in ("adam", "momentum", "adamw")} == {100_000_000}
    assert {elements[f"{name}-1g"] for name in ("adam", "momentum", "adamw")} == {1_000_000_000}
    assert elements["adam-clip"] == elements["adam-bfloat16"] == 100_000_000
    assert [len(SUITE[name].shapes) for name in ("adam-resnet50", "host-resnet50", "adam-1000x1000")] == [
        161,
        161,
        1000,
    ]
    assert elements["bfloat16-beyond-2^31"] == 2**31 + 17
    assert elements["adam-1000x1000"] == 1_000_000
    step = SUITE["adam-clip"].step
    assert step["max_norm"] is not None
    assert step["skip_nonfinite"]
    assert step["grad_scale"] != 1
    assert not any(SUITE[name].flat for name in ("adam-resnet50", "adam-1000x1000", "host-resnet50"))


def test_bytes_are_those_of_the_issue_and_of_the_states_that_optimizers_have() -> None:
    momentum = {"momentum": 0.9}
    assert bytes_per_element("SGD", momentum, "float32") == 20
    assert bytes_per_element("Adam", {}, "float32") == bytes_per_element("AdamW", {}, "float32") == 28
    assert bytes_per_element("Adam", {}, "bfloat16") == 22
    for case in SUITE.values():
        opt = getattr(fastopt, case.optimizer)([np.ones((1, 1), np.float32)], **case.hyper)
        states = sum(isinstance(value, np.ndarray) for value in opt.state["0"].values())
        assert bytes_per_element(case.optimizer, case.hyper, "float32") == 12 + 8 * states


def result(**samples: list[float]) -> dict[str, Any]:
    contenders = {name: {"samples": values, "bytes": 100} for name, values in samples.items()}
    return {"error": None, "problems": {}, "contenders": contenders}


def case_with(*bars: Bar) -> Case:
    return Case("x", "device", "Adam", {}, {"w": (3,)}, ("a", "b"), bars=bars)


@pytest.mark.parametrize(
    ("bar", "measured", "verdict"),
    [
        (Bar("a", "ratio", 2.0, "b"), 2.0, "reached"),  # the median of 1, 2 and 3
        (Bar("a", "ratio", 1.99, "b"), 2.0, "MISSED"),
        (Bar("a", "fraction", 0.5, "b"), 0.5, "reached"),
        (Bar("a", "fraction", 0.51, "b"), 0.5, "MISSED"),
        (Bar("a", "microseconds", 4e6, ""), 4e6, "reached"),
        (Bar("a", "microseconds", 3.9e6, ""), 4e6, "MISSED"),
    ],
)
def test_a_bar_is_judged_by_the_median_of_rounds(bar: Bar, measured: float, verdict: str) -> None:
    (found,) = judge(case_with(bar), result(a=[1.0, 4.0, 12.0], b=[1.0, 2.0, 4.0]))
    assert (found.measured, found.verdict) == (pytest.approx(measured), verdict)
    assert found.spread is not None
    assert found.spread[0] < measured < found.spread[1]


def test_bytes_count_in_a_fraction() -> None:
    found = result(a=[1.0], b=[1.0])
    found["contenders"]["b"]["bytes"] = 200
    assert judge(case_with(Bar("a", "fraction", 0.5, "b")), found)[0].measured == 0.5


@pytest.mark.parametrize(("waits", "verdict"), [(0, "reached"), (1, "MISSED")])
def test_a_single_wait_misses_the_bar(waits: int, verdict: str) -> None:
    found = result(a=[])
    found["contenders"]["a"] = {"waits": waits}
    assert judge(case_with(Bar("a", "count", 0)), found)[0].verdict == verdict


def test_what_failed_or_did_not_run_is_a_row() -> None:
    bar = Bar("a", "ratio", 2.0, "b")
    assert [v.verdict for v in judge(case_with(bar), None)] == ["not measured"]
    assert [v.verdict for v in judge(case_with(), None)] == ["not measured"]
    failed = {**result(), "error": "KeyError: 1"}
    assert [v.verdict for v in judge(case_with(bar), failed)] == ["error: KeyError: 1"]
    assert [v.verdict for v in judge(case_with(), failed)] == ["error: KeyError: 1"]
    without = {**result(a=[1.0]), "problems": {"b": "OutOfMemoryError: 9"}}
    assert [v.verdict for v in judge(case_with(bar), without)] == ["not measured", "error: OutOfMemoryError: 9"]
    assert [v.verdict for v in judge(case_with(), without)] == ["error: OutOfMemoryError: 9"]
    assert [v.verdict for v in judge(case_with(), result(a=[1.0], b=[1.0]))] == ["reached"]


# --- shapes and numbers ----------------------------------------------------------------------------------------------


def test_bert_large_has_the_parameters_of_its_configuration() -> None:
    shapes = bert_large()
    hidden, inner = 1024, 4096
    embeddings = (30522 + 512 + 2) * hidden + 2 * hidden
    layer = 4 * (hidden + 1) * hidden + (hidden + 1) * inner + (inner + 1) * hidden + 4 * hidden
    assert sum(map(math.prod, shapes.values())) == embeddings + 24 * layer + (hidden + 1) * hidden == 335_141_888
    assert len(shapes) == 5 + 24 * 16 + 2
    assert bert_large(hidden=4, layers=1)["layer0.up.weight"] == (4096, 4)


@pytest.mark.parametrize(("count", "start"), [(0, 0), (1, 6), (7, 0), (20, 5), (14, 21)])
def test_values_repeat_and_are_the_same_on_the_gpu(stand_in: Any, count: int, start: int) -> None:
    gpu = FakeGpu(stand_in)
    values = Values(gpu, np.dtype(np.float32), 1.0, seed=0, period=7)
    taken = values.take(count, start)
    period = values.take(7, 0)
    assert taken.tolist() == [period[(start + k) % 7] for k in range(count)]
    assert sum(length for _, _, length in pieces(count, start, 7)) == count
    array = gpu.empty((count + 2,), np.float32)
    values.fill(array.data.ptr + 4, count, start)
    assert stand_in.get(array).tolist() == [7, *taken, 7]


def test_the_period_is_a_prime() -> None:
    from bench.gpu_data import PERIOD

    assert all(PERIOD % k for k in range(2, math.isqrt(PERIOD) + 1))


@pytest.mark.parametrize("name", [n for n, case in SUITE.items() if case.kind in ("device", "wall")])
def test_parameter_sets_are_beyond_the_cache(fake: FakeGpu, name: str) -> None:
    fake.l2 = 60_000_000
    case = SUITE[name]
    sets = Problem(case, fake, period=7).sets
    states = (bytes_per_element(case.optimizer, case.hyper, "float32") - 12) // 2
    per_element = states + 2 * (2 if case.dtype == "bfloat16" else 4)
    assert sets * case.elements * per_element >= 4 * fake.l2  # also of momentum, which stands beside LARS


def test_a_check_looks_everywhere_and_a_timing_at_three_places(fake: FakeGpu) -> None:
    case = Case("x", "device", "SGD", {"lr": 1.0}, {"w": (50,)}, ())
    assert Problem(case, fake, period=7).places(50, 7) == [0, 28, 49]
    assert Problem(dataclasses.replace(case, kind="check"), fake, period=7).places(50, 7) == list(range(0, 50, 7))
    assert Problem(case, fake, period=60).places(50, 50) == [0]


# --- answers ---------------------------------------------------------------------------------------------------------

ADAM = {"lr": 1e-3}
SMALL = {"w": (5, 7), "b": (3,)}


class WrongFastopt(gpu_contenders.Fastopt):
    def recipe_of(self, problem: Problem) -> Recipe:
        return Recipe("Adam", {"lr": 2e-3}, {})

    def compare(self, model: Any) -> None:
        self.recipe = super().recipe_of(self.problem)
        super().compare(model)


class WrongTorch(gpu_contenders.TorchFused):
    options: ClassVar[dict[str, bool]] = {"fused": True, "maximize": True}


class Raises(gpu_contenders.Fastopt):
    def make(self) -> Any:
        raise MemoryError("no room")


@pytest.mark.parametrize("shapes", [SMALL, {"w": (50,)}], ids=["whole", "periodic"])
def test_wrong_answers_and_errors_are_problems_and_the_others_go_on(
    fake: FakeGpu, monkeypatch: pytest.MonkeyPatch, shapes: Any
) -> None:
    pytest.importorskip("torch")
    for name, kind in {"wrong": WrongFastopt, "wrong torch": WrongTorch, "raises": Raises}.items():
        monkeypatch.setitem(CONTENDERS, name, kind)
    case = Case("x", "device", "Adam", ADAM, shapes, ("fastopt", "wrong", "wrong torch", "raises", "torch fused"))
    found = measure(case, fake, Copy(fake), 2, period=7)
    assert found["error"] is None
    assert list(found["contenders"]) == ["fastopt", "torch fused"]
    assert found["problems"]["raises"] == "MemoryError: no room"
    assert found["problems"]["wrong"].startswith("WrongAnswer: parameter of w is")
    assert found["problems"]["wrong torch"].startswith("WrongAnswer: w is off by")


def test_one_wrong_bit_in_a_state_is_found(fake: FakeGpu) -> None:
    case = Case("x", "check", "Adam", ADAM, {"w": (50,)}, ())
    contender = CONTENDERS["fastopt"](Problem(case, fake, period=7), Copy(fake))
    contender.check()
    model = contender.models[0]
    state = model.optimizer.state["w"]["exp_avg"]
    one = gpu_contenders.address(state) + 4 * 31
    fake.write(one, np.nextafter(fake.read(one, 1, np.float32), np.float32(9)))
    with pytest.raises(Exception, match=r"exp_avg of w is .* in 31; 1 of the 7 elements from 28 on differ"):
        contender.compare(model)


# --- waits -----------------------------------------------------------------------------------------------------------


def call(name: str, ts: float, cat: str = "cuda_runtime", dur: float = 1.0) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def spans() -> list[dict[str, Any]]:
    return [call(STEPS, 100, "user_annotation", 50), call(CONTROL, 200, "user_annotation", 50), {"ph": "M"}]


def test_calls_are_counted_in_the_steps_and_in_the_control_apart() -> None:
    events = [*spans(), call("cudaMemcpyAsync", 110), call("cuLaunchKernel", 120, "cuda_driver")]
    events += [call("cudaEventSynchronize", 99), call("cudaDeviceSynchronize", 210), call("aten::add", 111, "cpu_op")]
    events += [call("Memcpy DtoH (Device -> Pageable)", 130, "gpu_memcpy"), call("cuLaunchKernel", 121, "cuda_driver")]
    assert tally(events) == {
        STEPS: {"Memcpy DtoH (Device -> Pageable)": 1, "cuLaunchKernel": 2, "cudaMemcpyAsync": 1},
        CONTROL: {"cudaDeviceSynchronize": 1},
    }


@pytest.mark.parametrize(
    ("seen", "waits"),
    [
        ([], 0),
        ([call("cudaMemcpyAsync", 110), call("Memcpy HtoD (Pinned -> Device)", 111, "gpu_memcpy")], 0),
        ([call("cudaStreamSynchronize", 110), call("cudaEventSynchronize", 120)], 2),
        ([call("cuStreamSynchronize", 110, "cuda_driver")], 1),
        ([call("cudaMemcpy", 110), call("cudaMemcpyAsync", 120)], 1),
        ([call("Memcpy DtoH (Device -> Pinned)", 111, "gpu_memcpy")], 1),
    ],
)
def test_waits_are_counted(fake: FakeGpu, seen: list[Any], waits: int) -> None:
    case = Case("x", "waits", "SGD", ADAM, SMALL, ("fastopt",), bars=(Bar("fastopt", "count", 0),))
    events = [*spans(), *seen, call("cudaDeviceSynchronize", 210)]

    def trace(steps: Callable[[], object], control: Callable[[], object]) -> Any:
        steps()
        return events

    found = measure(case, fake, Copy(fake), 1, period=7, trace=trace)
    assert found["contenders"]["fastopt"]["waits"] == waits
    assert judge(case, found)[0].verdict == ("MISSED" if waits else "reached")


def test_a_wait_that_the_profiler_does_not_see_counts(fake: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "idle", lambda: True)  # all is done when the steps return
    case = Case("x", "waits", "SGD", ADAM, SMALL, ("fastopt",))
    events = [*spans(), call("cudaDeviceSynchronize", 210)]
    found = measure(case, fake, Copy(fake), 1, period=7, trace=lambda steps, control: events)
    assert found["contenders"]["fastopt"]["waits"] == 1


def test_a_profiler_that_sees_nothing_is_an_error(fake: FakeGpu) -> None:
    case = Case("x", "waits", "SGD", ADAM, SMALL, ("fastopt",))
    found = measure(case, fake, Copy(fake), 1, period=7, trace=lambda steps, control: spans())
    assert "did not see a wait" in found["error"]


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
def test_bad_arguments_are_one_line_and_status_2(
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
    assert 'bench gpu: CuPy is missing: pip install "fastopt[cuda12]"' in error
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
echo "python3 $*" >>"$CALLS"
case "$*" in *{failing}*) exit 1 ;; *"import fastopt"*) [ "{built}" = yes ] || exit 1 ;; esac
"""


def run_script(folder: Path, failing: str = "nothing at all", built: str = "yes") -> tuple[int, str, list[str]]:
    """Status and output of gpu.sh with a stand-in for Python, and the calls of that."""
    calls = folder / "calls"
    stub = folder / "python3"
    stub.write_text(STUB.format(failing=json.dumps(failing), built=built))
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
    stages = ["pip install", "import fastopt", "fastopt info", "pytest", "bench.gpu --out", "bench.gpu --show"]
    places = [next(k for k, call in enumerate(calls) if stage in call) for stage in stages]
    assert places == sorted(places)
    assert places[-1] == len(calls) - 1
    install = calls[places[0]]
    assert all(x in install for x in ("--no-build-isolation", "--no-deps", "FASTOPT_CUDA=ON"))
    assert len(list((tmp_path / "out").iterdir())) <= 8


def test_a_failing_stage_stops_nothing_and_is_the_exit_status(tmp_path: Path) -> None:
    status, said, calls = run_script(tmp_path, failing="-m pytest")
    assert status == 1
    assert "FAILED" in said
    assert any("bench.gpu --out" in call for call in calls)


def test_without_prebuilt_kernels_the_script_warns_and_builds_again(tmp_path: Path) -> None:
    _, said, calls = run_script(tmp_path, built="no")
    assert [x for call in calls for x in ("=ON", "=AUTO") if f"FASTOPT_CUDA{x}" in call] == ["=ON", "=AUTO"]
    assert "WARNING" in said
    assert any("bench.gpu --out" in call for call in calls)
