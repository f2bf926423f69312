"""The optimizers: each is torch's class where that has one, and which of fastopt's rules its options select."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import ParamsT

from ..engine.classes import class_of
from ..kernels.registry import RULES
from ..kernels.rules.rule import Rule
from ._options import plain
from ._tensors import COMPUTED
from .base import TensorOptimizer

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "optimizer",
]


class _WithDefaults(torch.optim.Optimizer):
    """torch's base class, with the defaults as keywords, as its subclasses have them."""

    def __init__(self, params: ParamsT, **defaults: Any) -> None:
        super().__init__(params, defaults)


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


class Adagrad(TensorOptimizer, torch.optim.Adagrad):
    """``torch.optim.Adagrad`` in one pass; formula in ``fastopt.Adagrad``, as is what ``eps_inside_sqrt`` does; further
    arguments in ``TensorOptimizer``.

    State: ``step``, ``sum``.
    """

    rule = RULES["adagrad"]

    def begin_group(self, group: dict[str, Any]) -> None:  # noqa: D102
        for p in group["params"]:
            if p in self.state and COMPUTED.get(p.dtype, p.dtype) != p.dtype:  # torch's rounds the start to 16 bits
                start = self.defaults["initial_accumulator_value"]
                self.state[p]["sum"] = torch.full_like(p, start, dtype=COMPUTED[p.dtype])


class Adadelta(TensorOptimizer, torch.optim.Adadelta):
    """``torch.optim.Adadelta`` in one pass; formula in ``fastopt.Adadelta``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``square_avg``, ``acc_delta``.
    """

    rule = RULES["adadelta"]


class RMSprop(TensorOptimizer, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` in one pass; formulas in ``fastopt.RMSprop``, as is what ``eps_inside_sqrt`` does;
    further arguments in ``TensorOptimizer``.

    State: ``step``, ``square_avg``, with ``centered`` also ``grad_avg``, with momentum also ``momentum_buffer``.
    """

    rule = RULES["rmsprop"]


class Rprop(TensorOptimizer, torch.optim.Rprop):
    """``torch.optim.Rprop`` in one pass; formula in ``fastopt.Rprop``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``prev``, ``step_size``.
    """

    rule = RULES["rprop"]


class ASGD(TensorOptimizer, torch.optim.ASGD):
    """``torch.optim.ASGD`` in one pass; formula in ``fastopt.ASGD``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``eta``, ``mu``, ``ax``.
    """

    rule = RULES["asgd"]


class Adam(TensorOptimizer, torch.optim.Adam):
    """``torch.optim.Adam`` in one pass; formulas in ``fastopt.Adam``, further arguments in ``TensorOptimizer``.

    ``eps_hat``: as there. ``fully_decoupled``: as in ``fastopt.AdamW``, with ``decoupled_weight_decay=True``.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, with ``amsgrad`` also ``max_exp_avg_sq``.
    """

    rule = RULES["adam"]
    flags = ("fully_decoupled",)

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

    begin_group, complete = Adam.begin_group, Adam.complete


class Adamax(TensorOptimizer, torch.optim.Adamax):
    """``torch.optim.Adamax`` in one pass; formula in ``fastopt.Adamax``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_inf``.
    """

    rule = RULES["adamax"]


class NAdam(TensorOptimizer, torch.optim.NAdam):
    """``torch.optim.NAdam`` in one pass; formula in ``fastopt.NAdam``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``.
    """

    rule = RULES["nadam"]


class RAdam(TensorOptimizer, torch.optim.RAdam):
    """``torch.optim.RAdam`` in one pass; formula in ``fastopt.RAdam``, further arguments in ``TensorOptimizer``.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``.
    """

    rule = RULES["radam"]


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


class _OfRule(_WithDefaults):
    """What a class of a rule has beside: its objects are pickled by the rule's name, for the class has none."""

    rule: ClassVar[Rule]

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not class_of(self.rule, TensorOptimizer, _OfRule):
            return super().__reduce_ex__(protocol)
        return _unmade, (self.rule,), self.__getstate__()


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
    return class_of(rule, TensorOptimizer, _OfRule)
