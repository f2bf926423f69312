"""``python -m bench step``: times one optimizer step, contenders interleaved in one run."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import startup
from .cases import SUITE, Bar, Case
from .contenders import CONTENDERS
from .stats import quartiles
from .worker import Worker

PAUSE = 0.01
"""Seconds between samples: the threads of the contender before spin for a while before they sleep."""


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("step", help="time one optimizer step against other implementations")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(SUITE)}, startup; all by default")
    parser.add_argument("--rounds", type=int, default=21, help="samples of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen cases."""
    names = args.cases or [*SUITE, "startup"]
    unknown = [name for name in names if name not in SUITE and name != "startup"]
    problem = None
    if unknown:
        problem = f"there is no case {unknown[0]!r}; cases are {', '.join(SUITE)}, startup"
    elif args.rounds < 1 or args.threads < 1:
        problem = "--rounds and --threads must be at least 1"
    elif args.json and not args.json.parent.is_dir():
        problem = f"the folder of {args.json} does not exist"
    if problem:
        print(f"bench step: {problem}", file=sys.stderr)
        return 2
    console = Console()
    record: dict[str, Any] = {"machine": machine(args.threads), "cases": {}}
    for name in names:
        if name == "startup":
            record["cases"][name] = startup.measure(console)
            continue
        samples, problems, temporaries = measure(SUITE[name], args.rounds, args.threads, console)
        show(SUITE[name], samples, problems, temporaries, console)
        record["cases"][name] = {"samples": samples, "problems": problems, "temporaries": temporaries}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(
    case: Case, rounds: int, threads: int, console: Console
) -> tuple[dict[str, list[float]], dict[str, str], dict[str, int | None]]:
    """Samples of every contender in seconds, why others have none, and the bytes each allocates in a step."""
    workers: dict[str, Worker] = {}
    problems, temporaries = {}, {}
    processes: dict[str, Worker] = {}
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console, transient=True
    )
    with progress:
        task = progress.add_task(f"{case.name}: checking answers", total=rounds + len(case.contenders))
        for contender in case.contenders:  # one after another: each needs memory and time to set up
            process = CONTENDERS[contender].process or contender
            if process not in processes:
                processes[process] = Worker(case, threads)
            ready = processes[process].add(contender)
            if ready.problem is None:
                workers[contender], temporaries[contender] = processes[process], ready.temporaries
            else:
                problems[contender] = ready.problem
            progress.advance(task)
        progress.update(task, description=f"{case.name}: timing")
        samples: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                time.sleep(PAUSE)
                samples[name].append(worker.sample(name))
            progress.advance(task)
    for worker in processes.values():
        worker.stop()
    return samples, problems, temporaries


def ratios(samples: dict[str, list[float]], bar: Bar) -> list[float]:
    """The bar's quantity in every round."""
    if bar.against is None:
        return [1e6 * seconds for seconds in samples[bar.contender]]
    return [a / b for a, b in zip(samples[bar.contender], samples[bar.against], strict=True)]


def show(
    case: Case,
    samples: dict[str, list[float]],
    problems: dict[str, str],
    temporaries: dict[str, int | None],
    console: Console,
) -> None:
    """Print times and bars."""
    table = Table(title=f"{case.name}: {case.elements:,} {case.dtype} in {len(case.shapes):,} arrays")
    for heading in ("contender", "median ms", "quartiles", "temporaries"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for name, values in samples.items():
        low, high = quartiles(values)
        middle, spread = f"{1e3 * statistics.median(values):.3f}", f"{1e3 * low:.3f} to {1e3 * high:.3f}"
        table.add_row(name, middle, spread, size(temporaries[name]))
    for name, problem in problems.items():
        table.add_row(name, problem, "", "")
    console.print(table)
    for bar in case.bars:
        if bar.contender not in samples or (bar.against and bar.against not in samples):
            console.print(f"  not measured: {bar.text}")
            continue
        values = ratios(samples, bar)
        middle = statistics.median(values)
        low, high = quartiles(values)
        if bar.against == "stream":
            middle, low, high = 1 / middle, 1 / high, 1 / low
        verdict = "reached" if statistics.median(ratios(samples, bar)) <= bar.limit else "MISSED"
        console.print(f"  {verdict}: {bar.text}: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


def size(count: int | None) -> str:
    """Bytes in a readable unit."""
    if count is None:
        return ""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def machine(threads: int) -> dict[str, Any]:
    """What was measured on."""
    import numpy as np

    import fastopt
    from fastopt import _backend

    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "fastopt": fastopt.__version__,
        "revision": revision or None,
        "instruction set": _backend.current().isa,
        "threads": threads,
    }
