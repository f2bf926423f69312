"""Contenders in processes of their own: two OpenMP runtimes in one process can slow each other down many times."""

from __future__ import annotations

import ctypes
import gc
import itertools
import math
import multiprocessing
import os
import time
import tracemalloc
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .case import LAYERWISE, Case
from .contenders import CONTENDERS
from .contenders.base import Arrays, Contender

CHECK_STEPS = {"RAdam": 7}
"""Steps of a checked contender, 3 where nothing is said: RAdam's first five do without its second moment."""

ROUNDING = {"RAdam": 4}
"""Factor on the tolerance: torch.compile forms RAdam's rectification from tensors of float32, where it loses digits."""

CHANGE = -0.5
"""Factor on the gradients from one checked step to the next: with equal ones Adam's step would be that of any betas."""

SAMPLE = 4096
TOLERANCE = {"float32": 8e-8, "float64": 4e-15, "float16": 8e-5, "bfloat16": 6e-4}
"""Largest difference from the float64 reference after the checked steps: some units in the last place of the largest
parameter (0.05), and small beside a step of Adam (1e-3)."""

WARM_UP = 3  # steps of every copy, before which states appear and plans settle
SHORT = 2e-3  # seconds that a sample lasts at least
PATIENCE = 600.0  # seconds for the setup of a contender that compiles itself
PERIOD = 1 << 20  # random numbers that are drawn; larger arrays repeat them


class Ready(NamedTuple):
    """What a worker says when it is ready to be timed, or why it is not."""

    problem: str | None
    temporaries: int | None = None


class Died(Exception):
    """The process is gone."""


class Worker:
    """A process that contenders share, case after case."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(threads)
        try:
            self._process = context.Process(target=_serve, args=(theirs, threads), daemon=True)
            self._process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()

    def _ask(self, *question: Any) -> Any:
        try:
            self._pipe.send(question)
            if self._pipe.poll(PATIENCE):
                return self._pipe.recv()
        except (EOFError, OSError):
            raise Died("its process died, for want of memory perhaps") from None
        self._process.kill()
        raise Died(f"no answer in {PATIENCE:.0f} s")

    def add(self, case: Case, contender: str, copies: int) -> Ready:
        """Set up a contender and wait until its answer is checked.

        Raises:
            Died: As every other method.
        """
        ready: Ready = self._ask("add", case, contender, copies)
        return ready

    def sample(self, contender: str) -> float:
        """Seconds of one step."""
        seconds: float = self._ask("sample", contender)
        return seconds

    def clear(self) -> None:
        """Forget all contenders."""
        self._ask("clear")

    def stop(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=5)
        self._process.kill()


def _serve(pipe: Connection, threads: int) -> None:
    running: dict[str, _Running] = {}
    while True:
        try:
            what, *rest = pipe.recv()
        except EOFError:
            return
        if what == "sample":
            pipe.send(running[rest[0]].sample())
        elif what == "clear":
            running.clear()
            gc.collect()
            if hasattr(ctypes.CDLL(None), "malloc_trim"):  # of the GNU C library, which otherwise keeps what it got
                ctypes.CDLL(None).malloc_trim(0)
            pipe.send(None)
        else:
            case, name, copies = rest
            try:
                running[name] = found = _Running(case, name, copies, threads)
                ready = Ready(None, found.temporaries)
            except WrongAnswer as error:
                ready = Ready(f"wrong answer: {error}")
            except Exception as error:  # whatever goes wrong in a contender is told, not raised
                ready = Ready(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            gc.collect()
            pipe.send(ready)


class WrongAnswer(Exception):
    """A contender computes something else."""


class _Running:
    """A contender that was checked, and as many copies as a case asks for, one after another in the steps."""

    def __init__(self, case: Case, name: str, copies: int, threads: int) -> None:
        kind = CONTENDERS[name]
        copies = min(copies, kind.most_copies or copies)
        members = []
        for k in range(copies):
            params, grads = data(case)
            expected = expectation(case, params, grads) if kind.checked and k == 0 else {}
            member = kind(case, params, grads, threads)
            del params, grads
            if expected:
                check(member, case, expected)
            members.append(member)
        self._steps: Iterator[Contender] = itertools.cycle(members)
        for _ in range(WARM_UP * (copies - 1) + 1):  # the checked one is warm
            next(self._steps).step()
        seconds = self._seconds(1)
        if seconds < SHORT:
            seconds = min(seconds, self._seconds(10))
        self._repeat = max(1, min(1000, math.ceil(SHORT / max(seconds, 1e-9))))
        self.temporaries = temporaries(next(self._steps))

    def sample(self) -> float:
        """Seconds of a step."""
        if self._repeat > 1:  # the threads of short steps have slept since the last sample; waking them is not the step
            next(self._steps).step()
        return self._seconds(self._repeat)

    def _seconds(self, repeat: int) -> float:
        steps = self._steps
        start = time.perf_counter()
        for _ in range(repeat):
            next(steps).step()
        return (time.perf_counter() - start) / repeat


def check(contender: Contender, case: Case, expected: dict[str, NDArray[Any]]) -> None:
    """Take the checked steps, and compare with what should come of them.

    Raises:
        WrongAnswer: It does not.
    """
    steps, tolerance = checked_steps(case), TOLERANCE[case.dtype] * ROUNDING.get(case.optimizer, 1)
    for _ in range(steps):
        contender.step()
        contender.scale_gradients(CHANGE)
    for array, want in expected.items():
        got = _sampled(np.asarray(contender.parameter(array)))
        worst = float(np.max(np.abs(got.astype(np.float64) - want), initial=0.0))
        if not worst <= tolerance:
            raise WrongAnswer(f"{array} is off by {worst:.2g}")
    contender.scale_gradients(1 / CHANGE**steps)


def checked_steps(case: Case) -> int:
    """How many steps are checked."""
    return CHECK_STEPS.get(case.optimizer, 3)


def data(case: Case) -> tuple[Arrays, Arrays]:
    """Parameters and gradients."""
    if case.dtype == "bfloat16":
        import ml_dtypes  # noqa: F401 - tells NumPy of bfloat16
    dtype = np.dtype(case.dtype)
    rng = np.random.default_rng(0)

    def draw(scale: float) -> Arrays:
        drawn = rng.standard_normal(min(PERIOD, max(case.elements, 1)), np.float32) * np.float32(scale)
        numbers, arrays, start = drawn.astype(dtype), {}, 0
        for name, shape in case.shapes.items():
            arrays[name] = np.empty(shape, dtype)
            flat, filled = arrays[name].reshape(-1), 0
            while filled < flat.size:
                piece = numbers[start : start + flat.size - filled]
                flat[filled : filled + piece.size] = piece
                filled, start = filled + piece.size, (start + piece.size) % numbers.size
        return arrays

    return draw(0.01), draw(0.01)


def _sampled(array: Any) -> Any:
    """Elements from all over an array, its first and last included."""
    flat = array.reshape(-1)
    return flat[np.unique(np.linspace(0, flat.size - 1, min(SAMPLE, flat.size)).astype(np.int64))]


def expectation(case: Case, params: Arrays, grads: Arrays) -> dict[str, NDArray[Any]]:
    """Sampled parameters after the checked steps, by the float64 references of the tests."""
    from tests.support import reference  # the repository's own: a benchmark runs from its root

    update = reference.REFERENCES[case.optimizer]
    layerwise = case.optimizer in LAYERWISE
    scale, norm = 1.0 / case.step.get("grad_scale", 1.0), None
    if "max_norm" in case.step:
        squares = sum(float(np.sum(np.square(g, dtype=np.float64))) for g in grads.values())
        norm = math.sqrt(squares) * scale
    expected = {}
    for name, array in params.items():
        p, g = ((a if layerwise else _sampled(a)).astype(np.float64) for a in (array, grads[name]))
        state = reference.initial_state(case.optimizer, p, **case.hyper)
        for t in range(1, checked_steps(case) + 1):
            change = CHANGE ** (t - 1)
            if case.step.get("zero_grads") and t > 1:
                change = 0.0
            if norm is not None:
                change *= reference.clip_coefficient(norm * abs(change), case.step["max_norm"])
            p, state = update(p, g * (scale * change), state, t, **case.hyper)
        expected[name] = _sampled(p) if layerwise else p
    return expected


def temporaries(contender: Contender) -> int:
    """Bytes that a step allocates beside what lives on: what Python traces, or by how much the process grows."""
    tracemalloc.start()
    contender.step()
    traced = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the largest size so far is that of now
        contender.step()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        grown = 1024 * (int(status["VmHWM"].split()[0]) - int(status["VmRSS"].split()[0]))
    except (OSError, KeyError, ValueError):
        grown = 0
    return max(traced, grown)
