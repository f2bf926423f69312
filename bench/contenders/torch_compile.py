"""torch.optim's step under ``torch.compile``, as torch's tutorial on compiled optimizers has it."""

from __future__ import annotations

import os
import shutil
from typing import Any, ClassVar

from ..case import Case
from .torch_optim import Torch

GRAPHS = 10_000
"""Graphs of one function that torch keeps, instead of 8: every copy of an optimizer has a graph of its own."""


class TorchCompile(Torch):
    """``torch.compile(optimizer.step)`` in the default mode; the first step compiles.

    The step count does not make it compile again: torch.optim keeps it as a tensor, and under ``torch.compile`` it
    computes the bias corrections from that tensor also without ``capturable``. Nor does lr, a float that stays as it
    is; a schedule would need a tensor. Counted in torch 2.13 over eight steps with `graphs`: one graph for each of the
    eleven optimizers, made in the first step; two for SGD with momentum, whose first step makes the buffers
    (tests/bench/test_contenders.py counts too).
    """

    options = ()
    most_copies = 1  # each would be compiled for itself
    arguments: ClassVar[dict[str, bool]] = {}

    @classmethod
    def missing(cls) -> str | None:  # noqa: D102
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            return f"not installed: a C++ compiler, {compiler}"
        return super().missing()

    def make(self, case: Case) -> Any:  # noqa: D102
        import torch
        import torch._dynamo

        # Beyond its limits torch would go on without compiling, and say so in a log only.
        config: Any = torch._dynamo.config
        config.recompile_limit = config.accumulated_recompile_limit = GRAPHS
        config.fail_on_recompile_limit_hit = True
        optimizer = super().make(case)
        self.compiled = torch.compile(optimizer.step)
        return optimizer

    @staticmethod
    def graphs() -> int:
        """How many graphs this process compiled so far."""
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def step(self) -> None:  # noqa: D102
        self.compiled()
