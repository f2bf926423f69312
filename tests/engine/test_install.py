"""What an installation brings along, and what it says where something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints, started away from the repository and from pytest's paths."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=inherited | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_but_the_package_can_be_imported() -> None:
    names = "bench", "docs", "examples", "kernels", "tests"
    found = python(f"import importlib.util, sys; print([n for n in {names} if importlib.util.find_spec(n)], *sys.path)")
    assert found.startswith("[]")
    assert not {str(ROOT), str(ROOT.parent)} & set(found.split())
