"""The examples run and learn."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("torch")
EXAMPLES = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("torch_*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(example)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=example.anchor,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses
    assert max(losses) < 0.5
