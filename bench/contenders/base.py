"""What a contender is."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..case import Case

Arrays = dict[str, NDArray[Any]]


class Contender:
    """Something that updates ``params`` with ``grads`` when ``step`` is called.

    Contenders run in processes of their own (worker.py), and import there what they need.

    Args:
        case: What to do.
        params: Parameters; the contender may copy them.
        grads: Gradients.
        threads: Number of threads.

    Attributes:
        gradients: The arrays that ``step`` takes gradients from, which a check scales between steps; empty where a
            contender keeps them elsewhere and overrides ``scale_gradients``.
    """

    package: ClassVar[str | None] = None
    """A module that must be installed."""

    install: ClassVar[str | None] = None
    """The command that installs it; by default pip with the name of the package."""

    process: ClassVar[str | None] = None
    """Contenders that name the same process share one; None is one of its own."""

    optimizers: ClassVar[tuple[str, ...] | None] = None
    """Class names that it has; None: all that a case may ask for."""

    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    """dtypes of parameters that it computes."""

    options: ClassVar[tuple[str, ...]] = ()
    """Options of a case's step that it knows."""

    checked: ClassVar[bool] = True
    """Whether it computes the case's optimizer, so that there is an answer to check."""

    most_copies: ClassVar[int | None] = None
    """Copies of a case's buffers that it goes round among at most; None: as many as the case asks for."""

    gradients: Iterable[Any] = ()

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        raise NotImplementedError

    @classmethod
    def missing(cls) -> str | None:
        """What to install, or None."""
        if cls.package is None or importlib.util.find_spec(cls.package) is not None:
            return None
        return f"not installed: {cls.install or f'pip install {cls.package}'}"

    @classmethod
    def refusal(cls, case: Case) -> str | None:
        """Why it cannot do the case, or None."""
        if cls.optimizers is not None and case.optimizer not in cls.optimizers:
            return f"has no {case.optimizer}"
        if case.dtype not in cls.dtypes:
            return f"does not compute {case.dtype}"
        unknown = [name for name in case.step if name not in cls.options]
        return f"its step has no {', '.join(unknown)}" if unknown else None

    def step(self) -> None:
        """Take one step."""
        raise NotImplementedError

    def parameter(self, name: str) -> Any:
        """The parameter as it is now, as a NumPy array."""
        raise NotImplementedError

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients of the next step."""
        for array in self.gradients:
            np.multiply(array, array.dtype.type(factor), out=array)


def betas_of(hyper: Mapping[str, Any]) -> tuple[float, float]:
    """Adam's betas, torch's by default."""
    first, second = hyper.get("betas", (0.9, 0.999))
    return first, second


def zeros_like(arrays: Arrays) -> Arrays:
    """A state that begins with zero, in memory that was touched."""
    return {name: np.full_like(array, 0) for name, array in arrays.items()}
