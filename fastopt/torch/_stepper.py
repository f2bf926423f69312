"""The steps of the parameters of one device: from param groups, state and ``.grad`` to the plan that serves."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..engine.plans import Plans
from ..engine.step import Request, StepInfo
from ..kernels.rules.rule import Options
from . import _devices
from ._devices import Gpu, Home
from ._entries import Entries, Kind, Treat
from ._patterns import Parameters, Pattern, Probe, Read
from ._shards import Shards
from ._state import Mirror, State
from ._tensors import parameter_memory


class Stepper:
    """What was derived from param groups and state: good while these stay as they are.

    Args:
        groups: The param groups.
        state: The state, which parameters join with their first step.
        kind: What kind of optimizer it is.
        home: The device whose parameters these are; others are left alone.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, kind: Kind, home: Home) -> None:
        self._lists = [list(group["params"]) for group in groups]
        mine = [
            (p, (g, i))
            for g, params in enumerate(self._lists)
            for i, p in enumerate(params)
            if _devices.home_of(p) is home
        ]
        self._params: list[Tensor] = [p for p, _ in mine]
        self.home = home
        self._flat = kind.flat
        self._entries = Entries(self._params, [place for _, place in mine], state, kind, home)
        self._parameters = Parameters(self._params, self._entries, kind, home, Shards(self._params))
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

    def step(self, request: Request, options: Sequence[Options], treat: Treat) -> StepInfo | None:
        """Take a step; None where parameters or states moved or were changed, so that all must be derived anew."""
        try:
            return self.take(request, options) if self.prepare(options, treat, request.zero_grads) else None
        finally:
            self.release()

    def prepare(self, options: Sequence[Options], treat: Treat, write: bool) -> bool:
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
            if not self._change(present, grads, options, treat):
                return False
            if self._hold(self.serving, write):
                return True
        if self.serving.is_stale():
            return False
        self._read(grads, options, treat, write)
        self.serving.look_for(grads)
        return True

    def _hold(self, pattern: Pattern, write: bool) -> bool:
        self._held = pattern.probe
        if pattern.hold(write):
            self._gradients = Read((), (), [])
            return True
        self.release()
        return False

    def _change(self, present: tuple[int, ...], grads: list[Tensor], options: Sequence[Options], treat: Treat) -> bool:
        """Have another pattern serve; False where all must be derived anew."""
        self.home.refuse_capture()
        self.settle()
        if self._pattern is not None and not self._pattern.mirror.holds():
            return False
        pattern = self._patterns.last(present)
        self._pattern = None if pattern is None else self._patterns.resume(pattern)
        if self._pattern is None:
            if any(_devices.home_of(self._params[i]) is not self.home for i in present) or self._entries.changed():
                return False
            grads = self._parameters.local(present, grads)
            dtypes = tuple(m.dtype for m in self._parameters.brought(present, grads))
            self._make((present, dtypes, self._flat is not None), options, treat)
        return self.serving.mirror.agrees()

    def _make(
        self, pattern: tuple[tuple[int, ...], tuple[torch.dtype, ...], bool], options: Sequence[Options], treat: Treat
    ) -> None:
        """Have a new pattern serve: which parameters have a gradient, of which dtypes, and whether these are flat."""
        self.home.refuse_capture()
        self.settle()
        self._pattern = None  # an interrupt must not leave half of one to be used
        present, dtypes, flat = pattern
        memories = [parameter_memory(self._params[i], self._entries.name(i)) for i in present]
        self.home.require()
        self._entries.admit(present, memories, options, treat)
        self._hidden.update(present)
        self._pattern = Pattern(self._parameters, present, dtypes, flat, options, treat)
        self._patterns.keep(pattern, self._pattern)

    def _read(self, grads: list[Tensor], options: Sequence[Options], treat: Treat, write: bool) -> None:
        """Have the plan read the gradients."""
        present, dtypes = self.serving.present, self.serving.dtypes
        self._gradients = gradients = self.serving.read(grads)
        if gradients.dtypes != dtypes:
            self._make((present, gradients.dtypes, self._flat is not None), options, treat)
        starts = np.array([m.data_ptr() for m in gradients.memories], np.uint64)
        if not self.serving.aim(starts, write):
            self._make((present, gradients.dtypes, False), options, treat)
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
        self._replayable = self.home.on_gpu and any(o.get("capturable") for o in options)
        # Whether a GPU skipped the step is not asked, because the answer would have to be waited for.
        self._conclude(skipped=request.skip_nonfinite and not self.home.on_gpu and info.skipped)
        for gradient in self._gradients.copied if request.zero_grads else ():  # the plan zeroed the copies
            if not gradient._is_zerotensor():
                gradient.zero_()
        return info

    def _conclude(self, *, skipped: bool = False) -> None:
        """Let versions and ``state`` follow the parameters. Once more does no harm."""
        pattern = self.serving
        pattern.mirror.show()
        if not skipped:
            if pattern.probe is None or not pattern.probe.bump_versions():
                torch.autograd.graph.increment_version(pattern.stepped)
            if pattern.masters is not None:
                pattern.masters.wrote()
            if self.home.on_gpu:
                self._unsettled = any(c.progress.fetch is not None for c in pattern.plan.cohorts)
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
            if self._entries[i].record.progress.steps > 0:
                self._entries.show(i)
                self._hidden.discard(i)

    def settle(self) -> None:
        """Let ``state`` show all steps that were taken; waits for a GPU where only that knows."""
        if self._pending:
            self._conclude()
        if self._unsettled:
            if self._replayable:
                self.serving.plan.recount()
            self.serving.mirror.settle()
            self._unsettled = self._replayable
            self._show_stepped()

    def make_states(self, options: Sequence[Options], treat: Treat) -> None:
        """Make all states of the parameters that may get a gradient, without a step."""
        self.home.require()
        wanted = [i for i, p in enumerate(self._params) if p.requires_grad]
        memories = [parameter_memory(self._params[i], self._entries.name(i)) for i in wanted]
        self._entries.admit(wanted, memories, options, treat)
        Mirror([self._entries[i].counted for i in wanted])  # writes the numbers
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
        return None if result is None else cast(Gpu, self.home).tensor(result)[1]


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
