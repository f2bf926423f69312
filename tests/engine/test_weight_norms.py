"""LARS may keep the norms of the weights from the update that wrote them, if nobody else writes."""

from typing import Any

import numpy as np
import pytest

import fastopt

SHAPES = {"small": (2, 3), "odd": (33, 65), "large": (5, 20_011), "tiny": (1, 1), "bias": (7,)}


def problem(keep: bool) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    params = fastopt.FlatBuffer.from_arrays({k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()})
    grads = params.zeros_like()
    for name in grads:
        grads[name] = rng.standard_normal(SHAPES[name])
    return params, grads, fastopt.LARS(params, lr=0.5, weight_decay=0.01, keep_weight_norms=keep)


@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_kept_norms_give_the_same_bits(max_norm: float | None) -> None:
    results = []
    for keep in (True, False):
        params, grads, opt = problem(keep)
        for _ in range(4):
            opt.step(grads, max_norm=max_norm)
        results.append(params.data.tobytes())
    assert results[0] == results[1]


def test_a_write_must_be_told() -> None:
    def run(keep: bool, tell: bool) -> bytes:
        params, grads, opt = problem(keep)
        opt.step(grads)
        params["large"][:] *= 3
        if tell:
            opt.weights_written()
        opt.step(grads)
        return params.data.tobytes()

    assert run(True, tell=True) == run(False, tell=False)
    assert run(True, tell=False) != run(False, tell=False)  # else nothing is kept, and the rest shows nothing


def test_loading_state_forgets_the_norms() -> None:
    results = []
    for keep in (True, False):
        params, grads, opt = problem(keep)
        opt.step(grads)
        params["large"][:] *= 3
        opt.load_state_dict(opt.state_dict())
        opt.step(grads)
        results.append(params.data.tobytes())
    assert results[0] == results[1]
