"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import sys

from .cli import refuse

EXTRA = 'which is not installed; pip install -e ".[bench]" brings it.'


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status."""
    try:
        from . import compare, list, report, step, train
        from .gpu import command as gpu
        from .scale import command as scale
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] in ("bench", "fastopt", "tests"):
            raise
        return refuse("", f"needs {error.name}, {EXTRA}")
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks and training runs of fastopt.")
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (step, report, compare, list, train, gpu, scale):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    status: int = args.func(args)
    return status


if __name__ == "__main__":
    sys.exit(main())
