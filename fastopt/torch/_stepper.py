"""The steps of the parameters of one device, or of several: from param groups, state and ``.grad`` to the plan."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..engine.plan import Plans
from ..engine.step import Request, StepInfo
from ..kernels.rules.rule import Options
from . import _devices
from ._devices import Gpu, TorchDevice
from ._entries import Choose, Entries, Kind
from ._patterns import Parameters, Pattern, Probe, Read
from ._shards import Shards
from ._state import State, StateSync
from ._tensors import parameter_memory


class Stepper:
    """What was derived from param groups and state: good while these stay as they are.

    Args:
        groups: The param groups.
        state: The state, which parameters join with their first step.
        kind: What kind of optimizer it is.
        device: The device whose parameters these are; others are left alone.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, kind: Kind, device: TorchDevice) -> None:
        self._lists = [list(group["params"]) for group in groups]
        mine = [
            (p, (g, i))
            for g, params in enumerate(self._lists)
            for i, p in enumerate(params)
            if _devices.device_of(p) is device
        ]
        self._params: list[Tensor] = [p for p, _ in mine]
        self.device = device
        self._flat = kind.flat
        self._entries = Entries(self._params, [place for _, place in mine], state, kind, device)
        self._parameters = Parameters(self._params, self._entries, kind, device, Shards(self._params))
        self._patterns: Plans[Pattern] = Plans()
        self._pattern: Pattern | None = None  # the one that serves
        self._hidden: set[int] = set()  # parameters that ``state`` does not show yet
        self._gradients = Read((), (), [])  # of the step that is prepared
        self._held: Probe | None = None  # what keeps them alive in their place
        self._pending = False  # whether a step may have been taken that state and versions do not show yet
        self._unsettled = False  # whether a GPU knows more than the state shows
        self._replayable = False  # whether steps may be taken by a CUDA graph

    def describes(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups hold the same parameters."""
        return len(groups) == len(self._lists) and all(
            _same(seen, group["params"]) for seen, group in zip(self._lists, groups, strict=True)
        )

    @property
    def serving(self) -> Pattern:
        """The pattern of the step that was prepared."""
        assert self._pattern is not None
        return self._pattern

    # --- the step ------------------------------------------------------------------------------------------------

    def step(self, request: Request, options: Sequence[Options], choose: Choose) -> StepInfo | None:
        """Take a step; None where parameters or states moved or were changed, so that all must be derived anew."""
        try:
            return self.take(request, options) if self.prepare(options, choose, request.zero_grads) else None
        finally:
            self.release()

    def prepare(self, options: Sequence[Options], choose: Choose, write: bool) -> bool:
        """Find the gradients, have the plan read them and refuse what must be; False where ``step`` returns None.

        Gradients are kept alive until ``release``.
        """
        if self._pending:
            self._conclude()
        if self._pattern is not None and self._hold(self._pattern, write):
            return True
        if self._flat is not None:
            self._flat.gather()
        listed: list[Any] = [p.grad for p in self._params]
        present = tuple([i for i, g in enumerate(listed) if g is not None])
        grads = [g for g in listed if g is not None]
        if self._pattern is None or self._pattern.present != present:
            if not self._change(present, grads, options, choose):
                return False
            if self._hold(self.serving, write):
                return True
        if self.serving.is_stale():
            return False
        self._read(grads, options, choose, write)
        self.serving.look_for(grads)
        return True

    def _hold(self, pattern: Pattern, write: bool) -> bool:
        self._held = pattern.probe
        if pattern.hold(write):
            self._gradients = Read((), (), [])
            return True
        self.release()
        return False

    def _change(
        self, present: tuple[int, ...], grads: list[Tensor], options: Sequence[Options], choose: Choose
    ) -> bool:
        """Have another pattern serve; False where all must be derived anew."""
        self.device.refuse_capture()
        self.settle()
        if self._pattern is not None and not self._pattern.sync.holds():
            return False
        pattern = self._patterns.last(present)
        self._pattern = None if pattern is None else self._patterns.resume(pattern)
        if self._pattern is None:
            if any(_devices.device_of(self._params[i]) is not self.device for i in present) or self._entries.changed():
                return False
            grads = self._parameters.local(present, grads)
            dtypes = tuple(m.dtype for m in self._parameters.brought(present, grads))
            self._make((present, dtypes, self._flat is not None), options, choose)
        return self.serving.sync.agrees()

    def _make(
        self, pattern: tuple[tuple[int, ...], tuple[torch.dtype, ...], bool], options: Sequence[Options], choose: Choose
    ) -> None:
        """Have a new pattern serve: which parameters have a gradient, of which dtypes, and whether these are flat."""
        self.device.refuse_capture()
        self.settle()
        self._pattern = None  # an interrupt must not leave half of one to be used
        present, dtypes, flat = pattern
        memories = [parameter_memory(self._params[i], self._entries.name(i)) for i in present]
        self.device.require()
        self._entries.admit(present, memories, options, choose)
        self._hidden.update(present)
        self._pattern = Pattern(self._parameters, present, dtypes, flat, options, choose)
        self._patterns.keep(pattern, self._pattern)

    def _read(self, grads: list[Tensor], options: Sequence[Options], choose: Choose, write: bool) -> None:
        """Have the plan read the gradients."""
        present, dtypes = self.serving.present, self.serving.dtypes
        self._gradients = gradients = self.serving.read(grads)
        if gradients.dtypes != dtypes:
            self._make((present, gradients.dtypes, self._flat is not None), options, choose)
        starts = np.array([m.data_ptr() for m in gradients.memories], np.uint64)
        if not self.serving.aim(starts, write):
            self._make((present, gradients.dtypes, False), options, choose)
            self.serving.aim(starts, write)

    def release(self) -> None:
        """Let the gradients go."""
        self._gradients = Read((), (), [])
        if self._held is not None:
            self._held.release()
            self._held = None

    def take(self, request: Request, options: Sequence[Options]) -> StepInfo:
        """Take the step that was prepared."""
        pattern = self.serving
        if pattern.masters is not None:
            pattern.masters.take_over()
        # An interrupt may come anywhere from here on: what it leaves undone is made good when somebody needs it.
        self._pending = True
        info = pattern.plan.step(request, options)
        self._replayable = self.device.on_gpu and any(o.get("capturable") for o in options)
        # Whether a GPU skipped the step is not asked, because the answer would have to be waited for.
        self._conclude(skipped=request.skip_nonfinite and not self.device.on_gpu and info.skipped)
        for gradient in self._gradients.copied if request.zero_grads else ():  # the plan zeroed the copies
            if not gradient._is_zerotensor():
                gradient.zero_()
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
            if self._hidden and not self._unsettled:
                self._show_stepped()
        self._pending = False

    def norm(self) -> float:
        """Norm of the gradients that were prepared, as they are; waits for a GPU."""
        return self.serving.plan.norm()

    def zero_gradients(self) -> None:
        """Set the gradients to zero, in a step that is skipped."""
        for p in self.serving.stepped:
            cast(Tensor, p.grad).zero_()

    @property
    def has_gradients(self) -> bool:
        """Whether there is anything to step."""
        return self._pattern is not None and bool(self._pattern.present)

    # --- state ---------------------------------------------------------------------------------------------------

    def _show_stepped(self) -> None:
        """Let ``state`` show parameters that took their first step."""
        for i in self._hidden.intersection(self.serving.present):
            if self._entries[i].record.step_count.steps > 0:
                self._entries.show(i)
                self._hidden.discard(i)

    def settle(self) -> None:
        """Let ``state`` show all steps that were taken; waits for a GPU where only that knows."""
        if self._pending:
            self._conclude()
        if self._unsettled and self._pattern is not None:
            if self._replayable:
                self.serving.plan.recount()
            self.serving.sync.settle()
            self._unsettled = self._replayable
            self._show_stepped()

    def make_states(self, options: Sequence[Options], choose: Choose) -> None:
        """Make all states of the parameters that may get a gradient, without a step."""
        self.device.require()
        wanted = [i for i, p in enumerate(self._params) if p.requires_grad]
        memories = [parameter_memory(self._params[i], self._entries.name(i)) for i in wanted]
        self._entries.admit(wanted, memories, options, choose)
        StateSync([self._entries[i].counted for i in wanted])  # writes the numbers
        for i in wanted:
            self._entries.show_made(i)

    def refresh(self) -> None:
        """Let masters follow their parameters in the next step."""
        for pattern in self._patterns:
            if pattern.masters is not None:
                pattern.masters.refresh()

    # --- GPUs ----------------------------------------------------------------------------------------------------

    def upload_options(self, options: Sequence[Options]) -> None:
        """Bring options to where captured steps find them."""
        self.serving.plan.upload_options(options)

    @property
    def is_capturable(self) -> bool:
        """Whether the last step was one that a CUDA graph may hold."""
        return self._replayable

    def verdict(self) -> Tensor | None:
        """1 if the last step was skipped, else 0, where only a GPU knows; not waited for."""
        result = self.serving.plan.result
        return None if result is None else cast(Gpu, self.device).tensor(result)[1]


def derive(groups: Sequence[Mapping[str, Any]], state: State, kind: Kind) -> Stepper | MultiDeviceStepper:
    """What a step needs to know of param groups and state."""
    devices = dict.fromkeys(_devices.device_of(p) for group in groups for p in group["params"]) or {_devices.CPU: None}
    # GPUs first: what a launch may fail of shows before the CPU has written anything.
    steppers = [
        Stepper(groups, state, kind, device) for device in sorted(devices, key=lambda device: not device.on_gpu)
    ]
    return steppers[0] if len(steppers) == 1 else MultiDeviceStepper(steppers)


class MultiDeviceStepper:
    """The steppers of several devices. Norms are those of all gradients, so they are combined on the host."""

    device = None
    is_capturable = False

    def __init__(self, steppers: Sequence[Stepper]) -> None:
        self._steppers = steppers

    def describes(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups hold the same parameters."""
        return self._steppers[0].describes(groups)

    def step(self, request: Request, options: Sequence[Options], choose: Choose) -> StepInfo | None:
        """Take a step on all devices or on none; None where all must be derived anew. A norm is waited for."""
        self._check_capture(options)
        try:
            if not all([stepper.prepare(options, choose, request.zero_grads) for stepper in self._steppers]):  # noqa: C419
                return None
            return self._take(request, options)
        finally:
            for stepper in self._steppers:
                stepper.release()

    def _check_capture(self, options: Sequence[Options]) -> None:
        if any(stepper.device.capturing() for stepper in self._steppers):
            raise RuntimeError(
                "fastopt.torch: a CUDA graph can hold only steps of parameters that are all on one GPU, but these are "
                f"on {', '.join(str(s.device.torch_device) for s in self._steppers)}. Make an optimizer for each."
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

    def make_states(self, options: Sequence[Options], choose: Choose) -> None:
        """Make all states of the parameters that may get a gradient, without a step."""
        for stepper in self._steppers:
            stepper.make_states(options, choose)

    def refresh(self) -> None:
        """Let masters follow their parameters in the next step."""
        for stepper in self._steppers:
            stepper.refresh()

    def verdict(self) -> Tensor | None:
        """None: the host knows whether the last step was skipped."""
        return None


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
