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
from ._devices import TorchDevice
from ._flat import FlatGroups
from ._master import MASTER
from ._shards import Shards
from ._state import NOTHING, STEP, Arena, ParameterState, Slot, State, layout_of, number
from ._tensors import (
    STORED,
    address_of,
    check_apart,
    gradient_memory,
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
    tensors: dict[str, Tensor] = field(kw_only=True)  # all of its state
    addresses: tuple[int, ...] = field(kw_only=True)  # where these were
    loose: Mapping[str, Tensor] = field(kw_only=True)  # numbers that the user put there


class Parameters:
    """The parameters of one device, and the records of those that have had a gradient.

    A tensor in ``state`` is stepped where it is. What is missing is made when a parameter has its first gradient, and
    shown once a step was taken.

    Args:
        params: The parameters.
        places: Group of each, and index in it.
        state: The state, which they join with their first step.
        kind: What kind of optimizer it is.
        device: Where they are.
    """

    def __init__(
        self, params: Sequence[Tensor], places: Sequence[tuple[int, int]], state: State, kind: Kind, device: TorchDevice
    ) -> None:
        self.params, self.kind, self.device = params, kind, device
        self.shards = Shards(params)
        self._places, self._state = places, state
        self.hidden: set[int] = set()  # indices of parameters that ``state`` does not show yet
        self._records: dict[int, TensorParameter] = {}
        self._beginnings: dict[tuple[int, int], tuple[RuleChoice, dict[str, Any], StepCount]] = {}

    def __getitem__(self, i: int) -> TensorParameter:
        return self._records[i]

    def name(self, i: int) -> str:
        """How errors call a parameter."""
        group, index = self._places[i]
        return f"parameter {index} of group {group}"

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
        """Let ``state`` show what there is of a parameter."""
        p, shown = self._records[i], dict.get(self._state, self.params[i], {})
        if p.tensors:
            if type(shown) is not ParameterState or shown.watch is not self._state.watch:
                shown = ParameterState(self._state.watch, shown)
            dict.update(shown, p.tensors)
            shown.slot, shown.untouched = p.slot, NOTHING
            dict.__setitem__(self._state, self.params[i], shown)
        self.hidden.discard(i)

    def show_made(self, i: int) -> None:
        """Let ``state`` show a parameter that took no step yet."""
        p = self._records[i]
        self.show(i)
        if p.fresh and p.tensors and not p.step_count.steps:
            self._state.of(self.params[i]).remember()

    def admit(self, present: Sequence[int], options: Sequence[Options]) -> None:
        """Find or make the states of parameters."""
        new: dict[tuple[torch.dtype, int], list[tuple[int, Tensor, Any]]] = {}
        present = [i for i in present if i not in self._records]
        self.hidden.update(present)
        for i, memory in zip(present, self.memories(present), strict=True):
            state = dict.get(self._state, self.params[i], {})
            slot = state.slot if type(state) is ParameterState else None
            if (
                slot is not None
                and slot.layout == layout_of(memory)
                and slot.arena.device is self.device  # parameters may have moved
                and not slot.arena.misses(slot.index, state)
            ):
                self._records[i] = self._record(i, memory, state, slot, options)
            else:
                group = 0 if self.kind.flat is None else self._places[i][0]  # which was laid out by itself
                new.setdefault((memory.dtype, group), []).append((i, memory, state))
        for members in new.values():
            arena = Arena([memory for _, memory, _ in members], self.device)
            for index, (i, memory, state) in enumerate(members):
                self._records[i] = self._record(i, memory, state, Slot(arena, index, layout_of(memory)), options)

    def _record(self, i: int, memory: Tensor, state: Any, slot: Slot, options: Sequence[Options]) -> TensorParameter:
        parameter, group = self.params[i], self._places[i][0]
        chosen, start, step_count = self._beginning(group, parameter.dim(), options)
        fresh = not dict.__len__(state) or (type(state) is ParameterState and state.is_untouched)
        if not fresh:
            step_count = self._step_count(i, chosen, state, step_count)
        tensors: dict[str, Tensor] = {}
        loose: dict[str, Tensor] = {}
        elsewhere: dict[str, int] = {}
        numbers = {STEP: float(step_count.steps)} if self.kind.counts else {}
        for name, known in {**numbers, **(step_count.carry or {})}.items():
            value = None if fresh else dict.get(state, name)
            if not isinstance(value, Tensor) or _was_made(state, slot, name, value):
                value = slot.arena.number(name, slot.index, known)
            elif address_of(value) != slot.arena.place(name, slot.index):
                loose[name] = self._checked(i, name, value)
            tensors[name] = value
        if self.kind.has_master(memory):
            start = {**start, MASTER: parameter.detach()}
        for name, first in start.items():
            value = dict.get(state, name)
            if value is None or (_was_made(state, slot, name, value) and value.shape == parameter.shape):
                made = slot.arena.state(name, slot.index, parameter, memory)
                if value is not None and not fresh:
                    made.copy_(value)
                elif isinstance(first, Tensor) or first:
                    _fill(made, first)
                value = made
            else:
                address = state_address(value, memory, f"{self.kind.name}: state {name!r} of {self.name(i)}")
                is_in_arena = address == slot.arena.place(name, slot.index) or not memory.numel()
                if name not in slot.arena.arrays or not is_in_arena:
                    elsewhere[name] = address
                if fresh:  # it began with the options of then
                    _fill(value, first)
            tensors[name] = value
        if fresh and dict.__len__(state):
            state.remember()
        name, pointer, dtype, copy = self.name(i), memory.data_ptr(), STORED[memory.dtype].name, None
        address = pointer
        if MASTER in start:
            copy, address, dtype = Copy(dtype, pointer), address_of(tensors[MASTER]), COMPUTE[dtype]
        return TensorParameter(
            *(name, parameter, memory.numel(), dtype, group),  # type: ignore[arg-type]
            *(slot.arena.offsets[slot.index], slot.arena.extents[slot.index], address, slot.arena.arrays, step_count),
            copy=copy,
            elsewhere=elsewhere or NOTHING,
            choice=chosen,
            slot=slot,
            fresh=fresh,
            pointer=pointer,
            tensors=tensors,
            addresses=tuple(map(address_of, tensors.values())),
            loose=loose or NOTHING,
        )

    def _beginning(
        self, group: int, dim: int, options: Sequence[Options]
    ) -> tuple[RuleChoice, dict[str, Any], StepCount]:
        """What is done to parameters of so many dimensions, what their states begin with, their first step count."""
        if (group, dim) not in self._beginnings:
            chosen = choice(self.kind.rules[group], options[group], dim).by(options[group])
            rule, averaged = chosen.rule, {EMA_STEP: 0.0} if chosen.averages else {}
            carried = rule.carry(options[group])._asdict() if rule.carry is not None else {}
            first = StepCount(0, {**carried, **averaged} or None)
            self._beginnings[group, dim] = chosen, chosen.start(options[group]), first
        return self._beginnings[group, dim]

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
        names: list[tuple[str, str]] = []
        rows: list[tuple[int, int, int]] = []
        for p in map(self._records.__getitem__, present):
            nbytes = p.size * ITEMSIZE[p.copy.dtype if p.copy else p.dtype]
            names.append((p.name, ""))
            rows.append((p.pointer, nbytes, nbytes))
            itemsize = ITEMSIZE[COMPUTE[p.dtype]]
            for name, address in zip(p.tensors, p.addresses, strict=True):
                if name in p.states or name in p.elsewhere:
                    names.append((p.name, name))
                    extent = p.size if name in p.elsewhere else p.extent
                    rows.append((address, p.size * itemsize, extent * itemsize))
        starts, nbytes, extents = np.array(rows, np.uint64).reshape(-1, 3).T
        check_apart(starts, nbytes.astype(np.int64), lambda k: _called(*names[k]), self.kind.name)
        order = np.argsort(starts)
        order = order[nbytes[order] > 0]
        starts, ends = starts[order], (starts + extents)[order]
        first = np.r_[True, starts[1:] != ends[:-1]][: len(order)]  # neighbours in an arena are one run
        begin, end = starts[first], ends[np.r_[first[1:], True][: len(order)]]
        return begin, (end - begin).astype(np.int64)


def _called(parameter: str, state: str) -> str:
    return f"state {state!r} of {parameter}" if state else parameter


def _was_made(state: Any, slot: Slot, name: str, value: Any) -> bool:
    """Whether a state was made for the parameter while it lay otherwise, or elsewhere, than now."""
    past = state.slot if type(state) is ParameterState else None
    if past is None or (past.layout == slot.layout and past.arena.device is slot.arena.device):
        return False
    return isinstance(value, Tensor) and address_of(value) == past.arena.place(name, past.index)


def _fill(value: Tensor, start: float | Tensor) -> None:
    if isinstance(start, Tensor):
        value.copy_(start)
    else:
        real(local(value, "a state")).fill_(start)
