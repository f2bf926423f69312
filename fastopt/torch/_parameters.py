"""The parameters of one device, and the memory of their states: what the user sees in ``state``, or what is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.options import RuleChoice, choice
from ..engine.plan import Copy, Parameter, StepCount
from ..kernels.dtypes import COMPUTE, ITEMSIZE
from ..kernels.epilogues import EMA, EMA_STEP
from ..kernels.rules.rule import Options, Rule
from . import _devices
from ._devices import TorchDevice
from ._flat import FlatGroups
from ._master import MASTER
from ._shards import Shards
from ._state import NOTHING, STEP, Arena, ParameterState, Slot, State, number
from ._tensors import (
    PLAIN,
    STORED,
    address_of,
    check_apart,
    gradient_memory,
    is_like,
    is_usual,
    layout_of,
    local,
    local_gradient,
    parameter_memory,
    real,
    state_address,
)

NUMBERS = (torch.float32, torch.float64, torch.int32, torch.int64)


class Kind(NamedTuple):
    """What kind of optimizer it is."""

    name: str  # for errors
    counts: bool  # whether ``state`` shows the step count
    master: bool  # whether 16-bit parameters have float32 ones that are stepped in their place
    flat: FlatGroups | None  # parameters and gradients that were moved into flat memory, group by group
    rules: Sequence[Rule]  # of each group
    slices: Any = None  # a ``sharded.Slices``, where the parameters are parts of others

    def has_master(self, memory: Tensor) -> bool:
        """Whether a parameter with this memory has a master."""
        return self.master and memory.dtype in (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class TensorParameter(Parameter):
    """A parameter that has had a gradient, with the tensors of its state."""

    beginning: Beginning = None  # type: ignore[assignment]
    arena: Arena = None  # type: ignore[assignment]
    index: int = 0  # in the arena
    layout: tuple[Any, ...] = ()
    fresh: bool = False  # whether ``state`` showed nothing, or what was made without a step
    pointer: int = 0  # where the parameter itself is
    tensors: Mapping[str, Tensor] = field(default_factory=dict)  # of its state, as far as somebody may know them
    addresses: tuple[int, ...] = ()  # where these were
    loose: Mapping[str, Tensor] = field(default_factory=dict)  # numbers that the user put there


class Beginning(NamedTuple):
    """What holds for new parameters of a group with as many dimensions, which have a master, or have none."""

    choice: RuleChoice
    values: dict[str, float]  # of all that ``state`` shows
    numbers: frozenset[str]  # names of those that are numbers
    step_count: StepCount


class Known(NamedTuple):
    """What there is of a parameter in ``state``."""

    tensors: dict[str, Tensor]
    loose: dict[str, Tensor]
    elsewhere: dict[str, int]
    fresh: bool


NEW = Known(NOTHING, NOTHING, NOTHING, True)  # type: ignore[arg-type]

Beginnings = dict[tuple[int, int, bool], Beginning]
"""By group, number of dimensions, and whether there is a master."""


class Parameters:
    """The parameters of one device, and the records of those that have had a gradient.

    A tensor in ``state`` is stepped where it is. What is missing gets memory when a parameter has its first gradient;
    tensors of this memory are made when somebody reads ``state`` after a step was taken.

    Args:
        groups: The param groups.
        state: The state, which they join with their first step.
        kind: What kind of optimizer it is.
        device: The device whose parameters these are; others are left alone.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, kind: Kind, device: TorchDevice) -> None:
        self.params: list[Tensor] = []
        self._groups: list[int] = []
        self._places: list[int] = []  # in its group
        for g, group in enumerate(groups):
            for place, p in enumerate(group["params"]):
                if _devices.device_of(p) is device:
                    self.params.append(p)
                    self._groups.append(g)
                    self._places.append(place)
        self.kind, self.device, self._state = kind, device, state
        self.shards = kind.slices or Shards(self.params)
        self.hidden: set[int] = set()  # indices of parameters that ``state`` does not show yet
        self._records: dict[int, TensorParameter] = {}
        self._layouts: dict[Any, Any] = {}  # one object for equal ones

    def __getitem__(self, i: int) -> TensorParameter:
        return self._records[i]

    def name(self, i: int) -> str:
        """How errors call a parameter."""
        return f"parameter {self._places[i]} of group {self._groups[i]}"

    def memories(self, present: Sequence[int]) -> list[Tensor]:
        """The real tensors that a step writes for parameters."""
        params = self.params
        return [params[i] if is_usual(params[i]) else parameter_memory(params[i], self.name(i)) for i in present]

    # --- gradients -----------------------------------------------------------------------------------------------

    def local(self, present: Sequence[int], grads: Sequence[Tensor]) -> list[Tensor]:
        """What this process holds of gradients, placed as their parameters are."""
        if {*map(type, grads)} <= PLAIN:
            return list(grads)
        return [local_gradient(g, self.params[i], self.name(i)) for i, g in zip(present, grads, strict=True)]

    def brought(self, present: Sequence[int], grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of this process as real tensors in their parameters' layouts, copied where they must be."""
        memories = []
        for i, gradient, memory in zip(present, grads, self.memories(present), strict=True):
            if not is_like(gradient, memory):
                has_master = self.kind.has_master(memory)
                gradient = gradient_memory(gradient, memory, has_master, self.kind.name, self.name(i))
            memories.append(gradient)
        return memories

    # --- states --------------------------------------------------------------------------------------------------

    def show_stepped(self) -> bool:
        """Let ``state`` show parameters that took their first step; whether there are some."""
        records = {i: self._records[i] for i in self.hidden & self._records.keys()} if self.hidden else {}
        steps = {p.step_count: p.step_count.steps for p in records.values()}  # a few: members of a group have one
        stepped = [i for i, p in records.items() if steps[p.step_count]]
        for i in stepped:
            self.show(i)
        return bool(stepped)

    def show(self, i: int) -> None:
        """Let ``state`` show a parameter."""
        p, shown, parameter = self._records[i], dict.get(self._state, self.params[i], {}), self.params[i]
        if p.beginning.values:
            made = {}
            for name in p.beginning.values:
                if name in p.tensors:
                    made[name] = p.tensors[name]
                elif name in p.beginning.numbers:
                    made[name] = p.arena.number(name, p.index)
                else:
                    made[name] = p.arena.state(name, p.index, parameter, p.layout)
            if type(shown) is not ParameterState or shown.watch is not self._state.watch:
                shown = ParameterState(self._state.watch, shown)
            dict.update(shown, made)
            shown.slot, shown.untouched = Slot(p.arena, p.index, p.layout), NOTHING
            p.tensors, p.addresses = made, tuple(map(address_of, made.values()))
            dict.__setitem__(self._state, parameter, shown)
        self.hidden.discard(i)

    def show_made(self, i: int) -> None:
        """Let ``state`` show a parameter that took no step yet."""
        p = self._records[i]
        self.show(i)
        if p.fresh and p.beginning.values and not p.step_count.steps:
            self._state.of(self.params[i]).remember()

    def admit(self, present: Sequence[int], options: Sequence[Options]) -> None:
        """Find or make the states of parameters."""
        new: dict[tuple[torch.dtype, int], tuple[list[int], list[Tensor], list[Any]]] = {}
        beginnings: Beginnings = {}
        nothing: dict[str, Any] = {}
        present = [i for i in present if i not in self._records]
        self.hidden.update(present)
        for i, memory in zip(present, self.memories(present), strict=True):
            state = dict.get(self._state, self.params[i], nothing)
            slot = state.slot if type(state) is ParameterState else None
            if (
                slot is not None
                and slot.layout == layout_of(memory)
                and slot.arena.device is self.device  # parameters may have moved
                and not slot.arena.misses(slot.row, state)
            ):
                self._records[i] = self._record(i, memory, state, slot, options, beginnings)
            else:
                group = 0 if self.kind.flat is None else self._groups[i]  # which was laid out by itself
                indices, memories, states = new.setdefault((memory.dtype, group), ([], [], []))
                indices.append(i)
                memories.append(memory)
                states.append(state)
        for indices, memories, states in new.values():
            arena = Arena(memories, self.device)
            for index, (i, memory, state) in enumerate(zip(indices, memories, states, strict=True)):
                layout = layout_of(memory)
                slot = Slot(arena, index, self._layouts.setdefault(layout, layout))
                self._records[i] = self._record(i, memory, state, slot, options, beginnings)

    def _record(
        self, i: int, memory: Tensor, state: Any, slot: Slot, options: Sequence[Options], beginnings: Beginnings
    ) -> TensorParameter:
        parameter, group = self.params[i], self._groups[i]
        arena, index, layout = slot
        has_master = self.kind.has_master(memory)
        alike = group, parameter.dim(), has_master
        if alike not in beginnings:
            beginnings[alike] = self._beginning(group, parameter.dim(), has_master, options[group])
        beginning = beginnings[alike]
        step_count, pointer, dtype = beginning.step_count, memory.data_ptr(), STORED[memory.dtype].name
        known = Known({}, {}, {}, True) if has_master else NEW
        if dict.__len__(state):
            step_count = step_count if _is_untouched(state) else self._step_count(i, beginning, state)
            known = self._known(i, memory, state, slot, beginning, step_count)
        else:
            for name, value in beginning.values.items():
                if value or name not in arena.names:
                    arena.begin(name, index, value, is_number=name in beginning.numbers)
        address, copy = pointer, None
        if has_master:
            if known.fresh or dict.get(state, MASTER) is None:
                if MASTER not in known.tensors:
                    known.tensors[MASTER] = arena.state(MASTER, index, parameter, layout)
                known.tensors[MASTER].copy_(parameter.detach())
            copy, address, dtype = Copy(dtype, pointer), address_of(known.tensors[MASTER]), COMPUTE[dtype]
        return TensorParameter(
            *(self.name(i), parameter, memory.numel(), dtype, group),  # type: ignore[arg-type]
            *(arena.offsets[index], arena.extents[index], address, arena.arrays, step_count),
            copy=copy,
            elsewhere=known.elsewhere,
            beginning=beginning,
            arena=arena,
            index=index,
            layout=layout,
            fresh=known.fresh,
            pointer=pointer,
            tensors=known.tensors,
            addresses=tuple(map(address_of, known.tensors.values())),
            loose=known.loose,
        )

    def _known(
        self, i: int, memory: Tensor, state: Any, slot: Slot, beginning: Beginning, step_count: StepCount
    ) -> Known:
        """What there is of a parameter in ``state``; what is missing there begins."""
        parameter, (arena, index, layout) = self.params[i], slot
        tensors: dict[str, Tensor] = {}
        loose: dict[str, Tensor] = {}
        elsewhere: dict[str, int] = {}
        fresh = _is_untouched(state)
        numbers = {STEP: float(step_count.steps), **(step_count.carry or {})}
        for name, first in beginning.values.items():
            value = dict.get(state, name)
            if name in beginning.numbers:
                if not isinstance(value, Tensor) or _was_made(state, slot, name, value):
                    arena.begin(name, index, numbers[name], is_number=True)
                    continue
                if address_of(value) != arena.place(name, index):
                    loose[name] = self._checked(i, name, value)
                first = numbers[name]
            elif value is None or (_was_made(state, slot, name, value) and value.shape == parameter.shape):
                arena.begin(name, index, first, is_number=False)
                if value is not None and not fresh:
                    tensors[name] = arena.state(name, index, parameter, layout).copy_(value)
                continue
            else:
                address = state_address(value, memory, f"{self.kind.name}: state {name!r} of {self.name(i)}")
                if name not in arena.arrays or (memory.numel() and address != arena.place(name, index)):
                    elsewhere[name] = address
            tensors[name] = value
            if fresh:  # it began with the options of then
                real(local(value, "a state")).fill_(first)
        if fresh:
            state.remember()
        return Known(tensors, loose, elsewhere, fresh)

    def _beginning(self, group: int, dim: int, has_master: bool, options: Options) -> Beginning:
        chosen = choice(self.kind.rules[group], options, dim)
        rule, averaged = chosen.rule, {EMA_STEP: 0.0} if chosen.averages else {}
        carried = {**(rule.carry(options)._asdict() if rule.carry is not None else {}), **averaged}
        numbers = {**({STEP: 0.0} if self.kind.counts else {}), **carried}
        values = {**numbers, **chosen.start(options), **({MASTER: 0.0} if has_master else {})}
        return Beginning(chosen, values, frozenset(numbers), StepCount(0, carried or None))

    def _step_count(self, i: int, beginning: Beginning, state: dict[str, Any]) -> StepCount:
        """How far the parameter has come, by what its state says."""
        chosen, carried = beginning.choice, dict(beginning.step_count.carry or {})
        rule = chosen.rule
        carried.pop(EMA_STEP, None)
        present = [name for name in (*rule.state, *carried) if dict.get(state, name) is not None]
        if self.kind.counts:
            steps = self._count(i, state, bool(present))
            missing = {*rule.state, *carried} - {*present, *rule.late} if steps else ()
            if missing:
                raise KeyError(self._hole(i, sorted(missing)[0], f"has taken {steps} steps"))
            carried.update((name, number(dict.get(state, name))) for name in carried if name in present)
        else:  # only the first step differs from the others, and leaves a state
            steps = int(bool(present))
        averagings = dict.get(state, EMA_STEP)
        if chosen.averages:  # an average that is lacking begins as a copy
            carried[EMA_STEP] = 0.0 if averagings is None or dict.get(state, EMA) is None else number(averagings)
        elif isinstance(averagings, Tensor):  # and so does one that is switched on again
            averagings.zero_()
        return StepCount(steps, carried or None)

    def _count(self, i: int, state: dict[str, Any], has_states: bool) -> int:
        value = dict.get(state, STEP)
        if value is None:
            if has_states:
                raise KeyError(self._hole(i, STEP, "has states"))
            return 0
        steps = number(value)
        if not (0 <= steps < 2**53 and steps == int(steps)):
            raise ValueError(
                f"{self.kind.name}: the step count of {self.name(i)} is {steps}; needed is a whole number."
            )
        return int(steps)

    def _hole(self, i: int, name: str, why: str) -> str:
        return (
            f"{self.kind.name}: {self.name(i)} {why}, but its state lacks {name!r}. Load a state dict that has it, or "
            "begin anew: del optimizer.state[parameter]."
        )

    def _checked(self, i: int, name: str, value: Tensor) -> Tensor:
        """A number that the user put into the state."""
        if value.numel() != 1 or value.device.type != "cpu" or value.dtype not in NUMBERS or type(value) is not Tensor:
            raise TypeError(
                f"{self.kind.name}: state {name!r} of {self.name(i)} is {value.dtype} of shape {tuple(value.shape)} "
                f"on {value.device}; needed is one float32 on the CPU, where load_state_dict brings it."
            )
        return value

    def owned(self, present: Sequence[int]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Runs of memory that a step of these parameters writes, sorted, and their bytes; refuses overlap."""
        owners, names, starts, sizes, ends = [], [], [], [], []  # rows would keep the garbage collector busy
        for p in map(self._records.__getitem__, present):
            size = p.size * ITEMSIZE[p.copy.dtype if p.copy else p.dtype]
            owners.append(p)
            names.append("")
            starts.append(p.pointer)
            sizes.append(size)
            ends.append(p.pointer + size)
            itemsize = ITEMSIZE[COMPUTE[p.dtype]]
            for name in (*p.beginning.choice.state, MASTER) if p.copy else p.beginning.choice.state:
                start = p.elsewhere[name] if name in p.elsewhere else p.arena.place(name, p.index)
                owners.append(p)
                names.append(name)
                starts.append(start)
                sizes.append(p.size * itemsize)
                ends.append(start + (p.size if name in p.elsewhere else p.extent) * itemsize)
        begin, nbytes, end = np.array(starts, np.uint64), np.array(sizes, np.int64), np.array(ends, np.uint64)

        def called(k: int) -> str:
            return f"state {names[k]!r} of {owners[k].name}" if names[k] else owners[k].name

        check_apart(begin, nbytes, called, self.kind.name)
        order = np.argsort(begin)
        order = order[nbytes[order] > 0]
        begin, end = begin[order], end[order]
        first = np.r_[True, begin[1:] != end[:-1]][: len(order)]  # neighbours in an arena are one run
        begin, end = begin[first], end[np.r_[first[1:], True][: len(order)]]
        return begin, (end - begin).astype(np.int64)


def _is_untouched(state: Any) -> bool:
    return type(state) is ParameterState and state.is_untouched


def _was_made(state: Any, slot: Slot, name: str, value: Any) -> bool:
    """Whether a state was made for the parameter while it lay otherwise, or elsewhere, than now."""
    past = state.slot if type(state) is ParameterState else None
    if past is None or (past.layout == slot.layout and past.arena.device is slot.arena.device):
        return False
    return isinstance(value, Tensor) and address_of(value) == past.arena.place(name, past.row)
