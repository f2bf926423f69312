"""What is measured on: processor, memory, caches, versions."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from .case import Case
from .cli import Refusal

PACKAGES = ("numpy", "torch", "numba", "optax", "jax", "deepspeed", "torch-optimi", "bitsandbytes")
CACHE = 32 << 20  # bytes, where the system does not tell
MOST_COPIES = 128


def describe(threads: int) -> dict[str, Any]:
    """Everything that a reader of the figures wants to know."""
    import fastopt
    from fastopt.engine import backend as _backend

    command = ["git", "rev-parse", "HEAD"]
    revision = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "cache": last_level_cache(),
        "threads": threads,
        "instruction set": _backend.current().isa,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "fastopt": fastopt.__version__,
        **versions,
        "revision": revision.stdout.strip() or None,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """Its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def last_level_cache() -> int:
    """Bytes."""
    units = {"K": 1 << 10, "M": 1 << 20}
    try:
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max(int(size[:-1]) * units[size[-1]] for size in sizes)
    except (OSError, KeyError, ValueError):
        return CACHE


def copies(case: Case) -> int:
    """How many copies of a case's buffers exceed the last-level cache twice, where its steps go round among copies."""
    if not case.rotate:
        return 1
    return min(MOST_COPIES, math.ceil(2 * last_level_cache() / max(case.resident, 1)))


def check_memory(case: Case, contenders: int) -> None:
    """Refuse a case that does not fit, before anything is allocated.

    Raises:
        Refusal: Says what is needed and what there is.
    """
    need = needed(case, contenders)
    free = psutil.virtual_memory().available
    if need > free:
        raise Refusal(
            f"{case.name} needs about {need / 1e9:.1f} GB for {contenders} contenders; {free / 1e9:.1f} GB are free."
        )


def needed(case: Case, contenders: int) -> int:
    """Bytes of a case: what every contender holds, what one sets up from, what an eager one allocates."""
    return contenders * copies(case) * case.resident + 2 * case.resident
