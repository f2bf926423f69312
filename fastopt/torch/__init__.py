"""fastopt.torch: torch.optim's optimizers, in one pass over memory.

``from fastopt.torch import AdamW`` in the place of ``from torch.optim import AdamW``; nothing else changes. Parameters
and ``.grad`` stay where they are, and checkpoints go both ways.

Example:
    >>> import torch
    >>> from fastopt.torch import AdamW
    >>> model = torch.nn.Linear(2, 1)
    >>> opt = AdamW(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> opt.step()
    >>> opt.zero_grad()
"""

from __future__ import annotations

import sys
from typing import Any

try:
    import torch  # noqa: F401 - to say what to install where it is missing
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError("fastopt.torch needs PyTorch: pip install torch") from None

from . import optimizers
from .amp import GradScaler
from .base import TensorOptimizer
from .optimizers import *

__all__: list[str] = []
__all__ += optimizers.__all__
__all__ += ["GradScaler", "ShardedOptimizer", "TensorOptimizer"]  # noqa: F405 - see __getattr__


def __getattr__(name: str) -> Any:
    if name == "ShardedOptimizer":  # imported when used: it needs torch.distributed
        from .sharded import ShardedOptimizer

        return ShardedOptimizer
    text = f"fastopt.torch has no {name!r}; it has {', '.join(__all__)}."
    # Of an AttributeError "from fastopt.torch import Name" keeps no word, and hasattr() expects one.
    imported = sys._getframe(1).f_code.co_name == "_handle_fromlist"
    raise ImportError(text) if imported and name[:1].isupper() else AttributeError(text)
