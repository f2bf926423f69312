"""Measures cases: every contender in its process, answers checked, rounds interleaved until they agree."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .case import Case
from .cli import Refusal
from .contenders import CONTENDERS
from .machine import check_memory, copies
from .results import Result, Timing
from .worker import Died, Worker

PAUSE = 0.01
"""Seconds between samples: the threads of the contender before spin for a while before they sleep."""

FEWEST = 5
"""Rounds at least."""

ACCURACY = 0.01
"""Relative standard error of all medians at which no more rounds are needed."""


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: Samples of each contender at most.
        seconds: After so many no round begins, once there are FEWEST.
        fixed: Take all rounds, however well they agree.
    """

    rounds: int = 21
    seconds: float = 60.0
    fixed: bool = False


class Measurement:
    """Measures cases one after another, with processes that stay.

    Args:
        threads: Number of threads of cases that do not say.
        effort: How long to measure.
    """

    def __init__(self, threads: int, effort: Effort) -> None:
        self.threads, self.effort = threads, effort
        self._workers: dict[tuple[str, int], Worker] = {}

    def __enter__(self) -> Measurement:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.stop()

    def run(self, case: Case, say: Callable[[str], None] = lambda text: None) -> Result:
        """Measure a case; ``say`` hears what happens."""
        threads = case.threads or self.threads
        result = Result.of(case, threads, copies=copies(case))
        able = []
        for name in case.contenders:
            problem = CONTENDERS[name].missing() or CONTENDERS[name].refusal(case)
            if problem is None:
                able.append(name)
            else:
                result.problems[name] = problem
        try:
            check_memory(case, len(able))
        except Refusal as refusal:
            result.skipped = str(refusal)
            return result
        ready = self._set_up(case, able, threads, result, say)
        say(f"{case.name}: timing")
        self._time(ready, threads, result)
        for worker in self._workers.values():
            worker.clear()
        result.judge(case.bars)
        return result

    def _set_up(
        self, case: Case, names: Sequence[str], threads: int, result: Result, say: Callable[[str], None]
    ) -> list[str]:
        """Make contenders, one after another: each needs memory and time of its own. Returns those to be timed."""
        ready = []
        for name in names:
            say(f"{case.name}: checking {name}")
            try:
                found = self._worker(name, threads).add(case, name, result.copies)
            except Died as error:
                self._lose(name, threads, result, ready, str(error))
                continue
            if found.problem is not None:
                result.problems[name] = found.problem
            else:
                ready.append(name)
                result.timings[name] = Timing([], found.temporaries)
        return ready

    def _time(self, names: list[str], threads: int, result: Result) -> None:
        began = time.perf_counter()
        rounds = 0
        while names and rounds < self.effort.rounds:
            if rounds >= FEWEST:
                late = time.perf_counter() - began > self.effort.seconds
                agreed = not self.effort.fixed and all(result.timings[name].standard_error < ACCURACY for name in names)
                if late or agreed:
                    break
            for name in list(names):
                time.sleep(PAUSE)
                try:
                    result.timings[name].samples.append(self._worker(name, threads).sample(name))
                except Died as error:
                    self._lose(name, threads, result, names, str(error))
            rounds += 1

    def _worker(self, name: str, threads: int) -> Worker:
        key = CONTENDERS[name].process or name, threads
        if key not in self._workers:
            self._workers[key] = Worker(threads)
        return self._workers[key]

    def _lose(self, name: str, threads: int, result: Result, names: list[str], why: str) -> None:
        """A process died, and with it all contenders that shared it."""
        process = CONTENDERS[name].process or name
        self._workers.pop((process, threads)).stop()
        for other in [name, *names]:
            if (CONTENDERS[other].process or other) == process:
                result.problems[other] = why
                result.timings.pop(other, None)
        names[:] = [other for other in names if other not in result.problems]
