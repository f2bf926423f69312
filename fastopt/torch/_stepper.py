"""The steps of the parameters of one device, or of several: from param groups, state and ``.grad`` to the plan."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..engine.device import HOST, Device
from ..engine.exclusive import makes_many
from ..engine.host import plan_class
from ..engine.plan import Plans
from ..engine.step import Request, StepInfo
from ..kernels.rules.rule import Options
from . import _devices
from ._parameters import Kind, Parameters
from ._patterns import Pattern, Probe
from ._state import State
from ._tensors import local


class Stepper:
    """What was derived from param groups and state for one device: good while these stay as they are.

    Args:
        groups: The param groups.
        state: The state, which parameters join with their first step.
        kind: What kind of optimizer it is.
        device: The device whose parameters these are; others are left alone.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, kind: Kind, device: Device) -> None:
        self.device = device
        self._flat = kind.flat
        self._parameters = Parameters(groups, state, kind, device)
        self._params = self._parameters.params
        self._patterns: Plans[Pattern] = Plans()
        self._pattern: Pattern | None = None  # the one that serves
        self._gradients: tuple[Sequence[Tensor], Sequence[Tensor]] = (), ()  # of the step that is prepared, and as read
        self._probe: Probe | None = None  # what keeps them alive in their place
        self._pending = False  # whether a step may have been taken that state and versions do not show yet
        self._may_skip = False  # whether the last step may have been skipped
        self._unsettled = False  # whether a GPU knows more than the state shows
        self.is_replayable = False  # whether steps may be taken by a CUDA graph

    @property
    def shards(self) -> Any:
        """Which of the parameters are spread over processes; false where none is."""
        return self._parameters.shards

    @property
    def serving(self) -> Pattern:
        """The pattern of the step that was prepared."""
        assert self._pattern is not None
        return self._pattern

    # --- the step ------------------------------------------------------------------------------------------------

    def prepare(self, options: Sequence[Options], write: bool) -> bool:
        """Find the gradients, have the plan read them and refuse what must be, before anything is written.

        Gradients are kept alive until ``release``.

        Returns:
            False where parameters or states moved or were changed, so that all must be derived anew.
        """
        if self._pending:
            self._conclude()
        if self._pattern is not None and self._hold(self._pattern, write):
            return True
        known = self._patterns.find(Pattern.knows)
        if known is not None and self._leave() and self._resume(known) and self._hold(known, write):
            return True
        if self._flat is not None:
            self._flat.gather()
        listed: list[Any] = [p.grad for p in self._params]
        present = tuple([i for i, g in enumerate(listed) if g is not None])
        grads = [g for g in listed if g is not None]
        if self._pattern is None or self._pattern.present != present:
            if not self._change(present, grads, options):
                return False
            if self._hold(self.serving, write):
                return True
        if self.serving.is_stale():
            return False
        self._read(grads, options, write)
        self.serving.look_for(grads)
        return True

    def _hold(self, pattern: Pattern, write: bool) -> bool:
        self._probe = pattern.probe
        if pattern.hold(write):
            return True
        self.release()
        return False

    def _leave(self) -> bool:
        """Get ready for another pattern; False where all must be derived anew."""
        self.device.refuse_capture()
        self._sync()
        return self._pattern is None or self._pattern.sync.holds()

    def _resume(self, pattern: Pattern | None) -> bool:
        """Have a pattern serve again; False where its parameters have gone ways of their own."""
        self._pattern = None  # an interrupt must not leave half of one to be used
        if pattern is None or not self._patterns.resume(pattern) or not pattern.sync.agrees():
            return False
        self._pattern = pattern
        return True

    @makes_many
    def _change(self, present: tuple[int, ...], grads: list[Tensor], options: Sequence[Options]) -> bool:
        """Have another pattern serve; False where all must be derived anew."""
        if not self._leave():
            return False
        if not self._resume(self._patterns.find(lambda pattern: pattern.present == present)):
            if any(_devices.device_of(self._params[i]) is not self.device for i in present):
                return False
            memories = self._parameters.read(present, grads)
            self._serve((present, tuple([m.dtype for m in memories]), self._flat is not None), options)
            return self.serving.sync.agrees()
        return True

    @makes_many
    def _serve(self, key: tuple[tuple[int, ...], tuple[torch.dtype, ...], bool], options: Sequence[Options]) -> None:
        """Have the pattern serve of these parameters with gradients of these dtypes, which are flat or not."""
        self.device.refuse_capture()
        self._sync()
        if not self._resume(self._patterns.find(lambda pattern: pattern.key == key)):
            make = plan_class(self.device)  # refuses where no kernels can be had, before states are made
            self._parameters.admit(key[0], options)
            self._pattern = self._patterns.keep(Pattern(self._parameters, *key, options, make))

    def _read(self, grads: list[Tensor], options: Sequence[Options], write: bool) -> None:
        """Have the plan read the gradients."""
        present = self.serving.present
        memories = self._parameters.read(present, grads)
        self._gradients, dtypes = (grads, memories), tuple([m.dtype for m in memories])
        if dtypes != self.serving.dtypes:
            self._serve((present, dtypes, self._flat is not None), options)
        starts = np.array([m.data_ptr() for m in memories], np.uint64)
        if not self.serving.aim(starts, write):
            self._serve((present, dtypes, False), options)
            self.serving.aim(starts, write)

    def release(self) -> None:
        """Let the gradients go."""
        self._gradients = (), ()
        if self._probe is not None:
            self._probe.release()
            self._probe = None

    def take(self, request: Request, options: Sequence[Options]) -> StepInfo:
        """Take the step that was prepared."""
        pattern = self.serving
        if pattern.masters is not None:
            pattern.masters.take_over()
        # An interrupt may come anywhere from here on: what it leaves undone is made good when somebody needs it.
        self._pending = True
        self._may_skip = request.skip_nonfinite
        info = pattern.plan.step(request, options)
        self.is_replayable = self.device.on_gpu and any(o.get("capturable") for o in options)
        # Whether a GPU skipped the step is not asked, because the answer would have to be waited for.
        self._conclude(skipped=request.skip_nonfinite and not self.device.on_gpu and info.skipped)
        for gradient, memory in zip(*self._gradients, strict=True) if request.zero_grads else ():
            part = local(gradient, "a gradient")
            if part.data_ptr() != memory.data_ptr() and not part._is_zerotensor():  # the plan zeroed a copy
                part.zero_()
        return info

    def _conclude(self, *, skipped: bool = False) -> None:
        """Let versions and ``state`` follow the parameters. Once more does no harm."""
        pattern = self.serving
        pattern.sync.show()
        if not skipped:
            if pattern.probe is None or not pattern.probe.bump_versions():
                torch.autograd.graph.increment_version(pattern.stepped)
            if pattern.masters is not None:
                pattern.masters.wrote()
            if self.device.on_gpu:
                self._unsettled = any(c.step_count.fetch is not None for c in pattern.plan.scalar_groups)
        self._pending = False

    # --- state ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Somebody reads the state: let it show all steps that were taken; waits for a GPU where only that knows."""
        self._sync()
        for pattern in self._patterns if self._parameters.show_stepped() else ():
            pattern.look_at_shown()

    def _sync(self) -> None:
        """Bring the numbers of ``state`` up to date."""
        if self._pending:
            self._conclude()
        if self._unsettled and self._pattern is not None:
            if self.is_replayable:
                self._pattern.plan.recount()
            self._pattern.sync.settle()
            self._unsettled = self.is_replayable

    @makes_many
    def make_states(self, options: Sequence[Options]) -> None:
        """Make all states of the parameters that may get a gradient, without a step."""
        plan_class(self.device)
        wanted = [i for i, p in enumerate(self._params) if p.requires_grad]
        self._parameters.admit(wanted, options)
        for i in wanted:
            self._parameters.show_made(i)

    def refresh(self) -> None:
        """Let masters follow their parameters in the next step."""
        for pattern in self._patterns:
            if pattern.masters is not None:
                pattern.masters.refresh()

    def verdict(self) -> Tensor | None:
        """1 if the last step was skipped, else 0, where only a GPU knows; not waited for."""
        result = self.serving.plan.result if self._may_skip else None
        return None if result is None else _devices.tensor_of(result, self.device)[1]


class Steppers:
    """The steppers of all devices. Norms over several are those of all gradients: they are combined on the host."""

    @makes_many
    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, kind: Kind) -> None:
        self._lists = [list(group["params"]) for group in groups]
        devices = dict.fromkeys(_devices.device_of(p) for p in chain(*self._lists)) or {HOST: None}
        # GPUs first: what a launch may fail of shows before the CPU has written anything.
        ordered = sorted(devices, key=lambda device: not device.on_gpu)
        self.each = [Stepper(groups, state, kind, device) for device in ordered]
        self.only = self.each[0] if len(self.each) == 1 else None  # the stepper, if all parameters are on one device
        self.have_stepped = False  # as far as is known without waiting for a GPU

    def describes(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups hold the same parameters."""
        return len(groups) == len(self._lists) and all(
            _same(seen, group["params"]) for seen, group in zip(self._lists, groups, strict=True)
        )

    def step(self, request: Request, options: Sequence[Options]) -> StepInfo | None:
        """Take a step on all devices or on none; None where all must be derived anew. A norm of several waits."""
        if self.only is None:
            self._check_capture(options)
        try:
            for stepper in self.each:
                if not stepper.prepare(options, request.zero_grads):
                    return None
            info = self._take(request, options) if self.only is None else self.only.take(request, options)
        finally:
            for stepper in self.each:
                stepper.release()
        known = not request.skip_nonfinite or not (any(s.device.on_gpu for s in self.each) or info.skipped)
        self.have_stepped = self.have_stepped or known
        return info

    def _check_capture(self, options: Sequence[Options]) -> None:
        if any(stepper.device.capturing() for stepper in self.each):
            raise RuntimeError(
                "fastopt.torch: a CUDA graph can hold only steps of parameters that are all on one GPU, but these are "
                f"on {', '.join(s.device.name for s in self.each)}. Make an optimizer for each."
            )
        if len({bool(o.get("capturable")) for o in options}) > 1:
            raise ValueError("fastopt.torch: capturable=True must be set for all param groups or for none.")

    def _take(self, request: Request, options: Sequence[Options]) -> StepInfo:
        active = [s for s in self.each if s.serving.present or s.shards]  # other processes wait for sums of shards
        norm = None
        if request.needs_norm:
            norm = math.hypot(*(stepper.serving.plan.norm() for stepper in active)) * request.multiplier
            if request.skip_nonfinite and not math.isfinite(norm):
                for p in chain(*(s.serving.stepped for s in active)) if request.zero_grads else ():
                    cast(Tensor, p.grad).zero_()
                return StepInfo(True, norm)
            multiplier = request.clipped(norm)
            request = dataclasses.replace(request, multiplier=multiplier, max_grad_norm=None, skip_nonfinite=False)
        for stepper in active:
            stepper.take(request, options)
        return StepInfo(False, norm)

    def settle(self) -> None:
        """Let ``state`` show what only GPUs know; waits for them."""
        for stepper in self.each:
            stepper.settle()

    def skipped(self, info: StepInfo) -> bool | Tensor:
        """Whether the last step was skipped; where only a GPU knows, 1 or 0 there, which is not waited for."""
        verdict = None if self.only is None else self.only.verdict()
        return info.skipped if verdict is None else verdict


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
