"""The benchmark for GPUs without one: bars, numbers, answers and rows; and a whole run over the stand-in of the tests.

What only a GPU can do is in `Gpu` (bench/gpu/device.py), and `FakeGpu` does it over host memory.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("cupy")

from gpu_fake import ADAM, SMALL, FakeGpu, Raises

import fastopt
from bench.gpu import contenders as gpu_contenders
from bench.gpu import others
from bench.gpu.cases import OTHERS, SUITE, Bar, Case, bytes_per_element, judge
from bench.gpu.contenders import CONTENDERS, Copy
from bench.gpu.data import Problem, Recipe, Values, pieces
from bench.gpu.measure import measure
from bench.gpu.waits import CONTROL, STEPS, tally

pytestmark = pytest.mark.full


# --- bars ------------------------------------------------------------------------------------------------------------


def test_cases_and_their_bars_name_contenders_that_exist():
    for case in SUITE.values():
        assert {name for b in case.bars for name in (b.contender, b.against) if name} <= set(case.contenders)
        assert set(case.contenders) <= set(CONTENDERS)
    assert {SUITE[f"{name}-1g"].elements for name in ("adam", "momentum", "sgd-bfloat16", "norm")} == {10**9}
    assert SUITE["norm-64-arrays"].elements == 10**9
    assert SUITE["bfloat16-beyond-2^31"].elements == 2**31 + 17


def test_bytes_are_those_of_the_states_that_optimizers_have():
    momentum = {"momentum": 0.9}
    assert bytes_per_element("SGD", momentum, "float32") == 20
    assert bytes_per_element("Adam", {}, "float32") == bytes_per_element("AdamW", {}, "float32") == 28
    assert bytes_per_element("Adam", {}, "bfloat16") == 22
    for case in SUITE.values():
        opt = getattr(fastopt, case.optimizer)([np.ones((1, 1), np.float32)], **case.hyper)
        states = sum(isinstance(value, np.ndarray) for value in opt.state["0"].values())
        assert bytes_per_element(case.optimizer, case.hyper, "float32") == 12 + 8 * states


def result(**samples):
    contenders = {name: {"samples": values, "bytes": 100} for name, values in samples.items()}
    return {"error": None, "problems": {}, "contenders": contenders}


def case_with(*bars):
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
def test_a_bar_is_judged_by_the_median_of_rounds(bar, measured, verdict):
    (found,) = judge(case_with(bar), result(a=[1.0, 4.0, 12.0], b=[1.0, 2.0, 4.0]))
    assert (found.measured, found.verdict) == (pytest.approx(measured), verdict)
    assert found.spread is not None
    assert found.spread[0] < measured < found.spread[1]


def test_bytes_count_in_a_fraction():
    found = result(a=[1.0], b=[1.0])
    found["contenders"]["b"]["bytes"] = 200
    assert judge(case_with(Bar("a", "fraction", 0.5, "b")), found)[0].measured == 0.5


def test_what_failed_or_did_not_run_is_a_row():
    failed, measured = {**result(), "error": "KeyError: 1"}, result(a=[1.0], b=[1.0])
    without = {**result(a=[1.0]), "problems": {"b": "OutOfMemoryError: 9"}}
    for found, with_bar, without_bars in (
        (None, ["not measured"], ["not measured"]),
        (failed, ["error: KeyError: 1"], ["error: KeyError: 1"]),
        (without, ["not measured", "error: OutOfMemoryError: 9"], ["error: OutOfMemoryError: 9"]),
        (measured, ["reached"], ["reached"]),
    ):
        assert [v.verdict for v in judge(case_with(Bar("a", "ratio", 2.0, "b")), found)] == with_bar
        assert [v.verdict for v in judge(case_with(), found)] == without_bars


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "start"), [(0, 0), (1, 6), (7, 0), (20, 5), (14, 21)])
def test_values_repeat_and_are_the_same_on_the_gpu(stand_in, count, start):
    gpu = FakeGpu(stand_in)
    values = Values(gpu, np.dtype(np.float32), 1.0, seed=0, period=7)
    taken = values.take(count, start)
    period = values.take(7, 0)
    assert taken.tolist() == [period[(start + k) % 7] for k in range(count)]
    assert sum(length for _, _, length in pieces(count, start, 7)) == count
    array = gpu.empty((count + 2,), np.float32)
    values.fill(array.data.ptr + 4, count, start)
    assert stand_in.get(array).tolist() == [7, *taken, 7]


@pytest.mark.parametrize("name", [n for n, case in SUITE.items() if case.kind in ("device", "wall")])
def test_parameter_sets_are_beyond_the_cache(fake, name):
    fake.l2 = 60_000_000
    case = SUITE[name]
    sets = Problem(case, fake, period=7).sets
    states = (bytes_per_element(case.optimizer, case.hyper, "float32") - 12) // 2
    per_element = states + 2 * (2 if case.dtype == "bfloat16" else 4)
    assert sets * case.elements * per_element >= 4 * fake.l2  # also of momentum, which stands beside LARS


# --- answers ---------------------------------------------------------------------------------------------------------


class WrongFastopt(gpu_contenders.Fastopt):
    def recipe_of(self, problem):
        return Recipe("Adam", {"lr": 2e-3}, {})

    def compare(self, model):
        self.recipe = super().recipe_of(self.problem)
        super().compare(model)


class WrongTorch(gpu_contenders.TorchFused):
    options: ClassVar[dict[str, bool]] = {"fused": True, "maximize": True}


@pytest.mark.parametrize("shapes", [SMALL, {"w": (50,)}], ids=["whole", "periodic"])
def test_wrong_answers_and_errors_are_problems_and_the_others_go_on(fake, monkeypatch, shapes):
    pytest.importorskip("torch")
    for name, kind in {"wrong": WrongFastopt, "wrong torch": WrongTorch, "raises": Raises}.items():
        monkeypatch.setitem(CONTENDERS, name, kind)
    bars = Bar("fastopt", "ratio", 1e9, "torch fused"), Bar("fastopt", "ratio", 1e9, "wrong"), Bar("raises", "ratio", 1)
    names = ("fastopt", "wrong", "wrong torch", "raises", "torch fused")
    case = Case("x", "device", "Adam", ADAM, shapes, names, bars=bars)
    found = measure(case, fake, Copy(fake), 2, period=7)
    assert found["error"] is None
    assert list(found["contenders"]) == ["fastopt", "wrong", "wrong torch", "torch fused"]
    assert [v.verdict for v in judge(case, found)][:3] == ["reached", "WRONG ANSWER", "not measured"]
    assert found["problems"]["raises"] == "MemoryError: no room"
    assert found["problems"]["wrong"].startswith("WrongAnswer: parameter of w is")
    assert found["problems"]["wrong torch"].startswith("WrongAnswer: w is off by")


def test_one_wrong_bit_in_a_state_is_found(fake):
    case = Case("x", "check", "Adam", ADAM, {"w": (50,)}, ())
    contender = CONTENDERS["fastopt"](Problem(case, fake, period=7), Copy(fake))
    contender.check()
    model = contender.models[0]
    state = model.optimizer.state["w"]["exp_avg"]
    one = gpu_contenders.address(state) + 4 * 31
    fake.write(one, np.nextafter(fake.read(one, 1, np.float32), np.float32(9)))
    with pytest.raises(Exception, match=r"exp_avg of w is .* in 31; 1 of the 7 elements from 28 on differ"):
        contender.compare(model)


# --- other libraries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [others.eager, others.functional])
def test_adam_of_cupy_is_adam(rule):
    # CuPy computes only on a GPU: the same lines compute on NumPy's arrays.
    rng = np.random.default_rng(0)
    p, m, v = rng.standard_normal(50, np.float32), np.zeros(50, np.float32), np.zeros(50, np.float32)
    params = {"w": p.copy()}
    adam = fastopt.Adam(params, lr=1e-3)
    for t in range(1, 4):
        g = rng.standard_normal(50, np.float32)
        p, m, v = rule(np.sqrt, p, g, m, v, *others.scalars(t, 1e-3))
        adam.step({"w": g})
    assert p.dtype == m.dtype == v.dtype == np.float32
    assert np.abs(p - params["w"]).max() < 1e-6


def test_what_is_not_installed_is_told_and_is_no_error(fake, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda package: None)
    assert set(OTHERS) == set(others.OTHERS) <= set(CONTENDERS)
    case = Case("x", "device", "Adam", ADAM, {"w": (50,)}, ("fastopt", *OTHERS))
    found = measure(case, fake, Copy(fake), 2, period=7)
    assert found["error"] is None
    assert set(found["contenders"]) == {"fastopt", "torch loop"}
    said = {verdict.bar: verdict.verdict for verdict in judge(case, found)}
    assert said.keys() == set(OTHERS) - {"torch loop"}
    assert all(verdict.startswith("not installed: ") and "pip install" in verdict for verdict in said.values())


@pytest.mark.parametrize(("name", "right"), [("Adam", True), ("AdamW", False)])
def test_a_library_beside_torch_is_checked(fake, monkeypatch, name, right):
    torch = pytest.importorskip("torch")

    class Stand(others.Library):
        package, install = "torch", ""
        options: ClassVar[dict[str, Any]] = {"weight_decay": 0.0 if right else 0.5}

        def kind(self):
            return getattr(torch.optim, name)

    monkeypatch.setitem(CONTENDERS, "stand", Stand)
    case = Case("x", "device", "Adam", ADAM, SMALL, ("stand",))
    problems = measure(case, fake, Copy(fake), 2, period=7)["problems"]
    assert not problems if right else problems["stand"].startswith("WrongAnswer: ")
    other = dataclasses.replace(case, optimizer="AdamW")
    assert "Adam on float32 with an lr" in measure(other, fake, Copy(fake), 2, period=7)["problems"]["stand"]


# --- waits -----------------------------------------------------------------------------------------------------------


def call(name, ts, cat="cuda_runtime"):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": 50 if cat == "user_annotation" else 1.0}


SPANS = [call(STEPS, 100, "user_annotation"), call(CONTROL, 200, "user_annotation"), {"ph": "M"}]


def test_calls_are_counted_in_the_steps_and_in_the_control_apart():
    events = [*SPANS, call("cudaMemcpyAsync", 110), call("cuLaunchKernel", 120, "cuda_driver")]
    events += [call("cudaEventSynchronize", 99), call("cudaDeviceSynchronize", 210), call("aten::add", 111, "cpu_op")]
    events += [call("Memcpy DtoH (Device -> Pageable)", 130, "gpu_memcpy"), call("cuLaunchKernel", 121, "cuda_driver")]
    assert tally(events) == {
        STEPS: {"Memcpy DtoH (Device -> Pageable)": 1, "cuLaunchKernel": 2, "cudaMemcpyAsync": 1},
        CONTROL: {"cudaDeviceSynchronize": 1},
    }


@pytest.mark.parametrize(
    ("seen", "idle", "waits"),
    [
        ([], False, 0),
        ([], True, 1),  # all is done when the steps return: they waited, unseen by the profiler
        ([call("cudaMemcpyAsync", 110), call("Memcpy HtoD (Pinned -> Device)", 111, "gpu_memcpy")], False, 0),
        ([call("cudaStreamSynchronize", 110), call("cudaEventSynchronize", 120)], False, 2),
        ([call("cuStreamSynchronize", 110, "cuda_driver")], False, 1),
        ([call("cudaMemcpy", 110), call("cudaMemcpyAsync", 120)], False, 1),
        ([call("Memcpy DtoH (Device -> Pinned)", 111, "gpu_memcpy")], False, 1),
    ],
)
def test_waits_are_counted(fake, monkeypatch, seen, idle, waits):
    monkeypatch.setattr(fake, "idle", lambda: idle)
    case = Case("x", "waits", "SGD", ADAM, SMALL, ("fastopt",), bars=(Bar("fastopt", "count", 0),))
    events = [*SPANS, *seen, call("cudaDeviceSynchronize", 210)]
    found = measure(case, fake, Copy(fake), 1, period=7, trace=lambda steps, control: (steps(), events)[1])
    assert found["contenders"]["fastopt"]["waits"] == waits
    assert judge(case, found)[0].verdict == ("MISSED" if waits else "reached")


def test_a_profiler_that_sees_nothing_is_an_error(fake):
    case = Case("x", "waits", "SGD", ADAM, SMALL, ("fastopt",))
    found = measure(case, fake, Copy(fake), 1, period=7, trace=lambda steps, control: SPANS)
    assert "did not see a wait" in found["error"]
