"""What the subcommands share: bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import TypeVar


class Refusal(Exception):
    """Bad input; the text is shown as one line."""


def refuse(command: str, why: object) -> int:
    """Print one line on stderr; return the exit status for bad input."""
    print(f"bench {command}".rstrip() + f": {why}", file=sys.stderr)
    return 2


Number = TypeVar("Number", int, float)


def number(kind: type[Number], option: str, text: str | float) -> Number:
    """Convert the text of an option, or raise Refusal."""
    try:
        return kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise Refusal(f"{option} must be {what}, got {text!r}.") from None


def writable(folder: Path, option: str = "--out") -> Path:
    """Make the folder and try to write there: before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise Refusal(f"{option} {str(folder)!r} is not a folder that can be written: {error.strerror}.") from None


def one_of(kind: str, name: str, known: object) -> None:
    """Refuse a name that nobody knows."""
    names = list(known)  # type: ignore[call-overload]
    if name not in names:
        raise Refusal(f"there is no {kind} {name!r}; there are {', '.join(names)}.")
