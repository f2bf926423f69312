"""What a case is: an optimizer, arrays, contenders, and the bars that it is to meet."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Bar:
    """A limit on the ratio of two contenders' times, or on the first one's time in ``unit``."""

    contender: str
    limit: float
    against: str | None = None
    unit: str = "µs"

    @property
    def text(self) -> str:
        """The bar in words."""
        if self.against is None:
            return f"{self.contender} ≤ {self.limit:g} {self.unit}"
        if self.against == "stream":
            return f"{self.contender} ≥ {1 / self.limit:.2f} of {self.against}'s speed"
        return f"{self.contender} ≤ {self.limit:g} × {self.against}"


@dataclass(frozen=True)
class Case:
    """One optimizer on arrays of given shapes.

    Attributes:
        name: Name on the command line.
        optimizer: Class name, in fastopt and in torch.optim where torch has it.
        hyper: Options of the constructor.
        shapes: Shape of each array by name.
        contenders: Names of contenders, in the order in which a round runs them.
        dtype: dtype of parameters and gradients.
        step: Options of ``step``: grad_scale, max_norm, skip_nonfinite, zero_grads.
        bars: Limits that the case is to meet.
        family: What the case belongs to: a name in suite.py.
        model: Name of the model whose shapes these are.
        threads: Number of threads, where the case sets it.
        rotate: Whether steps go round among as many copies as exceed the last-level cache, as gradients and states of a
            training step have left it; otherwise small cases are measured in cache.
    """

    name: str
    optimizer: str
    hyper: Mapping[str, Any]
    shapes: Shapes
    contenders: tuple[str, ...]
    dtype: str = "float32"
    step: Mapping[str, Any] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()
    family: str = "bars"
    model: str | None = None
    threads: int | None = None
    rotate: bool = False

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of one element: float32 for 16-bit parameters, else of the parameters' dtype."""
        return max(4, ITEMSIZE[self.dtype]) * states(self.optimizer, tuple(sorted(self.hyper.items())))

    @property
    def resident(self) -> int:
        """Bytes of parameters, gradients and states together."""
        return self.elements * (2 * ITEMSIZE[self.dtype] + self.state_bytes)

    @property
    def declared_bytes(self) -> int:
        """Bytes that a step must move: it reads and writes parameters and states, and reads the gradients.

        A norm reads the gradients once more, trust ratios read parameters and gradients once more, and LAMB its states,
        too; zeroing writes the gradients.
        """
        itemsize = ITEMSIZE[self.dtype]
        moved = 3 * itemsize + 2 * self.state_bytes
        if self.optimizer in LAYERWISE:
            moved += 2 * itemsize + self.state_bytes * (self.optimizer == "LAMB")
        elif "max_norm" in self.step or "skip_nonfinite" in self.step:
            moved += itemsize
        moved += itemsize * bool(self.step.get("zero_grads"))
        return self.elements * moved


LAYERWISE = ("LARS", "LAMB")
"""What needs to know whole parameters."""


@functools.cache
def states(optimizer: str, hyper: tuple[tuple[str, Any], ...]) -> int:
    """How many states of the parameter's shape an optimizer has."""
    import fastopt

    made = getattr(fastopt, optimizer)({"w": np.ones(1, np.float32)}, **dict(hyper))
    return sum(isinstance(value, np.ndarray) for value in made.state["w"].values())
