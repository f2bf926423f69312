"""bitsandbytes' optimizers with 32-bit states on CPU tensors."""

from __future__ import annotations

from typing import Any, ClassVar

from ..case import Case
from .limited import Limited
from .torch_optim import Torch


class BitsAndBytes(Limited, Torch):
    """bitsandbytes with ``optim_bits=32``.

    Since 0.50 it has these for the CPU too (``_optimizer_update_32bit_cpu`` in its backends/cpu/ops.py): one operation
    of torch after another, on copies. It takes ``dampening``, ``nesterov``, ``amsgrad`` and RMSprop's ``momentum``
    without doing them, and Adam's ``weight_decay`` is that of AdamW, so all these are left out here.
    """

    package = "bitsandbytes"
    install = "pip install bitsandbytes"
    dtypes = ("float32",)
    options = ()
    known: ClassVar[dict[str, tuple[str, ...]]] = {
        "SGD": ("lr", "momentum", "weight_decay"),
        "Adagrad": ("lr", "eps", "weight_decay"),
        "RMSprop": ("lr", "alpha", "eps", "weight_decay"),
        "Adam": ("lr", "betas", "eps"),
        "AdamW": ("lr", "betas", "eps", "weight_decay"),
        "Lion": ("lr", "betas", "weight_decay"),
    }

    @classmethod
    def refusal(cls, case: Case) -> str | None:  # noqa: D102
        if case.optimizer == "SGD" and not case.hyper.get("momentum"):
            return "its SGD needs momentum"
        return super().refusal(case)

    def make(self, case: Case) -> Any:  # noqa: D102
        from bitsandbytes import optim

        return getattr(optim, case.optimizer)(self.params.values(), **self.hyper(case), optim_bits=32)
