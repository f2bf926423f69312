"""The optimizers of torch.optim but for Adam's family: each is torch's class, and which of fastopt's rules its options
select. Constructors are written out, because tools that make command lines and completions read the source.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.options import arguments
from ..kernels.registry import RULES
from ._tensors import COMPUTED
from .base import TensorOptimizer


class SGD(TensorOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` in one pass; formulas in ``fastopt.SGD``, as is what ``lr_in_momentum`` does; further
    arguments in ``TensorOptimizer``.

    State: ``momentum_buffer``, unless momentum is 0.

    Example:
        >>> import torch, fastopt.torch
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = fastopt.torch.SGD([w], lr=0.1, momentum=0.9)
        >>> w.grad = torch.tensor([1.0, 0.0])
        >>> opt.step()
        >>> w.tolist()
        [0.8999999761581421, 1.0]
    """

    rule = RULES["sgd"]
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        lr_in_momentum: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))


class Adagrad(TensorOptimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` in one pass; formula in ``fastopt.Adagrad``, as is what ``eps_inside_sqrt`` does; further
    arguments in ``TensorOptimizer``.

    State: ``step``, ``sum``.
    """

    rule = RULES["adagrad"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        eps_inside_sqrt: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
        for p, state in self.state.items():
            if COMPUTED.get(p.dtype, p.dtype) != p.dtype:  # torch's constructor rounds the start to 16 bits
                start = self.defaults["initial_accumulator_value"]
                state["sum"] = torch.full_like(p, start, dtype=COMPUTED[p.dtype])


class Adadelta(TensorOptimizer, torch.optim.Adadelta):
    """``torch.optim.Adadelta`` in one pass; formula in ``fastopt.Adadelta``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``square_avg``, ``acc_delta``.
    """

    rule = RULES["adadelta"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
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


class RMSprop(TensorOptimizer, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` in one pass; formulas in ``fastopt.RMSprop``, as is what ``eps_inside_sqrt`` does;
    further arguments in ``TensorOptimizer``.

    State: ``step``, ``square_avg``, with ``centered`` also ``grad_avg``, with momentum also ``momentum_buffer``.
    """

    rule = RULES["rmsprop"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_inside_sqrt: bool = False,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))


class Rprop(TensorOptimizer, torch.optim.Rprop):
    """``torch.optim.Rprop`` in one pass; formula in ``fastopt.Rprop``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``prev``, ``step_size``.
    """

    rule = RULES["rprop"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
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


class ASGD(TensorOptimizer, torch.optim.ASGD):
    """``torch.optim.ASGD`` in one pass; formula in ``fastopt.ASGD``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``eta``, ``mu``, ``ax``.
    """

    rule = RULES["asgd"]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
    ) -> None:
        super().__init__(**arguments(locals()))
