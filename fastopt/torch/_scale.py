"""What GradScaler asks of a step: gradients divided by a scale, and no step where gradients were not finite."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..engine.device import Device
from ..engine.step import Request
from ._tensors import local


def request_for(asked: Request, scale: Any, found: Any, device: Device | None) -> tuple[Request | None, Tensor | None]:
    """The request with a loss scale, or None where the step must be skipped; and a tensor that must outlive the step.

    Args:
        asked: What else is asked for.
        scale: The loss scale, a tensor or a number; None for 1.
        found: Greater than 0 where the step must be skipped; None if nobody looked.
        device: Where the parameters are; None if in several places, for which both are waited for.
    """
    if device is not None and device.on_gpu:
        return _decided_there(asked, scale, found, device)
    if found is not None and float(found):
        return None, None
    return dataclasses.replace(asked, multiplier=1.0 if scale is None else 1.0 / float(scale)), None


def _decided_there(asked: Request, scale: Any, found: Any, device: Device) -> tuple[Request, Tensor]:
    """Leave it to the GPU. A scale of NaN makes the norm NaN, and a step whose norm is not finite is skipped."""
    there = _placed(1.0 if scale is None else scale, device)
    if found is not None:
        there = torch.where(_placed(found, device) != 0, math.nan, there)
    skip = asked.skip_nonfinite or found is not None
    return dataclasses.replace(asked, scale_at=there.data_ptr(), skip_nonfinite=skip), there


def _placed(number: Any, device: Device) -> Tensor:
    if isinstance(number, Tensor):
        return number.to(device.name, torch.float32, non_blocking=True)
    return torch.full((), float(number), dtype=torch.float32, device=device.name)


def unscale(params: Iterable[Tensor], scale: Any, skipped: bool | Tensor) -> None:
    """Divide gradients by the scale, unless the step was skipped, as torch's fused steps leave them. Waits for no GPU.

    Args:
        params: The parameters.
        scale: The loss scale, a tensor or a number.
        skipped: Whether the step was skipped; a tensor, not 0 where it was, if only a GPU knows.
    """
    if skipped is True:
        return
    places: dict[torch.device, list[Tensor]] = {}
    for p in params:
        if p.grad is not None:
            if 0 in local(p.grad, "a gradient").stride():  # an expanded tensor cannot be written
                p.grad = p.grad.clone(memory_format=torch.contiguous_format)
            gradient = local(p.grad, "a gradient").detach()
            places.setdefault(gradient.device, []).append(gradient)
    for device, gradients in places.items():
        inverse = torch.as_tensor(scale, dtype=torch.float64).to(device, non_blocking=True).reciprocal().float()
        if isinstance(skipped, Tensor):
            inverse = torch.where(skipped.to(device, non_blocking=True) != 0, 1.0, inverse)
        torch._foreach_mul_(gradients, inverse)
