"""``python -m bench report``: runs a suite and writes what was found as JSON and as a page to look at."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from . import machine, startup, step
from .case import Case
from .cli import Refusal, number, refuse, writable
from .measure import Effort
from .results import Record
from .suite import QUICK, SLOW, SUITE

QUICK_EFFORT = Effort(rounds=15, seconds=1.0)
FULL_EFFORT = Effort(rounds=31, seconds=30.0)

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench: begin (python -m bench report --readme) -->\n", "<!-- bench: end -->\n"


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "report",
        help="run a suite and write a page with tables and plots",
        description="Run a suite of cases, interleaved and checked, and write every sample (report.json) and a page to "
        "look at (report.html). The quick suite takes three to six minutes on two cores.",
    )
    parser.add_argument("--full", action="store_true", help="every case and contender: an hour, and much memory")
    parser.add_argument("--threads", metavar="N", default=str(step.THREADS), help="of everybody (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", default="bench/out", help="folder of the files (default: %(default)s)")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="measure nothing, show this file")
    parser.add_argument("--readme", action="store_true", help="also write the figures into README.md and docs/")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, or read what was measured, and write."""
    try:
        from . import page
    except ModuleNotFoundError as error:
        return refuse("report", f'needs {error.name}, which is not installed; pip install -e ".[bench]" brings it.')
    try:
        threads = number(int, "--threads", args.threads)
        if threads < 1:
            raise Refusal("--threads must be at least 1.")
        record = Record.read(args.source) if args.source else None
        folder = writable(Path(args.out))
    except Refusal as refusal:
        return refuse("report", refusal)
    if record is None:
        record = measured(args.full, threads, Console())
        record.write(folder / "report.json")
    page.write_page(record, folder / "report.html")
    pictures = page.write_pictures(record, folder)
    if args.readme:
        page.write_pictures(record, ROOT / "docs")
        record.write(ROOT / "bench" / "results" / "cpu.json")
        update_readme(ROOT / "README.md", page.readme_block(record))
    for path in (folder / "report.json", folder / "report.html", *pictures):
        if path.exists():
            print(path)
    return 0


def measured(full: bool, threads: int, console: Console) -> Record:
    """Run a suite."""
    began = time.perf_counter()
    record = Record(machine.describe(threads), "full" if full else "quick")
    step.measure(record, cases(full), threads, FULL_EFFORT if full else QUICK_EFFORT, console)
    record.results += startup.measure(11 if full else 3)
    for result in record.results[-2:]:
        step.show(result, console)
    record.seconds = time.perf_counter() - began
    return record


def cases(full: bool) -> list[Case]:
    """Those of a suite: the quick one leaves out contenders that compile for a minute."""
    if full:
        return list(SUITE.values())
    return [
        dataclasses.replace(SUITE[name], contenders=tuple(n for n in SUITE[name].contenders if n not in SLOW))
        for name in QUICK
    ]


def update_readme(path: Path, block: str, begin: str = BEGIN) -> None:
    """Put a block of figures between the marks."""
    text = path.read_text()
    head, rest = text.split(begin)
    _, tail = rest.split(END, 1)
    path.write_text(head + begin + block + END + tail)
