"""The command line: ``fastopt info``."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastopt", description="The update step of training as fast as memory allows."
    )
    parser.add_argument("--version", action="version", version=f"fastopt {importlib.metadata.version('fastopt')}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, instruction set, threads, kernels, optional packages, memory bandwidth")
    parser.parse_args(argv)
    from .info import facts

    lines = facts()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
