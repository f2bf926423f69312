"""Averages of the parameters: reading them in the place of the parameters, and letting them begin anew."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from .arrays import Array
from .engine.exclusive import exclusive, finish, swapping
from .engine.plan import Parameter, Plan, StepCount
from .group_options import Base
from .kernels.epilogues import EMA, EMA_STEP


class Averages(Base):
    """What can be done with the averages of an optimizer whose param groups have ``ema_decay``."""

    _parameters: list[Parameter]
    _plan: Plan | None
    _users: list[object]

    def _current_options(self) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _rebuild(self) -> None:
        raise NotImplementedError

    def swap_ema(self) -> AbstractContextManager[None]:
        """A block in which the parameters hold their averages, for validation: ``with opt.swap_ema(): ...``

        Averages are rounded once to 16-bit parameters. A parameter that was not averaged yet keeps its value. On
        leaving, also by an exception, the parameters become again what they were, bit for bit; what is written to them
        in the block is lost. It takes memory for a copy of the parameters.

        Inside, ``step``, ``state_dict``, ``load_state_dict``, ``add_param_group``, ``swap_ema``, ``reset_ema`` and
        ``fastopt.save`` of this optimizer raise RuntimeError.

        Raises:
            ValueError: No param group has ``ema_decay``.
            RuntimeError: A block of this kind is not over yet, or another thread is using this optimizer.

        Example:
            >>> import numpy as np, fastopt
            >>> w = np.array([1.0])
            >>> opt = fastopt.SGD([w], lr=1.0, ema_decay=0.5)
            >>> for _ in range(2):
            ...     info = opt.step([np.array([1.0])])
            >>> with opt.swap_ema():
            ...     print(w.tolist())
            [-0.5]
            >>> w.tolist()
            [-1.0]
        """

        def pairs() -> list[tuple[Array, Array]]:
            averaged = self._averaged("swap_ema")
            return [(p.array, p.views[EMA]) for p in averaged if EMA_STEP in (p.step_count.carry or {})]

        return swapping(self, pairs, self._device.copy, self._device.assign)

    @exclusive
    def reset_ema(self) -> None:
        """Let averages begin anew, as copies of the parameters as they are now.

        Raises:
            ValueError: No param group has ``ema_decay``.
            RuntimeError: Another thread is using this optimizer, or it is inside ``swap_ema``.
        """
        averaged = self._averaged("reset_ema")
        anew = {
            p.step_count: StepCount(p.step_count.steps, {**(p.step_count.carry or {}), EMA_STEP: 1.0}) for p in averaged
        }
        reset = [(p, anew[p.step_count]) for p in averaged]

        def take_over() -> None:
            for p, step_count in reset:
                self._device.assign(p.views[EMA], p.array)
                p.step_count = step_count
            self._rebuild()

        finish(take_over)

    def _averaged(self, what: str) -> list[Parameter]:
        """The parameters of groups with averages."""
        options = self._current_options()
        if all(o.get("ema_decay") is None for o in options):
            raise ValueError(f"{self._name}.{what}: no param group has averages; give one ema_decay.")
        if self._plan is not None:
            self._plan.recount()
        return [p for p in self._parameters if options[p.group].get("ema_decay") is not None]
