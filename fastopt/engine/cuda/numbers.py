"""The few numbers that a step is made of, in device memory: brought by the host, or formed there."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...kernels.epilogues import EMA_STEP
from ...kernels.layout import (
    AVERAGED,
    CARRY,
    DECAY,
    HEADER_WORDS,
    LR,
    LR_BYTES,
    MULTIPLIER32,
    MULTIPLIER64,
    OPTIONS,
    RULE,
    SCALAR_GROUP_WORDS,
    SCALARS,
    STEPS,
    WARMUP,
    WORD,
)
from ...kernels.rules.rule import Options, Rule
from ..options import RuleChoice
from ..plan import ScalarGroup
from .runtime import Runtime, address
from .staging import PinnedRing


class DeviceScalars:
    """What all blocks read: the multiplier of the gradients, whether to skip, and the scalars of each scalar group.

    The host brings them, unless the prologue forms them.
    """

    def __init__(self, runtime: Runtime, scalar_groups: int) -> None:
        self._content = np.zeros(WORD * HEADER_WORDS + (8 + 4) * SCALARS * scalar_groups, np.uint8)
        ends = np.cumsum([WORD * HEADER_WORDS, 8 * SCALARS * scalar_groups])
        header, numbers64, numbers32 = np.split(self._content, ends)
        self._header64, self._header32 = header.view(np.float64), header.view(np.float32)
        self._numbers64 = numbers64.view(np.float64).reshape(scalar_groups, SCALARS)
        self._numbers32 = numbers32.view(np.float32).reshape(scalar_groups, SCALARS)
        self._device: Any = runtime.upload(self._content)
        self.header = address(self._device)
        self.scalars64, self.scalars32 = (self.header + int(end) for end in ends)
        self._staging = PinnedRing(runtime, self.header, self._content.nbytes)

    def bring(
        self, scalar_groups: Sequence[ScalarGroup], options: Sequence[Options], multiplier: float, stream: Any
    ) -> None:
        """Form the scalars of the next step and put their upload on the stream."""
        self._header64[MULTIPLIER64] = multiplier
        self._header32[MULTIPLIER32] = multiplier
        for row, scalar_group in zip(self._numbers64, scalar_groups, strict=True):
            scalar_group.prepare(options[scalar_group.group])
            row[:] = scalar_group.numbers
        with np.errstate(over="ignore"):  # to infinity, as on the host
            self._numbers32[...] = self._numbers64
        self._staging.send(self._content, stream)

    def forget(self) -> None:
        """The prologue wrote the numbers."""
        self._staging.forget()


class DeviceStepCount:
    """Step counts that the device keeps, and the options from which it forms scalars.

    An lr may live on the device itself: the option "lr_at" is then its address and its itemsize.
    """

    def __init__(self, runtime: Runtime, scalar_groups: Sequence[ScalarGroup], rules: Sequence[Rule]) -> None:
        self._runtime = runtime
        self._scalar_groups, self._rules = scalar_groups, rules
        self.there = False
        self._words = np.zeros((len(scalar_groups), SCALAR_GROUP_WORDS), np.int64)
        self._words[:, RULE] = [rules.index(scalar_group.choice.rule) for scalar_group in scalar_groups]
        self._options = np.zeros((len(scalar_groups), OPTIONS))
        self._device: Any = runtime.upload(self._words)
        self._device_options: Any = runtime.upload(self._options)
        self.scalar_groups, self.options = address(self._device), address(self._device_options)
        self._words_staging = PinnedRing(runtime, self.scalar_groups, self._words.nbytes)
        self._options_staging = PinnedRing(runtime, self.options, self._options.nbytes)

    def bring(self, options: Sequence[Options], stream: Any) -> None:
        """Have the device count from here on, by the options as they are now."""
        for rule in self._rules:
            if not rule.counts:
                raise TypeError(
                    f"fastopt: skip_nonfinite and capturable on a GPU need to know what the scalars of rule "
                    f"{rule.name!r} read: give fastopt.Rule its options."
                )
            if hasattr(rule.scalars, "__wrapped__"):
                raise TypeError(
                    f"fastopt: skip_nonfinite and capturable on a GPU have the scalars of rule {rule.name!r} compiled: "
                    "write them as a function in a file, whose every return is a dict display with the same names."
                )
        lrs = [options[scalar_group.group].get("lr_at", (0, 0)) for scalar_group in self._scalar_groups]
        if self.there and self._words[:, [LR, LR_BYTES]].tolist() != list(map(list, lrs)):
            self._take_back(stream)
        for c, scalar_group in enumerate(self._scalar_groups):
            rule, mine = scalar_group.choice.rule, scalar_group.complete(options[scalar_group.group])
            numbers = [x for name in rule.counts for x in np.ravel(mine.get(name) or 0.0)]
            self._options[c, : len(numbers)] = numbers
            self._options[c, [DECAY, WARMUP]] = mine.get("ema_decay") or 0.0, mine.get("ema_warmup", False)
            if not self.there:
                self._words[c, [STEPS, LR, LR_BYTES, AVERAGED]] = (
                    scalar_group.step_count.steps,
                    *lrs[c],
                    scalar_group.averaged,
                )
                if rule.carry is not None:
                    carried = scalar_group.carried(mine)
                    self._words[c, CARRY : CARRY + len(carried)].view(np.float64)[:] = carried
        self._options_staging.send(self._options.reshape(-1).view(np.uint8), stream)
        if not self.there:
            self._words_staging.send(self._words.reshape(-1).view(np.uint8), stream)
        self.there = True

    def _take_back(self, stream: Any) -> None:
        """Fetch the counts, to bring them anew."""
        self._runtime.refuse_capture(stream)
        self.advance(stream)
        self.leave()

    def leave(self) -> None:
        """The host counts from here on, until counts are brought anew."""
        self._words_staging.forget()
        self.there = False

    def advance(self, stream: Any) -> None:
        """A step was put on the stream: who wants to know the counts has to fetch them."""
        for c, scalar_group in enumerate(self._scalar_groups):
            choice = scalar_group.choice
            scalar_group.step_count.fetch = functools.partial(_fetch, self._runtime, self._device, choice, c, stream)


def _fetch(
    runtime: Runtime, words: Any, choice: RuleChoice, c: int, stream: Any
) -> tuple[int, dict[str, float] | None]:
    """Steps and carried numbers of a scalar group, which it does not know: that would be a cycle, freed late."""
    row, rule = runtime.download(words, stream)[c], choice.rule
    steps = int(row[STEPS])
    carry = dict(zip(rule.carried, row[CARRY:].view(np.float64).tolist(), strict=False))
    if choice.averages:
        carry[EMA_STEP] = float(row[AVERAGED])
    return steps, carry if carry and steps > 0 else None
