"""A GradScaler whose check for overflow is part of the step."""

from __future__ import annotations

from typing import Any

import torch

from .optimizer import TensorOptimizer


class GradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that leaves the check for infinities and NaN to the step of fastopt's optimizers.

    torch's own scaler works too; but before a step it reads and writes all gradients to see whether they are finite.
    With this one that is found while the step reads them for the norm, and gradients are not written. A step with
    gradients that are not finite changes nothing, also the first. On a GPU nothing is waited for. Other optimizers are
    treated as by torch.

    Args:
        device: "cpu" or "cuda", as for torch's.
        **kwargs: As for torch's.

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt, scaler = fastopt.torch.SGD([w], lr=0.5), fastopt.torch.GradScaler("cpu", init_scale=8.0)
        >>> scaler.scale((w * torch.tensor([1.0, 2.0])).sum()).backward()
        >>> scaler.step(opt)
        >>> scaler.update()
        >>> w.tolist(), w.grad.tolist()
        ([0.5, 0.0], [8.0, 16.0])
    """

    def __init__(self, device: str = "cpu", **kwargs: Any) -> None:
        super().__init__(device, **kwargs)

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Called by torch's ``step`` where the user did not unscale before."""
        if not isinstance(optimizer, TensorOptimizer):
            return super()._check_inf_per_device(optimizer)
        scale, _ = self._check_scale_growth_tracker("_check_inf_per_device")
        found: dict[Any, torch.Tensor] = {scale.device: torch.zeros((), dtype=torch.float32, device=scale.device)}
        self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        optimizer._skip_nonfinite = True
        return found

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Take a step with unscaled gradients, unless some are not finite; as torch's."""
        try:
            result = super().step(optimizer, *args, **kwargs)
            if isinstance(optimizer, TensorOptimizer) and optimizer._skip_nonfinite:
                for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                    optimizer._tell_skipped(found)
        finally:
            if isinstance(optimizer, TensorOptimizer):
                optimizer._skip_nonfinite = False
        return result
