"""The plan for arrays on a GPU: a launch for the whole model, and one before it where something must be known first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.dtypes import COMPUTE
from ...kernels.rules.rule import Options, Rule
from ..plan import Plan
from ..step import Request, StepInfo
from .device import CudaDevice, Function
from .kernels import kernels_of
from .table import NO_TASKS, CudaTable, DeviceScalars, DeviceStepCount, Launch, NormTasks, segment_words

_STEPPED = StepInfo()


class CudaPlan(Plan):
    """A plan whose step is put on a stream and not waited for.

    The host forms the scalars of a step and uploads them, as long as it knows the step counts. Where the device decides
    whether a step is taken (``skip_nonfinite``), or takes steps without the host (``capturable``), the counts move
    there, and the prologue forms the scalars.
    """

    kept = 8
    _device: CudaDevice

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._kernels = kernels_of(self._device)
        self._rules: list[Rule] = list(dict.fromkeys(c.choice.rule for c in self.scalar_groups))
        self._numbers = DeviceScalars(self._device, len(self.scalar_groups))
        self._step_count = DeviceStepCount(self._device, self.scalar_groups, self._rules)
        self._layers: CudaTable | None = None
        self._merged: CudaTable | None = None
        self._table(norms=self._has_ratio)  # a kernel that cannot be had is an error before anything is written

    def _table(self, *, norms: bool) -> CudaTable:
        """One segment per parameter where norms are taken, else one per run."""
        if norms or not self.flat:
            if self._layers is None:
                self._layers = self._build(self._every_parameter)
            return self._layers
        if self._merged is None:
            self._merged = self._build(self._runs)
        return self._merged

    def _build(self, runs: list[tuple[int, int]]) -> CudaTable:
        first = [k for k, _ in runs]
        stored = [(self.parameters[k].dtype, self.dtypes[k].name) for k in first]
        kernels = [
            (self._kernels.update(self._rule(k), p, g), COMPUTE[p] == "float64")
            for k, (p, g) in zip(first, stored, strict=True)
        ]
        terms = [
            self._kernels.terms(self._rule(k), p, g) if self._adapts(k) and self._rule(k).sources else None
            for k, (p, g) in zip(first, stored, strict=True)
        ]
        words = segment_words(
            self._addresses(runs),
            scalar_groups=[self._member[k] for k in first],
            signs=[self._signs[self.parameters[k].group] for k in first],
            adapts=[self._adapts(k) for k in first],
            stored=stored,
            epilogues=[self._epilogues(k) for k in first],
        )
        sizes = np.array([size for _, size in runs], np.int64)
        return CudaTable(self._device, sizes, words, np.array(first, np.int64), kernels, terms)

    def resume(self) -> bool:
        self._step_count.leave()  # other plans may have counted meanwhile
        return super().resume()

    def point_at(self, gradients: NDArray[np.uint64]) -> None:
        self._gradients = gradients

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
        counts_there = self._step_count.there or request.skip_nonfinite or capturable
        decides = counts_there or request.needs_norm or request.scale_at != 0
        norms = request.needs_norm or self._has_ratio
        table = self._table(norms=norms or not (self.flat and self._merges(request.multiplier, options)))
        prologues = self._prologues(table, request, decides=decides, forms=counts_there)
        info, result = self._new_info(request, stream, capturable)

        table.point_at(self._gradients, stream)
        if counts_there:
            self._step_count.bring(options, stream)
        else:
            self._numbers.bring(self.scalar_groups, options, request.multiplier, stream)
        if counts_there:  # by the prologue
            self._step_count.advance(stream)
        for number, kernel, tasks in prologues:
            what = int(request.skip_nonfinite), int(counts_there), int(decides and number == 0), result
            self._find_out(table, number, kernel, tasks, request, what, stream)
        for sums in table.sums:
            self._launch_sums(sums, table, stream)
        if decides:
            self._numbers.forget()
        # The line where a count and its step can fall apart: an interrupt among these launches leaves the count ahead.
        if not counts_there:
            counts = self._counts.numbers
            counts[: self._counts.half] = counts[self._counts.half :]
        for update in table.launches:
            scalars = self._numbers.scalars64 if update.wide else self._numbers.scalars32
            ratios = table.ratios64 if update.wide else table.ratios32
            places = update.chunks, table.segments, table.gradients, self._numbers.header, scalars, ratios
            update.kernel(update.blocks, (*places, int(request.zero_grads)), stream)
        return info

    def _launch_sums(self, sums: Launch, table: CudaTable, stream: Any) -> None:
        scalars = self._numbers.scalars64 if sums.wide else self._numbers.scalars32
        arguments = (
            *(table.chunks, table.segments, table.gradients, sums.chunks, table.chunk_count),
            *(table.partials, table.counters, self._numbers.header, scalars, self._numbers.scalars64),
            *(table.ratios64, table.ratios32),
        )
        sums.kernel(sums.blocks, arguments, stream)

    def _find_out(
        self,
        table: CudaTable,
        number: int,
        kernel: Function,
        tasks: NormTasks,
        request: Request,
        what: tuple[int, int, int, int],
        stream: Any,
    ) -> None:
        """Launch a prologue; ``what`` are its last arguments."""
        arguments = (
            *(table.chunks, table.segments, table.gradients, tasks.address, tasks.chunks, tasks.arrays),
            *(table.chunk_count, table.segment_count, len(self.scalar_groups)),
            *(table.partials, table.squares, table.counters),
            *(self._numbers.header, self._numbers.scalars64, self._numbers.scalars32),
            *(table.ratios64, table.ratios32, self._step_count.scalar_groups, self._step_count.options, number),
            *(request.multiplier, request.scale_at),
            math.inf if request.max_grad_norm is None else request.max_grad_norm,
            *what,
        )
        kernel(max(tasks.chunks, 1), arguments, stream)

    def norm(self) -> float:
        if not self.parameters:
            return 0.0
        with self._device.selected():
            stream, table = self._device.stream(), self._table(norms=True)
            table.point_at(self._gradients, stream)
            result = self._device.empty(2, np.dtype(np.float64), stream)
            kernel, what = self._kernels.prologue(self._rules[0]), (0, 0, 1, self._device.address(result))
            self._find_out(table, 0, kernel, table.norm_tasks, Request(), what, stream)
            self._numbers.forget()
            return float(self._device.download(result, stream)[0])

    def recount(self) -> None:
        if self._step_count.there:
            with self._device.selected():
                self._step_count.advance(self._device.stream())

    def upload_options(self, options: Sequence[Options]) -> None:
        with self._device.selected():
            self._step_count.bring(options, self._device.stream())

    def _prologues(
        self, table: CudaTable, request: Request, *, decides: bool, forms: bool
    ) -> list[tuple[int, Function, NormTasks]]:
        """What is launched before the update: number of the rule, kernel, chunks whose squares it sums."""
        of_squares = [rule.ratio is not None and not rule.sources for rule in self._rules]
        if not decides and not (self._has_ratio and any(of_squares)):
            return []
        tasks = table.norm_tasks if request.needs_norm else table.ratio_tasks
        wanted = [k for k in range(len(self._rules)) if k == 0 or forms or of_squares[k]]
        return [(k, self._kernels.prologue(self._rules[k]), tasks if k == 0 else NO_TASKS) for k in wanted]

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
