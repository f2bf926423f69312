"""Parameters on several devices: an stepper for each, which are one step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..engine.step import Request, StepInfo
from ..kernels.rules.rule import Options
from . import _devices
from ._entries import Kind, Treat
from ._state import State
from ._stepper import Stepper


def derive(groups: Sequence[Mapping[str, Any]], state: State, kind: Kind) -> Stepper | Several:
    """What a step needs to know of param groups and state."""
    homes = dict.fromkeys(_devices.home_of(p) for group in groups for p in group["params"]) or {_devices.CPU: None}
    # GPUs first: what a launch may fail of shows before the CPU has written anything.
    steppers = [Stepper(groups, state, kind, home) for home in sorted(homes, key=lambda home: not home.on_gpu)]
    return steppers[0] if len(steppers) == 1 else Several(steppers)


class Several:
    """The steppers of several devices. Norms are those of all gradients, so they are combined on the host."""

    home = None
    is_capturable = False

    def __init__(self, steppers: Sequence[Stepper]) -> None:
        self._steppers = steppers

    def describes(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups hold the same parameters."""
        return self._steppers[0].describes(groups)

    def step(self, request: Request, options: Sequence[Options], treat: Treat) -> StepInfo | None:
        """Take a step on all devices or on none; None where all must be derived anew. A norm is waited for."""
        self._check_capture(options)
        try:
            if not all([stepper.prepare(options, treat, request.zero_grads) for stepper in self._steppers]):  # noqa: C419
                return None
            return self._take(request, options)
        finally:
            for stepper in self._steppers:
                stepper.release()

    def _check_capture(self, options: Sequence[Options]) -> None:
        if any(stepper.home.capturing() for stepper in self._steppers):
            raise RuntimeError(
                "fastopt.torch: a CUDA graph can hold only steps of parameters that are all on one GPU, but these are "
                f"on {', '.join(str(stepper.home.device) for stepper in self._steppers)}. Make an optimizer for each."
            )
        if len({bool(o.get("capturable")) for o in options}) > 1:
            raise ValueError("fastopt.torch: capturable=True must be set for all param groups or for none.")

    def _take(self, request: Request, options: Sequence[Options]) -> StepInfo:
        active = [stepper for stepper in self._steppers if stepper.has_gradients]
        norm = None
        if request.needs_norm:
            norm = math.hypot(*(stepper.norm() for stepper in active)) * request.multiplier
            if request.skip_nonfinite and not math.isfinite(norm):
                for stepper in active if request.zero_grads else ():
                    stepper.zero_gradients()
                return StepInfo(True, norm)
            multiplier = request.clipped(norm)
            request = dataclasses.replace(request, multiplier=multiplier, max_norm=None, skip_nonfinite=False)
        for stepper in active:
            stepper.take(request, options)
        return StepInfo(False, norm)

    def settle(self) -> None:
        """Let ``state`` show what only GPUs know; waits for them."""
        for stepper in self._steppers:
            stepper.settle()

    def make_states(self, options: Sequence[Options], treat: Treat) -> None:
        """Make all states of the parameters that may get a gradient, without a step."""
        for stepper in self._steppers:
            stepper.make_states(options, treat)

    def refresh(self) -> None:
        """Let masters follow their parameters in the next step."""
        for stepper in self._steppers:
            stepper.refresh()

    def verdict(self) -> Tensor | None:
        """None: the host knows whether the last step was skipped."""
        return None
