"""torch.optim's implementations, and fastopt.torch in their place."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..case import Case
from .base import Arrays, Contender


def tensor(array: NDArray[Any]) -> Any:
    """The array as a tensor of the same memory; torch does not know NumPy's bfloat16."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def array_of(tensor: Any) -> NDArray[Any]:
    """The tensor as an array of the same memory."""
    import torch

    if tensor.dtype is torch.bfloat16:
        import ml_dtypes

        bits: NDArray[Any] = tensor.view(torch.int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    found: NDArray[Any] = tensor.numpy()
    return found


class Torch(Contender):
    """torch.optim, one of its implementations."""

    package = "torch"
    install = "pip install torch"
    optimizers = (
        *("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD"),
    )
    dtypes = ("float32", "float64")  # with 16-bit parameters torch's states are 16-bit too: another computation
    options = ("max_norm", "zero_grads")
    arguments: ClassVar[dict[str, bool]]

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.params = {name: torch.nn.Parameter(tensor(array)) for name, array in params.items()}
        for name, parameter in self.params.items():
            parameter.grad = tensor(grads[name])
        self.gradients = list(grads.values())
        self.request = case.step
        self.optimizer = self.make(case)

    def make(self, case: Case) -> Any:
        """The optimizer."""
        import torch

        return getattr(torch.optim, case.optimizer)(self.params.values(), **case.hyper, **self.arguments)

    def step(self) -> None:  # noqa: D102
        if "max_norm" in self.request:
            import torch

            torch.nn.utils.clip_grad_norm_(self.params.values(), self.request["max_norm"])
        self.optimizer.step()
        if self.request.get("zero_grads"):
            self.optimizer.zero_grad(set_to_none=False)

    def parameter(self, name: str) -> Any:  # noqa: D102
        return array_of(self.params[name].detach())


class TorchFused(Torch):
    """torch.optim with fused=True."""

    optimizers = ("SGD", "Adagrad", "Adam", "AdamW")

    arguments: ClassVar[dict[str, bool]] = {"fused": True}


class TorchLoop(Torch):
    """torch.optim's default on the CPU, one tensor operation after another."""

    arguments: ClassVar[dict[str, bool]] = {"foreach": False}


class TorchForeach(Torch):
    """torch.optim with foreach=True."""

    arguments: ClassVar[dict[str, bool]] = {"foreach": True}


class TorchFusedMoving(TorchFused):
    """The same with other tensors in ``.grad`` at every step, as after ``zero_grad()`` and ``backward()``."""

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        self.both = [[p.grad for p in self.params.values()], [p.grad.clone() for p in self.params.values()]]
        self.gradients = [array_of(gradient) for gradients in self.both for gradient in gradients]

    def step(self) -> None:  # noqa: D102
        self.both.reverse()
        for parameter, gradient in zip(self.params.values(), self.both[0], strict=True):
            parameter.grad = gradient
        self.optimizer.step()


class TorchFusedAmp(TorchFused):
    """torch's GradScaler and clipping around its fused step.

    They write the gradients, so a scale other than 1 would make them smaller from step to step; the work is the same.
    """

    options = ("grad_scale", "max_norm", "skip_nonfinite")
    checked = False

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

    optimizers = (*Torch.optimizers, "Lion", "LARS")
    dtypes = ("float32", "float64", "float16", "bfloat16")
    arguments: ClassVar[dict[str, bool]] = {}

    def make(self, case: Case) -> Any:  # noqa: D102
        import torch

        import fastopt.torch

        fastopt.set_num_threads(torch.get_num_threads())
        return getattr(fastopt.torch, case.optimizer)(
            self.params.values(),
            **case.hyper,
            **self.arguments,
            max_grad_norm=case.step.get("max_norm"),
            zero_grads=case.step.get("zero_grads", False),
        )

    def step(self) -> None:  # noqa: D102
        self.optimizer.step()


class FrontMoving(Front, TorchFusedMoving):
    """fastopt.torch with other tensors in ``.grad`` at every step."""


class FrontFlat(Front):
    """fastopt.torch with ``flatten=True``."""

    arguments: ClassVar[dict[str, bool]] = {"flatten": True}

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        self.gradients = [array_of(parameter.grad) for parameter in self.params.values()]


class FrontAmp(Front):
    """fastopt.torch with its GradScaler, and clipping inside the step."""

    options = ("grad_scale", "max_norm", "skip_nonfinite")

    def __init__(self, case: Case, params: Arrays, grads: Arrays, threads: int) -> None:
        super().__init__(case, params, grads, threads)
        import torch

        import fastopt.torch

        scale = case.step["grad_scale"]
        # Gradients stay scaled: torch's contender keeps a scale of 1, and nobody reads them after a step.
        self.scaler: Any = fastopt.torch.GradScaler("cpu", scale, growth_interval=2**30, unscale_grads=False)
        self.scaler.scale(torch.ones(()))

    def step(self) -> None:  # noqa: D102
        self.scaler.step(self.optimizer)
        self.scaler.update()
