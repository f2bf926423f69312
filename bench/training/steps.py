"""One step of fastopt beside the same rule written eagerly in NumPy: first the answers, then times in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

import fastopt

from ..case import Case, Shapes
from ..contenders.plain import Plain
from ..models import shapes
from .mlp import Recipe

MODEL = "mobilenet-v3-large"
"""A model of realistic size whose eager step still takes well below a second."""
LARGE: Shapes = shapes(MODEL)

CHECKED = (1.0, -0.5, 0.7, 0.7, -1.0, 0.3)
"""Factors on the gradient in the steps that are compared: signs turn, and RAdam begins to rectify in the sixth."""
TOLERANCE = 1e-3
"""Of the mean distance that parameters went; formulas that differ are further apart."""
STRAYS = 1e-4
"""Share of elements that may be further apart: where rounding decides a sign, as in Lion."""

FEWEST, MOST = 9, 51
"""Samples at least and at most; short ones, of which there are many, find a busy machine idle now and then."""
SAMPLE_SECONDS, CASE_SECONDS = 5e-4, 0.1
MOST_STEPS = 20


class WrongAnswer(Exception):
    """fastopt and the eager rule computed something else."""


@dataclass(frozen=True)
class Times:
    """Medians of one step on the same arrays, seconds."""

    fastopt: float
    numpy: float


def compare(recipe: Recipe, arrays: Shapes) -> Times:
    """Time a step of the recipe's optimizer on arrays of these shapes, both ways, in turns.

    Raises:
        WrongAnswer: The two do not compute the same.
    """
    rng = np.random.default_rng(0)
    params = fastopt.FlatBuffer(arrays)
    grads = fastopt.FlatBuffer(arrays)
    for name in arrays:
        params[name][...] = rng.standard_normal(arrays[name], np.float32)
        grads[name][...] = rng.standard_normal(arrays[name], np.float32)
    first = {name: array.copy() for name, array in params.items()}
    case = Case(recipe.name, recipe.make.__name__, {"lr": recipe.lr, **recipe.options}, arrays, ())
    eager = Plain(case, {name: array.copy() for name, array in params.items()}, dict(grads), 1)
    optimizer = recipe.build(params)

    drawn = grads.data.copy()
    for factor in CHECKED:
        grads.data[...] = np.float32(factor) * drawn
        optimizer.step(grads)
        eager.step()
    _check(recipe, first, dict(params), eager.params)

    steps: dict[str, Callable[[], object]] = {"fastopt": lambda: optimizer.step(grads), "numpy": eager.step}
    once = {name: _seconds(step, 1) for name, step in steps.items()}
    repeats = {name: max(1, min(MOST_STEPS, int(SAMPLE_SECONDS / once[name]))) for name in steps}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    seconds_a_round = sum(once[name] * repeats[name] for name in steps)
    for _ in range(max(FEWEST, min(MOST, int(CASE_SECONDS / seconds_a_round)))):
        for name, step in steps.items():
            samples[name].append(_seconds(step, repeats[name]))
    return Times(**{name: statistics.median(values) for name, values in samples.items()})


def _check(recipe: Recipe, first: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    apart = sum(float(np.sum(np.abs(ours[name] - array))) for name, array in first.items())
    elements = sum(array.size for array in first.values())
    limit = TOLERANCE * apart / elements
    strays = sum(int(np.count_nonzero(~(np.abs(ours[name] - theirs[name]) <= limit))) for name in first)  # NaN strays
    if strays > STRAYS * elements:
        raise WrongAnswer(
            f"{recipe.name} of fastopt and of NumPy differ by more than {limit:.1g} in {strays} of {elements} elements"
        )


def _seconds(step: Callable[[], object], repeat: int) -> float:
    """Time of one of some steps."""
    start = perf_counter()
    for _ in range(repeat):
        step()
    return (perf_counter() - start) / repeat
