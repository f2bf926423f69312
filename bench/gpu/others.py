"""Adam of other libraries on a GPU: CuPy by hand, and fused kernels for torch. None of them has to be installed."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import numpy as np

from .contenders import Contender, Copy, Model, NotInstalled, Torch
from .data import Problem, check_close


class CuPy(Contender):
    """Adam as one writes it in CuPy: one operation after another, each a kernel."""

    def __init__(self, problem: Problem, copy: Copy) -> None:
        require("cupy", "pip install cupy-cuda12x")
        refuse_others(problem)
        super().__init__(problem, copy)

    def make(self) -> Model:  # noqa: D102
        gpu, shapes, dtype = self.problem.gpu, self.problem.case.shapes, self.problem.dtype
        params, grads, m, v = ({name: gpu.empty(shape, dtype) for name, shape in shapes.items()} for _ in range(4))
        for array in (*m.values(), *v.values()):
            array.fill(0)
        update, lr, t = self.update(), self.recipe.hyper["lr"], 0

        def step() -> None:
            nonlocal t
            t += 1
            numbers = scalars(t, lr)
            for name in params:
                params[name], m[name], v[name] = update(params[name], grads[name], m[name], v[name], *numbers)

        return Model(params, grads, step, None)

    def update(self) -> Any:
        """What makes the new parameter and states of an array."""
        import cupy

        return lambda *arguments: eager(cupy.sqrt, *arguments)

    def compare(self, model: Model) -> None:  # noqa: D102
        check_close(self.problem, self.recipe, model.params)


class CuPyFuse(CuPy):
    """The same operations in one kernel by ``cupy.fuse``, whose results are new arrays."""

    def update(self) -> Any:  # noqa: D102
        import cupy

        @cupy.fuse(kernel_name="adam")
        def fused(
            p: Any, g: Any, m: Any, v: Any,
            lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, correction1: Any, correction2: Any, eps: Any,
        ) -> Any:  # fmt: skip
            numbers = lr, beta1, rest1, beta2, rest2, correction1, correction2, eps
            return functional(cupy.sqrt, p, g, m, v, *numbers)

        return fused


def scalars(t: int, lr: float, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> tuple[np.float32, ...]:
    """What step t takes after its arrays; in float32, so that nothing is computed in float64."""
    numbers = lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - beta1**t, 1 - beta2**t, eps
    return tuple(np.float32(number) for number in numbers)


def eager(
    sqrt: Any, p: Any, g: Any, m: Any, v: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, correction1: Any, correction2: Any, eps: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """Adam (Kingma, Ba 2015, Algorithm 1) in place."""
    m *= beta1
    m += rest1 * g
    v *= beta2
    v += rest2 * (g * g)
    p -= lr * (m / correction1) / (sqrt(v / correction2) + eps)
    return p, m, v


def functional(
    sqrt: Any, p: Any, g: Any, m: Any, v: Any,
    lr: Any, beta1: Any, rest1: Any, beta2: Any, rest2: Any, correction1: Any, correction2: Any, eps: Any,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The same without writing into what it is given."""
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * (g * g)
    return p - lr * (m / correction1) / (sqrt(v / correction2) + eps), m, v


class TorchLoop(Torch):
    """torch.optim with foreach=False: one tensor operation after another."""

    options: ClassVar[dict[str, bool]] = {"foreach": False}


class Library(Torch):
    """An Adam of the same name and options as torch's."""

    package: ClassVar[str]
    install: ClassVar[str]
    options: ClassVar[dict[str, Any]] = {"adam_w_mode": False}

    def __init__(self, problem: Problem, copy: Copy) -> None:
        require(self.package, self.install)
        refuse_others(problem)
        super().__init__(problem, copy)


class Apex(Library):
    """NVIDIA Apex's FusedAdam, which needs its extensions to be built."""

    package = "apex"
    # PyPI's apex is something else.
    install = "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation git+https://github.com/NVIDIA/apex"

    def kind(self) -> Any:  # noqa: D102
        from apex.optimizers import FusedAdam

        return FusedAdam


class TransformerEngine(Library):
    """Transformer Engine's FusedAdam."""

    package = "transformer_engine"
    install = 'pip install --no-build-isolation "transformer_engine[pytorch]"'

    def kind(self) -> Any:  # noqa: D102
        from transformer_engine.pytorch.optimizers import FusedAdam

        return FusedAdam


class BitsAndBytes(Library):
    """bitsandbytes' Adam with 32-bit states."""

    package = "bitsandbytes"
    install = "pip install bitsandbytes"
    options: ClassVar[dict[str, Any]] = {"optim_bits": 32}

    def kind(self) -> Any:  # noqa: D102
        from bitsandbytes.optim import Adam

        return Adam


def require(package: str, install: str) -> None:
    """Refuse to go on without a package.

    Raises:
        NotInstalled: It is not there.
    """
    if importlib.util.find_spec(package) is None:
        raise NotInstalled(install)


def refuse_others(problem: Problem) -> None:
    """Refuse what these are not written for.

    Raises:
        NotImplementedError: The case is another one than Adam on float32 with nothing but a learning rate.
    """
    case = problem.case
    if case.optimizer != "Adam" or set(case.hyper) != {"lr"} or case.dtype != "float32" or case.step:
        raise NotImplementedError("Adam on float32 with an lr, and nothing else")


OTHERS: dict[str, type[Contender]] = {
    "cupy": CuPy,
    "cupy fuse": CuPyFuse,
    "torch loop": TorchLoop,
    "apex": Apex,
    "transformer engine": TransformerEngine,
    "bitsandbytes": BitsAndBytes,
}
