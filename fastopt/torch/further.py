"""Optimizers that torch does not have, in torch's manner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.options import arguments
from ..engine.plan import Treatment, layerwise
from ..kernels.registry import RULES
from ..kernels.rules.rule import Options, Rule
from ._options import check_rate
from ._tensors import holds_part
from .optimizer import TensorOptimizer


def _refuse(wrong: bool, what: str, value: Any) -> None:
    """Refuse a value in torch's words."""
    if wrong:
        raise ValueError(f"Invalid {what}: {value}")


class _WithDefaults(torch.optim.Optimizer):
    """torch's base class, with the defaults as keywords, as its subclasses have them."""

    def __init__(self, params: ParamsT, **defaults: Any) -> None:
        super().__init__(params, defaults)


class _Layerwise:
    """What LARS and LAMB have in common: ratios by norms of whole parameters."""

    select_rule: Callable[[Options], Rule]

    def structure(self, options: Options) -> tuple[Any, ...]:
        return *TensorOptimizer.structure(self, options), options["adapt"], options.get("decay_1d")  # type: ignore[arg-type]

    def treat(self, options: Options, parameter: Tensor) -> Treatment:
        if holds_part(parameter):
            raise NotImplementedError(
                f"{type(self).__name__}: a parameter is a {type(parameter).__name__} that is sharded, and the norm of "
                "its whole is not known to one process. Use an optimizer whose rule has no norms, or DDP."
            )
        return layerwise(self.select_rule(options), options, parameter.ndim)


class Lion(TensorOptimizer, _WithDefaults):
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

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        given = arguments(locals())
        check_rate(lr, "Lion")
        _refuse(not lr >= 0.0, "learning rate", lr)
        for index, beta in enumerate(betas):
            _refuse(not 0.0 <= beta < 1.0, f"beta parameter at index {index}", beta)
        _refuse(not weight_decay >= 0.0, "weight_decay value", weight_decay)
        super().__init__(**given)

    def select_rule(self, options: Options) -> Rule:  # noqa: D102 - see TensorOptimizer
        return RULES["lion"]


class LARS(_Layerwise, TensorOptimizer, _WithDefaults):
    """LARS (arXiv:1708.03888, in MLPerf's form) with true norms per tensor; formula and arguments in ``fastopt.LARS``,
    further arguments in ``TensorOptimizer``.

    Tensors of one dimension or none (biases, norm layers) have no trust ratio and no decay, unless ``adapt`` is given.

    State: ``momentum_buffer``.

    Raises:
        NotImplementedError: A process holds only a part of a parameter (a DTensor that is sharded): the norm is not
            known.

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

    def __init__(
        self,
        params: ParamsT,
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
        decay_1d: bool | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        given = arguments(locals())
        check_rate(lr, "LARS")
        _refuse(not lr >= 0.0, "learning rate", lr)
        _refuse(not momentum >= 0.0, "momentum value", momentum)
        _refuse(not weight_decay >= 0.0, "weight_decay value", weight_decay)
        _refuse(not trust_coefficient >= 0.0, "trust_coefficient value", trust_coefficient)
        _refuse(not eps >= 0.0, "epsilon value", eps)
        if nesterov and momentum <= 0:
            raise ValueError("Nesterov momentum requires a momentum")
        super().__init__(**given)

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["lars_nesterov" if options["nesterov"] else "lars"]


class LAMB(_Layerwise, TensorOptimizer, _WithDefaults):
    """LAMB (arXiv:1904.00962) with true norms per tensor; formula and arguments in ``fastopt.LAMB``, further arguments
    in ``TensorOptimizer``.

    Tensors of one dimension or none (biases, norm layers) have no trust ratio and no decay, unless ``adapt`` is given.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Raises:
        NotImplementedError: A process holds only a part of a parameter (a DTensor that is sharded): the norm is not
            known.

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> opt = fastopt.torch.LAMB([w], lr=0.1, eps=0.0)
        >>> w.grad = torch.full((2, 2), 5.0)
        >>> opt.step()
        >>> [round(x, 3) for x in w.flatten().tolist()]
        [1.8, 1.8, 1.8, 1.8]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        adapt: bool | None = None,
        decay_1d: bool | None = None,
        trust_clip: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        given = arguments(locals())
        check_rate(lr, "LAMB")
        _refuse(not lr >= 0.0, "learning rate", lr)
        for index, beta in enumerate(betas):
            _refuse(not 0.0 <= beta < 1.0, f"beta parameter at index {index}", beta)
        _refuse(not eps >= 0.0, "epsilon value", eps)
        _refuse(not weight_decay >= 0.0, "weight_decay value", weight_decay)
        _refuse(trust_clip is not None and not trust_clip > 0.0, "trust_clip value", trust_clip)
        super().__init__(**given)

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["lamb"]
