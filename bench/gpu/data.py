"""What contenders on a GPU compute with, and whether they compute it right."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cases import STATE_ITEMSIZE, STATES, Case
from .device import Gpu, address

PERIOD = 2**24 - 3
"""Numbers repeat after so many, which is a prime: an index that lost its upper bits meets other numbers."""

STEPS = 3
WEIGHT_SCALE, GRADIENT_SCALE = 0.25, 0.01
TOLERANCE = {"float32": 2e-5, "bfloat16": 0.05}
"""Largest difference of torch's parameters after three steps: far above what rounding makes of numbers below 2, far
below the steps of another optimizer, which are 1e-3 or more, and with the learning rate for bfloat16 0.1 or more."""

WORKING_SETS = 8
"""Parameter sets of a contender take so many times the second-level cache, or more."""


class WrongAnswer(Exception):
    """A contender computes something else."""


def pieces(count: int, start: int, period: int) -> Iterator[tuple[int, int, int]]:
    """Place, place in the period and length of each piece of ``count`` elements that begin at ``start``."""
    done = 0
    while done < count:
        source = (start + done) % period
        length = min(period - source, count - done)
        yield done, source, length
        done += length


class Values:
    """Endless numbers that repeat after a period, on the host and on the GPU.

    Args:
        gpu: The GPU.
        dtype: Their dtype.
        scale: Their standard deviation.
        seed: Chooses them.
        period: How many there are.
    """

    def __init__(self, gpu: Gpu, dtype: np.dtype[Any], scale: float, seed: int, period: int = PERIOD) -> None:
        drawn = np.random.default_rng(seed).standard_normal(period, np.float32)
        self._gpu, self._host = gpu, (drawn * np.float32(scale)).astype(dtype)
        self._device = gpu.empty((period,), dtype)
        self._address = address(self._device)
        gpu.write(self._address, self._host)

    def fill(self, to: int, count: int, start: int) -> None:
        """Put ``count`` numbers from ``start`` on to a place on the GPU."""
        size = self._host.itemsize
        for place, source, length in pieces(count, start, len(self._host)):
            self._gpu.copy(to + size * place, self._address + size * source, size * length)

    def take(self, count: int, start: int) -> NDArray[Any]:
        """The same numbers in a new array of the host."""
        array = np.empty(count, self._host.dtype)
        for place, source, length in pieces(count, start, len(self._host)):
            array[place : place + length] = self._host[source : source + length]
        return array


class Recipe(NamedTuple):
    """An optimizer, its options, and those of its step."""

    optimizer: str
    hyper: Mapping[str, Any]
    step: Mapping[str, Any]


class Problem:
    """A case on a GPU, with its numbers.

    Args:
        case: The case.
        gpu: The GPU.
        period: After how many elements numbers repeat.

    Attributes:
        sets: How many parameter sets a contender takes in turn.
        dtype: dtype of parameters and gradients.
    """

    def __init__(self, case: Case, gpu: Gpu, period: int = PERIOD) -> None:
        import fastopt

        self.case, self.gpu, self.period = case, gpu, period
        self.dtype = fastopt.FlatBuffer({}, case.dtype).dtype
        self._weights = Values(gpu, self.dtype, WEIGHT_SCALE, 0, period)
        self._gradients = Values(gpu, self.dtype, GRADIENT_SCALE, 1, period)
        one = case.elements * (2 * self.dtype.itemsize + STATE_ITEMSIZE * STATES[case.optimizer])
        self.sets = math.ceil(WORKING_SETS * gpu.l2 / one) if case.kind in ("device", "wall") else 1
        self._expected: dict[str, dict[str, dict[str, Any]]] = {}

    def fill_weights(self, arrays: Mapping[str, Any]) -> None:
        """Give parameters on the GPU their first values."""
        for k, (name, array) in enumerate(arrays.items()):
            self._weights.fill(address(array), math.prod(self.case.shapes[name]), self._start(k))

    def fill_gradients(self, arrays: Mapping[str, Any], t: int = 0) -> None:
        """Give gradients on the GPU the values of step t."""
        for k, (name, array) in enumerate(arrays.items()):
            self._gradients.fill(address(array), math.prod(self.case.shapes[name]), self._start(k, t))

    @staticmethod
    def _start(k: int, t: int = 0) -> int:
        return 7919 * k + 104_729 * t

    @property
    def periodic(self) -> bool:
        """Whether a period says all: one array, no element of which has to do with another."""
        return len(self.case.shapes) == 1 and self.case.optimizer != "LARS" and "max_norm" not in self.case.step

    def expected(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        """Parameter, states and step count of each array after the first steps on the CPU; of one period if that is
        enough."""
        key = repr(recipe)
        if key not in self._expected:
            self._expected[key] = self._run_on_cpu(recipe)
        return self._expected[key]

    def _run_on_cpu(self, recipe: Recipe) -> dict[str, dict[str, Any]]:
        import fastopt

        shapes = self.case.shapes
        if self.periodic:
            shapes = {name: (min(math.prod(shape), self.period),) for name, shape in shapes.items()}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        params = {
            name: self._weights.take(sizes[name], self._start(k)).reshape(shape)
            for k, (name, shape) in enumerate(shapes.items())
        }
        optimizer = getattr(fastopt, recipe.optimizer)(params, **recipe.hyper)
        for t in range(STEPS):
            grads = {
                name: self._gradients.take(sizes[name], self._start(k, t)).reshape(shape)
                for k, (name, shape) in enumerate(shapes.items())
            }
            optimizer.step(grads, **recipe.step)
        return {name: {"parameter": params[name], **state} for name, state in optimizer.state.items()}

    def places(self, size: int, expected_size: int) -> list[int]:
        """Where in an array of ``size`` elements the expected ones are looked for: everywhere in a case that is only a
        check, else in its first, its middle and its last period."""
        every = list(range(0, size, expected_size)) if expected_size else []
        return every if self.case.kind == "check" else sorted({*every[:1], *every[len(every) // 2 :][:1], *every[-1:]})


def check_bits(problem: Problem, recipe: Recipe, found: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse parameters and states on the GPU that differ in a bit from those of the CPU."""
    for name, wanted in problem.expected(recipe).items():
        for key, want in wanted.items():
            got = found[name][key]
            if not isinstance(want, np.ndarray):
                if got != want:
                    raise WrongAnswer(f"{key} of {name} is {got}, not {want}")
                continue
            for place, values in _read(problem, got, math.prod(problem.case.shapes[name]), want):
                differ = np.flatnonzero(_bits(values) != _bits(want.reshape(-1)[: values.size]))
                if differ.size:
                    first = int(differ[0])
                    raise WrongAnswer(
                        f"{key} of {name} is {values[first]!r}, not {want.reshape(-1)[first]!r}, in {place + first}; "
                        f"{differ.size} of the {values.size} elements from {place} on differ"
                    )


def check_close(problem: Problem, recipe: Recipe, found: Mapping[str, Any]) -> None:
    """Refuse parameters on the GPU that are further from the CPU's than rounding brings them."""
    for name, wanted in problem.expected(recipe).items():
        want = wanted["parameter"]
        for _, values in _read(problem, found[name], math.prod(problem.case.shapes[name]), want):
            difference = values.astype(np.float32) - want.reshape(-1)[: values.size].astype(np.float32)
            worst = float(np.max(np.abs(difference), initial=0.0))
            if not worst <= TOLERANCE[problem.case.dtype]:
                raise WrongAnswer(f"{name} is off by {worst:.2g}")


def _read(problem: Problem, array: Any, size: int, want: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
    for place in problem.places(size, want.size):
        count = min(want.size, size - place)
        yield place, problem.gpu.read(address(array) + want.itemsize * place, count, want.dtype)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    return array.view(f"u{array.dtype.itemsize}")
