"""Measures a case on a GPU: answers first, then all contenders in turn, round by round."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

from ..stats import quartiles
from .cases import Case
from .contenders import CONTENDERS, Contender, Copy
from .data import PERIOD, Problem, WrongAnswer
from .device import Gpu
from .waits import Trace, count_waits, torch_trace

SAMPLE_SECONDS = {"device": 4e-3, "wall": 20e-3}
MOST_STEPS = 1000
TRIALS = 3
HOST_STEPS = 20


def measure(
    case: Case, gpu: Gpu, copy: Copy, rounds: int, *, period: int = PERIOD, trace: Trace = torch_trace
) -> dict[str, Any]:
    """Everything about a case, ready for JSON: samples in seconds per step, what failed, and why."""
    began = time.perf_counter()
    result: dict[str, Any] = {"error": None, "contenders": {}, "problems": {}}
    try:
        problem = Problem(case, gpu, period)
        result |= {"elements": case.elements, "arrays": len(case.shapes), "dtype": case.dtype, "sets": problem.sets}
        _compete(problem, copy, rounds, trace, result)
        del problem
    except Exception as error:  # the other cases go on
        result["error"] = describe(error)
    try:
        gpu.free()
    except Exception as error:  # of a kernel that ran before
        result["error"] = result["error"] or describe(error)
    return {**result, "seconds": time.perf_counter() - began}


def _compete(problem: Problem, copy: Copy, rounds: int, trace: Trace, result: dict[str, Any]) -> None:
    """Set up, check and measure the contenders."""
    case, ready, repeats = problem.case, dict[str, Contender](), dict[str, int]()
    for name in case.contenders:
        try:
            ready[name] = CONTENDERS[name](problem, copy)
            try:
                ready[name].check()
            except WrongAnswer as error:  # how fast it is wrong may help to find out why; no bar counts it
                result["problems"][name] = describe(error)
            repeats[name] = _warm_up(case, ready[name], copy)
        except Exception as error:  # whatever goes wrong in a contender is told, and the others go on
            result["problems"][name] = describe(error)
            ready.pop(name, None)
            problem.gpu.free()
    if case.kind == "waits":
        for name, contender in ready.items():
            result["contenders"][name] = count_waits(contender, copy, trace)
    elif case.kind in SAMPLERS:
        result["contenders"] = _time(case, ready, repeats, copy, rounds)


def describe(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _time(
    case: Case, contenders: dict[str, Contender], repeats: dict[str, int], copy: Copy, rounds: int
) -> dict[str, Any]:
    sample = SAMPLERS[case.kind]
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()  # what it costs is not the step's, and it would come to one contender and not to another
    try:
        for number in range(rounds):
            order = list(contenders.items())
            for name, contender in order if number % 2 else reversed(order):
                samples[name].append(sample(contender, repeats[name], copy))
    finally:
        gc.enable()
    return {
        name: {
            "samples": values,
            "median": statistics.median(values),
            "quartiles": quartiles(values),
            "steps per sample": repeats[name],
            "bytes": contenders[name].bytes,
        }
        for name, values in samples.items()
    }


def _warm_up(case: Case, contender: Contender, copy: Copy) -> int:
    """Take the first steps of every set; how many steps make a sample that is long enough."""
    if case.kind == "check":
        return 0
    for _ in range(2 * max(1, len(contender.models))):
        contender.step()
    contender.problem.gpu.synchronize()
    if case.kind not in SAMPLE_SECONDS:
        return HOST_STEPS
    sample = SAMPLERS[case.kind]
    seconds = min(sample(contender, TRIALS, copy) for _ in range(TRIALS))
    return max(1, min(MOST_STEPS, math.ceil(SAMPLE_SECONDS[case.kind] / seconds)))


def _device(contender: Contender, repeat: int, copy: Copy) -> float:
    """Seconds on the GPU of one of many steps, with more steps waiting there all the time."""

    def work() -> None:
        for _ in range(repeat):
            contender.step()

    return contender.problem.gpu.seconds(work, copy.run, contender.stream) / repeat


def _wall(contender: Contender, repeat: int, copy: Copy) -> float:
    """Seconds of one of many steps until all are done."""
    gpu = contender.problem.gpu
    gpu.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        contender.step()
    gpu.synchronize()
    return (time.perf_counter() - start) / repeat


def _host(contender: Contender, repeat: int, copy: Copy) -> float:
    """Median of the seconds after which a step returns, with nothing else waiting on the GPU."""
    seconds = []
    for _ in range(repeat):
        contender.problem.gpu.synchronize()
        start = time.perf_counter()
        contender.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


SAMPLERS: dict[str, Callable[[Contender, int, Copy], float]] = {"device": _device, "wall": _wall, "host": _host}
