"""What an installation brings along, and what it says where something is missing."""

import os
import shutil
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest
from fresh import python
from refusal import hide

from fastopt import __main__ as info
from fastopt.engine import backend as _backend

ROOT = Path(__file__).parents[2]


def test_nothing_but_the_package_can_be_imported():
    names = "bench", "docs", "examples", "kernels", "tests"
    found = python(f"import importlib.util, sys; print([n for n in {names} if importlib.util.find_spec(n)], *sys.path)")
    assert found.startswith("[]")
    assert not {str(ROOT), str(ROOT.parent)} & set(found.split())


def test_fastopt_torch_is_imported_on_first_use():
    program = """
import sys, fastopt
assert "torch" in dir(fastopt) and "fastopt.torch" not in sys.modules
print(fastopt.torch.AdamW.__module__.split(".")[:2])
"""
    pytest.importorskip("torch")
    assert python(program) == "['fastopt', 'torch']"


@pytest.mark.parametrize(
    ("isa", "missing", "said"),
    [
        (None, (), "rules ×"),
        (None, ("fastopt._native",), "compiled on first use"),
        ("numba", (), "compiled on first use"),
        (None, ("fastopt._native", "numba"), "none, for Numba is missing"),
        ("numba", ("numba",), "none, for Numba is missing"),
    ],
)
def test_info_tells_where_kernels_come_from(monkeypatch, isa, missing, said):
    pytest.importorskip("numba")
    hide(monkeypatch, *missing)
    monkeypatch.setattr(_backend, "current", lambda: _backend.load(isa))
    monkeypatch.setattr(info, "bandwidth", str)
    facts = info.facts()
    assert said in facts["kernels"]
    assert ("needed to step: pip install numba" in facts["Numba"]) == ("none" in said)


def test_info_without_enough_memory(monkeypatch):
    monkeypatch.setattr(info, "FlatBuffer", Mock(side_effect=MemoryError("Unable to allocate 128 MiB")))
    assert info.bandwidth() == "not measured: Unable to allocate 128 MiB"


def test_an_installation_that_can_never_step_says_so_when_it_is_imported():
    program = """
import importlib.util, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *_: None if name in ("fastopt._native", "numba") else find(name)
with warnings.catch_warnings(record=True) as caught:
    import fastopt
print(*[warning.message for warning in caught])
"""
    assert "no optimizer can take a step. Install gcc and then fastopt again, or Numba" in python(program)


@pytest.mark.full
@pytest.mark.parametrize(("cuda", "said"), [("AUTO", "without compiled kernels"), ("1", "FASTOPT_CUDA=1 needs a C")])
def test_without_a_c_compiler_only_what_was_asked_for_by_name_fails(tmp_path, cuda, said):
    if shutil.which("cmake") is None:
        pytest.skip("needs CMake")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DFASTOPT_CUDA={cuda}"]
    environment = os.environ | {"CC": str(tmp_path / "no-such-compiler")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (cuda == "AUTO")
    assert said in " ".join(done.stderr.split())
