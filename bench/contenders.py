"""Contenders: each makes the step of a case its own way. They run in processes of their own (worker.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import numpy as np

from .cases import Case

Arrays = dict[str, Any]
Step = Callable[[], object]


class Contender:
    """Something that updates ``params`` with ``grads`` when ``step`` is called.

    Args:
        case: What to do.
        params: Parameters; the contender may copy them.
        grads: Gradients.
        threads: Number of threads.

    Attributes:
        gradients: The arrays that ``step`` takes gradients from.
    """

    requires: str | None = None  # a package that must be installed, and is only imported by this contender
    gradients: Iterable[Any] = ()
    process: str | None = None  # contenders that name the same one share a process; None is one of its own

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        raise NotImplementedError

    def step(self) -> None:
        """Take one step."""
        raise NotImplementedError

    def parameter(self, name: str) -> Any:
        """The parameter as it is now, as a NumPy array."""
        raise NotImplementedError


class Fastopt(Contender):
    """fastopt on flat buffers."""

    process = "fastopt"  # its variants have one OpenMP runtime, and are compared more steadily in one process
    flat = True

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import fastopt

        fastopt.set_num_threads(threads)
        if self.flat:
            self.params: Any = fastopt.FlatBuffer.from_arrays(params)
            self.grads: Any = fastopt.FlatBuffer.from_arrays(grads)
        else:
            self.params, self.grads = params, grads
        self.gradients = list(self.grads.values())
        self.optimizer = getattr(fastopt, self.class_name(case))(self.params, **self.hyper(case))
        self.options = self.step_options(case)

    def class_name(self, case: Case) -> str:
        """Name of the optimizer."""
        return case.optimizer

    def hyper(self, case: Case) -> dict[str, Any]:
        """Its options."""
        return case.hyper

    def step_options(self, case: Case) -> dict[str, Any]:
        """Options of its step."""
        return case.step

    def step(self) -> None:  # noqa: D102
        self.optimizer.step(self.grads, **self.options)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]


class FastoptArrays(Fastopt):
    """fastopt on arrays that the caller keeps, and gradients that stay where they are."""

    flat = False


class FastoptMoving(FastoptArrays):
    """fastopt on arrays that the caller keeps, and gradients in new arrays at every step."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        self.both = [self.grads, {name: array.copy() for name, array in self.grads.items()}]
        self.gradients = [array for grads in self.both for array in grads.values()]

    def step(self) -> None:  # noqa: D102
        self.both.reverse()
        self.optimizer.step(self.both[0], **self.options)


class FastoptPlain(Fastopt):
    """The same step without unscaling, clipping and finite check."""

    def step_options(self, case: Case) -> dict[str, Any]:  # noqa: D102
        return {}


class FastoptKeep(Fastopt):
    """LARS that keeps the norms of the weights."""

    def hyper(self, case: Case) -> dict[str, Any]:  # noqa: D102
        return {**case.hyper, "keep_weight_norms": True}


class FastoptMomentum(Fastopt):
    """Momentum in the place of LARS."""

    def class_name(self, case: Case) -> str:  # noqa: D102
        return "SGD"

    def hyper(self, case: Case) -> dict[str, Any]:  # noqa: D102
        return {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


class Torch(Contender):
    """torch.optim, one of its implementations."""

    requires = "torch"
    options: ClassVar[dict[str, bool]]

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.params = {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in params.items()}
        for name, parameter in self.params.items():
            parameter.grad = torch.from_numpy(grads[name])  # the same memory
        self.gradients = list(grads.values())
        self.optimizer = getattr(self.module, case.optimizer)(self.params.values(), **case.hyper, **self.options)

    @property
    def module(self) -> Any:
        """Where the optimizers are."""
        import torch

        return torch.optim

    def step(self) -> None:  # noqa: D102
        self.optimizer.step()

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name].detach().numpy()


class TorchFused(Torch):
    """torch.optim with fused=True."""

    options: ClassVar[dict[str, bool]] = {"fused": True}


class TorchLoop(Torch):
    """torch.optim's default on the CPU, one tensor operation after another."""

    options: ClassVar[dict[str, bool]] = {"foreach": False}


class TorchForeach(Torch):
    """torch.optim with foreach=True."""

    options: ClassVar[dict[str, bool]] = {"foreach": True}


class TorchFusedMoving(TorchFused):
    """The same with other tensors in ``.grad`` at every step, as after ``zero_grad()`` and ``backward()``."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        self.both = [[p.grad for p in self.params.values()], [p.grad.clone() for p in self.params.values()]]
        self.gradients = [tensor.numpy() for tensors in self.both for tensor in tensors]

    def step(self) -> None:  # noqa: D102
        self.both.reverse()
        for parameter, gradient in zip(self.params.values(), self.both[0], strict=True):
            parameter.grad = gradient
        self.optimizer.step()


class TorchFusedAmp(TorchFused):
    """torch's GradScaler and clipping around its fused step.

    They write the gradients, so a scale other than 1 would make them smaller from step to step; the work is the same.
    """

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        import torch

        self.clip = torch.nn.utils.clip_grad_norm_
        self.max_norm = case.step["max_norm"]
        self.scaler: Any = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=2**30)
        self.scaler.scale(torch.ones(()))  # as for the loss: makes the scale

    def step(self) -> None:  # noqa: D102
        self.scaler.unscale_(self.optimizer)
        self.clip(self.params.values(), self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Front(Torch):
    """fastopt.torch in the place of torch.optim."""

    options: ClassVar[dict[str, bool]] = {}

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import fastopt

        fastopt.set_num_threads(threads)
        super().__init__(case, params, grads, threads)

    @property
    def module(self) -> Any:  # noqa: D102
        import fastopt.torch

        return fastopt.torch


class FrontMoving(Front, TorchFusedMoving):
    """fastopt.torch with other tensors in ``.grad`` at every step."""


class FrontFlat(Front):
    """fastopt.torch with ``flatten=True``."""

    options: ClassVar[dict[str, bool]] = {"flatten": True}

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        self.gradients = [parameter.grad.numpy() for parameter in self.params.values()]


class FrontAmp(Front):
    """fastopt.torch with its GradScaler, and clipping inside the step."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        import torch

        self.optimizer = getattr(self.module, case.optimizer)(
            self.params.values(), **case.hyper, max_grad_norm=case.step["max_norm"]
        )
        self.scaler = self.module.GradScaler("cpu", init_scale=case.step["grad_scale"], growth_interval=2**30)
        self.scaler.scale(torch.ones(()))

    def step(self) -> None:  # noqa: D102
        self.scaler.step(self.optimizer)
        self.scaler.update()


class NumpyAdam(Contender):
    """Adam as one writes it in NumPy."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        if case.optimizer != "Adam":
            raise NotImplementedError(f"the NumPy contender is Adam, not {case.optimizer}")
        self.params, self.grads, self.lr, self.t = params, grads, case.hyper["lr"], 0
        self.gradients = list(grads.values())
        self.m = {name: np.zeros_like(p) for name, p in params.items()}
        self.v = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self) -> None:  # noqa: D102
        self.t += 1
        for name, p in self.params.items():
            g, m, v = self.grads[name], self.m[name], self.v[name]
            m[:] = 0.9 * m + 0.1 * g
            v[:] = 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9**self.t), v / (1 - 0.999**self.t)
            p -= self.lr * m_hat / (np.sqrt(v_hat) + 1e-8)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]


class Stream(Contender):
    """No optimizer: the same reads and writes with one addition each (stream.c), the limit that the machine sets."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import fastopt

        from .stream import stream

        optimizer = getattr(fastopt, case.optimizer)([np.ones(1, np.float32)], **case.hyper)
        count = sum(isinstance(value, np.ndarray) for value in optimizer.state["0"].values())
        self.params = fastopt.FlatBuffer.from_arrays(params)
        self.arrays = [self.params.data, fastopt.FlatBuffer.from_arrays(grads).data]
        self.arrays += [self.params.zeros_like("float32").data for _ in range(count)]
        self.run = stream(self.params.dtype.itemsize)
        addresses = [array.ctypes.data for array in self.arrays] + [0] * 3
        self.arguments = (self.params.data.size, count, *addresses[:5])

    def step(self) -> None:  # noqa: D102
        self.run(*self.arguments)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return self.params[name]


CONTENDERS: dict[str, type[Contender]] = {
    "fastopt": Fastopt,
    "fastopt arrays": FastoptArrays,
    "fastopt moving": FastoptMoving,
    "fastopt plain": FastoptPlain,
    "fastopt keep": FastoptKeep,
    "momentum": FastoptMomentum,
    "torch fused": TorchFused,
    "torch loop": TorchLoop,
    "torch foreach": TorchForeach,
    "torch fused moving": TorchFusedMoving,
    "torch fused amp": TorchFusedAmp,
    "fastopt.torch": Front,
    "fastopt.torch moving": FrontMoving,
    "fastopt.torch flat": FrontFlat,
    "fastopt.torch amp": FrontAmp,
    "numpy": NumpyAdam,
    "stream": Stream,
}

UNCHECKED = ("stream", "momentum", "fastopt plain", "torch fused amp")
"""Contenders that do not compute the case's optimizer, so that there is no answer to check."""
