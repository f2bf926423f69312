"""``python -m bench step``: times one optimizer step, contenders interleaved in one run."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import machine, startup
from .case import ITEMSIZE, Case
from .cli import Refusal, number, one_of, refuse, writable
from .contenders import CONTENDERS
from .measure import Effort, Measurement
from .models import MODELS, shapes
from .results import Record, Result
from .suite import ALL, FAMILIES, OPTIMIZERS, SUITE, cut, size

THREADS = min(2, len(os.sched_getaffinity(0)))


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser(
        "step",
        help="time one optimizer step against other implementations",
        description="Time one optimizer step, contenders interleaved, each in a process of its own; every answer is "
        "checked before. Cases of the suite by name or by family (`bench list` tells all), or one of your own by the "
        "options --optimizer, --dtype, --size, --arrays, --model; with neither, Adam on 16M float32. One case takes "
        "about half a minute, a family some minutes.",
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"cases or families: {', '.join(FAMILIES)}, startup")
    parser.add_argument("--optimizer", metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (default: adam)")
    parser.add_argument("--dtype", metavar="NAME", help=f"{', '.join(ITEMSIZE)} (default: float32)")
    parser.add_argument("--size", metavar="N", help="elements in all, like 1000, 64k, 16M, 1G (default: 16M)")
    parser.add_argument("--arrays", metavar="N", help="arrays that they are cut into (default: 1)")
    parser.add_argument("--model", metavar="NAME", help=f"shapes of a model instead: {', '.join(MODELS)}")
    parser.add_argument("--contenders", metavar="A,B", help="who takes part, separated by commas")
    parser.add_argument("--rounds", metavar="N", default="21", help="samples of each contender (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", default=str(THREADS), help="of everybody (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen cases."""
    try:
        cases = chosen(args)
        rounds, threads = number(int, "--rounds", args.rounds), number(int, "--threads", args.threads)
        if rounds < 1 or threads < 1:
            raise Refusal("--rounds and --threads must be at least 1.")
        if args.json:
            writable(args.json.parent, "the folder of --json")
        for case in cases:
            able = [n for n in case.contenders if not (CONTENDERS[n].missing() or CONTENDERS[n].refusal(case))]
            machine.check_memory(case, len(able))
    except Refusal as refusal:
        return refuse("step", refusal)
    console = Console()
    record = Record(machine.describe(threads), " ".join(args.cases) or "step")
    effort = Effort(rounds, seconds=float("inf"), fixed=True)
    measure(record, cases, threads, effort, console)
    if "startup" in args.cases:
        record.results += startup.measure(min(rounds, 11))
        for result in record.results[-2:]:
            show(result, console)
    if args.json:
        record.write(args.json)
    return 0


def measure(record: Record, cases: Sequence[Case], threads: int, effort: Effort, console: Console) -> None:
    """Measure cases into a record, with a progress bar, and print each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as progress, Measurement(threads, effort) as measurement:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            result = measurement.run(case, lambda text: progress.update(task, description=text))
            record.results.append(result)
            show(result, progress.console)
            progress.advance(task)
    record.seconds += time.perf_counter() - began


# --- the command line ------------------------------------------------------------------------------------------------


def own(args: argparse.Namespace) -> bool:
    """Whether the command line describes a case of its own."""
    return any(getattr(args, name) is not None for name in ("optimizer", "dtype", "size", "arrays", "model"))


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for, or Refusal."""
    if args.cases and own(args):
        raise Refusal("name cases, or describe one by options: not both.")
    if not args.cases:
        cases = [described(args)]
    else:
        cases = []
        for name in args.cases:
            one_of("case", name, [*SUITE, *FAMILIES, "startup"])
            cases += [case for case in SUITE.values() if name in (case.name, case.family)]
    if args.contenders is None:
        return cases
    names = tuple(name.strip() for name in args.contenders.split(","))
    for name in names:
        one_of("contender", name, CONTENDERS)
    return [dataclasses.replace(case, contenders=names) for case in cases]


def described(args: argparse.Namespace) -> Case:
    """The case that the options describe, or Refusal."""
    name, dtype = args.optimizer or "adam", args.dtype or "float32"
    one_of("optimizer", name, OPTIMIZERS)
    one_of("dtype", dtype, ITEMSIZE)
    if args.model is not None:
        if args.size is not None or args.arrays is not None:
            raise Refusal("--model brings its own --size and --arrays; leave these out.")
        one_of("model", args.model, MODELS)
        arrays = shapes(args.model)
    else:
        try:
            elements = size(args.size or "16M")
        except ValueError:
            raise Refusal(f"--size must be a number like 1000, 64k, 16M or 1G, got {args.size!r}.") from None
        count = number(int, "--arrays", args.arrays or 1)
        if not 1 <= count <= elements:
            raise Refusal(f"--arrays must be in [1, {max(elements, 1)}], the number of elements, got {count}.")
        arrays = dict(cut(elements, count))
    title = f"{name} {dtype} {args.model or args.size or '16M'}" + f" in {len(arrays)} arrays" * (len(arrays) > 1)
    who = tuple(name for name in ALL if name != "torch compile")
    if len(arrays) > 1:
        who = ("fastopt", "fastopt arrays", "fastopt.torch", *who[1:])
    return Case(title, *OPTIMIZERS[name], arrays, who, dtype, family="step", model=args.model)


# --- what is printed -------------------------------------------------------------------------------------------------


def show(result: Result, console: Console) -> None:
    """Print times and bars."""
    if result.skipped:
        console.print(f"{result.name}: skipped: {result.skipped}")
        return
    what = f"{result.elements:,} {result.dtype} in {result.arrays:,} arrays, {result.threads} threads"
    table = Table(title=f"{result.name}: {what}" if result.elements else result.name, title_justify="left")
    for heading in ("contender", "median ms", "quartiles", "GB/s", "of stream", "temporaries"):
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    stream = result.timings.get("stream")
    steady = stream is not None and not stream.is_unsteady
    for name, timing in result.timings.items():
        low, high = timing.quartiles
        spread = f"{1e3 * low:.3f} to {1e3 * high:.3f}" + " (large)" * timing.is_spread
        speed = f"{result.speed(name) / 1e9:.1f}" if result.bytes else ""
        fraction = f"{1 / result.ratio(name, 'stream'):.2f}" if steady else ""
        table.add_row(name, f"{1e3 * timing.median:.3f}", spread, speed, fraction, readable(timing.temporaries))
    for name, problem in result.problems.items():
        table.add_row(name, problem)
    console.print(table)
    unsteady = [name for name, timing in result.timings.items() if timing.is_unsteady]
    if unsteady:
        console.print(f"  too unsteady to compare with, by the quartiles: {', '.join(unsteady)}. Is the machine busy?")
    for verdict in result.verdicts:
        if verdict.measured is None:
            why = "too unsteady" if {verdict.contender, verdict.against} & set(unsteady) else "not measured"
            console.print(f"  {why}: {verdict.text}")
        else:
            word = "reached" if verdict.reached else "MISSED"
            spread = f"quartiles {verdict.low:.3f} to {verdict.high:.3f}"
            console.print(f"  {word}: {verdict.text}: {verdict.measured:.3f} ({spread})")


def readable(count: int | None) -> str:
    """Bytes in a readable unit."""
    if count is None:
        return ""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
