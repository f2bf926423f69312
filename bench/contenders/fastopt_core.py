"""fastopt on NumPy arrays, in the ways that cases compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..case import Case
from .base import Arrays, Contender


class Fastopt(Contender):
    """fastopt on flat buffers."""

    process = "fastopt"  # its variants have one OpenMP runtime, and are compared more steadily in one process
    dtypes = ("float32", "float64", "float16", "bfloat16")
    options = ("grad_scale", "max_norm", "skip_nonfinite", "zero_grads")
    flat: ClassVar[bool] = True

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import fastopt

        fastopt.set_num_threads(threads)
        if self.flat:
            self.params: Any = fastopt.FlatBuffer.from_arrays(params)
            self.grads: Any = fastopt.FlatBuffer.from_arrays(grads)
        else:
            self.params, self.grads = params, grads
        self.gradients = list(self.grads.values())
        self.optimizer = getattr(fastopt, self.class_name(case))(self.params, **self.hyper(case))
        self.request = self.step_options(case)

    def class_name(self, case: Case) -> str:
        """Name of the optimizer."""
        return case.optimizer

    def hyper(self, case: Case) -> Mapping[str, Any]:
        """Its options."""
        return case.hyper

    def step_options(self, case: Case) -> Mapping[str, Any]:
        """Options of its step."""
        return case.step

    def step(self) -> None:  # noqa: D102
        self.optimizer.step(self.grads, **self.request)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]


class FastoptArrays(Fastopt):
    """fastopt on arrays that the caller keeps, and gradients that stay where they are."""

    flat = False


class FastoptMoving(FastoptArrays):
    """fastopt on arrays that the caller keeps, and gradients in new arrays at every step."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        self.both = [self.grads, {name: array.copy() for name, array in self.grads.items()}]
        self.gradients = [array for grads in self.both for array in grads.values()]

    def step(self) -> None:  # noqa: D102
        self.both.reverse()
        self.optimizer.step(self.both[0], **self.request)


class FastoptPlain(Fastopt):
    """The same step without unscaling, clipping and finite check."""

    checked = False

    def step_options(self, case: Case) -> Mapping[str, Any]:  # noqa: D102
        return {}


class FastoptKeep(Fastopt):
    """LARS that keeps the norms of the weights."""

    def hyper(self, case: Case) -> Mapping[str, Any]:  # noqa: D102
        return {**case.hyper, "keep_weight_norms": True}


class FastoptAdamW(Fastopt):
    """AdamW in the place of LAMB."""

    checked = False

    def class_name(self, case: Case) -> str:  # noqa: D102
        return "AdamW"


class FastoptMomentum(Fastopt):
    """Momentum in the place of LARS."""

    checked = False

    def class_name(self, case: Case) -> str:  # noqa: D102
        return "SGD"

    def hyper(self, case: Case) -> Mapping[str, Any]:  # noqa: D102
        return {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
