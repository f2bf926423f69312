"""What a step does to which parameters: groups that share scalars, and runs of memory that one segment serves."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..kernels.dtypes import COMPUTE, ITEMSIZE
from ..kernels.epilogues import AVERAGE, EMA, EMA_STEP, ROUND, average_weight
from ..kernels.layout import SCALARS, WEIGHT
from ..kernels.rules.rule import Options, Rule
from .device import Array, Device
from .options import RuleChoice
from .padding import keeps_zeros
from .step import Request, StepInfo
from .table import ROW, Counts, Stages

MAX_STEP = 2**53  # so far float64 counts
Combine = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64] | None]


class StepCount:
    """How far some parameters have come: number of steps taken, and the numbers that the rule carries.

    A plan counts in a row of its ``Counts``. Where a GPU counts the steps, ``fetch`` asks it, once, when somebody wants
    to know.
    """

    __slots__ = ("_at", "_carry", "_counts", "_names", "_steps", "fetch")

    def __init__(
        self, steps: int = 0, carry: dict[str, float] | None = None, counts: Counts | None = None, row: int = 0
    ) -> None:
        self._counts, self._at = counts, ROW * row
        self._names: tuple[str, ...] = ()
        self.fetch: Callable[[], tuple[int, dict[str, float] | None]] | None
        self.start(steps, carry)

    def start(self, steps: int, carry: dict[str, float] | None) -> None:
        """Count from here on."""
        self.fetch = None
        self._steps, self._carry = steps, carry
        if self._counts is not None:
            self._counts.numbers[self._at] = steps

    def follow(self, steps: int, carry: Mapping[str, float]) -> None:
        """What will be known once the counts are committed."""
        if self._counts is None or len(carry) >= ROW:
            raise ValueError(f"fastopt: a rule can carry at most {ROW - 1} numbers, got {', '.join(carry)}.")
        numbers, at = self._counts.numbers, self._at + self._counts.half
        numbers[at] = steps
        if carry:
            self._names = tuple(carry)
            numbers[at + 1 : at + 1 + len(carry)] = array("d", carry.values())

    def _settle(self) -> None:
        if self.fetch is not None:
            assert self._counts is not None
            steps, carry = self.fetch()
            if carry is not None:  # None before the first step: the rule's start, or what was loaded
                self._names = tuple(carry)
                self._counts.numbers[self._at + 1 : self._at + 1 + len(carry)] = array("d", carry.values())
            self._counts.numbers[self._at] = steps
            self.fetch = None

    @property
    def steps(self) -> int:
        """Steps taken."""
        if self.fetch is not None:
            self._settle()
        return self._steps if self._counts is None else int(self._counts.numbers[self._at])

    @property
    def carry(self) -> dict[str, float] | None:
        """What the rule carries; None for nothing, and before the first step."""
        if self.steps == self._steps or self._counts is None:
            return self._carry
        return dict(zip(self._names, self._counts.numbers[self._at + 1 : self._at + ROW], strict=False)) or None


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
    step_count: StepCount = field(default_factory=StepCount)
    copy: Copy | None = None
    shape: tuple[int, ...] = ()
    guard: Any = None  # a weak reference to the array, which makes NumPy refuse to resize it
    elsewhere: Mapping[str, int] = field(default_factory=dict)  # addresses of states that lie in no flat array

    @property
    def views(self) -> dict[str, Array]:
        """The states in the shape of the array."""
        mine = slice(self.offset, self.offset + self.size)
        return {name: flat[mine].reshape(self.array.shape) for name, flat in self.states.items()}


@dataclass
class ScalarGroup:
    """Parameters that take the same scalars: same group, same choice, equal step counts."""

    group: int
    choice: RuleChoice
    step_count: StepCount
    numbers: NDArray[np.float64]  # a row of the table of scalars
    scalars: NDArray[np.float64]  # the rule's, of it
    _tried: tuple[Options | None, bool] = None, True  # options, and whether zeros stay zeros with them

    def complete(self, options: Options) -> Options:
        """The group's options as they hold for this scalar group."""
        return {**options, **dict(self.choice.overrides)} if self.choice.overrides else options

    def prepare(self, options: Options) -> None:
        """Form the scalars of the next step, and what will be known after it."""
        options = self.complete(options)
        rule, t = self.choice.rule, self.step_count.steps + 1
        if t > MAX_STEP:
            raise OverflowError(f"fastopt: parameters of group {self.group} have taken 2^53 steps, so far steps count.")
        carry: dict[str, float] = {}
        if rule.carry is None:
            self.scalars[:] = rule.scalars(t, options)
        else:
            self.scalars[:], carried = rule.scalars(t, options, self.carried(options))
            carry = carried._asdict()
        if self.choice.averages:
            n = self.averaged
            self.numbers[WEIGHT] = average_weight(n, options["ema_decay"], options.get("ema_warmup", False))
            carry[EMA_STEP] = n + 1.0
        self.step_count.follow(t, carry)

    @property
    def averaged(self) -> float:
        """How often the parameters were averaged."""
        return (self.step_count.carry or {}).get(EMA_STEP, 0.0)

    def carried(self, options: Options) -> Any:
        """What the rule carries into the next step, in its NamedTuple."""
        assert self.choice.rule.carry is not None
        start, known = self.choice.rule.carry(options), self.step_count.carry or {}
        return start._replace(**{name: known[name] for name in start._fields if name in known})

    def keeps_zeros(self, options: Options) -> bool:
        """Whether padding of zeros stays zero with these options of the group, which are another dict once changed."""
        if self._tried[0] is not options:
            self._tried = options, keeps_zeros(self.choice.rule, self.complete(options))
        return self._tried[1]


class Plan(ABC):
    """What is done for one set of gradients: which parameters have one, of which dtypes, flat or not.

    A plan serves every step whose gradients are alike; where they moved, ``point_at`` takes their new addresses. A
    subclass knows where the arrays are: it builds the tables and walks them.

    Args:
        parameters: The parameters that have a gradient.
        dtypes: Storage dtype of each gradient.
        choices: What is done to each parameter.
        flat: Whether parameters and gradients are flat buffers of one layout, whose neighbours merge into one run.
        signs: -1 for each group that maximises, else 1.
        device: Where all of it lives.
    """

    kept = 8  # how many plans an optimizer keeps, so that patterns of gradients may alternate

    combine: Combine | None = None
    """Changes sums over parameters, one row each, before a norm is formed of them: adds those of other processes,
    perhaps by those of chunks, which it is given, too. Returns the rows of all that have a gradient on any process."""

    combine_ratios: Combine | None = None
    """The same before ratios are formed. Then all sums are taken before the first update, else wave after wave."""

    ratios_wait = True  # whether their sums depend on clipping; else they are combined with those of the norm
    stages: Stages | None = None

    result: Any = None
    """On a GPU: the norm of the last step that needed one, and whether that step is skipped."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        dtypes: Sequence[np.dtype[Any]],
        choices: Sequence[RuleChoice],
        flat: bool,
        signs: Sequence[float],
        device: Device,
    ) -> None:
        self.parameters = parameters
        self.dtypes = dtypes
        self.flat = flat
        self.scalar_groups, self._member, self._counts = self._form_scalar_groups(choices)
        self._has_ratio = any(c.choice.adapts and c.choice.rule.ratio is not None for c in self.scalar_groups)
        self._signs = signs
        self._device = device
        self._bases: dict[int, int] = {}  # addresses of flat state arrays, which the parameters keep alive
        self._runs = self._find_runs()
        self._tables: dict[bool, Any] = {}
        self._gradients: NDArray[np.uint64] = np.zeros(len(parameters), np.uint64)
        self._adopt()

    def _form_scalar_groups(self, choices: Sequence[RuleChoice]) -> tuple[list[ScalarGroup], list[int], Counts]:
        """The scalar groups, and the index of each parameter's."""
        places: dict[tuple[Any, ...], int] = {}
        member = []
        for p, choice in zip(self.parameters, choices, strict=True):
            key = (p.group, choice, p.step_count.steps, tuple((p.step_count.carry or {}).items()))
            member.append(places.setdefault(key, len(places)))
        counts = Counts(len(places))
        scalar_groups = []
        for (group, choice, steps, carry), row in places.items():
            step_count, numbers = StepCount(steps, dict(carry) or None, counts, row), np.zeros(SCALARS)
            scalars = numbers[: len(choice.rule.Scalars._fields)]
            scalar_groups.append(ScalarGroup(group, choice, step_count, numbers, scalars))
        return scalar_groups, member, counts

    def _adopt(self) -> None:
        """Members of a scalar group share one step count from here on, which is that of each of them."""
        for p, c in zip(self.parameters, self._member, strict=True):
            p.step_count = self.scalar_groups[c].step_count

    def resume(self) -> bool:
        """Serve again, after other plans did; False where members of a scalar group have other counts now."""
        reached: dict[int, StepCount] = {}
        # A set: most members of a scalar group share one step count.
        for c, step_count in set(zip(self._member, [p.step_count for p in self.parameters], strict=True)):
            first = reached.setdefault(c, step_count)
            if step_count is not first and (step_count.steps, step_count.carry) != (first.steps, first.carry):
                return False
        for c, step_count in reached.items():
            self.scalar_groups[c].step_count.start(step_count.steps, step_count.carry)
        self._adopt()
        self.forget_weights()
        return True

    def _find_runs(self) -> list[tuple[int, int]]:
        """First parameter and number of elements of each run that one segment can serve."""
        runs: list[tuple[int, int]] = []
        last, previous = 0, None
        for k, p in enumerate(self.parameters):
            if previous is not None and self.flat and not p.size:
                continue  # an empty array may lie anywhere, also behind memory of somebody else
            if (
                previous is not None
                and self.flat
                and self._member[k] == self._member[last]
                and p.offset == previous.offset + previous.extent
                and not self._adapts(k)
                and not (p.elsewhere or previous.elsewhere)
                and all(p.states[name] is previous.states[name] for name in self._choice(k).state)
                and self._copy_follows(k, runs[-1][0])
            ):
                first, _ = runs[-1]
                runs[-1] = first, p.offset - self.parameters[first].offset + p.size
            else:
                runs.append((k, p.size))
            last, previous = k, p
        return runs

    def _merges(self, multiplier: float, options: Sequence[Options]) -> bool:
        """Whether runs may be taken whole, the padding between arrays included, which must stay zero."""
        # The gradient there is zero times the multiplier: no longer zero if that is NaN.
        if not math.isfinite(multiplier):
            return False
        for scalar_group in self.scalar_groups:  # noqa: SIM110 - a generator takes longer
            if not scalar_group.keeps_zeros(options[scalar_group.group]):
                return False
        return True

    def _copy_follows(self, k: int, first: int) -> bool:
        """Whether a parameter's copy lies as far behind that of the first in its run as the parameter itself."""
        p, before = self.parameters[k], self.parameters[first]
        if p.copy is None or before.copy is None:
            return p.copy is before.copy
        distance = (p.offset - before.offset) * ITEMSIZE[p.copy.dtype]
        # An empty array may be said to lie anywhere.
        return p.copy.dtype == before.copy.dtype and (not p.size or p.copy.address == before.copy.address + distance)

    def _choice(self, k: int) -> RuleChoice:
        return self.scalar_groups[self._member[k]].choice

    def _rule(self, k: int) -> Rule:
        return self._choice(k).rule

    def _adapts(self, k: int) -> bool:
        return self._choice(k).adapts and self._rule(k).ratio is not None

    def _epilogues(self, k: int) -> list[tuple[Rule, str, int]]:
        """Epilogues of a run that begins with this parameter, each with the dtype and the address of its target."""
        p = self.parameters[k]
        found = [] if p.copy is None else [(ROUND, p.copy.dtype, p.copy.address)]
        return [*found, (AVERAGE, COMPUTE[p.dtype], self._place(p, EMA))] if self._choice(k).averages else found

    def _place(self, p: Parameter, name: str) -> int:
        """Where a state of a parameter begins."""
        if name in p.elsewhere:
            return p.elsewhere[name]
        flat = p.states[name]
        if id(flat) not in self._bases:  # an address costs microseconds to find, so each is asked for once
            self._bases[id(flat)] = self._device.address(flat)
        return self._bases[id(flat)] + p.offset * flat.itemsize

    def _addresses(self, runs: list[tuple[int, int]]) -> list[list[int]]:
        """For each run where its parameter, gradient and states begin; the gradient's place is left 0."""
        mine = ((k, self.parameters[k]) for k, _ in runs)
        return [[p.address, 0, *(self._place(p, name) for name in self._rule(k).state)] for k, p in mine]

    def _table(self, *, norms: bool) -> Any:
        """The table with a segment for each run, or, where norms or ratios are taken, for each parameter."""
        norms = norms or self._has_ratio or self.combine_ratios is not None
        if norms not in self._tables:
            every_parameter = [(k, p.size) for k, p in enumerate(self.parameters)]
            self._tables[norms] = self._build(every_parameter if norms else self._runs, norms)
        return self._tables[norms]

    @abstractmethod
    def _build(self, runs: list[tuple[int, int]], norms: bool) -> Any:
        """A table with a segment for each run."""

    def point_at(self, gradients: NDArray[np.uint64]) -> None:
        """Take the gradients from these addresses."""
        self._gradients = gradients

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


class Serves(Protocol):
    """A plan, or what a front end keeps with one."""

    @property
    def kept(self) -> int:
        """How many may be kept."""

    def resume(self) -> bool:
        """Serve again, after others did; False where it cannot."""


S = TypeVar("S", bound=Serves)


class Plans(Generic[S]):
    """A few plans, each for one pattern of gradients: the least recently used goes."""

    def __init__(self) -> None:
        self._used: list[S] = []  # the last one last

    def find(self, fits: Callable[[S], bool]) -> S | None:
        """The plan used last of those that fit."""
        return next((plan for plan in reversed(self._used) if fits(plan)), None)

    def resume(self, plan: S) -> bool:
        """Have a plan serve again; where it cannot, it goes."""
        self._used.remove(plan)
        return plan.resume() and self.keep(plan) is plan

    def keep(self, plan: S) -> S:
        """Remember the plan that serves now."""
        self._used.append(plan)
        del self._used[: -plan.kept]
        return plan

    def __iter__(self) -> Iterator[S]:
        return iter(self._used)
