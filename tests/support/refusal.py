"""What the tests of bad input have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import fastopt

CLASSES = [
    fastopt.SGD,
    fastopt.Adagrad,
    fastopt.RMSprop,
    fastopt.Adam,
    fastopt.AdamW,
    fastopt.Adadelta,
    fastopt.Adamax,
    fastopt.NAdam,
    fastopt.RAdam,
    fastopt.Rprop,
    fastopt.ASGD,
    fastopt.Lion,
    fastopt.LARS,
]


def gradients(**replaced: Any) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    arrays = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(3)}
    return {name: array.astype(np.float32) for name, array in arrays.items()} | replaced


def trained(cls: Any = fastopt.AdamW, **options: Any) -> Any:
    """An optimizer of float32 arrays that took a step, so that neither its states nor its counts are zero."""
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((3, 2)).astype(np.float32), "b": np.ones(3, np.float32)}
    opt = cls(params, **{"lr": 0.1} | options)
    opt.step(gradients())
    return opt


def fingerprint(opt: Any) -> Any:
    """Options, bytes and counts of an optimizer: everything it has."""
    options = [[(k, v) for k, v in group.items() if k != "params"] for group in opt.param_groups]
    params = [{name: array.tobytes() for name, array in group["params"].items()} for group in opt.param_groups]
    state = {
        name: {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in entry.items()}
        for name, entry in opt.state.items()
    }
    return repr(options), params, state


@contextlib.contextmanager
def refused(error: type[Exception], *words: str, opt: Any = None) -> Iterator[None]:
    """The block raises ``error`` itself, no subclass, with all of these words, and leaves ``opt`` as it was."""
    before = fingerprint(opt) if opt else None
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert caught.type is error, message
    assert [word for word in words if word not in message] == [], message
    assert opt is None or fingerprint(opt) == before
