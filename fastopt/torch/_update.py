"""From param groups, state and ``.grad`` to a plan, and the checks that all is as it was when the plan was made."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._arrays import first_hit, first_overlap
from .._plan import Copy, Parameter, Plan, Progress, Treatment, initial_states
from .._step import Request, StepInfo
from ..kernels.dtypes import ITEMSIZE
from ..kernels.rule import Options, Rule
from . import _devices
from ._devices import Gpu, Home
from ._flat import FlatGroups
from ._master import MASTER, Masters
from ._probe import Probe
from ._state import STEP, Block, Mirror, ParameterState, Slot, State, number
from ._tensors import COMPUTED, PLAIN, STORED, check_apart, gradient_memory, local, local_gradient, parameter_memory

Treat = Callable[[Options, Tensor], Treatment]


class Entry(NamedTuple):
    """A parameter that has had a gradient."""

    record: Parameter
    slot: Slot
    state: ParameterState


class Kind(NamedTuple):
    """What kind of optimizer it is."""

    name: str  # for errors
    counts: bool  # whether ``state`` shows the step count
    master: bool  # whether 16-bit parameters have float32 ones that are stepped in their place
    flat: FlatGroups | None  # parameters and gradients that were moved into flat memory, group by group


class Update:
    """What was derived from param groups, state and the pattern of gradients: good while all these stay as they are.

    Args:
        groups: The param groups.
        state: The state, which parameters join with their first step.
        treat: What is done to a parameter.
        kind: What kind of optimizer it is.
        home: The device whose parameters these are; others are left alone.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, treat: Treat, kind: Kind, home: Home) -> None:
        self._lists = [list(group["params"]) for group in groups]
        mine = [
            (p, (g, i))
            for g, params in enumerate(self._lists)
            for i, p in enumerate(params)
            if _devices.home_of(p) is home
        ]
        self._params: list[Tensor] = [p for p, _ in mine]
        self._places = [place for _, place in mine]
        self.home = home
        self._everyone = list(range(len(self._params)))
        self._state, self._treat, self._kind, self._where = state, treat, kind, kind.name
        self._entries: dict[int, Entry] = {}
        self._present: list[int] | None = None
        self._copied: list[Tensor] = []
        self._hidden: set[int] = set()
        self._probe: Probe | None = None
        self._served = 0  # steps that the plan has taken without it
        self._starts = b""  # where the plan finds the gradients, as the bytes of an array
        self._alive: Sequence[Tensor] = ()  # what the plan reads
        self._held: Probe | None = None  # what keeps it alive in their place
        self._unsettled = False  # whether a GPU knows more than the state shows
        self._replayable = False  # whether steps may be taken by a CUDA graph

    def describes(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups hold the same parameters."""
        return len(groups) == len(self._lists) and all(
            _same(seen, group["params"]) for seen, group in zip(self._lists, groups, strict=True)
        )

    def step(self, request: Request, options: Sequence[Options]) -> StepInfo | None:
        """Take a step; None where parameters or states moved or were changed, so that all must be derived anew."""
        try:
            return self.take(request, options) if self.prepare(options, request.zero_grads) else None
        finally:
            self.release()

    def prepare(self, options: Sequence[Options], write: bool) -> bool:
        """Find the gradients, have the plan read them and refuse what must be; False where ``step`` returns None.

        Gradients are kept alive until ``release``.
        """
        if self._probe is not None and self._probe.hold():
            self._held = self._probe
            if self._undisturbed() and not self._is_negated([self._params[i].grad for i in self._scalars]):
                stay = self._probe.pointers.tobytes() == self._starts
                if stay or self._kind.flat is None:  # gradients outside flat memory must be gathered
                    if not stay or write:
                        self._aim(self._probe.pointers.copy(), options, write)
                    return True
            self.release()
        return self._prepare_by_python(options, write)

    def _prepare_by_python(self, options: Sequence[Options], write: bool) -> bool:
        if self._kind.flat is not None:
            self._kind.flat.gather()
        listed: list[Any] = [p.grad for p in self._params]
        present, grads = [i for i, g in enumerate(listed) if g is not None], [g for g in listed if g is not None]
        if present != self._present:
            if any(_devices.home_of(self._params[i]) is not self.home for i in present):
                return False
            self._choose(present, grads, options)
        elif self._is_stale():
            return False
        self._alive = self._point(grads, options, write)
        self._served += 1
        if self._served >= 2 and self._probe is None and self._is_simple(grads):  # the pattern seems to last
            dtypes = dict(zip(present, self._dtypes, strict=True))
            self._probe = Probe(self._params, [dtypes.get(i) for i in self._everyone], self.home.device, self._owned)
        return True

    def release(self) -> None:
        """Let the gradients go."""
        self._alive = ()
        if self._held is not None:
            self._held.release()
            self._held = None

    def _is_simple(self, grads: Sequence[Tensor]) -> bool:
        """Whether parameters and gradients are what kernels read and write, with nothing in between."""
        simple = self._plain and not self._complex and not self._copied and set(map(type, grads)) <= PLAIN
        return simple and Probe.available()

    def take(self, request: Request, options: Sequence[Options]) -> StepInfo:
        """Take the step that was prepared."""
        self._masters.take_over()
        try:
            info = self.plan.step(request, options)
        finally:  # also after an interrupt: the plan counts a step before it is taken
            self._mirror.show()
        # Whether a GPU skipped the step is not asked, because the answer would have to be waited for.
        if self.home.on_gpu:
            self._unsettled = any(c.progress.fetch is not None for c in self.plan.cohorts)
            self._replayable = any(o.get("capturable") for o in options)
        if self.home.on_gpu or not info.skipped:
            torch.autograd.graph.increment_version(self._stepped)
            self._masters.wrote()
            if self._hidden and not self._unsettled:
                self._show_new(self._hidden.intersection(self._present or ()))
        for gradient in self._copied if request.zero_grads else ():  # the plan zeroed the copies
            gradient.zero_()
        return info

    def _show_new(self, these: Collection[int]) -> None:
        """Let ``state`` show parameters that took their first step."""
        for i in these:
            entry = self._entries[i]
            entry.state.show(entry.slot)
            if entry.slot.entries:
                self._state.keep(self._params[i], entry.state)
        self._hidden.difference_update(these)

    def settle(self) -> None:
        """Let ``state`` show what only the GPU knows; waits for it."""
        if self._unsettled:
            if self._replayable:
                self.plan.recount()
            self._mirror.settle()
            self._unsettled = self._replayable
            present = self._hidden.intersection(self._present or ())
            self._show_new([i for i in present if self._entries[i].record.progress.steps > 0])

    def norm(self) -> float:
        """Norm of the gradients that were prepared, as they are; waits for a GPU."""
        return self.plan.norm()

    def zero_gradients(self) -> None:
        """Set the gradients to zero, in a step that is skipped."""
        for p in self._stepped:
            cast(Tensor, p.grad).zero_()

    def upload_options(self, options: Sequence[Options]) -> None:
        """Bring options to where captured steps find them."""
        self.plan.upload_options(options)

    @property
    def is_capturable(self) -> bool:
        """Whether the last step was one that a CUDA graph may hold."""
        return self._replayable

    @property
    def has_gradients(self) -> bool:
        """Whether there is anything to step."""
        return bool(self._present)

    def verdict(self) -> Tensor | None:
        """1 if the last step was skipped, else 0, where only a GPU knows; not waited for."""
        result = self.plan.result
        return None if result is None else cast(Gpu, self.home).tensor(result)[1]

    # --- gradients -----------------------------------------------------------------------------------------------

    def _undisturbed(self) -> bool:
        """Whether the state is where it was, and says what the plan knows."""
        return [tensor.data_ptr() for tensor in self._flat_states] == self._states_at and self._mirror.holds()

    def _is_stale(self) -> bool:
        params = self._stepped if self._plain else [local(p.detach(), self._where) for p in self._stepped]
        return (
            [p.data_ptr() for p in params] != self._pointers
            or [p.nbytes for p in params] != self._nbytes
            or not self._undisturbed()
        )

    @staticmethod
    def _is_negated(grads: Sequence[Any]) -> bool:
        """Whether some are lazily negated or conjugated: their memory holds something else."""
        return any(g is not None and (g.is_neg() or g.is_conj()) for g in grads)

    def _point(self, grads: list[Tensor], options: Sequence[Options], write: bool) -> Sequence[Tensor]:
        """Point the plan at the gradients; returns what it reads, which must live until the step is over."""
        held = grads
        if not (self._plain and set(map(type, grads)) <= PLAIN):
            held = [local(g, name) for g, name in zip(grads, self._names, strict=True)]
            grads = self._local(grads)
        memories = grads
        if not self._are_plain(grads):
            memories = self._brought(grads)
            dtypes = [m.dtype for m in memories]
            if dtypes != self._dtypes:
                self._make_plan(dtypes, options, self._kind.flat is not None)
        self._copied = []
        if memories is not held:
            self._copied = [g for g, m in zip(held, memories, strict=True) if g.data_ptr() != m.data_ptr()]
        starts = np.array([m.data_ptr() for m in memories], np.uint64)
        hit = first_hit(starts, self._extent, *self._owned)
        if hit is not None:
            raise ValueError(
                f"{self._where}: the gradient of {self._names[hit]} shares memory with a parameter or a state, which "
                "the step writes. Set .grad to a copy."
            )
        self._aim(starts, options, write)
        return memories

    def _local(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """What this process holds of gradients, placed as their parameters are."""
        return [local_gradient(g, p, n) for g, p, n in zip(grads, self._stepped, self._names, strict=True)]

    def _are_plain(self, grads: list[Tensor]) -> bool:
        """Whether nothing about any gradient needs a closer look."""
        # List by list: a comprehension over a thousand tensors takes 80 µs, a function call for each 300.
        try:
            return (
                [g.dtype for g in grads] == self._seen_dtypes
                and [g.nbytes for g in grads] == self._extent.tolist()
                and [g.is_contiguous() for g in grads] == self._contiguous
                and all((grads[k].shape, grads[k].stride()) == layout for k, layout in self._strided)
                and not self._is_negated([grads[k] for k in self._lazy])
            )
        except RuntimeError:  # sparse tensors have no such things
            return False

    def _aim(self, starts: NDArray[np.uint64], options: Sequence[Options], write: bool) -> None:
        """Hand the addresses of the gradients to the plan."""
        clash = first_overlap(starts, self._extent) if write else None
        if clash is not None:
            a, b = (self._names[k] for k in clash)
            raise ValueError(
                f"{self._where}: the gradients of {a} and {b} share memory, so zero_grads=True would zero one before "
                "it is read. Set one to a copy."
            )
        placed = None
        if self._flat:
            placed = self._in_runs(starts, np.array([dtype.itemsize for dtype in self._dtypes]))
            if placed is None:
                self._make_plan(self._dtypes, options, False)
        self.plan.point_at(starts if placed is None else placed)
        self._starts = starts.tobytes()

    def _brought(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients as kernels can read them."""
        return [
            gradient_memory(g, parameter_memory(p, name), self._has_master(p), self._where, name)
            for p, g, name in zip(self._stepped, grads, self._names, strict=True)
        ]

    def _in_runs(self, starts: NDArray[np.uint64], itemsizes: NDArray[np.int64]) -> NDArray[np.uint64] | None:
        """Addresses by the layout of the blocks, or None if the arrays do not lie so. An empty tensor says nothing."""
        bases = starts.astype(np.int64) - self._offsets * itemsizes
        for members in self._members:
            there = members[self._sizes[members] > 0]
            if there.size:
                if (bases[there] != bases[there[0]]).any() or (itemsizes[there] != itemsizes[there[0]]).any():
                    return None
                bases[members] = bases[there[0]]
        placed: NDArray[np.uint64] = (bases + self._offsets * itemsizes).astype(np.uint64)
        return placed

    def _has_master(self, parameter: Tensor) -> bool:
        return self._kind.master and parameter.dtype in (torch.float16, torch.bfloat16)

    def _name(self, i: int) -> str:
        group, index = self._places[i]
        return f"parameter {index} of group {group}"

    # --- the plan ------------------------------------------------------------------------------------------------

    def _choose(self, present: list[int], grads: Sequence[Tensor], options: Sequence[Options]) -> None:
        """Make the plan for the parameters that have a gradient now."""
        self.home.refuse_capture()
        self.settle()
        self._present = None  # until all of it is there
        self._names = [self._name(i) for i in present]
        self._stepped = [self._params[i] for i in present]
        memories = [parameter_memory(p, name) for p, name in zip(self._stepped, self._names, strict=True)]
        check_apart(memories, self._names, self._where)
        dtypes = [m.dtype for m in self._brought(self._local(grads))]
        self.home.require()
        self._admit(present, memories, options)
        self._masters = Masters(
            [
                (local(p.detach(), name), local(self._entries[i].slot.entries[MASTER], name))
                for i, p, name in zip(present, self._stepped, self._names, strict=True)
                if self._has_master(p)
            ]
        )
        self._plain = all(type(p) in PLAIN for p in self._stepped)
        self._entered = [self._entries[i] for i in present]
        self._blocks = list({id(e.slot.block): e.slot.block for e in self._entered}.values())
        self._pointers, self._nbytes = [m.data_ptr() for m in memories], [m.nbytes for m in memories]
        self._flat_states = [tensor for block in self._blocks for tensor in block.tensors()]
        self._states_at = [tensor.data_ptr() for tensor in self._flat_states]
        extents = zip(self._states_at, [tensor.nbytes for tensor in self._flat_states], strict=True)
        owned = [*zip(self._pointers, self._nbytes, strict=True), *extents]
        starts, nbytes = np.array(sorted(x for x in owned if x[1]), np.uint64).reshape(-1, 2).T
        self._owned = starts, nbytes.astype(np.int64)
        raw = [local(p.detach(), name) for p, name in zip(self._stepped, self._names, strict=True)]
        self._contiguous = [p.is_contiguous() for p in raw]
        self._strided = [(k, (p.shape, p.stride())) for k, p in enumerate(raw) if not p.is_contiguous()]
        # The only contiguous tensors that autograd leaves negated: imaginary parts of one element.
        self._lazy = [k for k, p in enumerate(raw) if p.is_complex() or p.numel() == 1]
        self._scalars = [i for i, p in zip(present, raw, strict=True) if p.numel() == 1]
        self._complex = {k: p.dtype for k, p in enumerate(raw) if p.is_complex()}
        records = [e.record for e in self._entered]
        self._offsets, self._sizes = np.array([(r.offset, r.size) for r in records], np.int64).reshape(-1, 2).T
        blocks = np.array([self._blocks.index(e.slot.block) for e in self._entered])
        self._members = [np.flatnonzero(blocks == b) for b in range(len(self._blocks))]
        self._make_plan(dtypes, options, self._kind.flat is not None)
        self._present = present

    def _make_plan(self, dtypes: list[torch.dtype], options: Sequence[Options], flat: bool) -> None:
        self.home.refuse_capture()
        self.settle()
        records = [e.record for e in self._entered]
        if flat:
            itemsizes = np.array([ITEMSIZE[r.dtype] for r in records])
            placed = self._in_runs(np.array([r.address for r in records], np.uint64), itemsizes)
            flat = placed is not None
            for record, address in zip(records, () if placed is None else placed.tolist(), strict=False):
                record.address = address
        self._flat = flat
        treatments = [self._treat(options[r.group], p) for r, p in zip(records, self._stepped, strict=True)]
        signs = [-1.0 if o.get("maximize") else 1.0 for o in options]
        stored: Any = [STORED[dtype] for dtype in dtypes]
        self.plan: Plan = self.home.plan(records, stored, treatments, flat, signs)
        self._mirror = Mirror(records, [e.slot for e in self._entered])
        self._dtypes = dtypes
        self._seen_dtypes = [self._complex.get(k, dtype) for k, dtype in enumerate(dtypes)]
        self._extent = np.array([r.size * dtype.itemsize for r, dtype in zip(records, dtypes, strict=True)], np.int64)
        self._starts = b""
        self._probe, self._served = None, 0

    def _admit(self, present: Sequence[int], memories: Sequence[Tensor], options: Sequence[Options]) -> None:
        """Give every parameter a slot, with what its state holds already."""
        new: dict[tuple[torch.dtype, int], list[tuple[int, Tensor]]] = {}
        for i, memory in zip(present, memories, strict=True):
            if i in self._entries:
                continue
            state = self._state.of(self._params[i])
            slot = state.slot
            if (
                slot is not None
                and state.in_place
                and slot.layout == _layout(memory)
                and slot.block.home is self.home  # parameters may have moved
            ):
                slot.block.refresh()
                self._enter(i, memory, state, slot, options)
            else:
                group = 0 if self._kind.flat is None else self._places[i][0]  # which was laid out by itself
                new.setdefault((memory.dtype, group), []).append((i, memory))
        for members in new.values():
            block = Block([memory for _, memory in members], self.home)
            for index, (i, memory) in enumerate(members):
                state = self._state.of(self._params[i])
                self._enter(i, memory, state, Slot(block, index, _layout(memory)), options)

    def _enter(self, i: int, memory: Tensor, state: ParameterState, slot: Slot, options: Sequence[Options]) -> None:
        parameter, group = self._params[i], self._places[i][0]
        rule = self._treat(options[group], parameter).rule
        progress = self._progress(rule, state, options[group])
        for name in [STEP] * self._kind.counts + list(progress.carry or {}):
            slot.add_number(name)
        for name, start in initial_states(rule, options[group]).items():
            if name not in slot.entries:
                slot.add_state(name, parameter, state.get(name), start, f"{self._where}: {self._name(i)}")
        copy = None
        if self._has_master(parameter):
            copy = Copy(STORED[memory.dtype].name, memory.data_ptr())
            if MASTER not in slot.entries:
                saved = state.get(MASTER)
                slot.add_state(MASTER, parameter, parameter if saved is None else saved, 0.0, self._where)
            memory = local(slot.entries[MASTER], self._name(i))
        record = slot.block.record(slot.index, parameter, memory, group, progress)
        record.copy = copy
        self._entries[i] = Entry(record, slot, state)
        self._hidden.add(i)

    def _progress(self, rule: Rule, state: ParameterState, options: Options) -> Progress:
        """How far the parameter has come, by what its state says."""
        if self._kind.counts:
            steps = int(number(state.get(STEP, 0)))
        else:  # only the first step differs from the others, and leaves a state
            steps = int(any(state.get(name) is not None for name in rule.state))
        if rule.carry is None:
            return Progress(steps)
        carried = rule.carry(options)._asdict()
        return Progress(steps, {name: number(state.get(name, start)) for name, start in carried.items()})


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _layout(memory: Tensor) -> tuple[Any, ...]:
    return memory.shape, memory.stride(), COMPUTED[memory.dtype]
