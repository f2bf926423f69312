"""``python -m bench compare A.json B.json``: what got slower beyond noise."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .cli import Refusal, number, refuse
from .results import Record, Result

CONTROLS = ("stream", "torch fused", "torch fused moving", "torch fused amp", "torch foreach", "torch loop", "numpy")
"""Contenders that do not change with fastopt. Where both runs have one, times are taken relative to it: a machine that
was busier in one run is no news."""

SIGNIFICANCE = 1e-3
"""A change is one if samples would differ so much by chance in fewer cases than this. A suite makes a hundred tests."""


@dataclass
class Change:
    """How a contender's time in a case changed.

    Attributes:
        factor: Median of B over median of A, both relative to ``control`` where there is one.
        verdict: "slower", "faster", or "" within noise.
    """

    case: str
    contender: str
    before: float
    after: float
    control: str | None
    factor: float
    verdict: str


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "compare",
        help="tell what got slower from one report to another",
        description="Compare two files that `bench step --json` or `bench report` wrote, by the samples of fastopt's "
        "contenders. Exit status 1 if anything got slower beyond noise.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument(
        "--threshold", metavar="X", default="0.05", help="smallest relative change that counts (default: %(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="show other contenders and what did not change, too")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the changes; 1 if something of ours got slower."""
    try:
        threshold = number(float, "--threshold", args.threshold)
        if not 0 <= threshold < math.inf:
            raise Refusal(f"--threshold must be in [0, inf), got {args.threshold}.")
        before, after = Record.read(args.before), Record.read(args.after)
        found = list(changes(before, after, threshold))
        if not found:
            raise Refusal(f"{args.before} and {args.after} have no case and contender in common.")
    except Refusal as refusal:
        return refuse("compare", refusal)
    console = Console()
    for key in ("processor", "threads", "instruction set", "torch", "python"):
        if before.machine.get(key) != after.machine.get(key):
            console.print(f"{key} differs: {before.machine.get(key)}, {after.machine.get(key)}")
    ours = [change for change in found if change.contender.startswith("fastopt")]
    show([c for c in (found if args.all else ours) if c.verdict or args.all], console)
    slower = [change for change in ours if change.verdict == "slower"]
    console.print(f"{len(slower)} of {len(ours)} measurements of fastopt got slower, by more than {threshold:.0%}")
    return int(bool(slower))


def changes(before: Record, after: Record, threshold: float) -> Iterator[Change]:
    """Every contender of every case that both runs have."""
    known = {result.name: result for result in before.results}
    for new in after.results:
        old = known.get(new.name)
        if old is None:
            continue
        control = next((name for name in CONTROLS if name in old.timings and name in new.timings), None)
        for name in new.timings:
            if name in old.timings:
                yield change(old, new, name, None if name in CONTROLS else control, threshold)


def change(old: Result, new: Result, name: str, control: str | None, threshold: float) -> Change:
    """How one contender's time changed."""
    from scipy.stats import mannwhitneyu  # type: ignore[import-untyped]

    def values(result: Result) -> list[float]:
        return result.ratios(name, control) if control else result.timings[name].samples

    a, b = values(old), values(new)
    factor = statistics.median(b) / statistics.median(a)
    verdict = ""
    for word, side, beyond in (
        ("slower", "less", factor > 1 + threshold),
        ("faster", "greater", factor < 1 / (1 + threshold)),
    ):
        if beyond and mannwhitneyu(a, b, alternative=side).pvalue < SIGNIFICANCE:
            verdict = word
    return Change(new.name, name, old.timings[name].median, new.timings[name].median, control, factor, verdict)


def show(found: list[Change], console: Console) -> None:
    """Print changes, the worst first."""
    if not found:
        return
    table = Table(title="changes of medians", title_justify="left")
    for heading in ("case", "contender", "A ms", "B ms", "B / A", "relative to", ""):
        table.add_column(heading, justify="right" if heading in ("A ms", "B ms", "B / A") else "left")
    for c in sorted(found, key=lambda c: -c.factor):
        times = f"{1e3 * c.before:.3f}", f"{1e3 * c.after:.3f}", f"{c.factor:.3f}"
        table.add_row(c.case, c.contender, *times, c.control or "", c.verdict)
    console.print(table)
