"""Options of an optimizer as a whole, which a step may override: clipping, skipping, zeroing."""

from __future__ import annotations

from dataclasses import replace
from types import EllipsisType
from typing import Any, Generic, TypeVar, overload

from .arrays import Array, Device, is_array
from .engine.options import SCALE, Range, boolean, optional_norm
from .engine.step import Request, StepInfo

T = TypeVar("T")


class StepOption(Generic[T]):
    """An attribute that is checked when it is set, and that a field of the optimizer's request holds."""

    def __init__(self, field: str, check: Range) -> None:
        self._field, self._check = field, check

    @overload
    def __get__(self, opt: None, owner: type) -> StepOption[T]: ...

    @overload
    def __get__(self, opt: StepOptions, owner: type) -> T: ...

    def __get__(self, opt: StepOptions | None, owner: type) -> Any:
        return self if opt is None else getattr(opt._request, self._field)

    def __set__(self, opt: StepOptions, value: T) -> None:
        name = "max_grad_norm" if self._field == "max_norm" else self._field
        opt._request = replace(opt._request, **{self._field: self._check(value, f"{type(opt).__name__}: {name}")})


class StepOptions:
    """What an optimizer does in every step, unless ``step`` is told otherwise."""

    max_grad_norm = StepOption[float | None]("max_norm", optional_norm)
    skip_nonfinite = StepOption[bool]("skip_nonfinite", boolean)
    zero_grads = StepOption[bool]("zero_grads", boolean)

    _device: Device

    def __init__(self, max_grad_norm: float | None, skip_nonfinite: bool, zero_grads: bool) -> None:
        self._request = Request()
        self.max_grad_norm, self.skip_nonfinite, self.zero_grads = max_grad_norm, skip_nonfinite, zero_grads
        self.last_info = StepInfo()

    def _requested(
        self,
        grad_scale: float | Array,
        max_grad_norm: float | EllipsisType | None,
        max_norm: float | EllipsisType | None,
        skip_nonfinite: bool | EllipsisType,
        zero_grads: bool | EllipsisType,
        keep_weights: bool,
    ) -> Request:
        """What a step with these arguments is asked to do; ... stands for what the optimizer does in every step."""
        own, where = self._request, f"{type(self).__name__}.step"
        if max_norm is not ... and max_grad_norm is not ...:
            raise TypeError(f"{where}: max_norm is another name of max_grad_norm; pass one of them.")
        zero = own.zero_grads if zero_grads is ... else boolean(zero_grads, f"{where}: zero_grads")
        multiplier, scale_at = 1.0, 0
        if type(grad_scale) is not float and is_array(grad_scale):
            scale_at = self._device.scalar(grad_scale, f"{where}: grad_scale")
        if not scale_at and (type(grad_scale) is not float or grad_scale != 1.0):
            multiplier = 1.0 / SCALE(grad_scale, f"{where}: grad_scale")
        norm = own.max_norm
        if max_norm is not ...:
            norm = optional_norm(max_norm, f"{where}: max_norm")
        elif max_grad_norm is not ...:
            norm = optional_norm(max_grad_norm, f"{where}: max_grad_norm")
        skip = own.skip_nonfinite if skip_nonfinite is ... else boolean(skip_nonfinite, f"{where}: skip_nonfinite")
        return Request(multiplier, scale_at, norm, skip, zero, keep_weights)
