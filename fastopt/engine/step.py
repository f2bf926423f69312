"""What a step is asked to do, and what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Request:
    """What a step is asked to do with the gradients that its plan points at."""

    multiplier: float = 1.0  # of the gradients, before clipping
    scale_at: int = 0  # address of a loss scale in device memory that takes the multiplier's place
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    zero_grads: bool = False
    keep_weights: bool = False  # trust the weight norms that the last step left
    needs_norm: bool = field(init=False)  # whether something is asked that depends on the norm of all gradients

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs_norm", self.max_grad_norm is not None or self.skip_nonfinite)

    @property
    def clips(self) -> bool:
        """Whether the multiplier of the gradients depends on their norm."""
        return self.max_grad_norm is not None and self.max_grad_norm != math.inf

    def clipped(self, norm: float) -> float:
        """The multiplier of the gradients, whose norm after unscaling is this."""
        if self.max_grad_norm is None or self.max_grad_norm == math.inf:
            return self.multiplier
        coefficient = self.max_grad_norm / (norm + 1e-6)
        return self.multiplier * (1.0 if coefficient > 1.0 else coefficient)  # NaN stays


class StepInfo:
    """What a step did. On a GPU reading a field waits for the step; a step itself never waits.

    Attributes:
        skipped: The gradients were not finite and ``skip_nonfinite`` was asked for: nothing was changed.
        grad_norm: Euclidean norm of all gradients, unscaled and before clipping; None where neither
            ``max_grad_norm`` nor ``skip_nonfinite`` asked for it.
    """

    __slots__ = ("_fetch", "_values")

    def __init__(
        self,
        skipped: bool = False,
        grad_norm: float | None = None,
        fetch: Callable[[], tuple[bool, float]] | None = None,
    ) -> None:
        self._values: tuple[bool, float | None] = skipped, grad_norm
        self._fetch = fetch

    def _settled(self) -> tuple[bool, float | None]:
        if self._fetch is not None:
            self._values, self._fetch = self._fetch(), None
        return self._values

    @property
    def skipped(self) -> bool:
        return self._settled()[0]

    @property
    def grad_norm(self) -> float | None:
        return self._settled()[1]

    def __iter__(self) -> Iterator[bool | float | None]:
        return iter(self._settled())

    def __eq__(self, other: object) -> bool:
        return self._settled() == (tuple(other) if isinstance(other, StepInfo) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"StepInfo(skipped={self.skipped}, grad_norm={self.grad_norm})"
