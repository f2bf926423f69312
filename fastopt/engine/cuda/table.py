"""What a step reads in device memory: the chunk table, and the few numbers that the step is made of."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.dtypes import CODES
from ...kernels.epilogues import EMA_STEP, KINDS
from ...kernels.layout import (
    ADAPTS,
    AVERAGED,
    CARRY,
    CHUNKS,
    DECAY,
    FIRST_CHUNK,
    G_CODE,
    GRADIENT,
    HEADER_WORDS,
    LR,
    LR_BYTES,
    MULTIPLIER32,
    MULTIPLIER64,
    OPTIONS,
    P_CODE,
    PARAMETER,
    PARTS_BITS,
    RULE,
    SCALAR_GROUP,
    SCALAR_GROUP_WORDS,
    SCALARS,
    SEGMENT_WORDS,
    SIGN,
    STEPS,
    SUMS,
    TARGETS,
    WARMUP,
    WORD,
)
from ...kernels.rules.rule import Options, Rule
from ..options import RuleChoice
from ..plan import ScalarGroup
from ..table import chunks_of
from .device import CudaDevice, Function, PinnedRing


class Launch(NamedTuple):
    """An update or terms kernel, whether it computes in float64, its blocks, and the address of its chunks."""

    kernel: Function
    wide: bool
    blocks: int
    chunks: int


class NormTasks(NamedTuple):
    """A list of chunks whose squares are summed: where it lies, how long it is, how many arrays it completes."""

    address: int
    chunks: int
    arrays: int


NO_TASKS = NormTasks(0, 0, 0)


class CudaTable:
    """Segments, cut into chunks, and what the prologue finds out about them.

    Args:
        device: The device.
        sizes: Elements of each segment.
        words: What each segment is, (segments, SEGMENT_WORDS), all but its chunks.
        first: The parameter with which each segment begins.
        kernels: The update kernel of each segment, and whether it computes in float64.
        terms: The terms kernel of each segment whose rule has one and that has a ratio.
    """

    def __init__(
        self,
        device: CudaDevice,
        sizes: NDArray[np.int64],
        words: NDArray[np.int64],
        first: NDArray[np.int64],
        kernels: list[tuple[Function, bool]],
        terms: list[Function | None],
    ) -> None:
        self._device = device
        self._first = first
        self.segment_count = len(sizes)
        chunks = chunks_of(sizes)
        self.chunk_count = len(chunks)
        words[:, CHUNKS] = np.bincount(chunks[:, 0], minlength=len(sizes))
        words[:, FIRST_CHUNK] = np.cumsum(words[:, CHUNKS]) - words[:, CHUNKS]
        self._words, self._chunks = words, chunks
        self._kept: list[Any] = []  # device arrays by whose addresses kernels are called
        self.segments, self.chunks = self._address(words), self._address(chunks)
        self.gradients = self._address(np.zeros(len(sizes), np.uint64))
        self._staging = PinnedRing(device, self.gradients, WORD * len(sizes))
        # One launch for each kernel: nearly always there is one. Backwards, so that the update begins with what the
        # prologue read last, which is still in the second-level cache.
        self.launches: list[Launch] = []
        for kernel, wide in dict.fromkeys(kernels):
            mine = chunks[np.array([k is kernel for k, _ in kernels])[chunks[:, 0]]]
            if len(mine):
                self.launches.append(Launch(kernel, wide, len(mine) << PARTS_BITS, self._address(mine[::-1])))
        self.sums: list[Launch] = []
        for sums, wide in dict.fromkeys((t, wide) for t, (_, wide) in zip(terms, kernels, strict=True) if t):
            mine = np.flatnonzero(np.array([t is sums for t in terms])[chunks[:, 0]])
            if len(mine):
                self.sums.append(Launch(sums, wide, len(mine), self._address(mine)))
        self._of_squares = (words[:, ADAPTS] != 0) & np.array([t is None for t in terms], bool)
        self.ratios64 = self._address(np.ones(2 * len(sizes)))  # stretch and ratio of each segment that adapts
        self.ratios32 = self._address(np.ones(2 * len(sizes), np.float32))

    def _address(self, array: NDArray[Any]) -> int:
        on_device = self._device.upload(np.ascontiguousarray(array))
        self._kept.append(on_device)
        return self._device.address(on_device)

    def point_at(self, gradients: NDArray[np.uint64], stream: Any) -> None:
        """Have the gradients taken from these addresses."""
        self._staging.send(gradients[self._first].view(np.uint8), stream, to_graphs=True)

    @functools.cached_property
    def partials(self) -> int:
        """Sums of each chunk: of squares of the parameters, then of the gradients; or of a rule's products."""
        return self._address(np.zeros(SUMS * self.chunk_count))

    @functools.cached_property
    def squares(self) -> int:
        """Sums of squares of each parameter, then of each gradient."""
        return self._address(np.zeros(2 * self.segment_count))

    @functools.cached_property
    def counters(self) -> int:
        """How many blocks are done, of each sum of squares; and how many of these are complete."""
        return self._address(np.zeros(2 * self.segment_count + 1, np.int64))

    @functools.cached_property
    def norm_tasks(self) -> NormTasks:
        """Chunks to be squared where the norm of all gradients is needed."""
        return self._jobs(np.ones(self.segment_count, bool))

    @functools.cached_property
    def ratio_tasks(self) -> NormTasks:
        """Chunks to be squared where only trust ratios are needed."""
        return self._jobs(self._of_squares)

    def _jobs(self, gradients: NDArray[np.bool_]) -> NormTasks:
        tasks, arrays = [], 0
        for which, wanted in ((PARAMETER, self._of_squares), (GRADIENT, gradients)):
            chunk = np.flatnonzero(wanted[self._chunks[:, 0]])
            tasks.append(np.stack([np.full(len(chunk), which), chunk], axis=1))
            arrays += int((wanted & (self._words[:, CHUNKS] > 0)).sum())
        table = np.concatenate(tasks)
        table = table[np.argsort(table[:, 1], kind="stable")]  # chunk by chunk, for the cache's sake
        return NormTasks(self._address(table), len(table), arrays)


def segment_words(
    addresses: list[list[int]],
    *,
    scalar_groups: list[int],
    signs: list[float],
    adapts: list[bool],
    stored: list[tuple[str, str]],
    epilogues: list[list[tuple[Rule, str, int]]],
) -> NDArray[np.int64]:
    """What segments are, for ``CudaTable``; ``stored`` are the dtypes of parameter and gradient, ``epilogues`` those of
    each with dtype and address of the target."""
    words = np.zeros((len(addresses), SEGMENT_WORDS), np.int64)
    for row, arrays in zip(words, addresses, strict=True):
        row[: len(arrays)] = arrays
    words[:, SCALAR_GROUP], words[:, SIGN], words[:, ADAPTS] = scalar_groups, signs, adapts
    for row, of_segment in zip(words, epilogues, strict=True):
        for what, dtype, target in of_segment:
            row[TARGETS + KINDS.index((what, dtype))] = target
    words[:, P_CODE], words[:, G_CODE] = [CODES[p] for p, _ in stored], [CODES[g] for _, g in stored]
    return words


# --- numbers ----------------------------------------------------------------------------------------------------------


class DeviceScalars:
    """What all blocks read: the multiplier of the gradients, whether to skip, and the scalars of each scalar group.

    The host brings them, unless the prologue forms them.
    """

    def __init__(self, device: CudaDevice, scalar_groups: int) -> None:
        self._content = np.zeros(WORD * HEADER_WORDS + (8 + 4) * SCALARS * scalar_groups, np.uint8)
        ends = np.cumsum([WORD * HEADER_WORDS, 8 * SCALARS * scalar_groups])
        header, numbers64, numbers32 = np.split(self._content, ends)
        self._header64, self._header32 = header.view(np.float64), header.view(np.float32)
        self._numbers64 = numbers64.view(np.float64).reshape(scalar_groups, SCALARS)
        self._numbers32 = numbers32.view(np.float32).reshape(scalar_groups, SCALARS)
        self._on_device: Any = device.upload(self._content)
        self.header = device.address(self._on_device)
        self.scalars64, self.scalars32 = (self.header + int(end) for end in ends)
        self._staging = PinnedRing(device, self.header, self._content.nbytes)

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

    def __init__(self, device: CudaDevice, scalar_groups: Sequence[ScalarGroup], rules: Sequence[Rule]) -> None:
        self._device = device
        self._scalar_groups, self._rules = scalar_groups, rules
        self.there = False
        self._words = np.zeros((len(scalar_groups), SCALAR_GROUP_WORDS), np.int64)
        self._words[:, RULE] = [rules.index(scalar_group.choice.rule) for scalar_group in scalar_groups]
        self._options = np.zeros((len(scalar_groups), OPTIONS))
        self._on_device: Any = device.upload(self._words)
        self._device_options: Any = device.upload(self._options)
        self.scalar_groups, self.options = device.address(self._on_device), device.address(self._device_options)
        self._words_staging = PinnedRing(device, self.scalar_groups, self._words.nbytes)
        self._options_staging = PinnedRing(device, self.options, self._options.nbytes)

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
        self._device.refuse_capture(stream)
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
            scalar_group.step_count.fetch = functools.partial(_fetch, self._device, self._on_device, choice, c, stream)


def _fetch(
    device: CudaDevice, words: Any, choice: RuleChoice, c: int, stream: Any
) -> tuple[int, dict[str, float] | None]:
    """Steps and carried numbers of a scalar group, which it does not know: that would be a cycle, freed late."""
    row, rule = device.download(words, stream)[c], choice.rule
    steps = int(row[STEPS])
    carry = dict(zip(rule.carried, row[CARRY:].view(np.float64).tolist(), strict=False))
    if choice.averages:
        carry[EMA_STEP] = float(row[AVERAGED])
    return steps, carry if carry and steps > 0 else None
