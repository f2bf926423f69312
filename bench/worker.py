"""Contenders in processes of their own: two OpenMP runtimes in one process can slow each other down many times."""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import os
import time
import tracemalloc
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from .cases import Case
from .contenders import CONTENDERS, UNCHECKED

CHECK_STEPS = 3
CHANGE = -0.5
"""Factor on the gradients from one checked step to the next: with equal ones Adam's step would be that of any betas."""

SAMPLE = 4096
TOLERANCE = {"float32": 2e-6, "float64": 1e-13, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest difference from the float64 reference after three steps, relative to 1: a few units in the last place."""


class Ready(NamedTuple):
    """What a worker says when it is ready to be timed, or why it is not."""

    problem: str | None
    temporaries: int | None = None


class Worker:
    """A process with contenders."""

    def __init__(self, case: Case, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            self._process = context.Process(target=_serve, args=(theirs, case, threads), daemon=True)
            self._process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()

    def add(self, contender: str) -> Ready:
        """Set up a contender and wait until its answer is checked."""
        try:
            self._pipe.send(("add", contender))
            answer: Ready = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            answer = Ready("its process died")
        return answer

    def sample(self, contender: str) -> float:
        """Seconds of one step."""
        self._pipe.send(("sample", contender))
        seconds: float = self._pipe.recv()
        return seconds

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, case: Case, threads: int) -> None:
    running: dict[str, tuple[Any, int]] = {}
    while True:
        try:
            what, name = pipe.recv()
        except EOFError:
            return
        if what == "sample":
            pipe.send(_seconds(*running[name]))
            continue
        ready = Ready(None)
        try:
            contender, problem = _make(case, name, threads)
            if problem is None:
                running[name], ready = _calibrate(contender)
            else:
                ready = Ready(problem)
        except Exception as error:  # whatever goes wrong in a contender is told, not raised
            ready = Ready(f"{type(error).__name__}: {error}")
        pipe.send(ready)


def _calibrate(contender: Any) -> tuple[tuple[Any, int], Ready]:
    """The contender with the number of steps that a sample needs to be long enough to time."""
    seconds = min(_seconds(contender, 1) for _ in range(3))
    repeat = max(1, min(1000, math.ceil(2e-3 / seconds)))
    tracemalloc.start()
    contender.step()
    temporaries = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (contender, repeat), Ready(None, temporaries)


def _seconds(contender: Any, repeat: int) -> float:
    if repeat > 1:  # the threads of short steps have slept since the last sample; waking them is not the step
        contender.step()
    start = time.perf_counter()
    for _ in range(repeat):
        contender.step()
    return (time.perf_counter() - start) / repeat


def _make(case: Case, name: str, threads: int) -> tuple[Any, str | None]:
    kind = CONTENDERS[name]
    if kind.requires and importlib.util.find_spec(kind.requires) is None:
        version = "==2.13.0" if kind.requires == "torch" else ""
        return None, f"not installed: pip install {kind.requires}{version}"
    params, grads = _data(case)
    expected = {} if name in UNCHECKED else _expected(case, params, grads)
    contender = kind(case, params, grads, threads)
    del params, grads
    for _ in range(CHECK_STEPS):
        contender.step()
        _scale(contender.gradients, CHANGE)
    for array, want in expected.items():
        got = _sample(np.asarray(contender.parameter(array)))
        worst = float(np.max(np.abs(got.astype(np.float64) - want), initial=0.0))
        if not worst <= TOLERANCE[case.dtype]:
            return None, f"wrong answer: {array} is off by {worst:.2g}"
    _scale(contender.gradients, 1 / CHANGE**CHECK_STEPS)
    return contender, None


def _scale(arrays: Iterable[Any], factor: float) -> None:
    for array in arrays:
        array[...] = array * array.dtype.type(factor)


def _data(case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    import fastopt

    rng = np.random.default_rng(0)
    dtype = fastopt.FlatBuffer({}, case.dtype).dtype

    def draw(scale: float) -> dict[str, Any]:
        return {
            name: (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)
            for name, shape in case.shapes.items()
        }

    return draw(0.25), draw(0.01)


def _sample(array: Any) -> Any:
    """Elements from all over an array, its first and last included."""
    flat = array.reshape(-1)
    return flat[np.unique(np.linspace(0, flat.size - 1, min(SAMPLE, flat.size)).astype(np.int64))]


def _expected(case: Case, params: dict[str, Any], grads: dict[str, Any]) -> dict[str, Any]:
    """Sampled parameters after the first steps, by the float64 references of the tests."""
    from tests import reference  # the repository's own: a benchmark runs from its root

    update = reference.REFERENCES[case.optimizer]
    layerwise = case.optimizer == "LARS"
    scale, norm = 1.0 / case.step.get("grad_scale", 1.0), None
    if "max_norm" in case.step:
        squares = sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values())
        norm = math.sqrt(squares) * scale
    expected = {}
    for name, array in params.items():
        p, g = ((a if layerwise else _sample(a)).astype(np.float64) for a in (array, grads[name]))
        state = reference.initial_state(case.optimizer, p, **case.hyper)
        for t in range(1, CHECK_STEPS + 1):
            change = CHANGE ** (t - 1)
            if norm is not None:
                change *= reference.clip_coefficient(norm * abs(change), case.step["max_norm"])
            p, state = update(p, g * (scale * change), state, t, **case.hyper)
        expected[name] = _sample(p) if layerwise else p
    return expected
