"""Programs in a process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def program(*arguments, timeout=120.0, cwd=Path(__file__).anchor, **environment):
    """A Python of its own that was run with these arguments, away from the repository and pytest's paths."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command, environment = [sys.executable, *map(str, arguments)], inherited | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def python(code, *args, **options):
    """What a fresh interpreter prints; one that hangs or fails raises."""
    done = program("-c", textwrap.dedent(code), *args, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
