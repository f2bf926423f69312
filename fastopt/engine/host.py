"""The plan for arrays in host memory: tables of addresses that the compiled library walks."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.layout import (
    DECIDE,
    GRADIENT,
    KEEP_W,
    KNOW_G,
    KNOW_W,
    MULTIPLIER,
    NORM,
    SUM,
    UPDATE,
    WAVES,
    WEIGHT,
    WORD,
)
from ..kernels.rules.rule import Options, Rule
from .backend import SERIAL_BELOW, current, get_num_threads
from .device import Device
from .exclusive import makes_many
from .plan import Plan
from .step import Request, StepInfo
from .table import Table, add_up

_STEPPED = StepInfo()
NO_SUMS: NDArray[np.float64] = np.empty((0, 0))
NAMES = ("update", "squares", "ratio", "terms", "scalars")


class HostPlan(Plan):
    """A plan whose kernels come from the backend of this process."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.backend = current()
        self._know_weights = False

    @makes_many
    def _build(self, runs: list[tuple[int, int]], norms: bool) -> Table:
        table = Table([size for _, size in runs], self._counts)
        kernels: dict[tuple[Any, ...], tuple[int, tuple[int, int], int, int]] = {}  # by kind of segment
        scalars = [scalar_group.numbers.ctypes.data for scalar_group in self.scalar_groups]
        first, at = [k for k, _ in runs], WORD * WEIGHT
        columns, kernel = [], self.backend.kernel
        for k in first:
            p, scalar_group = self.parameters[k], self.scalar_groups[self._member[k]]
            rule = scalar_group.choice.rule
            kind = (rule, p.dtype, self.dtypes[k], self._adapts(k))
            if kind not in kernels:
                stored = p.dtype, self.dtypes[k].name
                kernels[kind] = (
                    kernel("update", rule, *stored),
                    (kernel("squares", stored[0]), kernel("squares", stored[1])) if norms else (0, 0),
                    kernel("ratio", rule) if self._adapts(k) else 0,
                    kernel("terms", rule, *stored) if self._adapts(k) and rule.sources else 0,
                )
            columns.append((*kernels[kind], scalars[self._member[k]]))
        for name, column in zip(NAMES, zip(*columns, strict=True), strict=False):
            table.segments[name] = column
        for place, column in enumerate(zip_longest(*map(self._epilogues, first))):
            table.segments["epilogues"][:, place] = [
                self._epilogue(k, e, scalars[self._member[k]] + at) if e else (0, 0, (0, 0))
                for k, e in zip(first, column, strict=True)
            ]
        for place, addresses in enumerate(zip_longest(*self._addresses(runs), fillvalue=0)):
            table.arrays[:, place] = np.array(addresses, np.uint64)
        table.first = np.array(first, np.int64)
        table.signs = np.array([self._signs[self.parameters[k].group] for k in first])
        table.itemsizes = np.array([self.dtypes[k].itemsize for k in first])
        table.arrays[:, GRADIENT] = self._gradients[table.first]
        return table

    def _epilogue(self, k: int, epilogue: tuple[Rule, str, int], scalars: int) -> tuple[Any, ...]:
        p, (rule, dtype, target) = self.parameters[k], epilogue
        return self.backend.kernel("update", rule, dtype, p.dtype), scalars, (target, p.address)

    def point_at(self, gradients: NDArray[np.uint64]) -> None:
        super().point_at(gradients)
        for table in self._tables.values():
            table.arrays[:, GRADIENT] = gradients[table.first]

    def step(self, request: Request, options: Sequence[Options]) -> StepInfo:
        if not request.needs_norm:
            self._launch(request, request.multiplier, options)
            return _STEPPED
        sums = None
        if self.combine_ratios is None or (self.ratios_wait and request.clips):
            norm = self.norm() * request.multiplier
        else:
            self._prepare(request, request.multiplier, options)
            squares, sums = self._squares(ratios=True)
            norm = math.sqrt(squares) * request.multiplier
        if request.skip_nonfinite and not math.isfinite(norm):
            if request.zero_grads:
                self._zero_gradients()
            return StepInfo(True, norm)
        self._launch(request, request.clipped(norm), options, sums)
        return StepInfo(False, norm)

    def norm(self) -> float:
        return math.sqrt(self._squares(ratios=False)[0])

    def _squares(self, *, ratios: bool) -> tuple[float, NDArray[np.float64]]:
        """The squares of all gradients; with the sums that ratios need, over all processes, if they are asked for."""
        table: Table = self._table(norms=True)
        self.backend.run(table.record_at, NORM, GRADIENT, _threads(table))
        if self.combine is None:
            return float(table.total), NO_SUMS
        squares, partials = table.segments["sums"][:, [GRADIENT]], table.partials[:, [GRADIENT]]  # copies
        if ratios:
            self.backend.run(table.record_at, SUM, KNOW_G, _threads(table))
            squares = np.hstack([squares, table.segments["sums"]])
            partials = np.hstack([partials, table.partials])
        rows = self.combine(squares, partials)
        rows = squares if rows is None else rows
        return float(add_up(rows[:, :1], np.array([len(rows)]))[0, 0]), squares[:, 1:]

    def _zero_gradients(self) -> None:
        for p, dtype, start in zip(self.parameters, self.dtypes, self._gradients.tolist(), strict=True):
            ctypes.memset(start, 0, p.size * dtype.itemsize)

    def _prepare(self, request: Request, multiplier: float, options: Sequence[Options]) -> Table:
        """The table with all that kernels are given."""
        for scalar_group in self.scalar_groups:
            scalar_group.prepare(options[scalar_group.group])
        table: Table = self._table(norms=self.flat and not self._merges(multiplier, options))
        if (multiplier, request.zero_grads) != table.launched_with:
            table.launched_with = None  # if an interrupt comes between the columns
            table.own[:, MULTIPLIER] = table.signs * multiplier
            table.segments["zeroed"] = table.itemsizes * request.zero_grads
            table.launched_with = multiplier, request.zero_grads
        return table

    def _launch(
        self,
        request: Request,
        multiplier: float,
        options: Sequence[Options],
        sums: NDArray[np.float64] | None = None,
    ) -> None:
        """Update; with the sums that ratios need over all processes, if they are known."""
        table = self._prepare(request, multiplier, options)
        known = KNOW_G * request.needs_norm + KNOW_W * (request.keep_weights and self._know_weights)
        self._know_weights = False
        if self._has_ratio and self.combine_ratios is None:
            self.backend.run(table.record_at, WAVES, known | KEEP_W * request.keep_weights, _threads(table))
            self._know_weights = request.keep_weights
            return
        if self.combine_ratios is not None:  # also where no parameter with a ratio has a gradient: others wait
            if sums is None:
                self.backend.run(table.record_at, SUM, known, _threads(table))
                sums = table.segments["sums"].copy()
                self.combine_ratios(sums, table.partials)
            own = table.segments["sums"].copy()
            table.segments["sums"] = sums
            self.backend.run(table.record_at, DECIDE, 0, 1)
            table.segments["sums"] = own  # of parts without elements nobody writes the sums again
        if self.stages is None:
            self.backend.run(table.record_at, UPDATE, 0, _threads(table))
            return
        for stage, record in table.stages(self.stages.of):
            self.backend.run(record.ctypes.data, UPDATE, 0, _threads(table))
            self.stages.reached(stage)

    def forget_weights(self) -> None:
        self._know_weights = False


def _threads(table: Table) -> int:
    return min(get_num_threads(), max(table.count, 1)) if table.elements >= SERIAL_BELOW else 1


def plan_class(device: Device) -> type[Plan]:
    """The class of plans for arrays that live in ``device``; refuses where no kernel can be had."""
    device.require()
    if not device.on_gpu:
        current().require()
        return HostPlan
    from .cuda.plan import CudaPlan

    return CudaPlan
