"""``python -m bench list``: what can be measured here, and what is missing."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from .contenders import CONTENDERS
from .models import MODELS
from .suite import FAMILIES, QUICK, SUITE


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("list", help="tell cases, contenders and models, and what is not installed")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print them."""
    console = Console()
    cases = Table(title="cases of `bench step` and `bench report`", title_justify="left")
    for heading in ("family", "cases (those of the quick report in bold)"):
        cases.add_column(heading)
    for family in FAMILIES:
        names = [name for name, case in SUITE.items() if case.family == family]
        cases.add_row(family, ", ".join(f"[bold]{name}[/bold]" if name in QUICK else name for name in names))
    cases.add_row("startup", "[bold]import and first step[/bold]")
    console.print(cases)
    table = Table(title="contenders", title_justify="left")
    for heading in ("name", "what it is", "here"):
        table.add_column(heading)
    for name, kind in CONTENDERS.items():
        table.add_row(name, (kind.__doc__ or "").splitlines()[0], kind.missing() or "installed")
    console.print(table)
    models = Table(title="models", title_justify="left")
    for heading in ("name", "parameters", "arrays"):
        models.add_column(heading, justify="left" if heading == "name" else "right")
    for name in MODELS:
        models.add_row(name, f"{SUITE[name].elements:,}", str(len(SUITE[name].shapes)))
    console.print(models)
    return 0
