"""Optimizers that torch does not have, in torch's manner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._plan import Treatment
from ..kernels.registry import RULES
from ..kernels.rule import Options, Rule
from ._tensors import PLAIN
from .optimizer import TensorOptimizer


def _refuse(wrong: bool, what: str, value: Any) -> None:
    """Refuse a value in torch's words."""
    if wrong:
        raise ValueError(f"Invalid {what}: {value}")


class _Lion(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _refuse(not lr >= 0.0, "learning rate", lr)
        for index, beta in enumerate(betas):
            _refuse(not 0.0 <= beta < 1.0, f"beta parameter at index {index}", beta)
        _refuse(not weight_decay >= 0.0, "weight_decay value", weight_decay)
        defaults = dict(
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults)


class Lion(TensorOptimizer, _Lion):
    """Lion (arXiv:2302.06675) in one pass; formula in ``fastopt.Lion``, further arguments in ``TensorOptimizer``.

    Args:
        params: As for ``torch.optim``.
        lr: Learning rate, >= 0.
        betas: Weight of the momentum in the step, and decay rate of the momentum, each in [0, 1).
        weight_decay: Decay rate, >= 0, multiplied by lr.
        maximize: Ascend.

    State: ``exp_avg``.

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = fastopt.torch.Lion([w], lr=0.5)
        >>> w.grad = torch.tensor([3.0, 0.0])
        >>> opt.step()
        >>> w.tolist()
        [0.5, 1.0]
    """

    counts_steps = False

    def select_rule(self, options: Options) -> Rule:  # noqa: D102 - see TensorOptimizer
        return RULES["lion"]


class _LARS(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        nesterov: bool = False,
        lr_in_momentum: bool = True,
        clip: bool = False,
        adapt: bool | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        _refuse(not lr >= 0.0, "learning rate", lr)
        _refuse(not momentum >= 0.0, "momentum value", momentum)
        _refuse(not weight_decay >= 0.0, "weight_decay value", weight_decay)
        _refuse(not trust_coefficient >= 0.0, "trust_coefficient value", trust_coefficient)
        _refuse(not eps >= 0.0, "epsilon value", eps)
        if nesterov and momentum <= 0:
            raise ValueError("Nesterov momentum requires a momentum")
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            nesterov=nesterov,
            lr_in_momentum=lr_in_momentum,
            clip=clip,
            adapt=adapt,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        super().__init__(params, defaults)


class LARS(TensorOptimizer, _LARS):
    """LARS (arXiv:1708.03888, in MLPerf's form) with true norms per tensor; formula and arguments in ``fastopt.LARS``,
    further arguments in ``TensorOptimizer``.

    Tensors of one dimension or none (biases, norm layers) have no trust ratio and no decay, unless ``adapt`` is given.

    State: ``momentum_buffer``.

    Raises:
        NotImplementedError: A parameter is a DTensor, of which a process holds only a part: the norm is not known.

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> opt = fastopt.torch.LARS([w], lr=1.0, trust_coefficient=0.01)
        >>> w.grad = torch.ones(2, 2)
        >>> opt.step()
        >>> [round(x, 3) for x in w.flatten().tolist()]
        [1.98, 1.98, 1.98, 1.98]
    """

    counts_steps = False

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["lars_nesterov" if options["nesterov"] else "lars"]

    def structure(self, options: Options) -> tuple[Any, ...]:  # noqa: D102
        return *super().structure(options), options["adapt"]

    def treat(self, options: Options, parameter: Tensor) -> Treatment:  # noqa: D102
        if type(parameter) not in PLAIN and hasattr(parameter, "device_mesh"):
            raise NotImplementedError(
                "LARS: a parameter is a DTensor, and the norm of its whole is not known to one process. Use an "
                "optimizer whose rule has no norms, or DDP."
            )
        rule, adapt = self.select_rule(options), options["adapt"]
        if adapt is None and parameter.ndim <= 1:
            return Treatment(rule, False, (("weight_decay", 0.0),))
        return Treatment(rule, adapt is not False)
