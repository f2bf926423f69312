"""Which memory holds the states of each parameter: what the user sees in ``state``, or what is made for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.options import RuleChoice
from ..engine.plan import Copy, Parameter, StepCount
from ..kernels.dtypes import COMPUTE, ITEMSIZE
from ..kernels.epilogues import EMA, EMA_STEP
from ..kernels.rules.rule import Options
from ._devices import TorchDevice
from ._flat import FlatGroups
from ._master import MASTER
from ._state import STEP, Arena, ParameterState, Slot, State, StateSync, layout_of, number
from ._tensors import STORED, address_of, check_apart, local, parameter_memory, real, state_address

Choose = Callable[[Options, Tensor], RuleChoice]

NUMBERS = (torch.float32, torch.float64, torch.int32, torch.int64)


class Kind(NamedTuple):
    """What kind of optimizer it is."""

    name: str  # for errors
    counts: bool  # whether ``state`` shows the step count
    master: bool  # whether 16-bit parameters have float32 ones that are stepped in their place
    flat: FlatGroups | None  # parameters and gradients that were moved into flat memory, group by group

    def has_master(self, memory: Tensor) -> bool:
        """Whether a parameter with this memory has a master."""
        return self.master and memory.dtype in (torch.float16, torch.bfloat16)


@dataclass(eq=False)
class Entry:
    """A parameter that has had a gradient."""

    record: Parameter
    slot: Slot
    state: ParameterState
    fresh: bool  # whether ``state`` shows nothing yet, or what was made without a step
    numbers: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of the parameter's shape
    seen: Any = None  # where the parameter and these were

    def places(self, memory: Tensor) -> Any:
        """Where the parameter, whose real tensor is ``memory``, and its state are now, and how the parameter lies."""
        shown = (*self.numbers.values(), *self.tensors.values())
        return memory.data_ptr(), layout_of(memory), list(map(address_of, shown))

    @property
    def counted(self) -> tuple[StepCount, Slot, dict[str, Tensor]]:
        """What a ``StateSync`` needs."""
        return self.record.step_count, self.slot, self.numbers


class Entries:
    """The parameters of one device that have had a gradient.

    A tensor in ``state`` is stepped where it is. What is missing is made when a parameter has its first gradient, and
    shown once a step was taken.
    """

    def __init__(
        self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], state: State, kind: Kind, device: TorchDevice
    ) -> None:
        self._params, self._places, self._state, self._kind, self._device = params, places, state, kind, device
        self._entries: dict[int, Entry] = {}

    def __getitem__(self, i: int) -> Entry:
        return self._entries[i]

    def name(self, i: int) -> str:
        """How errors call a parameter."""
        group, index = self._places[i]
        return f"parameter {index} of group {group}"

    def show(self, i: int) -> None:
        """Let ``state`` show a parameter that took a step."""
        entry = self._entries[i]
        shown = {**entry.numbers, **entry.tensors}
        if shown:
            entry.state.show(entry.slot, shown)
            entry.state.untouched = {}
            self._state.keep(self._params[i], entry.state)

    def show_made(self, i: int) -> None:
        """Let ``state`` show a parameter that took none yet."""
        entry = self._entries[i]
        self.show(i)
        if entry.fresh:
            entry.state.remember()

    def admit(
        self, present: Sequence[int], memories: Sequence[Tensor], options: Sequence[Options], choose: Choose
    ) -> None:
        """Find or make the states of parameters, whose real tensors are ``memories``."""
        new: dict[tuple[torch.dtype, int], list[tuple[int, Tensor]]] = {}
        for i, memory in zip(present, memories, strict=True):
            if i in self._entries:
                continue
            state = self._state.of(self._params[i])
            slot = state.slot
            if (
                slot is not None
                and slot.layout == layout_of(memory)
                and slot.arena.device is self._device  # parameters may have moved
                and all(dict.get(state, name) is not None for name in slot.entries)
            ):
                self._entries[i] = self._entry(i, memory, state, slot, options, choose)
            else:
                group = 0 if self._kind.flat is None else self._places[i][0]  # which was laid out by itself
                new.setdefault((memory.dtype, group), []).append((i, memory))
        for members in new.values():
            arena = Arena([memory for _, memory in members], self._device)
            for index, (i, memory) in enumerate(members):
                state = self._state.of(self._params[i])
                slot = Slot(arena, index, layout_of(memory))
                self._entries[i] = self._entry(i, memory, state, slot, options, choose)

    def _entry(
        self, i: int, memory: Tensor, state: ParameterState, slot: Slot, options: Sequence[Options], choose: Choose
    ) -> Entry:
        parameter, group = self._params[i], self._places[i][0]
        choice, untouched = choose(options[group], parameter), state.is_untouched
        step_count = self._step_count(i, choice, state, options[group])
        record = Parameter(
            name=self.name(i),
            array=parameter,  # type: ignore[arg-type]
            size=memory.numel(),
            dtype=STORED[memory.dtype].name,
            group=group,
            offset=slot.arena.offsets[slot.index],
            extent=slot.arena.extents[slot.index],
            address=memory.data_ptr(),
            states=slot.arena.arrays,
            step_count=step_count,
        )
        entry = Entry(record, slot, state, untouched or not dict.__len__(state))
        for name in [STEP] * self._kind.counts + list(step_count.carry or {}):
            entry.numbers[name] = self._number(i, state, slot, name)
        for name, start in choice.start(options[group]).items():
            entry.tensors[name] = self._tensor(i, memory, entry, name, start)
        if self._kind.has_master(memory):
            record.copy = Copy(record.dtype, record.address)
            master = entry.tensors[MASTER] = self._tensor(i, memory, entry, MASTER, parameter.detach())
            record.address, record.dtype = address_of(master), COMPUTE[record.dtype]
        if untouched:
            state.remember()
        entry.seen = entry.places(memory)
        return entry

    def changed(self) -> bool:
        """Whether some parameter or state, with a gradient now or without, is not where it was, or counts otherwise."""
        try:
            memories = {i: parameter_memory(self._params[i], self.name(i)) for i in self._entries}
        except (NotImplementedError, TypeError, ValueError):  # nothing that could be stepped where it was
            return True
        return any(
            entry.places(memories[i]) != entry.seen or not StateSync([entry.counted], write=False).agrees()
            for i, entry in self._entries.items()
        )

    def _step_count(self, i: int, choice: RuleChoice, state: ParameterState, options: Options) -> StepCount:
        """How far the parameter has come, by what its state says."""
        rule = choice.rule
        carried: dict[str, float] = rule.carry(options)._asdict() if rule.carry is not None else {}
        present = [name for name in (*rule.state, *carried) if dict.get(state, name) is not None]
        if state.is_untouched:
            steps = 0
        elif self._kind.counts:
            steps = self._count(i, state, bool(present))
            missing = {*rule.state, *carried} - {*present, *rule.late} if steps else ()
            if missing:
                raise KeyError(self._hole(i, sorted(missing)[0], f"has taken {steps} steps"))
            carried.update((name, number(dict.get(state, name))) for name in carried if name in present)
        else:  # only the first step differs from the others, and leaves a state
            steps = int(bool(present))
        averagings = dict.get(state, EMA_STEP)
        if choice.averages:  # an average that is lacking begins as a copy
            carried[EMA_STEP] = 0.0 if averagings is None or dict.get(state, EMA) is None else number(averagings)
        elif isinstance(averagings, Tensor):  # and so does one that is switched on again
            averagings.zero_()
        return StepCount(steps, carried or None)

    def _count(self, i: int, state: ParameterState, has_states: bool) -> int:
        value = dict.get(state, STEP)
        if value is None:
            if has_states:
                raise KeyError(self._hole(i, STEP, "has states"))
            return 0
        steps = number(value)
        if not (0 <= steps < 2**53 and steps == int(steps)):
            raise ValueError(
                f"{self._kind.name}: the step count of {self.name(i)} is {steps}; needed is a whole number."
            )
        return int(steps)

    def _hole(self, i: int, name: str, why: str) -> str:
        return (
            f"{self._kind.name}: {self.name(i)} {why}, but its state lacks {name!r}. Load a state dict that has it, or "
            "begin anew: del optimizer.state[parameter]."
        )

    def _number(self, i: int, state: ParameterState, slot: Slot, name: str) -> Tensor:
        """The tensor of a step count or carried number; what it says the plan writes."""
        value = dict.get(state, name)
        if value is None or not isinstance(value, Tensor) or _was_made(state, slot, name, value):
            return slot.add_number(name, 0.0 if value is None else number(value))
        if value.numel() != 1 or value.device.type != "cpu" or value.dtype not in NUMBERS or type(value) is not Tensor:
            raise TypeError(
                f"{self._kind.name}: state {name!r} of {self.name(i)} is {value.dtype} of shape {tuple(value.shape)} "
                f"on {value.device}; needed is one float32 on the CPU, where load_state_dict brings it."
            )
        return value

    def _tensor(self, i: int, memory: Tensor, entry: Entry, name: str, start: float | Tensor) -> Tensor:
        """The tensor of a state: the one that the user sees, or a new one, which begins with ``start``."""
        parameter, state, slot = self._params[i], entry.state, entry.slot
        value = dict.get(state, name)
        if value is None:
            value = slot.add_state(name, parameter, memory)
            if isinstance(start, Tensor) or start:
                _fill(value, start)
        elif slot.holds(name, value):
            if entry.fresh:  # it began with the options of then
                _fill(value, start)
        elif _was_made(state, slot, name, value) and value.shape == parameter.shape:
            value = slot.add_state(name, parameter, memory).copy_(value)
        else:
            where = f"{self._kind.name}: state {name!r} of {self.name(i)}"
            entry.record.elsewhere[name] = state_address(value, memory, where)
        return value

    def owned(self, present: Sequence[int]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Runs of memory that a step of these parameters writes, sorted, and their bytes; refuses overlap."""
        names, rows = [], []
        for i in present:
            entry = self._entries[i]
            record, itemsize = entry.record, ITEMSIZE[COMPUTE[entry.record.dtype]]
            address, dtype = (record.copy.address, record.copy.dtype) if record.copy else (record.address, record.dtype)
            names.append(record.name)
            rows.append((address, record.size * ITEMSIZE[dtype], record.size * ITEMSIZE[dtype]))
            for name, tensor in entry.tensors.items():
                names.append(f"state {name!r} of {record.name}")
                extent = record.size if name in record.elsewhere else record.extent
                rows.append((address_of(tensor), record.size * itemsize, extent * itemsize))
        starts, nbytes, extents = np.array(rows, np.uint64).reshape(-1, 3).T
        check_apart(starts.tolist(), nbytes.tolist(), names, self._kind.name)
        order = np.argsort(starts)
        order = order[nbytes[order] > 0]
        starts, ends = starts[order], (starts + extents)[order]
        first = np.r_[True, starts[1:] != ends[:-1]][: len(order)]  # neighbours in an arena are one run
        begin, end = starts[first], ends[np.r_[first[1:], True][: len(order)]]
        return begin, (end - begin).astype(np.int64)


def _was_made(state: ParameterState, slot: Slot, name: str, value: Any) -> bool:
    """Whether a state was made for the parameter while it lay otherwise, or elsewhere, than now."""
    past = state.slot
    moved = past is not None and (past.layout != slot.layout or past.arena.device is not slot.arena.device)
    return moved and past is not None and past.holds(name, value)


def _fill(value: Tensor, start: float | Tensor) -> None:
    if isinstance(start, Tensor):
        value.copy_(start)
    else:
        real(local(value, "a state")).fill_(start)
