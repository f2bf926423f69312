"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys

from . import step, train
from .gpu import command as gpu


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks and training runs of fastopt.")
    commands = parser.add_subparsers(dest="command", required=True)
    step.add_parser(commands)
    train.add_parser(commands)
    gpu.add_parser(commands)
    args = parser.parse_args(argv)
    status: int = args.func(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
