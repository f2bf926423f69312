"""Optimizers of arrays on a GPU, against the same ones on the CPU, bit for bit.

There is no GPU here: launches go to Numba's simulator (cuda_stand_in.py). test_gpu.py is the same on a real one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case
from compare import DTYPES, build
from cuda_stand_in import StandIn, on_device, on_host

import fastopt
from fastopt._cuda import arrays, kernels

SHAPES: dict[str, tuple[int, ...]] = {"w": (5, 7), "b": (3,), "s": (), "none": (0,), "more": (2, 3, 11)}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], StandIn]]:
    """GPUs by number, each made when it is first asked for."""
    made: dict[int, StandIn] = {}

    def runtime(device: int, library: str = "cupy") -> StandIn:
        return made.setdefault(device, StandIn(device, library))

    monkeypatch.setattr(arrays, "Runtime", runtime)
    monkeypatch.setattr(kernels, "ptx_file", lambda rule, symbol, dtypes: Path(f"{symbol}.ptx"))
    arrays.space.cache_clear()
    kernels.kernels_of.cache_clear()
    yield runtime
    arrays.space.cache_clear()
    kernels.kernels_of.cache_clear()


FEW = {"w": (5, 7), "b": (3,)}  # a block of the prologue is 256 threads, which take the simulator a tenth of a second

ONE_PER_RULE = list({case.rule: case for case in CASES}.values())


def problem(p: str = "float32", g: str | None = None, *, shapes: Any = SHAPES, steps: int = 3) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)

    def draw(dtype: str) -> dict[str, Any]:
        return {k: np.asarray(rng.standard_normal(s)).astype(DTYPES[dtype]) for k, s in shapes.items()}

    return draw(p), [draw(g or p) for _ in range(steps)]


def moved(named: dict[str, Any], device: int = 0) -> dict[str, Any]:
    return {name: on_device(array, device) for name, array in named.items()}


def same(on_gpu: Any, params: Any, opt_gpu: Any, opt: Any) -> None:
    """Parameters, states and step counts are the same, bit for bit."""
    for name, array in params.items():
        assert on_host(on_gpu[name]).tobytes() == array.tobytes(), name
        found, wanted = opt_gpu.state[name], opt.state[name]
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if isinstance(value, np.ndarray):
                assert on_host(found[key]).tobytes() == value.tobytes(), (name, key)
            else:
                assert found[key] == value, (name, key)


def run_both(case: Case, params: Any, grads: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
    on_gpu = moved(params)
    opt_gpu, opt = build(case, on_gpu), build(case, params)
    for gradient in grads:
        found, wanted = opt_gpu.step(moved(gradient), **options), opt.step(gradient, **options)
        assert found == wanted
    return on_gpu, params, opt_gpu, opt


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_optimizer_has_the_bits_of_the_cpu(case: Case) -> None:
    same(*run_both(case, *problem()))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("p", "g"), [("float64", "float64"), ("bfloat16", "bfloat16"), ("float32", "float16")])
@pytest.mark.parametrize("name", ["Adam", "LARS"])
def test_every_dtype_has_the_bits_of_the_cpu(name: str, p: str, g: str) -> None:
    case = next(c for c in CASES if c.optimizer == name)
    same(*run_both(case, *problem(p, g, shapes=FEW, steps=2), max_norm=0.7))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case", ONE_PER_RULE, ids=lambda case: case.id)
def test_clipping_unscaling_and_skipping_are_decided_on_the_device(case: Case) -> None:
    params, grads = problem(shapes=FEW, steps=4)
    grads[0]["w"][2, 2] = math.inf  # the first step is skipped
    grads[2]["b"][0] = -math.inf
    same(*run_both(case, params, grads, max_norm=0.5, grad_scale=8.0, skip_nonfinite=True))
