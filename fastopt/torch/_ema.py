"""Averages of the parameters: reading them in the place of the parameters, and letting them begin anew."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..engine.exclusive import exclusive, finish, swapping
from ..kernels.epilogues import EMA, EMA_STEP
from ._groups import GroupOptions
from ._master import MASTER
from ._state import number


class Averages(GroupOptions):
    """What can be done with the averages of an optimizer whose param groups have ``ema_decay``."""

    def swap_ema(self) -> AbstractContextManager[None]:
        """A block in which the parameters hold their averages, for validation: ``with opt.swap_ema(): ...``

        As in ``fastopt``'s optimizers: averages are rounded once to 16-bit parameters, one that was not averaged yet
        keeps its value, and on leaving, also by an exception, all become again what they were, bit for bit. Masters
        stay what they are. Buffers are the model's and not averaged: ``torch.optim.swa_utils.update_bn(loader, model)``
        in the block renews the statistics of batch normalization.

        Inside, ``step``, ``state_dict``, ``load_state_dict``, ``add_param_group``, ``swap_ema`` and ``reset_ema`` raise
        RuntimeError.

        Raises:
            ValueError: No param group has ``ema_decay``.
            RuntimeError: A block of this kind is not over yet, or another thread is using this optimizer.

        Example:
            >>> import torch, fastopt.torch
            >>> w = torch.nn.Parameter(torch.ones(1))
            >>> opt = fastopt.torch.SGD([w], lr=1.0, ema_decay=0.5)
            >>> for _ in range(2):
            ...     w.grad = torch.ones(1)
            ...     opt.step()
            >>> with opt.swap_ema():
            ...     print(w.tolist())
            [-0.5]
            >>> w.tolist()
            [-1.0]
        """

        def pairs() -> list[tuple[Tensor, Tensor]]:
            return [(p, state[EMA]) for p, state in self._averaged("swap_ema") if number(state[EMA_STEP]) > 0]

        return swapping(self, pairs, _copy, _write)

    @_disable_dynamo
    @exclusive
    def reset_ema(self) -> None:
        """Let averages begin anew, as copies of the parameters (of masters, where there are some) as they are now.

        A parameter that has no average yet gets one in its first step, as a copy of what it is then.

        Raises:
            ValueError: No param group has ``ema_decay``.
            RuntimeError: Another thread is using this optimizer, or it is inside ``swap_ema``.
        """

        def reset() -> None:
            for p, state in averaged:
                weights, master = p.detach(), state.get(MASTER)
                if master is not None:  # which follows a parameter that somebody else wrote only in the next step
                    weights = torch.where(weights == master.to(p.dtype), master, weights.to(master.dtype))
                _write(state[EMA], weights)
                state[EMA_STEP].fill_(1)

        averaged = self._averaged("reset_ema")
        finish(reset)

    def _averaged(self, what: str) -> list[tuple[Tensor, dict[str, Any]]]:
        """The parameters that have an average, and their states."""
        options = self._current_options()
        if all(o["ema_decay"] is None for o in options):
            raise ValueError(f"{type(self).__name__}.{what}: no param group has averages; give one ema_decay.")
        groups = [g for g, o in zip(self.param_groups, options, strict=True) if o["ema_decay"] is not None]
        states = [(p, self.state[p]) for g in groups for p in g["params"] if p in self.state]
        return [(p, state) for p, state in states if EMA in state and EMA_STEP in state]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _write(tensor: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(values)
