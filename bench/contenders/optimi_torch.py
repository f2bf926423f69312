"""torch-optimi on CPU tensors."""

from __future__ import annotations

from typing import Any, ClassVar

from ..case import Case
from .limited import Limited
from .torch_optim import Torch


class Optimi(Limited, Torch):
    """torch-optimi's default on the CPU: one tensor operation after another.

    Its Triton kernels need a GPU, and its ``foreach``, which it has deprecated, computes in ``.grad``: what a second
    step would find there are no gradients. L2 decay is added to ``.grad`` as well, so it is left out here.

    Its RAdam is left out, too: eps stands next to the root of the corrected second moment, in torch next to that of the
    other.
    """

    package = "optimi"
    install = "pip install torch-optimi"
    dtypes = ("float32",)
    options = ()
    known: ClassVar[dict[str, tuple[str, ...]]] = {
        "SGD": ("lr", "momentum"),
        "Adam": ("lr", "betas", "eps"),
        "AdamW": ("lr", "betas", "eps", "weight_decay"),
        "Lion": ("lr", "betas", "weight_decay"),
    }
    adam: ClassVar[dict[str, Any]] = {"betas": (0.9, 0.999), "eps": 1e-8}
    defaults: ClassVar[dict[str, dict[str, Any]]] = {"Adam": adam, "AdamW": adam}
    """torch's, where optimi has other ones: (0.9, 0.99) and 1e-6."""

    def make(self, case: Case) -> Any:  # noqa: D102
        import optimi

        hyper = {**self.defaults.get(case.optimizer, {}), **self.hyper(case)}
        return getattr(optimi, case.optimizer)(self.params.values(), **hyper, foreach=False, triton=False)
