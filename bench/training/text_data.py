"""Text that every machine has: the sources of Python's standard library, read as bytes, no download."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

VOCABULARY = 256
EVERY = 10
"""Every tenth file is for validation."""
SMALLEST = 100_000
"""Bytes below which a standard library is not there as sources."""


class Text(NamedTuple):
    """Whole files, one after another, a byte of 0 (which no source holds) between them."""

    train: Bytes
    validation: Bytes
    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]


def load(folder: Path | None = None) -> Text:
    """Read the modules at the top of the standard library, in the order of their names, and split them by files.

    Packages are left out: distributions leave some of them out, too. So is what the build of Python writes for one
    machine, so that the bytes depend on the version of Python only.

    Raises:
        FileNotFoundError: There are no sources, as in a Python from a zip file.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    paths = sorted(path for path in folder.glob("*.py") if not path.name.startswith("_sysconfigdata"))
    contents = [path.read_bytes() for path in paths]
    if sum(map(len, contents)) < SMALLEST:
        raise FileNotFoundError(f"the sources of Python's standard library are not in {folder}")
    held_out = [k % EVERY == EVERY - 1 for k in range(len(paths))]
    names: list[tuple[str, ...]] = []
    texts: list[Bytes] = []
    for part in (False, True):
        members = [k for k, held in enumerate(held_out) if held is part]
        names.append(tuple(paths[k].name for k in members))
        texts.append(np.frombuffer(b"\0".join(contents[k] for k in members), np.uint8))
    return Text(texts[0], texts[1], names[0], names[1])


def windows(text: Bytes, starts: Sequence[int] | NDArray[Any], length: int) -> NDArray[np.int64]:
    """Return length + 1 bytes from each start, as rows: all but the last are read, all but the first are to be told."""
    return text[np.asarray(starts)[:, None] + np.arange(length + 1)].astype(np.int64)


def random_windows(text: Bytes, rng: np.random.Generator, count: int, length: int) -> NDArray[np.int64]:
    """Windows that start anywhere."""
    return windows(text, rng.integers(0, len(text) - length, count), length)


def spread_windows(text: Bytes, count: int, length: int) -> NDArray[np.int64]:
    """Windows at equal distances from the first byte to the last."""
    return windows(text, np.linspace(0, len(text) - length - 1, count).astype(np.int64), length)
