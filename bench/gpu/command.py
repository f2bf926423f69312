"""``python -m bench gpu``: measures steps on a GPU against a copy and torch, and says which bars are reached."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..cli import refuse
from .cases import ROUNDS, STAGES, SUITE, Verdict, judge
from .contenders import Copy
from .device import Gpu, NoGpu, machine
from .measure import describe, measure

WIDTH = 118  # of the tables where output goes into a file
BROKEN = 3
DIED = {"error": "the process died in this case", "contenders": {}, "problems": {}, "seconds": 0.0}


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    help_ = "time steps on a GPU against a copy and torch"
    parser = commands.add_parser("gpu", help=help_, description=f"{help_.capitalize()}, answers checked before.")
    known = f"{', '.join(SUITE)}, or all of a stage of bench/gpu.sh: {', '.join(STAGES)}; all by default"
    parser.add_argument("cases", nargs="*", metavar="CASE", help=known)
    parser.add_argument("--out", type=Path, help="write every sample to this file, anew after each case")
    parser.add_argument("--resume", action="store_true", help="leave out cases that the file of --out has already")
    parser.add_argument("--limit", type=float, help="begin no case after so many seconds")
    parser.add_argument("--show", type=Path, metavar="FILE", help="only print the tables of a file written by --out")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen cases; 0 if nothing failed (a bar may be missed), 1 if something did, 2 if nothing could run,
    3 if the GPU fails."""
    unknown = [name for name in args.cases if name not in SUITE and name not in STAGES]
    problem = None
    if unknown:
        problem = f"there is no case {unknown[0]!r}; cases are {', '.join((*STAGES, *SUITE))}"
    elif args.out and not args.out.parent.is_dir():
        problem = f"the folder of {args.out} does not exist"
    elif args.show and not args.show.is_file():
        problem = f"there is no file {args.show}"
    if problem:
        return refuse("gpu", problem)
    if args.show:
        record = json.loads(args.show.read_text())
    else:
        try:
            gpu = Gpu()
        except NoGpu as error:
            return refuse("gpu", error)
        chosen = [case for name in args.cases or SUITE for case in STAGES.get(name, (name,))]
        record = {"machine": {}, "rounds": ROUNDS, "chosen": chosen, "cases": {}}
        if args.resume and args.out and args.out.is_file():
            record = json.loads(args.out.read_text())
        if not _measure(gpu, record, args.limit, args.out):
            print("bench gpu: the GPU fails since this case; go on in a new process with --resume", file=sys.stderr)
            return BROKEN
    verdicts = [verdict for name in record["chosen"] for verdict in judge(SUITE[name], record["cases"].get(name))]
    show(record, verdicts, Console(width=None if sys.stdout.isatty() else WIDTH))
    return int(any(verdict.verdict.startswith("error") for verdict in verdicts))


def _measure(gpu: Gpu, record: dict[str, Any], limit: float | None, out: Path | None) -> bool:
    """Measure what the record lacks; False if the GPU fails since the last case, as it does after a bad access."""

    def save() -> None:
        if out:
            out.write_text(json.dumps(record, indent=1) + "\n")

    began = time.perf_counter()
    try:
        record["machine"] = machine(gpu)
    except Exception as error:  # a machine that cannot be described can be measured
        record["machine"] = {"error": describe(error)}
    copy = Copy(gpu)
    for name in record["chosen"]:
        if name in record["cases"]:
            continue
        if limit is not None and time.perf_counter() - began > limit:
            print(f"{name}: not measured, {limit:g} s are over", flush=True)
            continue
        record["cases"][name] = DIED
        save()
        record["cases"][name] = result = measure(SUITE[name], gpu, copy, record["rounds"])
        save()
        said = [f"{verdict.bar}: {verdict.verdict}" for verdict in judge(SUITE[name], result)]
        print(f"{name}: {'; '.join(said)} ({result['seconds']:.1f} s)", flush=True)
        try:
            gpu.synchronize()
        except Exception:  # CuPy's, of the kernel that did it
            return False
    return True


def show(record: dict[str, Any], verdicts: list[Verdict], console: Console) -> None:
    """Print what was measured on, every contender, and last the bars."""
    console.print(", ".join(f"{key} {value}" for key, value in record["machine"].items()), highlight=False)
    times = Table(title=f"medians of {record['rounds']} rounds, contenders interleaved", title_justify="left")
    for heading in ("case", "contender", "ms a step", "quartiles", "GB/s"):
        times.add_column(heading, justify="left" if heading in ("case", "contender") else "right")
    for name, result in record["cases"].items():
        for contender, found in result["contenders"].items():
            if "samples" in found:
                low, high = found["quartiles"]
                speed = "" if SUITE[name].kind == "host" else f"{found['bytes'] / found['median'] / 1e9:.0f}"
                cells = f"{1e3 * found['median']:.4f}", f"{1e3 * low:.4f} to {1e3 * high:.4f}", speed
                times.add_row(name, contender, *cells)
    console.print(times)
    bars = Table(title="bars", title_justify="left")
    for heading in ("case", "bar", "measured", "quartiles", ""):
        bars.add_column(heading, justify="right" if heading in ("measured", "quartiles") else "left")
    for verdict in verdicts:
        middle = "" if verdict.measured is None else f"{verdict.measured:.3f}"
        spread = "" if verdict.spread is None else "{:.3f} to {:.3f}".format(*verdict.spread)
        bars.add_row(verdict.case, verdict.bar, middle, spread, verdict.verdict)
    console.print(bars)
