"""Contenders on a GPU: each makes the step of a case its own way, on several parameter sets in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .cases import OTHERS, bytes_per_element
from .data import STEPS, Problem, Recipe, Values, WrongAnswer, check_bits, check_close
from .device import Gpu, address

Step = Callable[[], Any]


class NotInstalled(Exception):
    """A contender that is not there; says what installs it."""


class Copy:
    """A copy on the GPU between two arrays that its second-level cache cannot hold."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.nbytes = gpu, gpu.copy_bytes
        self.arrays = [gpu.empty((self.nbytes // 4,), np.float32) for _ in range(2)]
        values = Values(gpu, np.dtype(np.float32), 1.0, seed=2, period=min(2**24 - 3, self.nbytes // 4))
        for start, array in enumerate(self.arrays):
            values.fill(address(array), self.nbytes // 4, start)
        gpu.synchronize()

    def run(self, stream: Any = None) -> None:
        """Put one on a stream."""
        source, to = self.arrays
        self.gpu.copy(address(to), address(source), self.nbytes, stream)


class Model(NamedTuple):
    """One parameter set: its arrays, and what updates them."""

    params: dict[str, Any]
    grads: dict[str, Any]
    step: Step
    optimizer: Any


class Contender:
    """Something that updates parameters on a GPU when ``step`` is called, another set each time.

    Args:
        problem: What to do.
        copy: What ``copy`` does.

    Attributes:
        bytes: What a step must move.
        stream: Where it goes; None is the default stream.
    """

    stream: Any = None

    def __init__(self, problem: Problem, copy: Copy) -> None:
        self.problem, case = problem, problem.case
        self.recipe = self.recipe_of(problem)
        self.bytes = case.elements * bytes_per_element(self.recipe.optimizer, self.recipe.hyper, case.dtype)
        self.models = [self.make() for _ in range(problem.sets)]
        for model in self.models:
            problem.fill_weights(model.params)
            problem.fill_gradients(model.grads)
        problem.gpu.synchronize()
        self._turns = itertools.cycle([model.step for model in self.models])

    def recipe_of(self, problem: Problem) -> Recipe:
        """What it computes."""
        return Recipe(problem.case.optimizer, problem.case.hyper, problem.case.step)

    def make(self) -> Model:
        """A parameter set."""
        raise NotImplementedError

    def step(self) -> None:
        """Take one step, of the next set."""
        next(self._turns)()

    def check(self) -> None:
        """Take the first steps of the first set, with other gradients each, and refuse a wrong answer."""
        model, gpu = self.models[0], self.problem.gpu
        for t in range(STEPS):
            self.problem.fill_gradients(model.grads, t)
            gpu.synchronize()
            model.step()
            gpu.synchronize()
        self.compare(model)
        self.problem.fill_gradients(model.grads)

    def compare(self, model: Model) -> None:
        """Refuse a wrong answer."""
        raise NotImplementedError


class Fastopt(Contender):
    """fastopt on arrays of the caller's, or on flat buffers where the case says so."""

    extra: ClassVar[dict[str, Any]] = {}

    def make(self) -> Model:  # noqa: D102
        import fastopt

        case, gpu = self.problem.case, self.problem.gpu
        params: Any
        grads: Any
        if self.flat:
            params, grads = (fastopt.FlatBuffer(case.shapes, case.dtype, device="cuda") for _ in range(2))
        else:
            params, grads = (
                {name: gpu.empty(shape, self.problem.dtype) for name, shape in case.shapes.items()} for _ in range(2)
            )
        optimizer = getattr(fastopt, self.recipe.optimizer)(params, **self.recipe.hyper, **self.extra)
        options = self.recipe.step
        return Model(dict(params), dict(grads), self.step_of(optimizer, grads, options), optimizer)

    @property
    def flat(self) -> bool:
        """Whether arrays lie in flat buffers."""
        return self.problem.case.flat

    def step_of(self, optimizer: Any, grads: Any, options: Any) -> Step:
        """What takes a step."""
        return lambda: optimizer.step(grads, **options)

    def compare(self, model: Model) -> None:  # noqa: D102
        state = model.optimizer.state
        found = {name: {"parameter": array, **state[name]} for name, array in model.params.items()}
        check_bits(self.problem, self.recipe, found)


class FastoptFlat(Fastopt):
    """fastopt on flat buffers."""

    flat = True


class Plain(Fastopt):
    """The same step without unscaling, clipping and finite check."""

    def recipe_of(self, problem: Problem) -> Recipe:  # noqa: D102
        return Recipe(problem.case.optimizer, problem.case.hyper, {})


class Momentum(Fastopt):
    """Momentum in the place of the case's optimizer."""

    def recipe_of(self, problem: Problem) -> Recipe:  # noqa: D102
        return Recipe("SGD", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}, {})


class Norm(Fastopt):
    """The norm of all gradients and nothing else: one of them is infinite, so that the update is skipped."""

    def __init__(self, problem: Problem, copy: Copy) -> None:
        super().__init__(problem, copy)
        self.bytes = problem.case.elements * problem.dtype.itemsize
        for model in self.models:
            self._break(model)

    def _break(self, model: Model) -> None:
        last = list(model.grads.values())[-1]
        infinite = np.array([np.inf], self.problem.dtype)
        self.problem.gpu.write(address(last) + last.nbytes - infinite.nbytes, infinite)

    def check(self) -> None:  # noqa: D102
        before = self._first()
        if not self.models[0].step().skipped or self._first() != before:
            raise WrongAnswer("a step with an infinite gradient was taken")

    def _first(self) -> bytes:
        first = next(iter(self.models[0].params.values()))
        self.problem.gpu.synchronize()
        return self.problem.gpu.read(address(first), 1, self.problem.dtype).tobytes()


class Kernels(Fastopt):
    """A step that could be captured, taken as it is, on a stream of its own."""

    extra: ClassVar[dict[str, Any]] = {"capturable": True}

    def __init__(self, problem: Problem, copy: Copy) -> None:
        self.stream = problem.gpu.stream()
        super().__init__(problem, copy)

    def step_of(self, optimizer: Any, grads: Any, options: Any) -> Step:  # noqa: D102
        def step() -> None:
            with self.stream:
                optimizer.step(grads, **options)

        return step


class Graph(Kernels):
    """Its CUDA graph: a set's first step is taken as it is, and every other one replays it."""

    def step_of(self, optimizer: Any, grads: Any, options: Any) -> Step:  # noqa: D102
        eager, replay = super().step_of(optimizer, grads, options), None

        def step() -> None:
            nonlocal replay
            if replay is not None:
                replay()
                return
            eager()
            replay = self.problem.gpu.capture(self.stream, eager)

        return step


class Torch(Contender):
    """torch.optim, one of its implementations."""

    options: ClassVar[dict[str, Any]]

    def make(self) -> Model:  # noqa: D102
        import torch

        def tensors() -> dict[str, Any]:
            case, device = self.problem.case, self.problem.gpu.torch_device
            return {
                name: torch.empty(shape, dtype=getattr(torch, case.dtype), device=device)
                for name, shape in case.shapes.items()
            }

        params, grads = tensors(), tensors()
        for name, tensor in params.items():
            tensor.grad = grads[name]
        optimizer = self.kind()(list(params.values()), **self.recipe.hyper, **self.options)
        return Model(params, grads, optimizer.step, optimizer)

    def kind(self) -> Any:
        """The optimizer's class."""
        import torch

        return getattr(torch.optim, self.recipe.optimizer)

    def compare(self, model: Model) -> None:  # noqa: D102
        check_close(self.problem, self.recipe, model.params)


class TorchFused(Torch):
    """torch.optim with fused=True."""

    options: ClassVar[dict[str, Any]] = {"fused": True}


class TorchForeach(Torch):
    """torch.optim with foreach=True, its default on a GPU."""

    options: ClassVar[dict[str, Any]] = {"foreach": True}


class TorchAmp(TorchFused):
    """torch.optim with fused=True and torch's GradScaler: the check of the gradients, the step, the new scale."""

    def make(self) -> Model:  # noqa: D102
        import torch

        model = super().make()
        # A scale of 1 that never grows: the gradients are those of the other contenders.
        scaler = self.scaler()(self.problem.gpu.torch_device, init_scale=1.0, growth_interval=2**30)
        scaler.scale(torch.zeros(1, device=self.problem.gpu.torch_device))  # it has its scale from here on

        def step() -> None:
            scaler.step(model.optimizer)
            scaler.update()

        return model._replace(step=step)

    def scaler(self) -> Any:
        """The scaler's class."""
        import torch

        return torch.amp.GradScaler


class FastoptTorchAmp(TorchAmp):
    """fastopt.torch with its own GradScaler."""

    options: ClassVar[dict[str, Any]] = {}

    def kind(self) -> Any:  # noqa: D102
        import fastopt.torch

        return getattr(fastopt.torch, self.recipe.optimizer)

    def scaler(self) -> Any:  # noqa: D102
        import fastopt.torch

        return fastopt.torch.GradScaler


class DeviceCopy(Contender):
    """No optimizer: a copy, the limit that the machine sets. Its bytes are those read and those written."""

    def __init__(self, problem: Problem, copy: Copy) -> None:
        self.problem, self.copy, self.arrays, self.models = problem, copy, copy.arrays, []
        self.bytes = 2 * copy.nbytes

    def step(self) -> None:  # noqa: D102
        self.copy.run()

    def check(self) -> None:  # noqa: D102
        self.step()
        self.problem.gpu.synchronize()
        source, to = (self.problem.gpu.read(address(array), self.copy.nbytes // 4, np.float32) for array in self.arrays)
        if not np.array_equal(source, to):
            raise WrongAnswer("the copy differs")


class TorchCopy(DeviceCopy):
    """The same copy by torch."""

    def __init__(self, problem: Problem, copy: Copy) -> None:
        import torch

        super().__init__(problem, copy)
        options: dict[str, Any] = {"dtype": torch.float32, "device": problem.gpu.torch_device}
        self.arrays = [torch.randn(copy.nbytes // 4, **options) for _ in range(2)]

    def step(self) -> None:  # noqa: D102
        self.arrays[1].copy_(self.arrays[0])


def _other(name: str) -> Callable[[Problem, Copy], Contender]:
    """One of others.py, whose contenders are made of those here."""

    def make(problem: Problem, copy: Copy) -> Contender:
        from . import others

        return others.OTHERS[name](problem, copy)

    return make


CONTENDERS: dict[str, Callable[[Problem, Copy], Contender]] = {
    "fastopt": Fastopt,
    "fastopt flat": FastoptFlat,
    "plain": Plain,
    "norm": Norm,
    "momentum": Momentum,
    "kernels": Kernels,
    "graph": Graph,
    "torch fused": TorchFused,
    "torch foreach": TorchForeach,
    "torch amp": TorchAmp,
    "fastopt.torch amp": FastoptTorchAmp,
    "copy": DeviceCopy,
    "torch copy": TorchCopy,
    **{name: _other(name) for name in OTHERS},
}
