"""The plan for arrays on a GPU: a launch for the whole model, and one before it where something must be known first."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from ...kernels import layout
from ...kernels.dtypes import CODES
from ...kernels.epilogues import EMA_STEP, KINDS
from ...kernels.rules.rule import Options, Rule
from ..options import RuleChoice
from ..plan import Plan, ScalarGroup
from ..step import Request, StepInfo
from ..table import Stages, Whole
from .device import CudaDevice, PinnedRing
from .kernels import load
from .table import CudaTable

_STEPPED = StepInfo()


class DeviceNumbers:
    """What all blocks read: the multiplier of the gradients, whether to skip, and the numbers of each scalar group.

    The host forms the scalars, unless the device keeps the step counts: then the host brings options, of which the
    prologue forms them. An lr may live on the device itself: the option "lr_at" is then its address and its itemsize.
    """

    def __init__(self, device: CudaDevice, scalar_groups: Sequence[ScalarGroup], rules: Sequence[Rule]) -> None:
        self._device, self._scalar_groups, self._rules = device, scalar_groups, rules
        self.counts_on_device = False
        self._content = np.zeros(layout.HEADER_WORDS + layout.NUMBERS * len(scalar_groups))
        rows = self._content[layout.HEADER_WORDS :].reshape(-1, layout.NUMBERS)
        self._scalars, self._options = rows[:, : layout.SCALARS], rows[:, layout.SCALARS :]
        self._words = np.zeros((len(scalar_groups), layout.SCALAR_GROUP_WORDS), np.int64)
        self._words[:, layout.RULE] = [rules.index(scalar_group.choice.rule) for scalar_group in scalar_groups]
        self._on_device: tuple[Any, Any] = device.upload(self._content), device.upload(self._words)
        self.numbers, self.words = map(device.address, self._on_device)
        self._staging = PinnedRing(device, self.numbers, self._content.nbytes)
        self._words_staging = PinnedRing(device, self.words, self._words.nbytes)

    def form(self, options: Sequence[Options], multiplier: float, stream: Any) -> None:
        """Form the scalars of the next step and put their upload on the stream."""
        self._content[layout.MULTIPLIER64] = multiplier
        for row, scalar_group in zip(self._scalars, self._scalar_groups, strict=True):
            scalar_group.prepare(options[scalar_group.group])
            row[:] = scalar_group.numbers
        self._staging.send(self._content.view(np.uint8), stream)

    def count(self, options: Sequence[Options], stream: Any) -> None:
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
        if self.counts_on_device and self._words[:, [layout.LR, layout.LR_BYTES]].tolist() != list(map(list, lrs)):
            self._device.refuse_capture(stream)  # of the upload of words that follows
            self.advance(stream)
            self.leave()
        for c, scalar_group in enumerate(self._scalar_groups):
            rule, mine = scalar_group.choice.rule, scalar_group.complete(options[scalar_group.group])
            numbers = [x for name in rule.counts for x in np.ravel(mine.get(name) or 0.0)]
            self._options[c, : len(numbers)] = numbers
            average = mine.get("ema_decay") or 0.0, mine.get("ema_warmup", False)
            self._options[c, [layout.DECAY, layout.WARMUP]] = average
            if not self.counts_on_device:
                start = scalar_group.step_count.steps, *lrs[c], scalar_group.averaged
                self._words[c, [layout.STEPS, layout.LR, layout.LR_BYTES, layout.AVERAGED]] = start
                if rule.carry is not None:
                    carried = scalar_group.carried(mine)
                    self._words[c, layout.CARRY : layout.CARRY + len(carried)].view(np.float64)[:] = carried
        self._staging.send(self._content.view(np.uint8), stream)
        if not self.counts_on_device:
            self._words_staging.send(self._words.reshape(-1).view(np.uint8), stream)
        self.counts_on_device = True

    def written(self) -> None:
        """The prologue wrote the header, which the host brings anew where it forms the scalars."""
        if not self.counts_on_device:
            self._staging.forget()

    def leave(self) -> None:
        """The host counts from here on, until the device does again."""
        if self.counts_on_device:
            self._staging.forget()
            self._words_staging.forget()
            self.counts_on_device = False

    def advance(self, stream: Any) -> None:
        """A step was put on the stream: who wants to know the counts has to fetch them."""
        words = self._on_device[1]
        for c, scalar_group in enumerate(self._scalar_groups):
            choice = scalar_group.choice
            scalar_group.step_count.fetch = functools.partial(_fetch, self._device, words, choice, c, stream)


def _fetch(
    device: CudaDevice, words: Any, choice: RuleChoice, c: int, stream: Any
) -> tuple[int, dict[str, float] | None]:
    """Steps and carried numbers of a scalar group, which it does not know: that would be a cycle, freed late."""
    row, rule = device.download(words, stream)[c], choice.rule
    steps = int(row[layout.STEPS])
    carry = dict(zip(rule.carried, row[layout.CARRY :].view(np.float64).tolist(), strict=False))
    if choice.averages:
        carry[EMA_STEP] = float(row[layout.AVERAGED])
    return steps, carry if carry and steps > 0 else None


class CudaPlan(Plan):
    """A plan whose step is put on a stream and not waited for.

    The host forms the scalars of a step and uploads them, as long as it knows the step counts. Where the device decides
    whether a step is taken (``skip_nonfinite``), or takes steps without the host (``capturable``), the counts move
    there, and the prologue forms the scalars.
    """

    whole: Whole | None = None
    """In the place of ``combine`` and ``combine_ratios``: where the sums of all processes are, and what adds them."""

    _device: CudaDevice

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rules: list[Rule] = list(dict.fromkeys(c.choice.rule for c in self.scalar_groups))
        self._numbers = DeviceNumbers(self._device, self.scalar_groups, self._rules)
        self._table(norms=not self.flat)  # a kernel that cannot be had is an error before anything is written

    def _build(self, runs: list[tuple[int, int]], norms: bool) -> CudaTable:
        rows, updates, terms = [], [], []
        for (k, _), addresses in zip(runs, self._addresses(runs), strict=True):
            p, rule, adapts = self.parameters[k], self._rule(k), self._adapts(k)
            stored = p.dtype, self.dtypes[k].name
            row = [*addresses, *[0] * (layout.SEGMENT_WORDS - len(addresses))]
            row[layout.SCALAR_GROUP], row[layout.SIGN] = self._member[k], int(self._signs[p.group])
            row[layout.ADAPTS], row[layout.G_CODE] = adapts, CODES[stored[1]]
            for epilogue, dtype, target in self._epilogues(k):
                row[layout.TARGETS + KINDS.index((epilogue, dtype))] = target
            rows.append(row)
            updates.append(load(self._device, "update", rule, *stored))
            terms.append(load(self._device, "terms", rule, *stored) if adapts else None)
        first, sizes = np.array(runs, np.int64).reshape(-1, 2).T
        words = np.array(rows, np.int64).reshape(-1, layout.SEGMENT_WORDS)
        stages = None if self.stages is None else [self.stages.of[k] for k, _ in runs]
        return CudaTable(self._device, sizes, words, first, updates, terms, self.whole, stages)

    def share(self, whole: Whole, stages: Stages) -> None:
        """Take sums over processes, and update in stages, from here on."""
        self.whole, self.stages = whole, stages
        self._tables.clear()

    def resume(self) -> bool:
        self._numbers.leave()  # other plans may have counted meanwhile
        return super().resume()

    def step(self, request: Request, options: Sequence[Options]) -> StepInfo:
        with self._device.selected():
            return self._step(request, options)

    def _step(self, request: Request, options: Sequence[Options]) -> StepInfo:
        stream = self._device.stream()
        capturable = any(o.get("capturable") for o in options)
        if not capturable and self._device.capturing(stream):
            raise RuntimeError("fastopt: a step can be captured into a CUDA graph only with capturable=True.")
        if capturable and not all(o.get("capturable") for o in options):
            raise ValueError("fastopt: capturable=True must be set for all param groups or for none.")
        counts = self._numbers.counts_on_device or request.skip_nonfinite or capturable
        decides = counts or request.needs_norm or request.scale_at != 0
        merges = self.flat and not request.needs_norm and self._merges(request.multiplier, options)
        table: CudaTable = self._table(norms=not merges)
        rules = (self._rules if counts else self._rules[:1]) if decides else ()
        prologues = [load(self._device, "prologue", rule) for rule in rules]
        info, result = self._new_info(request, stream, capturable)

        self._upload_gradients(table, stream)
        if counts:
            self._numbers.count(options, stream)
            self._numbers.advance(stream)
        else:
            self._numbers.form(options, request.multiplier, stream)
        if request.needs_norm and not prologues:  # nobody here has a gradient, but others may wait
            self._take_sums(lambda act: None)
        for number, prologue in enumerate(prologues):
            self._prologue(table, prologue, request, stream, number, counts, result)
        if table.sums if self.whole is None else self.whole.ratios:
            self._take_sums(functools.partial(self._ratios, table, stream))
        # The line where a count and its step can fall apart: an interrupt among these launches leaves the count ahead.
        if not counts:
            numbers = self._counts.numbers
            numbers[: self._counts.half] = numbers[self._counts.half :]
        zero = int(request.zero_grads)
        for update, following in zip_longest(table.updates, table.updates[1:]):
            update.kernel(update.blocks, (update.mine, *table.places[1:], self._numbers.numbers, zero), stream)
            if self.stages is not None and (following is None or following.stage != update.stage):
                self.stages.reached(update.stage)
        return info

    def _take_sums(self, launch: Callable[[int], None]) -> None:
        """Launch what forms sums and what follows from them: at once, or with other processes' sums in between."""
        if self.whole is None:
            launch(0)
        else:
            self.whole.combine(lambda: launch(layout.SUM))
            launch(layout.DECIDE)

    def _ratios(self, table: CudaTable, stream: Any, act: int) -> None:
        for sums in table.ratios if act == layout.DECIDE else table.sums:
            places = *table.places, self._numbers.numbers, table.partials, act, sums.mine
            sums.kernel(sums.blocks, places, stream)

    def _upload_gradients(self, table: CudaTable, stream: Any) -> None:
        table.gradients.send(self._gradients[table.first].view(np.uint8), stream, to_graphs=True)

    def _prologue(
        self, table: CudaTable, kernel: Any, request: Request, stream: Any, number: int, forms: bool, result: int
    ) -> None:
        """Launch the prologue of a rule; the first one decides."""
        sums = request.needs_norm and number == 0

        def launch(act: int) -> None:
            blocks = sums * (table.segment_count if act == layout.DECIDE else table.chunk_count)
            if act == layout.SUM and not blocks:
                return
            arguments = (
                *(*table.places, self._numbers.numbers, table.partials, self._numbers.words),
                *(table.segment_count, len(self.scalar_groups), act, blocks),
                *(number, request.multiplier, request.scale_at),
                math.inf if request.max_grad_norm is None else request.max_grad_norm,
                *(int(request.skip_nonfinite), int(forms), int(number == 0), result),
            )
            kernel(max(blocks, 1), arguments, stream)

        if sums:
            self._take_sums(launch)
        else:
            launch(0)
        self._numbers.written()

    def norm(self) -> float:
        if not self.parameters:
            return 0.0
        with self._device.selected():
            stream, table = self._device.stream(), self._table(norms=True)
            self._upload_gradients(table, stream)
            result = self._device.empty(2, np.dtype(np.float64), stream)
            kernel, request = load(self._device, "prologue", self._rules[0]), Request(max_grad_norm=math.inf)
            self._prologue(table, kernel, request, stream, 0, False, self._device.address(result))
            return float(self._device.download(result, stream)[0])

    def recount(self) -> None:
        if self._numbers.counts_on_device:
            with self._device.selected():
                self._numbers.advance(self._device.stream())

    def upload_options(self, options: Sequence[Options]) -> None:
        with self._device.selected():
            self._numbers.count(options, self._device.stream())

    def _new_info(self, request: Request, stream: Any, capturable: bool) -> tuple[StepInfo, int]:
        """What the step returns, and where the prologue writes the norm and whether the step is skipped."""
        if not request.needs_norm:
            return _STEPPED, 0
        if not self.parameters:  # nobody has a gradient
            return StepInfo(False, 0.0), 0
        # A graph writes to one place for ever; otherwise every step has its own, so that it can be read much later.
        if self.result is None or not capturable:
            self.result = self._device.empty(2, np.dtype(np.float64), stream)
        result, device = self.result, self._device

        def fetch() -> tuple[bool, float]:
            norm, skipped = device.download(result, stream).tolist()
            return bool(skipped), norm

        return StepInfo(fetch=fetch), self._device.address(result)
