"""DeepSpeed's CPU optimizers: C++ with AVX-512 or AVX2, one call per array."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

from ..case import Case
from .limited import Limited
from .torch_optim import Torch


class DeepSpeed(Limited, Torch):
    """DeepSpeedCPUAdam, which is AdamW too, and DeepSpeedCPULion.

    DeepSpeedCPUAdagrad is left out: it leaves the update in the gradient's memory, at those elements at an array's end
    that no vector takes ("STORE UPDATE TERM TO GRAD'S MEMORY" in its cpu_adagrad.cpp), so that a second step with the
    same gradients is another one.

    The first one in a user's account builds its extension with ``-march=native``, a minute or more; torch keeps it in
    ~/.cache/torch_extensions.
    """

    package = "deepspeed"
    install = "pip install deepspeed ninja"
    dtypes = ("float32",)
    options = ()
    known: ClassVar[dict[str, tuple[str, ...]]] = {
        "Adam": ("lr", "betas", "eps", "weight_decay"),
        "AdamW": ("lr", "betas", "eps", "weight_decay"),
        "Lion": ("lr", "betas", "weight_decay"),
    }
    defaults: ClassVar[dict[str, dict[str, Any]]] = {
        "Adam": {"adamw_mode": False},
        "AdamW": {"adamw_mode": True, "weight_decay": 1e-2},
        "Lion": {"betas": (0.9, 0.99)},
    }
    """What differs from torch's defaults; Lion's from its paper's."""

    @classmethod
    def refusal(cls, case: Case) -> str | None:  # noqa: D102
        return "its Adagrad overwrites gradients" if case.optimizer == "Adagrad" else super().refusal(case)

    @classmethod
    def missing(cls) -> str | None:  # noqa: D102
        missing = super().missing()
        if missing is None and shutil.which("g++") is None:
            return "not installed: a C++ compiler, g++"
        return missing

    def make(self, case: Case) -> Any:  # noqa: D102
        # With a GPU it would ask for CUDA's compiler, although these optimizers are C++.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Ninja is a program beside Python, which an environment that is not activated does not have in its path.
        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        from deepspeed.ops import adam, lion

        kind = lion.DeepSpeedCPULion if case.optimizer == "Lion" else adam.DeepSpeedCPUAdam
        return kind(list(self.params.values()), **{**self.defaults.get(case.optimizer, {}), **self.hyper(case)})
