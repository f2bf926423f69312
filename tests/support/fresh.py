"""Programs in a process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def python(code: str, *args: str, timeout: float = 120.0, **environment: str) -> str:
    """What a fresh interpreter prints, away from the repository and pytest's paths; one that hangs or fails raises."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command, folder = [sys.executable, "-c", textwrap.dedent(code), *args], Path(__file__).anchor
    done = subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
