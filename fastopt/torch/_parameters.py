"""The parameters of one device, and the memory of their states: what the user sees in ``state``, or what is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.plan import Copy, Parameter, RuleChoice, StepCount, choice
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
    STORED,
    address_of,
    check_apart,
    gradient_memory,
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

    def has_master(self, memory: Tensor) -> bool:
        """Whether a parameter with this memory has a master."""
        return self.master and memory.dtype in (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class TensorParameter(Parameter):
    """A parameter that has had a gradient, with the tensors of its state."""

    choice: RuleChoice = field(kw_only=True)
    slot: Slot = field(kw_only=True)
    fresh: bool = field(kw_only=True)  # whether ``state`` shows nothing yet, or what was made without a step
    pointer: int = field(kw_only=True)  # where the parameter itself is
    names: tuple[str, ...] = field(kw_only=True)  # of what ``state`` shows
    tensors: Mapping[str, Tensor] = field(kw_only=True)  # as far as somebody may know them
    addresses: tuple[int, ...] = field(kw_only=True)  # where these were
    loose: Mapping[str, Tensor] = field(kw_only=True)  # numbers that the user put there


Beginnings = dict[tuple[int, int, bool], tuple[RuleChoice, dict[str, float], StepCount, tuple[str, ...]]]
"""By group, number of dimensions, and whether there is a master: what is done to parameters, what their states begin
with, their first step count, and the names of all that ``state`` shows."""


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
        self.shards = Shards(self.params)
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
        return [parameter_memory(self.params[i], self.name(i)) for i in present]

    # --- gradients -----------------------------------------------------------------------------------------------

    def local(self, present: Sequence[int], grads: Sequence[Tensor]) -> list[Tensor]:
        """What this process holds of gradients, placed as their parameters are."""
        return [local_gradient(g, self.params[i], self.name(i)) for i, g in zip(present, grads, strict=True)]

    def brought(self, present: Sequence[int], grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of this process as real tensors in their parameters' layouts, copied where they must be."""
        memories = []
        for i, gradient, memory in zip(present, grads, self.memories(present), strict=True):
            has_master = self.kind.has_master(memory)
            memories.append(gradient_memory(gradient, memory, has_master, self.kind.name, self.name(i)))
        return memories

    # --- states --------------------------------------------------------------------------------------------------

    def show(self, i: int) -> None:
        """Let ``state`` show a parameter."""
        p, shown = self._records[i], dict.get(self._state, self.params[i], {})
        if p.names:
            made = {name: p.tensors[name] if name in p.tensors else self._made(i, p, name) for name in p.names}
            if type(shown) is not ParameterState or shown.watch is not self._state.watch:
                shown = ParameterState(self._state.watch, shown)
            dict.update(shown, made)
            shown.slot, shown.untouched = p.slot, NOTHING
            p.tensors, p.addresses = made, tuple(map(address_of, made.values()))
            dict.__setitem__(self._state, self.params[i], shown)
        self.hidden.discard(i)

    def _made(self, i: int, p: TensorParameter, name: str) -> Tensor:
        if name in p.slot.arena.numbers:
            return p.slot.arena.number(name, p.slot.index)
        return p.slot.arena.state(name, p.slot.index, self.params[i], p.slot.layout)

    def show_made(self, i: int) -> None:
        """Let ``state`` show a parameter that took no step yet."""
        p = self._records[i]
        self.show(i)
        if p.fresh and p.names and not p.step_count.steps:
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
                and not slot.arena.misses(slot.index, state)
            ):
                self._records[i] = self._record(i, memory, state, slot, options, beginnings)
            else:
                group = 0 if self.kind.flat is None else self._groups[i]  # which was laid out by itself
                lists = new.setdefault((memory.dtype, group), ([], [], []))
                for column, value in zip(lists, (i, memory, state), strict=True):
                    column.append(value)
        for indices, memories, states in new.values():
            arena = Arena(memories, self.device)
            for index, (i, memory, state) in enumerate(zip(indices, memories, states, strict=True)):
                layout = layout_of(memory)
                slot = Slot(arena, index, self._layouts.setdefault(layout, layout))
                self._records[i] = self._record(i, memory, state, slot, options, beginnings)

    def _record(
        self, i: int, memory: Tensor, state: Any, slot: Slot, options: Sequence[Options], beginnings: Beginnings
    ) -> TensorParameter:
        parameter, group, arena, index = self.params[i], self._groups[i], slot.arena, slot.index
        has_master = self.kind.has_master(memory)
        alike = group, parameter.dim(), has_master
        if alike not in beginnings:
            beginnings[alike] = self._beginning(group, parameter.dim(), has_master, options[group])
        chosen, start, step_count, names = beginnings[alike]
        is_empty = not dict.__len__(state)
        fresh = is_empty or (type(state) is ParameterState and state.is_untouched)
        if not fresh:
            step_count = self._step_count(i, chosen, state, step_count)
        tensors: dict[str, Tensor] = {}
        loose: dict[str, Tensor] = {}
        elsewhere: dict[str, int] = {}
        numbers = {STEP: float(step_count.steps)} if self.kind.counts else {}
        for name, known in {**numbers, **(step_count.carry or {})}.items():
            value = None if is_empty else dict.get(state, name)
            if not isinstance(value, Tensor) or _was_made(state, slot, name, value):
                arena.begin(name, index, known, is_number=True)
                continue
            tensors[name] = value
            if address_of(value) != arena.place(name, index):
                loose[name] = self._checked(i, name, value)
            if fresh:
                value.fill_(known)
        for name, first in start.items():
            value = None if is_empty else dict.get(state, name)
            moved = value is not None and _was_made(state, slot, name, value) and value.shape == parameter.shape
            if value is None or moved:
                arena.begin(name, index, first, is_number=False)
                if moved and not fresh:
                    tensors[name] = arena.state(name, index, parameter, slot.layout).copy_(value)
                continue
            address = state_address(value, memory, f"{self.kind.name}: state {name!r} of {self.name(i)}")
            if name not in arena.arrays or (memory.numel() and address != arena.place(name, index)):
                elsewhere[name] = address
            tensors[name] = value
            if fresh:  # it began with the options of then
                real(local(value, "a state")).fill_(first)
        if has_master and (fresh or dict.get(state, MASTER) is None):
            if MASTER not in tensors:
                tensors[MASTER] = arena.state(MASTER, index, parameter, slot.layout)
            tensors[MASTER].copy_(parameter.detach())
        if fresh and not is_empty:
            state.remember()
        name, pointer, dtype, copy = self.name(i), memory.data_ptr(), STORED[memory.dtype].name, None
        address = pointer
        if has_master:
            copy, address, dtype = Copy(dtype, pointer), address_of(tensors[MASTER]), COMPUTE[dtype]
        return TensorParameter(
            *(name, parameter, memory.numel(), dtype, group),  # type: ignore[arg-type]
            *(arena.offsets[index], arena.extents[index], address, arena.arrays, step_count),
            copy=copy,
            elsewhere=elsewhere or NOTHING,
            choice=chosen,
            slot=slot,
            fresh=fresh,
            pointer=pointer,
            names=names,
            tensors=tensors or NOTHING,
            addresses=tuple(map(address_of, tensors.values())),
            loose=loose or NOTHING,
        )

    def _beginning(
        self, group: int, dim: int, has_master: bool, options: Options
    ) -> tuple[RuleChoice, dict[str, float], StepCount, tuple[str, ...]]:
        chosen = choice(self.kind.rules[group], options, dim).by(options)
        rule, averaged = chosen.rule, {EMA_STEP: 0.0} if chosen.averages else {}
        carried = {**(rule.carry(options)._asdict() if rule.carry is not None else {}), **averaged}
        start = {**chosen.start(options), **({MASTER: 0.0} if has_master else {})}
        names = (*([STEP] if self.kind.counts else []), *carried, *start)
        return chosen, start, StepCount(0, carried or None), names

    def _step_count(self, i: int, chosen: RuleChoice, state: dict[str, Any], first: StepCount) -> StepCount:
        """How far the parameter has come, by what its state says."""
        rule, carried = chosen.rule, dict(first.carry or {})
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
        names, starts, sizes, ends = [], [], [], []  # no rows: they would keep the garbage collector busy
        for p in map(self._records.__getitem__, present):
            size = p.size * ITEMSIZE[p.copy.dtype if p.copy else p.dtype]
            names.append(p.name)
            starts.append(p.pointer)
            sizes.append(size)
            ends.append(p.pointer + size)
            itemsize = ITEMSIZE[COMPUTE[p.dtype]]
            for name in (*p.choice.state, MASTER) if p.copy else p.choice.state:
                start = p.elsewhere.get(name, p.slot.arena.place(name, p.slot.index))
                names.append(f"state {name!r} of {p.name}")
                starts.append(start)
                sizes.append(p.size * itemsize)
                ends.append(start + (p.size if name in p.elsewhere else p.extent) * itemsize)
        begin, nbytes, end = np.array(starts, np.uint64), np.array(sizes, np.int64), np.array(ends, np.uint64)
        check_apart(begin, nbytes, names.__getitem__, self.kind.name)
        order = np.argsort(begin)
        order = order[nbytes[order] > 0]
        begin, end = begin[order], end[order]
        first = np.r_[True, begin[1:] != end[:-1]][: len(order)]  # neighbours in an arena are one run
        begin, end = begin[first], end[np.r_[first[1:], True][: len(order)]]
        return begin, (end - begin).astype(np.int64)


def _was_made(state: Any, slot: Slot, name: str, value: Any) -> bool:
    """Whether a state was made for the parameter while it lay otherwise, or elsewhere, than now."""
    past = state.slot if type(state) is ParameterState else None
    if past is None or (past.layout == slot.layout and past.arena.device is slot.arena.device):
        return False
    return isinstance(value, Tensor) and address_of(value) == past.arena.place(name, past.index)
