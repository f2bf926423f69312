"""LARS keeps the norms of the weights from the update that wrote them, while nobody else writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import fastopt

SHAPES = {"small": (2, 3), "odd": (33, 65), "large": (5, 20_011), "tiny": (1, 1), "bias": (7,)}


def problem() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    params = fastopt.FlatBuffer.from_arrays({k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()})
    grads = params.zeros_like()
    for name in grads:
        grads[name] = rng.standard_normal(SHAPES[name])
    return params, grads, lambda p, keep: fastopt.LARS(p, lr=0.5, weight_decay=0.01, keep_weight_norms=keep)


def scale(params: Any) -> None:
    params.data *= 3


def swap(params: Any) -> None:
    params["large"][:] = params["large"][::-1, ::-1].copy()
    params["odd"][:] = 1


def mask(params: Any) -> None:
    for array in params.values():
        array[np.random.default_rng(1).random(array.shape) < 0.5] = 0


@pytest.mark.parametrize("write", [scale, swap, mask, lambda params: None], ids=["scale", "swap", "mask", "none"])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_a_write_between_steps_is_noticed(write: Callable[[Any], None], max_norm: float | None) -> None:
    results = []
    for keep in (True, False):
        params, grads, make = problem()
        opt = make(params, keep)
        for _ in range(3):
            opt.step(grads, max_norm=max_norm)
            write(params)
        opt.step(grads, max_norm=max_norm)
        results.append(params.data.tobytes())
    assert results[0] == results[1]


def test_a_write_of_one_element_must_be_told() -> None:
    def run(keep: bool, tell: bool) -> bytes:
        params, grads, make = problem()
        opt = make(params, keep)
        opt.step(grads)
        params["large"][2, 77] = 1e4  # not among the samples
        if tell:
            opt.weights_written()
        opt.step(grads)
        return params.data.tobytes()

    assert run(True, tell=True) == run(False, tell=False)
    assert run(True, tell=False) != run(False, tell=False)  # else nothing is kept, and the test above shows nothing


def test_loading_state_forgets_the_norms() -> None:
    params, grads, make = problem()
    opt = make(params, True)
    opt.step(grads)
    state = opt.state_dict()
    params["large"][2, 77] = 1e4
    opt.load_state_dict(state)
    other, _, _ = problem()
    other.data[:] = params.data
    fresh = make(other, False)
    fresh.load_state_dict(state)
    fresh.param_groups[0]["keep_weight_norms"] = False
    opt.step(grads)
    fresh.step(grads)
    assert params.data.tobytes() == other.data.tobytes()
