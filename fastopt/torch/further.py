"""Optimizers that torch does not have, in torch's manner."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.classes import Front, class_of
from ..engine.options import arguments
from ..kernels.registry import RULES
from ..kernels.rules.rule import Rule
from .base import TensorOptimizer


class _WithDefaults(torch.optim.Optimizer):
    """torch's base class, with the defaults as keywords, as its subclasses have them."""

    def __init__(self, params: ParamsT, **defaults: Any) -> None:
        super().__init__(params, defaults)


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

    rule = RULES["lion"]
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
        super().__init__(**arguments(locals()))


class LARS(TensorOptimizer, _WithDefaults):
    """LARS (arXiv:1708.03888, in MLPerf's form) with true norms per tensor; formula and arguments in ``fastopt.LARS``,
    further arguments in ``TensorOptimizer``.

    Tensors of one dimension or none (biases, norm layers) have no trust ratio and no decay, unless ``adapt`` is given.

    State: ``momentum_buffer``.

    Raises:
        NotImplementedError: The norm of a parameter's whole cannot be had: FSDP1, Partial DTensors, shards on GPUs.

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> opt = fastopt.torch.LARS([w], lr=1.0, trust_coefficient=0.01)
        >>> w.grad = torch.ones(2, 2)
        >>> opt.step()
        >>> [round(x, 3) for x in w.flatten().tolist()]
        [1.98, 1.98, 1.98, 1.98]
    """

    rule = RULES["lars"]
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
        super().__init__(**arguments(locals()))

    def complete(self, options: dict[str, Any], index: int) -> dict[str, Any]:  # noqa: D102
        options = super().complete(options, index)
        if options["nesterov"] and not options["momentum"]:
            raise ValueError(f"LARS: group {index}: nesterov=True needs momentum > 0, got 0.")
        return options


class LAMB(TensorOptimizer, _WithDefaults):
    """LAMB (arXiv:1904.00962) with true norms per tensor; formula and arguments in ``fastopt.LAMB``, further arguments
    in ``TensorOptimizer``.

    Tensors of one dimension or none (biases, norm layers) have no trust ratio and no decay, unless ``adapt`` is given.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.

    Raises:
        NotImplementedError: The norm of a parameter's whole cannot be had: FSDP1, Partial DTensors, shards on GPUs.

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.full((2, 2), 2.0))
        >>> opt = fastopt.torch.LAMB([w], lr=0.1, eps=0.0)
        >>> w.grad = torch.full((2, 2), 5.0)
        >>> opt.step()
        >>> [round(x, 3) for x in w.flatten().tolist()]
        [1.8, 1.8, 1.8, 1.8]
    """

    rule = RULES["lamb"]

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
        super().__init__(**arguments(locals()))


class _OfRule(_WithDefaults):
    """What a class of a rule has beside: its objects are pickled by the rule's name, for the class has none."""

    rule: ClassVar[Rule]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not class_of(self.rule, FRONT):
            return super().__reduce_ex__(protocol)
        return _unmade, (self.rule,), self.__getstate__()


FRONT = Front((TensorOptimizer, _OfRule), Lion, arguments)


def _unmade(rule: Rule) -> Any:
    made: Any = optimizer(rule)
    return made.__new__(made)


def optimizer(rule: Rule) -> type[Any]:
    """The class of optimizers for tensors by a rule, ``C(params, <options>, *, maximize, foreach, capturable, ...)``.

    Args:
        rule: What ``@fastopt.rule`` made.

    Returns:
        A class in torch's manner: all of ``TensorOptimizer``, and checkpoints. It is named as the rule, and always the
        same for a rule. Objects can be copied; they can be pickled if the rule stands at the top level of a module.

    State: ``step``, what the rule carries, and its states.

    Raises:
        TypeError: ``rule`` is none, or was made without defaults for its options.

    Example:
        >>> import torch, fastopt, fastopt.torch
        >>> @fastopt.rule(options={"lr": 0.5})
        ... def descent(p, g, h):
        ...     return (p - h.lr * g,)
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = fastopt.torch.optimizer(descent)([w])
        >>> w.grad = torch.tensor([1.0, 0.0])
        >>> opt.step()
        >>> w.tolist()
        [0.5, 1.0]
    """
    return class_of(rule, FRONT)
