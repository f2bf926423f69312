"""Float32 masters of float16 and bfloat16 parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MASTER = "master_param"
"""Their name in ``state``, as in Apex."""


class MasterWeights:
    """Pairs of a parameter and the float32 tensor that is stepped in its place."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._params = [p for p, _ in pairs]
        self._masters = [m for _, m in pairs]
        self._versions: list[int] = []

    def take_over(self) -> None:
        """Let the masters follow parameters that somebody else wrote: an element that is not its master's rounding."""
        if [p._version for p in self._params] != self._versions:
            for p, master in zip(self._params, self._masters, strict=True):
                torch.where(p == master.to(p.dtype), master, p.to(master.dtype), out=master)

    def refresh(self) -> None:
        """Somebody may have written parameters without a trace, as ``.data`` does."""
        self._versions = []

    def wrote(self) -> None:
        """The step rounded the masters to the parameters."""
        self._versions = [p._version for p in self._params]
