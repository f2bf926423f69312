"""The examples run and learn."""

import importlib.util
import pathlib
import re

import pytest
from fresh import program

pytest.importorskip("torch")
pytestmark = pytest.mark.full
EXAMPLES = sorted((pathlib.Path(__file__).parents[2] / "examples").glob("torch_*.py"))
NEEDS = {"torch_huggingface": ("transformers", "accelerate"), "torch_lightning": ("lightning",)}


@pytest.mark.parametrize(
    "example", [pytest.param(x, marks=pytest.mark.integrations if x.stem in NEEDS else (), id=x.stem) for x in EXAMPLES]
)
def test_example(example):
    for package in NEEDS.get(example.stem, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'needs {package}: pip install "fastopt[integrations]"')
    done = program("-W", "ignore", example)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses
    assert max(losses) < 0.5
