"""The parameters of one device, and the memory of their states: what the user sees in ``state``, or what is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.device import Device, check_apart
from ..engine.options import RuleChoice, choice
from ..engine.plan import Copy, Parameter, StepCount
from ..kernels.dtypes import COMPUTE, ITEMSIZE
from ..kernels.epilogues import EMA, EMA_STEP
from ..kernels.rules.rule import Options, Rule
from . import _devices
from ._flat import FlatGroups
from ._master import MASTER
from ._shards import Shards
from ._state import NOTHING, STEP, ParameterState, Slot, State, lay_out, number
from ._tensors import (
    STORED,
    address_of,
    gradient_memory,
    is_like,
    is_usual,
    layout_of,
    local,
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
    slot: Slot = None  # type: ignore[assignment]
    fresh: bool = True  # whether ``state`` showed nothing, or what was made without a step
    pointer: int = 0  # where the parameter itself is
    tensors: dict[str, Tensor] = field(default_factory=dict)  # of its state, as far as somebody may know them
    addresses: tuple[int, ...] = ()  # where these were
    loose: dict[str, Tensor] = field(default_factory=dict)  # numbers that the user put there


class Beginning(NamedTuple):
    """What holds for new parameters of a group with as many dimensions, which have a master, or have none."""

    choice: RuleChoice
    values: dict[str, float]  # of all that ``state`` shows
    numbers: frozenset[str]  # names of those that are numbers
    step_count: StepCount


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

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, kind: Kind, device: Device) -> None:
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

    def __getitem__(self, i: int) -> TensorParameter:
        return self._records[i]

    def name(self, i: int) -> str:
        """How errors call a parameter."""
        return f"parameter {self._places[i]} of group {self._groups[i]}"

    def memories(self, present: Sequence[int]) -> list[Tensor]:
        """The real tensors that a step writes for parameters."""
        params = self.params
        return [params[i] if is_usual(params[i]) else parameter_memory(params[i], self.name(i)) for i in present]

    def adapted(self, options: Sequence[Options]) -> dict[int, Rule]:
        """The rules of the parameters that take a ratio, with or without gradient."""
        dims = enumerate(zip(self._groups, (p.dim() for p in self.params), strict=True))
        chosen = ((i, choice(self.kind.rules[group], options[group], dim)) for i, (group, dim) in dims)
        return {i: c.rule for i, c in chosen if c.adapts and c.rule.ratio is not None}

    # --- gradients -----------------------------------------------------------------------------------------------

    def read(self, present: Sequence[int], grads: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of this process as real tensors in their parameters' layouts, copied where they must be."""
        memories = []
        for i, gradient, memory in zip(present, grads, self.memories(present), strict=True):
            if not is_like(gradient, memory):
                has_master, where = self.kind.has_master(memory), (self.kind.name, self.name(i))
                gradient = gradient_memory(gradient, self.params[i], memory, has_master, *where)
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
        p, parameter, names = self._records[i], self.params[i], self._records[i].beginning.values
        if names:
            shown, arena = self._state.of(parameter), p.slot.arena
            p.tensors = {n: p.tensors[n] if n in p.tensors else arena.tensor(n, p.slot, parameter) for n in names}
            p.addresses = tuple(map(address_of, p.tensors.values()))
            dict.update(shown, p.tensors)
            shown.slot, shown.untouched = p.slot, NOTHING
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
        present = [i for i in present if i not in self._records]
        self.hidden.update(present)
        memories = self.memories(present)
        states = [dict.get(self._state, self.params[i], {}) for i in present]
        slots = [self._slot_of(state, memory) for state, memory in zip(states, memories, strict=True)]
        groups = [0 if self.kind.flat is None else self._groups[i] for i in present]  # each is laid out by itself
        lacking = [k for k, slot in enumerate(slots) if slot is None]
        new = iter(lay_out([(memories[k], groups[k]) for k in lacking]))
        beginnings: dict[Any, Beginning] = {}
        for i, memory, state, slot in zip(present, memories, states, slots, strict=True):
            alike = self._groups[i], self.params[i].dim(), self.kind.has_master(memory)
            if alike not in beginnings:
                beginnings[alike] = self._beginning(*alike, options[self._groups[i]])
            self._records[i] = self._record(i, memory, state, slot or next(new), beginnings[alike])

    def _slot_of(self, state: dict[str, Any], memory: Tensor) -> Slot | None:
        """Where the state of a parameter is; None where it must have another place, since the parameter was moved."""
        slot = state.slot if type(state) is ParameterState else None
        if slot is None or slot.layout != layout_of(memory) or slot.arena.device != memory.device:
            return None
        return None if slot.arena.misses(slot.row, state) else slot

    def _record(
        self, i: int, memory: Tensor, state: dict[str, Any], slot: Slot, beginning: Beginning
    ) -> TensorParameter:
        parameter, (arena, row, _), pointer = self.params[i], slot, memory.data_ptr()
        p = TensorParameter(
            *(self.name(i), parameter, memory.numel(), STORED[memory.dtype].name, self._groups[i]),  # type: ignore[arg-type]
            *(arena.offsets[row], arena.extents[row], pointer, arena.arrays, beginning.step_count),
            beginning=beginning,
            slot=slot,
            pointer=pointer,
        )
        if dict.__len__(state):
            self._adopt(p, memory, state)
        else:
            for name, value in beginning.values.items():
                if value or name not in arena.starts:
                    arena.begin(name, row, value, is_number=name in beginning.numbers)
        if self.kind.has_master(memory):
            if MASTER not in p.tensors:
                p.tensors[MASTER] = arena.tensor(MASTER, slot, parameter)
            if p.fresh or dict.get(state, MASTER) is None:
                p.tensors[MASTER].copy_(parameter.detach())
            p.copy, p.address, p.dtype = Copy(p.dtype, pointer), address_of(p.tensors[MASTER]), COMPUTE[p.dtype]
        p.addresses = tuple(map(address_of, p.tensors.values()))
        return p

    def _adopt(self, p: TensorParameter, memory: Tensor, state: dict[str, Any]) -> None:
        """Go on from what there is of a parameter in ``state``; what is missing there begins."""
        parameter, (arena, row, _) = cast(Tensor, p.array), p.slot
        p.fresh = type(state) is ParameterState and state.is_untouched
        if not p.fresh:
            p.step_count = self._step_count(p, state)
        numbers = {STEP: float(p.step_count.steps), **(p.step_count.carry or {})}
        elsewhere: dict[str, int] = {}
        for name, first in p.beginning.values.items():
            value = dict.get(state, name)
            if name in p.beginning.numbers:
                first = numbers[name]
                if not isinstance(value, Tensor) or _was_made(state, p.slot, name, value):
                    arena.begin(name, row, first, is_number=True)
                    continue
                if address_of(value) != arena.place(name, row):
                    p.loose[name] = self._checked(p.name, name, value)
            elif value is None or (_was_made(state, p.slot, name, value) and value.shape == parameter.shape):
                arena.begin(name, row, first, is_number=False)
                if value is not None and not p.fresh:
                    p.tensors[name] = arena.tensor(name, p.slot, parameter).copy_(value)
                continue
            else:
                address = state_address(value, memory, f"{self.kind.name}: state {name!r} of {p.name}")
                if name not in arena.arrays or (memory.numel() and address != arena.place(name, row)):
                    elsewhere[name] = address
            p.tensors[name] = value
            if p.fresh:  # it began with the options of then
                real(local(value, "a state")).fill_(first)
        p.elsewhere = elsewhere
        if p.fresh:
            cast(ParameterState, state).remember()

    def _beginning(self, group: int, dim: int, has_master: bool, options: Options) -> Beginning:
        chosen = choice(self.kind.rules[group], options, dim)
        rule, averaged = chosen.rule, {EMA_STEP: 0.0} if chosen.averages else {}
        carried = {**(rule.carry(options)._asdict() if rule.carry is not None else {}), **averaged}
        numbers = {**({STEP: 0.0} if self.kind.counts else {}), **carried}
        values = {**numbers, **chosen.start(options), **({MASTER: 0.0} if has_master else {})}
        return Beginning(chosen, values, frozenset(numbers), StepCount(0, carried or None))

    def _step_count(self, p: TensorParameter, state: dict[str, Any]) -> StepCount:
        """How far the parameter has come, by what its state says."""

        def hole(name: str, why: str) -> KeyError:
            return KeyError(
                f"{self.kind.name}: {p.name} {why}, but its state lacks {name!r}. Load a state dict that has it, or "
                "begin anew: del optimizer.state[parameter]."
            )

        rule, carried, step = p.beginning.choice.rule, dict(p.beginning.step_count.carry or {}), dict.get(state, STEP)
        carried.pop(EMA_STEP, None)
        present = [name for name in (*rule.state, *carried) if dict.get(state, name) is not None]
        if not self.kind.counts:  # only the first step differs from the others, and leaves a state
            steps = float(bool(present))
        elif step is None and present:
            raise hole(STEP, "has states")
        else:
            steps = 0.0 if step is None else number(step)
            if not (0 <= steps < 2**53 and steps == int(steps)):
                raise ValueError(f"{self.kind.name}: the step count of {p.name} is {steps}; needed is a whole number.")
            missing = {*rule.state, *carried} - {*present, *rule.late}
            if steps and missing:
                raise hole(min(missing), f"has taken {int(steps)} steps")
            carried.update((name, number(dict.get(state, name))) for name in carried if name in present)
        averagings = dict.get(state, EMA_STEP)
        if p.beginning.choice.averages:  # an average that is lacking begins as a copy
            carried[EMA_STEP] = 0.0 if averagings is None or dict.get(state, EMA) is None else number(averagings)
        elif isinstance(averagings, Tensor):  # and so does one that is switched on again
            averagings.zero_()
        return StepCount(int(steps), carried or None)

    def _checked(self, owner: str, name: str, value: Tensor) -> Tensor:
        """A number that the user put into the state."""
        if value.numel() != 1 or value.device.type != "cpu" or value.dtype not in NUMBERS or type(value) is not Tensor:
            raise TypeError(
                f"{self.kind.name}: state {name!r} of {owner} is {value.dtype} of shape {tuple(value.shape)} "
                f"on {value.device}; needed is one float32 on the CPU, where load_state_dict brings it."
            )
        return value

    def owned(self, present: Sequence[int]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Runs of memory that a step of these parameters writes, sorted, and their bytes; refuses overlap."""
        rows: list[tuple[TensorParameter, str, int, int, int]] = []  # owner, state, beginning, bytes, with padding
        for p in map(self._records.__getitem__, present):
            size, itemsize = p.size * ITEMSIZE[p.copy.dtype if p.copy else p.dtype], ITEMSIZE[COMPUTE[p.dtype]]
            rows.append((p, "", p.pointer, size, size))
            for name in (*p.beginning.choice.state, MASTER) if p.copy else p.beginning.choice.state:
                apart = name in p.elsewhere
                start = p.elsewhere[name] if apart else p.slot.arena.place(name, p.slot.row)
                rows.append((p, name, start, p.size * itemsize, (p.size if apart else p.extent) * itemsize))

        def called(k: int) -> str:
            owner, name, *_ = rows[k]
            return f"state {name!r} of {owner.name}" if name else owner.name

        begin = np.array([start for _, _, start, _, _ in rows], np.uint64)
        nbytes, extents = (np.array([row[k] for row in rows], np.int64) for k in (3, 4))
        end = begin + extents.astype(np.uint64)
        check_apart(begin, nbytes, called, self.kind.name)
        order = np.argsort(begin)
        order = order[nbytes[order] > 0]
        begin, end = begin[order], end[order]
        first = np.r_[True, begin[1:] != end[:-1]][: len(order)]  # neighbours in an arena are one run
        begin, end = begin[first], end[np.r_[first[1:], True][: len(order)]]
        return begin, (end - begin).astype(np.int64)


def _was_made(state: Any, slot: Slot, name: str, value: Any) -> bool:
    """Whether a state was made for the parameter while it lay otherwise, or elsewhere, than now."""
    past = state.slot if type(state) is ParameterState else None
    if past is None or (past.layout == slot.layout and past.arena.device == slot.arena.device):
        return False
    return isinstance(value, Tensor) and address_of(value) == past.arena.place(name, past.row)
