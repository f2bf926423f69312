"""Makes the helpers of this folder importable, and gives every test the same threads and a choice of kernels."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # before Numba is imported: kernels for CUDA run in its simulator
sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))  # pytest's importlib mode leaves sys.path alone

from isas import native_isas

from fastopt import _backend, _host_plan, set_num_threads

_load = functools.cache(_backend.load)  # Numba compiles its scheduler once


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads on every machine; a test may set others, which the next one does not see."""
    monkeypatch.setattr(_backend, "_threads", None)
    set_num_threads(2)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses the kernels of the optimizers that the test makes from then on."""

    def choose(isa: str) -> None:
        chosen = _load(isa)
        for module in (_backend, _host_plan):
            monkeypatch.setattr(module, "current", lambda: chosen)

    return choose


@pytest.fixture(params=native_isas())
def isa(request: pytest.FixtureRequest, backend: Callable[[str], None]) -> str:
    """Runs the test once with the kernels of each instruction set."""
    backend(request.param)
    return str(request.param)


@pytest.fixture
def always_threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start threads for few elements too, where a step would be serial."""
    monkeypatch.setattr(_host_plan, "SERIAL_BELOW", 1)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A GPU: a real one where the tests marked gpu run, else the stand-in."""
    import gpus

    gpus.forget_devices()
    yield gpus.RealGpu() if request.param == "real" else gpus.StandInGpu(monkeypatch)
    gpus.forget_devices()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A GPU that counts what is asked of it, and that can be made to fail."""
    import gpus

    gpus.forget_devices()
    yield gpus.StandInGpu(monkeypatch)
    gpus.forget_devices()
