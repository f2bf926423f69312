"""From parameters, gradients and their progress to the tables that a launch walks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._arrays import Array
from ._backend import SERIAL_BELOW, Backend, get_num_threads
from ._table import Table
from .kernels.layout import GRADIENT, KNOW_G, KNOW_W, MULTIPLIER, ZERO
from .kernels.rule import Options, Rule


@dataclass
class Progress:
    """How far some parameters have come: number of steps taken, and the rule's host scalars."""

    steps: int = 0
    carry: dict[str, float] | None = None


@dataclass(eq=False)
class Parameter:
    """One array, where its state lies, and how far it has come."""

    name: str
    array: Array
    size: int  # as it was checked: an array's shape and dtype can be changed in place
    dtype: str
    group: int
    offset: int  # first element in the state arrays
    extent: int  # elements up to the next array there, padding included
    address: int
    states: dict[str, Array] = field(default_factory=dict)  # the flat state arrays, shared with neighbours
    progress: Progress = field(default_factory=Progress)
    guard: Any = None  # a weak reference to the array, which makes NumPy refuse to resize it


class Treatment(NamedTuple):
    """What is done to a parameter: its rule, whether its layer's trust ratio counts, and options that are replaced."""

    rule: Rule
    adapts: bool
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclass
class Cohort:
    """Parameters that take the same scalars: same group, same treatment, equal progress."""

    group: int
    treatment: Treatment
    progress: Progress
    following: Progress
    scalars: NDArray[np.float64]

    def prepare(self, options: Options) -> None:
        """Form the scalars of the next step."""
        if self.treatment.overrides:
            options = {**options, **dict(self.treatment.overrides)}
        rule, t = self.treatment.rule, self.progress.steps + 1
        if rule.carry is None:
            self.scalars[:] = rule.scalars(t, options)
            self.following = Progress(t)
        else:
            carry = rule.carry(options)
            if self.progress.carry:
                carry = carry._replace(**self.progress.carry)
            self.scalars[:], carry = rule.scalars(t, options, carry)
            self.following = Progress(t, carry._asdict())

    def advance(self) -> None:
        """The step was taken."""
        self.progress.steps, self.progress.carry = self.following.steps, self.following.carry


class Plan:
    """The tables for one set of gradients: which parameters have one, of which dtypes, flat or not.

    A plan serves every step whose gradients are alike; where they moved, ``point_at`` writes their new addresses.

    Args:
        parameters: The parameters that have a gradient.
        dtypes: Storage dtype of each gradient.
        treatments: Treatment of each parameter.
        flat: Whether parameters and gradients are flat buffers of one layout, whose neighbours merge into one run.
        signs: -1 for each group that maximises, else 1.
        backend: Where kernels come from.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        dtypes: Sequence[np.dtype[Any]],
        treatments: Sequence[Treatment],
        flat: bool,
        signs: Sequence[float],
        backend: Backend,
    ) -> None:
        self.parameters = parameters
        self.dtypes = dtypes
        self.flat = flat
        self.backend = backend
        self.cohorts: list[Cohort] = []
        self._member = self._form_cohorts(treatments)
        self._has_ratio = any(c.treatment.adapts and c.treatment.rule.ratio is not None for c in self.cohorts)
        self._signs = signs
        self._runs = self._find_runs()
        self._gradients: NDArray[np.uint64] = np.zeros(len(parameters), np.uint64)
        self._layers: Table | None = None
        self._updates: Table | None = None
        self._know_weights = False

    def _form_cohorts(self, treatments: Sequence[Treatment]) -> list[int]:
        """Index of each parameter's cohort; members of a cohort share one progress from here on."""
        found: dict[tuple[Any, ...], int] = {}
        member = []
        for parameter, treatment in zip(self.parameters, treatments, strict=True):
            steps, carry = parameter.progress.steps, parameter.progress.carry
            key = (parameter.group, treatment, steps, tuple((carry or {}).items()))
            if key not in found:
                found[key] = len(self.cohorts)
                scalars = np.zeros(len(treatment.rule.Scalars._fields))  # type: ignore[attr-defined]
                progress = Progress(steps, carry)
                self.cohorts.append(Cohort(parameter.group, treatment, progress, progress, scalars))
            parameter.progress = self.cohorts[found[key]].progress
            member.append(found[key])
        return member

    def _find_runs(self) -> list[tuple[int, int]]:
        """First parameter and number of elements of each run that one segment can serve."""
        runs: list[tuple[int, int]] = []
        previous = None
        for k, p in enumerate(self.parameters):
            if (
                previous is not None
                and self.flat
                and self._member[k] == self._member[k - 1]
                and p.offset == previous.offset + previous.extent
                and not self._adapts(k)
                and all(p.states[name] is previous.states[name] for name in self._rule(k).state)
            ):
                first, _ = runs[-1]
                runs[-1] = first, p.offset - self.parameters[first].offset + p.size
            else:
                runs.append((k, p.size))
            previous = p
        return runs

    def _rule(self, k: int) -> Rule:
        return self.cohorts[self._member[k]].treatment.rule

    def _adapts(self, k: int) -> bool:
        return self.cohorts[self._member[k]].treatment.adapts and self._rule(k).ratio is not None

    @property
    def layers(self) -> Table:
        """One segment per parameter: what norms are taken over."""
        if self._layers is None:
            self._layers = self._build([(k, p.size) for k, p in enumerate(self.parameters)], norms=True)
        return self._layers

    @property
    def updates(self) -> Table:
        """One segment per run."""
        if self._updates is None:
            self._updates = self.layers if self._has_ratio else self._build(self._runs, norms=False)
        return self._updates

    def _build(self, runs: list[tuple[int, int]], *, norms: bool) -> Table:
        table = Table([size for _, size in runs])
        # Addresses cost microseconds each to find, so each is asked for once per kind of segment.
        kernels: dict[tuple[Any, ...], tuple[int, tuple[int, int], int]] = {}
        states: dict[int, int] = {}
        for segment, (k, _) in zip(table.segments, runs, strict=True):
            p, cohort = self.parameters[k], self.cohorts[self._member[k]]
            rule = cohort.treatment.rule
            kind = (rule, p.dtype, self.dtypes[k], self._adapts(k))
            if kind not in kernels:
                stored = p.dtype, self.dtypes[k].name
                kernels[kind] = (
                    self.backend.update_kernel(rule, *stored),
                    (self.backend.norm_kernel(stored[0]), self.backend.norm_kernel(stored[1])) if norms else (0, 0),
                    self.backend.ratio_kernel(rule) if self._adapts(k) else 0,
                )
            segment["update"], segment["norm"], segment["ratio"] = kernels[kind]
            segment["scalars"] = cohort.scalars.ctypes.data
            arrays = [p.address, 0]
            for name in rule.state:
                flat = p.states[name]
                if id(flat) not in states:
                    states[id(flat)] = flat.ctypes.data
                arrays.append(states[id(flat)] + p.offset * flat.itemsize)
            segment["arrays"][: len(arrays)] = arrays
        table.first = np.array([k for k, _ in runs], np.int64)
        table.signs = np.array([self._signs[self.parameters[k].group] for k, _ in runs])
        table.arrays[:, GRADIENT] = self._gradients[table.first]
        return table

    def point_at(self, gradients: NDArray[np.uint64]) -> None:
        """Take the gradients from these addresses."""
        self._gradients = gradients
        for table in (self._layers, self._updates):
            if table is not None:
                table.arrays[:, GRADIENT] = gradients[table.first]

    def gradient_squares(self) -> float:
        """The prologue pass: sum of squares of all gradients as stored; not finite if one of them is not."""
        table = self.layers
        self.backend.squares(table, GRADIENT, _threads(table))
        return table.total_squares(GRADIENT)

    def launch(
        self, options: Sequence[Options], multiplier: float, zero: bool, *, know_gradients: bool, keep_weights: bool
    ) -> None:
        """Take the step."""
        for cohort in self.cohorts:
            cohort.prepare(options[cohort.group])
        # A merged run updates padding too, which is zero times the multiplier: no longer zero if that is NaN.
        table = self.updates if math.isfinite(multiplier) else self.layers
        if (multiplier, zero) != table.launched_with:
            table.own[:, MULTIPLIER] = table.signs * multiplier
            table.own[:, ZERO] = zero
            table.launched_with = multiplier, zero
        flags = KNOW_G * know_gradients + KNOW_W * (keep_weights and self._know_weights)
        # Before the kernel, after which an interrupt would be raised: the count must not lag behind the parameters.
        self._know_weights = True
        for cohort in self.cohorts:
            cohort.advance()
        if self._has_ratio:
            self.backend.layers(table, flags, _threads(table))
        else:
            self.backend.update(table, _threads(table))

    def forget_weights(self) -> None:
        """Somebody else wrote the weights: their norms are taken anew."""
        self._know_weights = False


def _threads(table: Table) -> int:
    return min(get_num_threads(), max(table.count, 1)) if table.elements >= SERIAL_BELOW else 1


def initial_states(rule: Rule, options: Mapping[str, Any]) -> dict[str, float]:
    """What the state arrays of a rule hold before the first step."""
    return {name: float(options[rule.initial[name]]) if name in rule.initial else 0.0 for name in rule.state}
