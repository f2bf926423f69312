"""What was found, in plain words: the first paragraph of the page, and the block of the README."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..results import Record, Result
from . import words
from .losses import Comparison, compare
from .tables import Tables
from .words import STREAM, is_ours, of_stream, ratio

TABLES = (
    {"stream": "speed, of the stream's"},
    {
        "torch fused": "÷ torch `fused=True`",
        "torch foreach": "÷ torch `foreach=True`",
        "torch loop": "÷ torch's default",
    },
)
"""Columns of the README's tables, by contender; a row stands where all of them were measured."""
FRONTS = ("fastopt.torch", "fastopt")
"""Whose figures are the main ones, on a model's shapes and else."""


def title(record: Record) -> str:
    """Of the page."""
    return f"fastopt: benchmarks on {record.machine.get('processor') or 'an unknown processor'}"


def machine_line(record: Record) -> str:
    """What was measured on, in a line, of what is known."""
    machine = record.machine
    cores, isa, memory = machine.get("cores"), machine.get("instruction set"), machine.get("memory")
    parts = [str(machine.get("processor") or "unknown processor")]
    parts += [words.plural(cores, "core")] if isinstance(cores, int) else []
    parts += [str(isa)] if isa else []
    parts += [f"{words.size(memory)} of memory"] if isinstance(memory, int | float) else []
    versions = [f"{name} {machine[name]}" for name in ("python", "numpy", "torch") if machine.get(name)]
    return ", ".join(parts + versions)


def sentences(record: Record, comparison: Comparison) -> list[str]:
    """The summary, sentence by sentence; nothing is said of what was not measured."""
    with_samples = [result for result in record.results if result.timings]
    skipped = len(Tables(record).skipped)
    names = {name for result in with_samples for name in result.timings} - {STREAM}
    minutes = record.seconds / 60
    took = f", in {minutes:.0f} minutes" if minutes >= 1.5 else ""
    said = [
        f"This run ({record.suite}) timed {words.plural(len(names), 'contender')} in "
        f"{words.plural(len(with_samples), 'case')}{took}, on {machine_line(record)}."
    ]
    if skipped:
        said.append(f"{words.plural(skipped, 'case')} had to be skipped.")
    said += filter(None, (_largest(record), _models(record)))
    said.append(_losses(comparison))
    verdicts = [verdict.reached for result in record.results for verdict in result.verdicts]
    if verdicts:
        said.append(
            f"Bars that fastopt sets itself: {verdicts.count(True)} of {len(verdicts)} reached, "
            f"{verdicts.count(False)} missed, {verdicts.count(None)} not measured."
        )
    wrong = len(Tables(record).wrong)
    if wrong:
        said.append(
            f"{words.plural(wrong, 'contender')} gave a wrong answer and {'was' if wrong == 1 else 'were'} not timed."
        )
    return said


def _largest(record: Record) -> str | None:
    result = largest(record)
    if result is None:
        return None
    front = _front(result)
    if front is None:
        return None
    said = []
    part = of_stream(result, front)
    if part:
        said.append(f"runs at {part.median:.2f} of the speed of a plain stream of the same reads and writes")
    for other, name in (("torch fused", "torch's fused step"), ("torch loop", "torch's default")):
        times = ratio(result, front, other)
        if times:
            said.append(f"takes {times.median:.2f} of the time of {name}")
    time = words.seconds(result.timings[front].median)
    speed = words.speed(result, front)
    first = f"{words.what(result)}: {front} takes {time} a step" + (f" ({words.digits(speed)} GB/s)" if speed else "")
    return ", ".join([first, *said[:-1]]) + (f" and {said[-1]}." if said else ".")


def _models(record: Record) -> str | None:
    ratios, fronts = [], set()
    for result in record.family("models"):
        front = _front(result)
        times = front and ratio(result, front, "torch fused")
        if front and times:
            ratios.append(times.median)
            fronts.add(front)
    if not ratios:
        return None
    names = " and ".join(sorted(fronts))
    where = f"On the shapes of {words.plural(len(ratios), 'real model')} {names} takes {statistics.median(ratios):.2f}"
    span = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{where}{span} of the time of torch's fused step."


def _losses(comparison: Comparison) -> str:
    if not comparison.cases:
        return "No case had both fastopt and another contender, so nothing is said of who is faster."
    cases = words.plural(comparison.cases, "case")
    if not comparison.losses:
        return f"In none of the {cases} with other contenders is one of them faster than fastopt beyond noise."
    return (
        f"In {comparison.lost} of the {cases} with other contenders, one of them is faster than fastopt beyond noise."
    )


def largest(record: Record) -> Result | None:
    """The largest single array of float32 that fastopt was measured on beside another, Adam's where there is one."""

    def rank(result: Result) -> tuple[bool, bool, int, int]:
        return result.optimizer == "Adam", STREAM in result.timings, result.elements, len(result.timings)

    found = [
        result
        for result in record.results
        if result.arrays == 1
        and result.dtype == "float32"
        and result.family not in ("threads", "options", "startup")
        and any(map(is_ours, result.timings))
    ]
    return max(found, key=rank, default=None)


def readme_block(record: Record) -> str:
    """Machine, main figures, and where others are faster, in markdown, of the record alone."""
    shown = words.measured(record)
    date = shown.machine.get("date")
    rounds = [len(timing.samples) for result in shown.results for timing in result.timings.values()]
    told = f"{min(rounds)} to {max(rounds)}" if rounds and min(rounds) < max(rounds) else f"{max(rounds, default=0)}"
    threads = shown.machine.get("threads")
    conditions = [
        *([words.plural(threads, "thread")] if isinstance(threads, int) else []),
        f"medians of {told} interleaved rounds",
        *([str(date)] if date else []),
    ]
    head = (
        f"{machine_line(shown)}; {', '.join(conditions)}. A plain stream of the same reads and writes is the limit of "
        "the memory: 1. Beside torch, below 1 fastopt takes less time. Several cases: their median, and the range."
    )
    lines = [_escaped(head)]
    for columns in TABLES:
        rows = [(label, [_cell(results, against) for against in columns]) for label, results in _readme_rows(shown)]
        complete = [f"| {label} | {' | '.join(filter(None, cells))} |" for label, cells in rows if all(cells)]
        if complete:
            title = f"| fastopt's step | {' | '.join(columns.values())} |"
            lines += ["", title, "|---|" + "--:|" * len(columns), *complete]
    losses = compare(shown).losses
    if losses:
        lines += ["", "Where another one is faster beyond noise:", ""]
        lines += [
            f"- {_escaped(words.what(loss.result, threads=False))}: {_escaped(loss.other)} takes "
            f"{1 / loss.ratio.median:.2f} of the time of {loss.ours}."
            for loss in losses
        ]
    return "\n".join([*lines, ""])


def _readme_rows(record: Record) -> Iterable[tuple[str, list[Result]]]:
    single = largest(record)
    if single:
        yield _escaped(words.what(single, threads=False)), [single]
    smallest = min(record.family("sizes"), key=lambda result: result.elements, default=None)
    if smallest and smallest is not single:
        yield _escaped(words.what(smallest, threads=False)), [smallest]
    for result in record.family("arrays"):
        if result.arrays == 1000:
            yield _escaped(words.what(result, threads=False)), [result]
    for result in record.family("models"):
        yield _escaped(words.what(result, threads=False)), [result]
    rules, dtypes = record.family("rules"), record.family("dtypes")
    names = " and ".join(dict.fromkeys(result.dtype for result in dtypes))
    for label, results in ((words.plural(len(rules), "optimizer"), rules), (f"Adam, {names}", dtypes)):
        if results:
            yield f"{label}, {words.elements(max(result.elements for result in results))} elements each", results


def _cell(results: list[Result], against: str) -> str | None:
    """The median over results of fastopt's time over another's, or of its fraction of the stream's speed; or None."""
    values = []
    for result in results:
        front = _front(result)
        part = front and (of_stream(result, front) if against == STREAM else ratio(result, front, against))
        if part:
            values.append(part.median)
    if not values:
        return None
    middle = f"{statistics.median(values):.2f}"
    span = f"{min(values):.2f} to {max(values):.2f}" if len(values) > 1 else ""
    some = f"{len(values)} of {len(results)}" if len(values) < len(results) else ""
    told = "; ".join(filter(None, (span, some)))
    return f"{middle} ({told})" if told else middle


def _front(result: Result) -> str | None:
    """The contender of ours whose figure is the main one, or None if no one of ours was measured."""
    ours = [name for name in result.timings if is_ours(name)]
    preferred = FRONTS if result.model else FRONTS[::-1]
    return next((name for name in (*preferred, *ours) if name in ours), None)


def _escaped(text: str) -> str:
    """Text of a record inside markdown, and inside a table's cell."""
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(mark, safe)
    return text
