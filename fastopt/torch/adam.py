"""Adam's family in torch.optim: each is torch's class, and which of fastopt's rules its options select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.options import arguments
from ..kernels.registry import RULES
from ._options import plain
from .base import TensorOptimizer


class Adam(TensorOptimizer, torch.optim.Adam):
    """``torch.optim.Adam`` in one pass; formulas in ``fastopt.Adam``, further arguments in ``TensorOptimizer``.

    ``eps_hat``: as there. ``fully_decoupled``: as in ``fastopt.AdamW``, with ``decoupled_weight_decay=True``.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` also ``max_exp_avg_sq``.
    """

    rule = RULES["adam"]
    rule_options: ClassVar[Mapping[str, Any]] = {"decoupled_weight_decay": False}  # torch's classes have it since 2.7

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eps_hat: bool = False,
        fully_decoupled: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))

    def begin_group(self, group: dict[str, Any]) -> None:  # noqa: D102
        if group.get("fully_decoupled"):
            group.setdefault("initial_lr", plain(group["lr"], f"{type(self).__name__}: lr"))

    def complete(self, options: dict[str, Any], index: int) -> dict[str, Any]:  # noqa: D102
        options = TensorOptimizer.complete(self, options, index)
        if options["fully_decoupled"]:
            self.begin_group(self.param_groups[index])  # it may have been switched on since
            options.setdefault("initial_lr", options["lr"])
            where = f"{type(self).__name__}: group {index}: fully_decoupled=True needs"
            if not options["decoupled_weight_decay"]:
                raise ValueError(f"{where} decoupled_weight_decay=True.")
            if options["initial_lr"] == 0.0:
                raise ValueError(f"{where} an initial lr > 0, got 0.")
        return options


class AdamW(TensorOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` in one pass; formulas in ``fastopt.AdamW``, as is what ``eps_hat`` and
    ``fully_decoupled`` do; further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` also ``max_exp_avg_sq``.

    Example:
        >>> import torch, fastopt.torch
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fastopt.torch.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> round(opt.last_info.grad_norm, 4)
        1.7321
    """

    rule = RULES["adamw"]
    rule_options: ClassVar[Mapping[str, Any]] = {"decoupled_weight_decay": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eps_hat: bool = False,
        fully_decoupled: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))

    begin_group, complete = Adam.begin_group, Adam.complete


class Adamax(TensorOptimizer, torch.optim.Adamax):
    """``torch.optim.Adamax`` in one pass; formula in ``fastopt.Adamax``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_inf``.
    """

    rule = RULES["adamax"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))


class NAdam(TensorOptimizer, torch.optim.NAdam):
    """``torch.optim.NAdam`` in one pass; formula in ``fastopt.NAdam``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``.
    """

    rule = RULES["nadam"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))


class RAdam(TensorOptimizer, torch.optim.RAdam):
    """``torch.optim.RAdam`` in one pass; formula in ``fastopt.RAdam``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    rule = RULES["radam"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
