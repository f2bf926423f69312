"""The optimizers of torch.optim: each is torch's class, and which of fastopt's rules its options select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from ..kernels.registry import RULES
from ..kernels.rule import Options, Rule
from ._tensors import COMPUTED
from .optimizer import TensorOptimizer


class SGD(TensorOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` in one pass; formulas in ``fastopt.SGD``, further arguments in ``TensorOptimizer``.

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

    counts_steps = False
    rule_options: ClassVar[Mapping[str, Any]] = {"lr_in_momentum": False}

    def select_rule(self, options: Options) -> Rule:  # noqa: D102 - see TensorOptimizer
        if options["momentum"] == 0.0:
            return RULES["sgd"]
        return RULES["nesterov" if options["nesterov"] else "momentum"]


class Adagrad(TensorOptimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` in one pass; formula in ``fastopt.Adagrad``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``sum``.
    """

    rule_options: ClassVar[Mapping[str, Any]] = {"eps_inside_sqrt": False}

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        for p, state in self.state.items():
            if COMPUTED.get(p.dtype, p.dtype) != p.dtype:  # torch's constructor rounds the start to 16 bits
                start = self.defaults["initial_accumulator_value"]
                state["sum"] = torch.full_like(p, start, dtype=COMPUTED[p.dtype])

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["adagrad"]


class Adadelta(TensorOptimizer, torch.optim.Adadelta):
    """``torch.optim.Adadelta`` in one pass; formula in ``fastopt.Adadelta``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``square_avg``, ``acc_delta``.
    """

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["adadelta"]


class RMSprop(TensorOptimizer, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` in one pass; formulas in ``fastopt.RMSprop``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``square_avg``, with ``centered`` also ``grad_avg``, with momentum also ``momentum_buffer``.
    """

    rule_options: ClassVar[Mapping[str, Any]] = {"eps_inside_sqrt": False}

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        centered = "_centered" if options["centered"] else ""
        momentum = "_momentum" if options["momentum"] else ""
        return RULES["rmsprop" + centered + momentum]


class Rprop(TensorOptimizer, torch.optim.Rprop):
    """``torch.optim.Rprop`` in one pass; formula in ``fastopt.Rprop``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``prev``, ``step_size``.
    """

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["rprop"]


class ASGD(TensorOptimizer, torch.optim.ASGD):
    """``torch.optim.ASGD`` in one pass; formula in ``fastopt.ASGD``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``eta``, ``mu``, ``ax``.
    """

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["asgd"]


class Adam(TensorOptimizer, torch.optim.Adam):
    """``torch.optim.Adam`` in one pass; formulas in ``fastopt.Adam``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` also ``max_exp_avg_sq``.
    """

    rule_options: ClassVar[Mapping[str, Any]] = {"eps_hat": False, "fully_decoupled": False}

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        rule = "amsgrad" if options["amsgrad"] else "adam"
        return RULES[rule + ("w" if options["decoupled_weight_decay"] else "")]


class AdamW(TensorOptimizer, torch.optim.AdamW):
    """``torch.optim.AdamW`` in one pass; formulas in ``fastopt.AdamW``, further arguments in ``TensorOptimizer``.

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

    rule_options = Adam.rule_options
    select_rule = Adam.select_rule


class Adamax(TensorOptimizer, torch.optim.Adamax):
    """``torch.optim.Adamax`` in one pass; formula in ``fastopt.Adamax``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_inf``.
    """

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["adamax"]


class NAdam(TensorOptimizer, torch.optim.NAdam):
    """``torch.optim.NAdam`` in one pass; formula in ``fastopt.NAdam``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``.
    """

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["nadam"]


class RAdam(TensorOptimizer, torch.optim.RAdam):
    """``torch.optim.RAdam`` in one pass; formula in ``fastopt.RAdam``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    def select_rule(self, options: Options) -> Rule:  # noqa: D102
        return RULES["radam"]
