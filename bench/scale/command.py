"""``python -m bench scale``: a step on several processes of this machine, and a model of it for thousands of ranks."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console
from rich.table import Table as Shown

from .. import machine
from ..cli import Refusal, number, refuse, writable
from ..report import update_readme
from ..suite import size as elements

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- bench: begin (python -m bench scale --docs: {}) -->\n"
SIZE = "50.4M"
WORLDS = (1, 2, 4)
HELD = 66
"""Bytes for each parameter on a process, and on one alone half as much again: contenders of a table live at once."""
WIDTH = 150  # of the tables where output goes into a file


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "scale",
        help="measure a step on several processes, and predict it for thousands of ranks",
        description="Measure a step of AdamW on 1, 2 and 4 processes of this machine (gloo, one thread each): sharded "
        "by fastopt, by torch, by FSDP2, and under DDP; interleaved, answers checked before. A model, calibrated in "
        "the same run, predicts these times, and those of 8 to 4,096 ranks on stated networks. Writes scale.json and "
        "pictures; takes three to six minutes.",
    )
    parser.add_argument("--size", metavar="N", default=SIZE, help="parameters: 2M, 50.4M (default: %(default)s)")
    parser.add_argument(
        "--rounds", metavar="N", default="5", help="of steps with backward (default: 5); twice as many without"
    )
    parser.add_argument("--processes", metavar="N,N", default=",".join(map(str, WORLDS)), help="default: %(default)s")
    parser.add_argument("--out", metavar="DIR", default="bench/out", help="folder of the files (default: %(default)s)")
    parser.add_argument("--from", dest="source", type=Path, metavar="JSON", help="measure nothing, show this file")
    parser.add_argument("--docs", action="store_true", help="also write the figures into docs/ and bench/results/")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Measure, or read what was measured, and write."""
    try:
        from . import charts, measure, model, tables
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("bench", "fastopt"):
            raise
        return refuse(
            "scale", f'needs {error.name}, which is not installed; pip install -e ".[bench,torch]" brings it.'
        )
    try:
        size, rounds, worlds = _checked(args)
        record = _read(args.source) if args.source else None
        folder = writable(Path(args.out))
        if record is None:
            began = time.perf_counter()
            of = machine.describe(1) | {"load": round(os.getloadavg()[0], 1)}
            settings = measure.Settings(size, {"update": 2 * rounds, "train": rounds})
            found = measure.measure(settings, worlds)
            nbytes = next(iter(found.values()))["train"]["backward alone"]["moved"]
            seconds = time.perf_counter() - began
            record = {"machine": of, "nbytes": nbytes, "seconds": round(seconds), "worlds": found}
            (folder / "scale.json").write_text(json.dumps(record) + "\n")
    except Refusal as refusal:
        return refuse("scale", refusal)
    training, steps = model.Training(), list(tables.steps(record))
    shown = [*tables.measured(record), tables.predicted(training)]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for table in shown:
        console.print(_shown(table))
    print(tables.verdict(record))
    pictures = charts.write(steps, training, folder)
    if args.docs:
        charts.write(steps, training, ROOT / "docs")
        (ROOT / "bench" / "results" / "scale.json").write_text(json.dumps(record) + "\n")
        *measured, predicted = (table.markdown() for table in shown)
        for what, block in {"measured": [tables.verdict(record) + "\n", *measured], "predicted": [predicted]}.items():
            update_readme(ROOT / "docs" / "scale.md", "\n" + "\n".join(block) + "\n", BEGIN.format(what))
    for path in (folder / "scale.json", *pictures):
        if path.exists():
            print(path)
    return int(any("problem" in e for f in record["worlds"].values() for t in f.values() for e in t.values()))


def _checked(args: argparse.Namespace) -> tuple[int, int, tuple[int, ...]]:
    """Parameters, rounds, numbers of processes."""
    try:
        size = elements(args.size)
    except ValueError:
        raise Refusal(f"--size must be a number like 2M or 50M, got {args.size!r}.") from None
    rounds = number(int, "--rounds", args.rounds)
    worlds = tuple(number(int, "--processes", text) for text in args.processes.split(","))
    if size < 1000:
        raise Refusal("--size must be at least 1k.")
    if rounds < 1 or min(worlds) < 1:
        raise Refusal("--rounds and --processes must be at least 1.")
    need, free = HELD * size * (max(worlds) + 0.5), psutil.virtual_memory().available
    if need > free and not args.source:
        raise Refusal(
            f"{args.size} parameters on {max(worlds)} processes need about {need / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free."
        )
    return size, rounds, worlds


def _read(path: Path) -> Any:
    try:
        record = json.loads(path.read_text())
        if isinstance(record, dict) and {"machine", "nbytes", "seconds", "worlds"} <= record.keys():
            return record
    except OSError as error:
        raise Refusal(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        pass
    raise Refusal(f"{path} was not written by bench scale.")


def _shown(table: Any) -> Shown:
    shown = Shown(title=table.title, title_justify="left")
    for heading in table.headings:
        name = heading in ("contender", "network", "fastest way")
        shown.add_column(heading, justify="left" if name else "right", no_wrap=name or heading == "quartiles")
    for row in table.rows:
        shown.add_row(*row)
    return shown
