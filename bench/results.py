"""What a run found: every sample, in a JSON file that ``report`` and ``compare`` read."""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .case import Bar, Case
from .cli import Refusal
from .stats import quartiles

FORMAT = 1
LARGE_SPREAD = 0.10
"""Distance of the quartiles relative to the median from which a spread is called large."""
UNSTEADY = 0.5
"""The same, from which a time is nothing to compare with."""


@dataclass
class Timing:
    """Samples of one contender.

    Attributes:
        samples: Seconds of a step, round by round; the rounds of all contenders of a case are interleaved.
        temporaries: Bytes that a step allocates beside what lives on, or None where nobody could tell.
    """

    samples: list[float]
    temporaries: int | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        middle: float = statistics.median(self.samples)
        return middle

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds."""
        return quartiles(self.samples)

    @property
    def standard_error(self) -> float:
        """That of the median, relative to it, as for samples from a normal distribution of the same quartiles."""
        low, high = self.quartiles
        return 0.93 * (high - low) / (self.median * len(self.samples) ** 0.5)

    @property
    def is_spread(self) -> bool:
        """Whether the samples lie far apart."""
        return self._spread > LARGE_SPREAD

    @property
    def is_unsteady(self) -> bool:
        """Whether the samples lie so far apart that a ratio to them says nothing: of at least four."""
        return len(self.samples) >= 4 and self._spread > UNSTEADY

    @property
    def _spread(self) -> float:
        low, high = self.quartiles
        return (high - low) / self.median if self.median else 0.0


@dataclass
class Verdict:
    """What came of a bar.

    Attributes:
        text: The bar in words.
        measured: The quantity that it limits: median over rounds; None if a contender is missing.
        low, high: Its quartiles.
        reached: None if it was not measured, or one of the two was too unsteady.
    """

    text: str
    contender: str
    against: str | None
    limit: float
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    reached: bool | None = None


@dataclass
class Result:
    """What was found in one case.

    Attributes:
        name, family, optimizer, dtype, elements, model: As in the case.
        arrays: Number of arrays.
        threads: Number of threads.
        bytes: What a step must move, by the rule.
        copies: Sets of buffers that steps went round among.
        timings: By contender, in the order of the rounds.
        problems: Why other contenders have no samples: not installed, a wrong answer, not made for the case.
        verdicts: What came of the case's bars.
        skipped: Why nothing was measured, or None.
    """

    name: str
    family: str
    optimizer: str
    dtype: str
    elements: int
    arrays: int
    threads: int
    bytes: int
    copies: int = 1
    model: str | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    skipped: str | None = None

    @classmethod
    def of(cls, case: Case, threads: int, **found: Any) -> Result:
        """The result of a case, yet without samples."""
        shown = {name: getattr(case, name) for name in ("name", "family", "optimizer", "dtype", "elements", "model")}
        return cls(**shown, arrays=len(case.shapes), threads=threads, bytes=case.declared_bytes, **found)

    def speed(self, contender: str) -> float:
        """Bytes per second: what the rule must move, by the median time."""
        return self.bytes / self.timings[contender].median

    def ratio(self, contender: str, against: str) -> float:
        """Median over rounds of one contender's time over another's."""
        return statistics.median(self.ratios(contender, against))

    def ratios(self, contender: str, against: str) -> list[float]:
        """One contender's time over another's, round by round."""
        pairs = zip(self.timings[contender].samples, self.timings[against].samples, strict=True)
        return [a / b for a, b in pairs]

    def judge(self, bars: tuple[Bar, ...]) -> None:
        """Say which bars are reached."""
        self.verdicts = [self._verdict(bar) for bar in bars]

    def _verdict(self, bar: Bar) -> Verdict:
        verdict = Verdict(bar.text, bar.contender, bar.against, bar.limit)
        if bar.contender not in self.timings or (bar.against and bar.against not in self.timings):
            return verdict
        if bar.against and (self.timings[bar.contender].is_unsteady or self.timings[bar.against].is_unsteady):
            return verdict
        if bar.against is None:
            factor = {"µs": 1e6, "ms": 1e3}[bar.unit]
            values = [factor * seconds for seconds in self.timings[bar.contender].samples]
        else:
            values = self.ratios(bar.contender, bar.against)
        verdict.reached = statistics.median(values) <= bar.limit
        if bar.against == "stream":  # told as a speed
            values = [1 / value for value in values]
        verdict.measured, (verdict.low, verdict.high) = statistics.median(values), quartiles(values)
        return verdict


@dataclass
class Record:
    """A whole run.

    Attributes:
        machine: What was measured on: "processor", "cores", "memory", "cache" (bytes of the last level), "instruction
            set", versions of packages, "revision" of the sources, "date".
        suite: "quick", "full" or the cases asked for.
        results: What was found, case by case.
        seconds: How long it took.
    """

    machine: dict[str, Any]
    suite: str
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    format: int = FORMAT

    def __getitem__(self, name: str) -> Result:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def family(self, name: str) -> list[Result]:
        """Results of a family that have samples."""
        return [result for result in self.results if result.family == name and result.timings]

    def write(self, path: Path) -> None:
        """Write everything, with times to a nanosecond."""

        def rounded(value: Any) -> Any:
            return round(value, 9) if isinstance(value, float) else value

        content = dataclasses.asdict(self)
        for result in content["results"]:
            for timing in result["timings"].values():
                timing["samples"] = [rounded(sample) for sample in timing["samples"]]
        path.write_text(json.dumps(content, indent=None, separators=(",", ":"), ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Record:
        """What ``write`` wrote.

        Raises:
            Refusal: It cannot be read, or is something else.
        """
        try:
            content = json.loads(path.read_text())
        except OSError as error:
            raise Refusal(f"{path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise Refusal(f"{path} is not valid JSON: {error}.") from None
        try:
            if content["format"] != FORMAT:
                raise Refusal(f"{path} has format {content['format']!r}; this version of bench reads {FORMAT}.")
            results = [
                Result(
                    **{
                        **found,
                        "timings": {name: Timing(**timing) for name, timing in found["timings"].items()},
                        "verdicts": [Verdict(**verdict) for verdict in found["verdicts"]],
                    }
                )
                for found in content["results"]
            ]
            return cls(**{**content, "results": results})
        except (AttributeError, KeyError, TypeError) as error:
            raise Refusal(f"{path} was not written by bench: {type(error).__name__}: {error}.") from None
