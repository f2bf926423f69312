"""What a step does to which parameters: cohorts that share scalars, and runs of memory that one segment serves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._arrays import Array, Space
from ._step import Request, StepInfo
from .kernels.dtypes import ITEMSIZE
from .kernels.rule import Options, Rule


class Progress:
    """How far some parameters have come: number of steps taken, and the numbers that the rule carries.

    Where a GPU counts the steps, ``fetch`` asks it, once, when somebody wants to know.
    """

    __slots__ = ("_carry", "_steps", "fetch")

    def __init__(self, steps: int = 0, carry: dict[str, float] | None = None) -> None:
        self._steps, self._carry = steps, carry
        self.fetch: Callable[[], tuple[int, dict[str, float] | None]] | None = None

    def _settle(self) -> None:
        if self.fetch is not None:
            self._steps, carry = self.fetch()
            if carry is not None:  # None before the first step: the rule's start, or what was loaded
                self._carry = carry
            self.fetch = None

    @property
    def steps(self) -> int:
        """Steps taken."""
        self._settle()
        return self._steps

    @property
    def carry(self) -> dict[str, float] | None:
        """What the rule carries."""
        self._settle()
        return self._carry

    def advance_to(self, following: Progress) -> None:
        """The step was taken."""
        self._steps, self._carry = following._steps, following._carry


class Copy(NamedTuple):
    """A 16-bit array that holds the rounding of a float32 parameter after each step."""

    dtype: str
    address: int


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
    copy: Copy | None = None
    guard: Any = None  # a weak reference to the array, which makes NumPy refuse to resize it
    elsewhere: dict[str, int] = field(default_factory=dict)  # addresses of states that lie in no flat array


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

    def complete(self, options: Options) -> Options:
        """The group's options as they hold for this cohort."""
        return {**options, **dict(self.treatment.overrides)} if self.treatment.overrides else options

    def prepare(self, options: Options) -> None:
        """Form the scalars of the next step."""
        options = self.complete(options)
        rule, t = self.treatment.rule, self.progress.steps + 1
        if rule.carry is None:
            self.scalars[:] = rule.scalars(t, options)
            self.following = Progress(t)
        else:
            self.scalars[:], carry = rule.scalars(t, options, self.carried(options))
            self.following = Progress(t, carry._asdict())

    def carried(self, options: Options) -> Any:
        """What the rule carries into the next step, in its NamedTuple."""
        assert self.treatment.rule.carry is not None
        return self.treatment.rule.carry(options)._replace(**self.progress.carry or {})

    def advance(self) -> None:
        """The step was taken."""
        self.progress.advance_to(self.following)


class Plan(ABC):
    """What is done for one set of gradients: which parameters have one, of which dtypes, flat or not.

    A plan serves every step whose gradients are alike; where they moved, ``point_at`` takes their new addresses. A
    subclass knows where the arrays are: it builds the tables and walks them.

    Args:
        parameters: The parameters that have a gradient.
        dtypes: Storage dtype of each gradient.
        treatments: Treatment of each parameter.
        flat: Whether parameters and gradients are flat buffers of one layout, whose neighbours merge into one run.
        signs: -1 for each group that maximises, else 1.
        space: Where all of it lives.
    """

    result: Any = None
    """On a GPU: the norm of the last step that needed one, and whether that step is skipped."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        dtypes: Sequence[np.dtype[Any]],
        treatments: Sequence[Treatment],
        flat: bool,
        signs: Sequence[float],
        space: Space,
    ) -> None:
        self.parameters = parameters
        self.dtypes = dtypes
        self.flat = flat
        self.cohorts: list[Cohort] = []
        self._member = self._form_cohorts(treatments)
        self._has_ratio = any(c.treatment.adapts and c.treatment.rule.ratio is not None for c in self.cohorts)
        self._signs = signs
        self._space = space
        self._runs = self._find_runs()
        self._gradients: NDArray[np.uint64] = np.zeros(len(parameters), np.uint64)

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
                and not (p.elsewhere or previous.elsewhere)
                and all(p.states[name] is previous.states[name] for name in self._rule(k).state)
                and self._copy_follows(k, runs[-1][0])
            ):
                first, _ = runs[-1]
                runs[-1] = first, p.offset - self.parameters[first].offset + p.size
            else:
                runs.append((k, p.size))
            previous = p
        return runs

    def _copy_follows(self, k: int, first: int) -> bool:
        """Whether a parameter's copy lies as far behind that of the first in its run as the parameter itself."""
        p, before = self.parameters[k], self.parameters[first]
        if p.copy is None or before.copy is None:
            return p.copy is before.copy
        distance = (p.offset - before.offset) * ITEMSIZE[p.copy.dtype]
        # An empty array may be said to lie anywhere.
        return p.copy.dtype == before.copy.dtype and (not p.size or p.copy.address == before.copy.address + distance)

    def _rule(self, k: int) -> Rule:
        return self.cohorts[self._member[k]].treatment.rule

    def _adapts(self, k: int) -> bool:
        return self.cohorts[self._member[k]].treatment.adapts and self._rule(k).ratio is not None

    def _addresses(self, runs: list[tuple[int, int]]) -> list[list[int]]:
        """For each run where its parameter, gradient and states begin; the gradient's place is left 0."""
        states: dict[int, int] = {}  # an address costs microseconds to find, so each is asked for once
        found = []
        for k, _ in runs:
            p = self.parameters[k]
            arrays = [p.address, 0]
            for name in self._rule(k).state:
                if name in p.elsewhere:
                    arrays.append(p.elsewhere[name])
                    continue
                flat = p.states[name]
                if id(flat) not in states:
                    states[id(flat)] = self._space.address(flat)
                arrays.append(states[id(flat)] + p.offset * flat.itemsize)
            found.append(arrays)
        return found

    @property
    def _every_parameter(self) -> list[tuple[int, int]]:
        """Runs of one parameter each: what norms are taken over."""
        return [(k, p.size) for k, p in enumerate(self.parameters)]

    @abstractmethod
    def point_at(self, gradients: NDArray[np.uint64]) -> None:
        """Take the gradients from these addresses."""

    @abstractmethod
    def step(self, request: Request, options: Sequence[Options]) -> StepInfo:
        """Take a step with the options of each group."""

    @abstractmethod
    def norm(self) -> float:
        """Euclidean norm of the gradients as they are; waits for a GPU."""

    def recount(self) -> None:  # noqa: B027 - only for what a device keeps
        """Steps may have been taken without the host: have the counts fetched when somebody wants to know."""

    def upload_options(self, options: Sequence[Options]) -> None:  # noqa: B027 - only for what a device keeps
        """Bring options to where captured steps find them."""

    def forget_weights(self) -> None:  # noqa: B027 - only plans that keep norms have something to forget
        """Somebody else wrote the weights: norms of them that were kept are no longer true."""


def initial_states(rule: Rule, options: Mapping[str, Any]) -> dict[str, float]:
    """What the state arrays of a rule hold before the first step."""
    return {name: float(options[rule.initial[name]]) if name in rule.initial else 0.0 for name in rule.state}
