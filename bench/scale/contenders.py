"""Who is measured on several processes, and what the answer must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Module, Parameter, ParameterList
from torch.nn.parallel import DistributedDataParallel

from fastopt.torch import AdamW, ShardedOptimizer

from ..models import Shape
from ..models.language import bert

LAYERS = 4
CHECKED = 3
"""Steps before anything is timed."""
HYPER: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}
SCALE = 1e-3
"""Of the gradients, as large as eps: AdamW's answer then depends on whether they were averaged or added."""
TOLERANCE = 1e-4 * CHECKED * HYPER["lr"]
"""A ten-thousandth of what the steps move: sums in another order give a hundredth of that."""


class WrongAnswer(Exception):
    """Parameters that are not torch's."""


def layers(size: int) -> list[list[Shape]]:
    """Shapes of four layers of BERT of about so many parameters: 50.4 M are those of BERT large."""
    width = max(2, round((size / (12 * LAYERS)) ** 0.5 / 2) * 2)
    every = bert(0, 0, 0, width, LAYERS, 4 * width)
    return [[shape for name, shape in every.items() if name.startswith(f"layer{k}.")] for k in range(LAYERS)]


class Problem:
    """Parameters, and gradients of this process.

    Args:
        size: Number of parameters, about.
        factor: Of the gradients of this process; the average over processes is 1.
    """

    def __init__(self, size: int, factor: float) -> None:
        self.layers = layers(size)
        self.shapes = [shape for layer in self.layers for shape in layer]
        self.gradients = self._random(1, SCALE)
        self.elements = sum(g.numel() for g in self.gradients)
        expected = self.parameters()
        for p, g in zip(expected, self.gradients, strict=True):
            p.grad = g
        optimizer = torch.optim.AdamW(expected, fused=True, **HYPER)
        for _ in range(CHECKED):
            optimizer.step()
        self._expected = [p.detach() for p in expected]
        for g in self.gradients:
            g.mul_(factor)

    def _random(self, seed: int, scale: float) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=generator).mul_(scale) for shape in self.shapes]

    def parameters(self) -> list[Parameter]:
        """As they are at the start."""
        return [Parameter(x) for x in self._random(0, 0.02)]

    def model(self) -> Module:
        """A model whose backward only hands the gradients over."""
        fresh = iter(self.parameters())
        given = iter(self.gradients)
        pairs = ([(next(fresh), next(given)) for _ in layer] for layer in self.layers)
        return torch.nn.Sequential(*map(_Layer, pairs))

    def error(self, answer: list[Tensor]) -> float:
        """Largest distance of parameters from those that torch's AdamW gives."""
        pairs = zip(answer, self._expected, strict=True)
        return max(float((x - y).abs().max()) if x.shape == y.shape else float("inf") for x, y in pairs)


class _Give(torch.autograd.Function):
    """Nothing forward; a given gradient of the parameter backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor, None]:
        return outer[0], ctx.gradient, None


class _Layer(Module):
    def __init__(self, pairs: list[tuple[Parameter, Tensor]]) -> None:
        super().__init__()
        self.weights = ParameterList(p for p, _ in pairs)
        self.given = [g for _, g in pairs]

    def forward(self, x: Tensor) -> Tensor:
        for parameter, gradient in zip(self.weights, self.given, strict=True):
            x = _Give.apply(x, parameter, gradient)
        return x


class Contender:
    """A model and an optimizer.

    Attributes:
        optimizer: Of which the states are counted.
    """

    optimizer: Any

    def step(self) -> None:
        """What is timed."""
        self.optimizer.step()

    def answer(self) -> list[Tensor]:
        """All parameters, whole."""
        raise NotImplementedError

    def states(self) -> int:
        """Bytes of the states on this process."""
        inner = getattr(self.optimizer, "optim", self.optimizer)  # ZeroRedundancyOptimizer's own
        found = (x for state in inner.state_dict()["state"].values() for x in state.values())
        tensors = (getattr(x, "local", x) for x in found if isinstance(x, Tensor))
        return sum((x.to_local() if isinstance(x, DTensor) else x).nbytes for x in tensors if x.dim())


class Update(Contender):
    """A step with gradients that are the same on all processes already."""

    def __init__(self, problem: Problem, make: Callable[[Any], Any]) -> None:
        self._params = problem.parameters()
        for p, g in zip(self._params, problem.gradients, strict=True):
            p.grad = g
        self.optimizer = make(self._params)

    def answer(self) -> list[Tensor]:  # noqa: D102
        return [p.detach() for p in self._params]


class Train(Contender):
    """Forward, backward and step of a model that computes nothing: gradients are averaged over the processes."""

    def __init__(self, problem: Problem, wrap: Callable[[Module], Module], make: Callable[[Any], Any]) -> None:
        self._model = wrap(problem.model())
        self._input = torch.zeros(1, requires_grad=True)
        self.optimizer = make(self._model.parameters())

    def step(self) -> None:  # noqa: D102
        self._model(self._input).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def answer(self) -> list[Tensor]:  # noqa: D102
        found = (p.detach() for p in self._model.parameters())
        return [x.full_tensor() if isinstance(x, DTensor) else x for x in found]


def _ddp(model: Module) -> Module:
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _fsdp(model: Module) -> Module:
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=False)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def _ours(params: Any, **options: Any) -> Any:
    return ShardedOptimizer(params, AdamW, **options, **HYPER)


def _fused(params: Any) -> Any:
    return torch.optim.AdamW(params, fused=True, **HYPER)


def _zero(params: Any, **options: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # only here: it warns of torch.jit.script

    return ZeroRedundancyOptimizer(params, torch.optim.AdamW, **options, fused=True, **HYPER)


UPDATE: dict[str, Callable[[Problem], Contender]] = {
    "ShardedOptimizer": lambda problem: Update(problem, _ours),
    "ZeroRedundancyOptimizer": lambda problem: Update(problem, _zero),
    "ZeroRedundancyOptimizer, bucket views": lambda problem: Update(
        problem, lambda params: _zero(params, parameters_as_bucket_view=True)
    ),
    "fused AdamW, not sharded": lambda problem: Update(problem, _fused),
}
"""A step with gradients that are averaged already: update, and gather where it is sharded."""

TRAIN: dict[str, Callable[[Problem], Contender]] = {
    "ShardedOptimizer(reduce_gradients=True)": lambda problem: Train(
        problem, lambda model: model, lambda params: _ours(params, reduce_gradients=True)
    ),
    "DDP + ShardedOptimizer": lambda problem: Train(problem, _ddp, _ours),
    "DDP + ZeroRedundancyOptimizer": lambda problem: Train(problem, _ddp, _zero),
    "DDP + fused AdamW": lambda problem: Train(problem, _ddp, _fused),
    "FSDP2 + fused AdamW": lambda problem: Train(problem, _fsdp, _fused),
}
"""The same, and before it gradients go from backward through the reduction over processes."""
