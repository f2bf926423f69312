"""The tables of the page: what is in their rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..results import Record, Result, Timing, Verdict
from . import words
from .words import is_ours, of_stream

MISSING = "not installed"
WRONG = "wrong answer"


@dataclass(frozen=True)
class Row:
    """One contender of one result."""

    result: Result
    contender: str
    timing: Timing

    @property
    def ours(self) -> bool:
        """Whether it is fastopt."""
        return is_ours(self.contender)

    @property
    def speed(self) -> float | None:
        """GB/s."""
        return words.speed(self.result, self.contender)

    @property
    def of_stream(self) -> float | None:
        """Fraction of the stream's speed."""
        part = of_stream(self.result, self.contender)
        return part.median if part else None


class Tables:
    """Everything that the page lists."""

    def __init__(self, record: Record) -> None:
        self.record = record

    @property
    def rows(self) -> Iterator[Row]:
        """All contenders of all results."""
        for result in self.record.results:
            for contender, timing in result.timings.items():
                yield Row(result, contender, timing)

    @property
    def bars(self) -> list[tuple[Result, Verdict]]:
        """All bars: missed ones first, then what was not measured, then reached ones."""
        found = [(result, verdict) for result in self.record.results for verdict in result.verdicts]
        order = (False, None, True)
        return sorted(found, key=lambda pair: order.index(pair[1].reached))

    @property
    def missing(self) -> list[tuple[str, str, int]]:
        """Contenders that were not installed, what installs them, and the number of their cases."""
        cases: dict[tuple[str, str], int] = defaultdict(int)
        for _, contender, why in self._problems(MISSING):
            cases[contender, why] += 1
        return [(contender, why, number) for (contender, why), number in cases.items()]

    @property
    def wrong(self) -> list[tuple[Result, str, str]]:
        """Contenders that compute something else, and by how much."""
        return list(self._problems(WRONG))

    @property
    def refused(self) -> list[tuple[str, list[str], str]]:
        """Other contenders without samples, the cases, and why."""
        cases: dict[tuple[str, str], list[str]] = defaultdict(list)
        for result in self.record.results:
            for contender, why in result.problems.items():
                if not why.startswith((MISSING, WRONG)):
                    cases[contender, why].append(result.name)
        return [(contender, names, why) for (contender, why), names in cases.items()]

    @property
    def skipped(self) -> list[Result]:
        """Cases of which nothing was measured."""
        return [result for result in self.record.results if result.skipped is not None]

    def _problems(self, kind: str) -> Iterator[tuple[Result, str, str]]:
        for result in self.record.results:
            for contender, why in result.problems.items():
                if why.startswith(kind):
                    yield result, contender, why.removeprefix(kind).removeprefix(":").strip()


def verdict_text(verdict: Verdict) -> str:
    """A bar's verdict in a word."""
    return {True: "reached", False: "missed", None: "not measured"}[verdict.reached]


def machine(record: Record) -> list[tuple[str, str]]:
    """What was measured on, entry by entry."""
    entries: list[tuple[str, str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for inner, found in value.items():
                add(str(inner), found)
        elif value is None:
            entries.append((name, "unknown"))
        elif name in ("memory", "cache") and isinstance(value, int | float):
            entries.append((name, words.size(value)))
        elif isinstance(value, list | tuple):
            entries.append((name, ", ".join(map(str, value))))
        else:
            entries.append((name, str(value)))

    add("", record.machine)
    return entries
