"""A GradScaler whose check for overflow is part of the step."""

from __future__ import annotations

from typing import Any

import torch

from ..engine.options import boolean


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that leaves the check for infinities and NaN to the step of fastopt's optimizers.

    torch's own scaler works too; but before a step it reads and writes all gradients to see whether they are finite.
    With this one that is found while the step reads them for the norm. A step with gradients that are not finite
    changes nothing, also the first. On a GPU nothing is waited for. Other optimizers are treated as by torch.

    Args:
        device: "cuda" or "cpu", as for torch's.
        init_scale: Scale to begin with.
        growth_factor: Factor on the scale after ``growth_interval`` steps without overflow.
        backoff_factor: Factor on the scale after an overflow.
        growth_interval: Steps without overflow after which the scale grows.
        enabled: False makes the scaler do nothing.
        unscale_grads: Leave ``.grad`` unscaled after ``step``, as torch's does. That takes a pass of its own, which
            False saves: ``.grad`` then stays multiplied by the scale. (With ``zero_grads=True`` there is no such pass.)

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt, scaler = fastopt.torch.SGD([w], lr=0.5), fastopt.torch.GradScaler("cpu", init_scale=8.0)
        >>> scaler.scale((w * torch.tensor([1.0, 2.0])).sum()).backward()
        >>> scaler.step(opt)
        >>> scaler.update()
        >>> w.tolist(), w.grad.tolist()
        ([0.5, 0.0], [1.0, 2.0])
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        unscale_grads: bool = True,
    ) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._unscale_grads = boolean(unscale_grads, "GradScaler: unscale_grads")

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Called by torch's ``step`` where the user did not unscale before."""
        if not hasattr(optimizer, "_checks_for_scaler"):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found: dict[Any, torch.Tensor] = {scale.device: torch.zeros((), dtype=torch.float32, device=scale.device)}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        optimizer._checks_for_scaler = True
        return found

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> float | None:
        """Take a step with unscaled gradients, unless some are not finite; as torch's."""
        if not hasattr(optimizer, "_checks_for_scaler"):
            return super().step(optimizer, *args, **kwargs)
        optimizer._unscales = self._unscale_grads
        try:
            result = super().step(optimizer, *args, **kwargs)
            if optimizer._checks_for_scaler:
                for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                    found.fill_(optimizer._steppers().skipped(optimizer.last_info))
        finally:
            optimizer._checks_for_scaler, optimizer._unscales = False, True
        return result
