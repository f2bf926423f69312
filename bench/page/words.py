"""Numbers as a reader wants them, and what every part of the page asks of a result."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass

from ..results import Record, Result
from ..stats import quartiles

OURS = "fastopt"
"""Contenders whose name begins so are ours."""

STREAM = "stream"
"""The contender that is no optimizer but the machine's limit."""

YARDSTICKS = (STREAM, "fastopt plain", "fastopt momentum")
"""Contenders that do less than the case asks for: what it costs is measured against them, and nobody wins or loses."""

FAMILIES = ("bars", "models", "sizes", "arrays", "threads", "rules", "dtypes", "options", "startup")
"""The order of the page; families that it does not know come last."""


def is_ours(contender: str) -> bool:
    """Whether it is fastopt, in whichever way."""
    return contender.startswith(OURS)


@dataclass(frozen=True)
class Ratio:
    """One contender's time over another's: median and quartiles over rounds."""

    median: float
    low: float
    high: float


def ratio(result: Result, contender: str, against: str) -> Ratio | None:
    """Compare two contenders of a result; None where one has no samples or is too unsteady, or a time is zero."""
    first, second = result.timings.get(contender), result.timings.get(against)
    if first is None or second is None or min(second.samples) <= 0 or first.is_unsteady or second.is_unsteady:
        return None
    if len(first.samples) == len(second.samples):
        values = result.ratios(contender, against)
        return Ratio(statistics.median(values), *quartiles(values))
    # Rounds that cannot be paired: the widest range that the quartiles allow.
    (low, high), (other_low, other_high) = first.quartiles, second.quartiles
    return Ratio(first.median / second.median, low / other_high, high / other_low)


def measured(record: Record) -> Record:
    """The record without contenders that have no samples and with families in the page's order."""

    def rank(result: Result) -> int:
        return FAMILIES.index(result.family) if result.family in FAMILIES else len(FAMILIES)

    results = []
    for result in record.results:
        timings = {name: timing for name, timing in result.timings.items() if timing.samples}
        empty = {name: "no samples" for name in result.timings if name not in timings and name not in result.problems}
        results.append(dataclasses.replace(result, timings=timings, problems={**result.problems, **empty}))
    return dataclasses.replace(record, results=sorted(results, key=rank))


def plural(number: int, noun: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def seconds(value: float) -> str:
    """A time with three digits and its unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 0.9995:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e9)} ns"


def digits(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def size(count: float) -> str:
    """Bytes in a readable unit."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= 0.9995 * factor:
            return f"{digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def elements(count: int) -> str:
    """A number of elements: 1000, 256 Ki, 25.6 M."""
    for factor, unit in ((1 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")):
        if count >= factor and count % factor == 0 and count % 1000:
            return f"{count // factor:,} {unit}"
    for factor, unit in ((10**9, "G"), (10**6, "M")):
        if count >= factor:
            return f"{float(f'{count / factor:.3g}'):g} {unit}"
    return f"{count:,}"


def speed(result: Result, contender: str) -> float | None:
    """GB/s, where the case tells what must be moved."""
    median = result.timings[contender].median
    return result.bytes / median / 1e9 if result.bytes and median > 0 else None


def of_stream(result: Result, contender: str) -> Ratio | None:
    """A contender's speed as a fraction of the stream's."""
    times = ratio(result, STREAM, contender)
    return times if contender != STREAM else None


def what(result: Result, threads: bool = True) -> str:
    """What a result measured, in a line."""
    if not result.elements:
        return result.optimizer
    arrays = "one array" if result.arrays == 1 else f"{result.arrays:,} arrays"
    parts = [f"{result.optimizer}, {elements(result.elements)} {result.dtype} in {arrays}"]
    if result.model:
        parts.append(result.model)
    if threads:
        parts.append(plural(result.threads, "thread"))
    return ", ".join(parts)
