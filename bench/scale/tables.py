"""What was measured and what the model says, as rows of text for the terminal and for docs/scale.md."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..page import words
from ..results import Timing
from .model import FLOAT, NETWORKS, PLANS, RANKS, Machine, Training

TITLES = {
    "update": "Update and gather, of gradients that are averaged already (ms, and MB a process)",
    "train": "Backward that only hands gradients over, reduction, update and gather (ms, and MB a process)",
}
OURS, THEIRS = "ShardedOptimizer", "ZeroRedundancyOptimizer"
BAR = 0.25
"""How far the model may be from the measured time of ours."""


@dataclass(frozen=True)
class Table:
    """Text in columns; those of numbers are right-aligned."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def markdown(self) -> str:
        """For a page."""
        numbers = [all(re.fullmatch(r"[\d.,–]+", row[k]) for row in self.rows) for k in range(len(self.headings))]
        lines = (" | ".join(row) for row in self.rows)
        rule = "|".join("---:" if number else "---" for number in numbers)
        return f"{self.title}:\n\n| {' | '.join(self.headings)} |\n|{rule}|\n" + "".join(f"| {x} |\n" for x in lines)


@dataclass(frozen=True)
class Step:
    """One contender on so many processes: measured, and by the model.

    Attributes:
        timing: Of the slowest process, by round.
        predicted: Seconds.
        wire: Bytes that each process received, on average, as the kernel of the system counted them.
        expected: The same by the formula.
        states: Bytes of the optimizer's states on a process.
        resident: Bytes by which a process grew.
        peak: The same in the course of a step.
    """

    table: str
    processes: int
    contender: str
    timing: Timing
    predicted: float
    wire: float
    expected: float
    states: float
    resident: float
    peak: float

    @property
    def ratio(self) -> float:
        """The model's time over the measured one."""
        return self.predicted / self.timing.median


def machines(record: dict[str, Any]) -> list[Machine]:
    """The machine as it was calibrated with each number of processes."""
    cores = record["machine"]["cores"]
    return [
        Machine.calibrated(int(world), cores, found["update"] | found["train"])
        for world, found in record["worlds"].items()
    ]


def steps(record: dict[str, Any]) -> Iterator[Step]:
    """All that were measured, by table and number of processes."""
    for table in TITLES:
        for machine in machines(record):
            for name, entry in record["worlds"][str(machine.processes)][table].items():
                if name in PLANS and "samples" in entry:
                    plan, nbytes = PLANS[name], record["nbytes"]
                    counted = {key: entry[key] for key in ("wire", "states", "resident", "peak")}
                    timing, wire = Timing(entry["samples"]), machine.wire(plan, nbytes)
                    step = machine.step(plan, nbytes)
                    yield Step(table, machine.processes, name, timing, step, expected=wire, **counted)


def measured(record: dict[str, Any]) -> list[Table]:
    """A table for each kind of step, and one of what was calibrated."""
    headings = ("processes", "contender", "ms", "quartiles", "model", "ratio", "received", "formula", "states",
                "resident", "peak")  # fmt: skip
    rows: dict[str, list[tuple[str, ...]]] = {table: [] for table in TITLES}
    for s in steps(record):
        low, high = (words.digits(1e3 * x) for x in s.timing.quartiles)
        milliseconds, megabytes = [1e3 * s.timing.median, 1e3 * s.predicted], [s.wire, s.expected]
        rows[s.table].append(
            (
                *(str(s.processes), s.contender, words.digits(milliseconds[0]), f"{low} to {high}"),
                *(words.digits(milliseconds[1]), f"{s.ratio:.2f}"),
                *(f"{x / 1e6:,.0f}" for x in (*megabytes, s.states, s.resident, s.peak)),
            )
        )
    calibrated = [
        (
            *(str(m.processes), f"{m.kernel / 1e9:.1f}"),
            *((f"{1e6 * m.latency:,.0f}", f"{1e-9 / m.per_byte:.2f}") if m.per_byte else ("–", "–")),
            *(words.digits(1e3 * m.backward), f"{1e-9 / m.fresh:.2f}"),
        )
        for m in machines(record)
    ]
    of = (
        "processes at once",
        "kernel, GB/s each",
        "latency, µs",
        "received, GB/s each",
        "backward, ms",
        "new memory, GB/s",
    )
    return [
        *(Table(title, headings, rows[table]) for table, title in TITLES.items()),
        Table("What the model was calibrated with, in the same rounds", of, calibrated),
    ]


def verdict(record: dict[str, Any]) -> str:
    """How well the model tells the times of ours, what torch's takes, and who gave a wrong answer: in sentences."""
    ours = [s for s in steps(record) if s.contender == OURS]
    said, on = ", ".join(f"{s.ratio:.2f}" for s in ours), ", ".join(str(s.processes) for s in ours)
    within = all(abs(s.ratio - 1) <= BAR for s in ours)
    of = record["machine"]
    text = f"{of['processor']}, {of['cores']} cores, on which the load was {of['load']} before, {of['date']}; "
    text += f"{record['nbytes'] / FLOAT / 1e6:.1f} M parameters. "
    text += f"The model's time of {OURS} over the measured one on {on} processes: {said}; "
    text += f"{'within' if within else 'not within'} {BAR:.0%}."
    others = {THEIRS: f" Its step takes {{}} of {THEIRS}'s", f"{THEIRS}, bucket views": ", {} of it with bucket views."}
    for other, which in others.items():
        theirs = {s.processes: s.timing.samples for s in steps(record) if s.contender == other}
        pairs = [(s.timing.samples, theirs[s.processes]) for s in ours if s.processes in theirs]
        ratios = [statistics.median(x / y for x, y in zip(a, b, strict=True)) for a, b in pairs]
        text += which.format(", ".join(f"{x:.2f}" for x in ratios))
    for world, found in record["worlds"].items():
        for name, entry in (found["update"] | found["train"]).items():
            if "problem" in entry:
                text += f" {name} on {world}: {entry['problem']}."
    return text


def predicted(training: Training) -> Table:
    """Steps on stated networks."""
    rows = []
    for network in NETWORKS:
        for ranks in RANKS[::3]:
            whole = training.nbytes
            ways = {"ring": network.ring, "direct": network.direct, "two levels": network.two_level}
            best = min(ways, key=lambda way: ways[way](ranks, training.bucket))
            small = training.times(network, ranks)
            large = training.times(network, ranks, whole / 8)
            rows.append(
                (
                    *(network.name, f"{ranks:,}", words.digits(1e3 * small["update"]), best),
                    *(words.digits(1e3 * (x["gather"])) for x in (small, large)),
                    *(words.digits(1e3 * (x["reduction"])) for x in (small, large)),
                    words.digits(training.memory_per_rank(ranks)["DDP + ShardedOptimizer"] / 1e9),
                )
            )
    headings = ("network", "ranks", "update, ms", "fastest way", "gather left, ms", "8 buckets",
                "reduction left, ms", "8 buckets", "GB a rank")  # fmt: skip
    return Table("Predicted, not measured", headings, rows)
