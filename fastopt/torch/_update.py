"""From param groups, state and ``.grad`` to a plan, and the checks that all is as it was when the plan was made."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import first_hit, first_overlap
from ..engine.plan import Plan
from ..engine.step import Request, StepInfo
from ..kernels.dtypes import ITEMSIZE
from ..kernels.rules.rule import Options
from . import _devices
from ._devices import Gpu, Home
from ._entries import Entries, Kind, Treat
from ._master import MASTER, Masters
from ._probe import Probe
from ._state import Mirror, State
from ._tensors import PLAIN, STORED, address_of, gradient_memory, local, local_gradient, parameter_memory


class Update:
    """What was derived from param groups, state and the pattern of gradients: good while all these stay as they are.

    Args:
        groups: The param groups.
        state: The state, which parameters join with their first step.
        kind: What kind of optimizer it is.
        home: The device whose parameters these are; others are left alone.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]], state: State, kind: Kind, home: Home) -> None:
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
        self._kind, self._where = kind, kind.name
        self._entries = Entries(self._params, self._places, state, kind, home)
        self._present: list[int] | None = None
        self._copied: list[Tensor] = []
        self._masters = Masters([])
        self._hidden: set[int] = set()
        self._probe: Probe | None = None
        self._served = 0  # steps that the plan has taken without it
        self._starts = b""  # where the plan finds the gradients, as the bytes of an array
        self._alive: Sequence[Tensor] = ()  # what the plan reads
        self._held: Probe | None = None  # what keeps it alive in their place
        self._pending = False  # whether a step may have been taken that state and versions do not show yet
        self._unsettled = False  # whether a GPU knows more than the state shows
        self._replayable = False  # whether steps may be taken by a CUDA graph

    def describes(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups hold the same parameters."""
        return len(groups) == len(self._lists) and all(
            _same(seen, group["params"]) for seen, group in zip(self._lists, groups, strict=True)
        )

    def step(self, request: Request, options: Sequence[Options], treat: Treat) -> StepInfo | None:
        """Take a step; None where parameters or states moved or were changed, so that all must be derived anew."""
        try:
            return self.take(request, options) if self.prepare(options, treat, request.zero_grads) else None
        finally:
            self.release()

    def prepare(self, options: Sequence[Options], treat: Treat, write: bool) -> bool:
        """Find the gradients, have the plan read them and refuse what must be; False where ``step`` returns None.

        Gradients are kept alive until ``release``.
        """
        if self._pending:
            self._conclude()
        if self._probe is not None:
            self._held = self._probe
            if (
                self._probe.hold()
                and self._mirror.holds()
                and not self._is_negated([self._params[i].grad for i in self._scalars])
            ):
                stay = self._probe.pointers.tobytes() == self._starts
                if stay or self._kind.flat is None:  # gradients outside flat memory must be gathered
                    if not stay or write:
                        self._aim(self._probe.pointers.copy(), options, treat, write)
                    return True
            self.release()
        return self._prepare_by_python(options, treat, write)

    def _prepare_by_python(self, options: Sequence[Options], treat: Treat, write: bool) -> bool:
        if self._kind.flat is not None:
            self._kind.flat.gather()
        listed: list[Any] = [p.grad for p in self._params]
        present, grads = [i for i, g in enumerate(listed) if g is not None], [g for g in listed if g is not None]
        if present != self._present:
            if any(_devices.home_of(self._params[i]) is not self.home for i in present):
                return False
            if self._present is not None and (self._entries.moved() or not self._mirror.holds()):
                return False
            self._choose(present, grads, options, treat)
        elif self._is_stale():
            return False
        self._alive = self._point(grads, options, treat, write)
        self._served += 1
        if self._served >= 2 and self._probe is None and self._is_simple(grads):  # the pattern seems to last
            dtypes = dict(zip(present, self._dtypes, strict=True))
            wanted = [dtypes.get(i) for i in self._everyone]
            shown = list(zip(self._shown, self._shown_at, strict=True))
            self._probe = Probe(self._params, wanted, shown, self.home.device, self._owned)
        return True

    def release(self) -> None:
        """Let the gradients go."""
        self._alive = ()
        if self._held is not None:
            self._held.release()
            self._held = None

    def _is_simple(self, grads: Sequence[Tensor]) -> bool:
        """Whether parameters and gradients are what kernels read and write, with nothing in between."""
        types = {*map(type, grads), *map(type, self._shown)}
        if any(p.is_inference() for p in self._params):
            return False
        return self._plain and not self._complex and not self._copied and types <= PLAIN and Probe.available()

    def take(self, request: Request, options: Sequence[Options]) -> StepInfo:
        """Take the step that was prepared."""
        self._masters.take_over()
        # An interrupt may come anywhere from here on: what it leaves undone is made good when somebody needs it.
        self._pending = True
        info = self.plan.step(request, options)
        self._replayable = self.home.on_gpu and any(o.get("capturable") for o in options)
        # Whether a GPU skipped the step is not asked, because the answer would have to be waited for.
        self._conclude(skipped=not self.home.on_gpu and info.skipped)
        for gradient in self._copied if request.zero_grads else ():  # the plan zeroed the copies
            if not gradient._is_zerotensor():
                gradient.zero_()
        return info

    def _conclude(self, *, skipped: bool = False) -> None:
        """Let versions and ``state`` follow the parameters. Once more does no harm."""
        self._mirror.show()
        if not skipped:
            if self._probe is None or not self._probe.bump_versions():
                torch.autograd.graph.increment_version(self._stepped)
            self._masters.wrote()
            if self.home.on_gpu:
                self._unsettled = any(c.progress.fetch is not None for c in self.plan.cohorts)
            if self._hidden and not self._unsettled:
                self._show_stepped()
        self._pending = False

    def _show_stepped(self) -> None:
        """Let ``state`` show parameters that took their first step."""
        for i in self._hidden.intersection(self._present or ()):
            if self._entries[i].record.progress.steps > 0:
                self._entries.show(i)
                self._hidden.discard(i)

    def settle(self) -> None:
        """Let ``state`` show all steps that were taken; waits for a GPU where only that knows."""
        if self._pending:
            self._conclude()
        if self._unsettled:
            if self._replayable:
                self.plan.recount()
            self._mirror.settle()
            self._unsettled = self._replayable
            self._show_stepped()

    def make_states(self, options: Sequence[Options], treat: Treat) -> None:
        """Make all states of the parameters that may get a gradient, without a step."""
        self.home.require()
        wanted = [i for i, p in enumerate(self._params) if p.requires_grad]
        memories = [parameter_memory(self._params[i], self._entries.name(i)) for i in wanted]
        self._entries.admit(wanted, memories, options, treat)
        Mirror([self._entries[i].counted for i in wanted])  # writes the numbers
        for i in wanted:
            self._entries.show_made(i)

    def refresh(self) -> None:
        """Let masters follow their parameters in the next step."""
        self._masters.refresh()

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
        return list(map(address_of, self._shown)) == self._shown_at and self._mirror.holds()

    def _is_stale(self) -> bool:
        params = self._stepped if self._plain else [local(p.detach(), self._where) for p in self._stepped]
        return (
            [p.data_ptr() for p in params] != self._pointers
            or [(p.dtype, p.shape, p.stride()) for p in params] != self._layouts
            or not self._undisturbed()
        )

    @staticmethod
    def _is_negated(grads: Sequence[Any]) -> bool:
        """Whether some are lazily negated or conjugated: their memory holds something else."""
        return any(g is not None and (g.is_neg() or g.is_conj()) for g in grads)

    def _point(self, grads: list[Tensor], options: Sequence[Options], treat: Treat, write: bool) -> Sequence[Tensor]:
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
                self._make_plan(dtypes, options, treat, self._kind.flat is not None)
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
        self._aim(starts, options, treat, write)
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
                and True not in [g._is_zerotensor() for g in grads]
            )
        except RuntimeError:  # sparse tensors have no such things
            return False

    def _aim(self, starts: NDArray[np.uint64], options: Sequence[Options], treat: Treat, write: bool) -> None:
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
                self._make_plan(self._dtypes, options, treat, False)
        self.plan.point_at(starts if placed is None else placed)
        self._starts = starts.tobytes()

    def _brought(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients as kernels can read them."""
        return [
            gradient_memory(g, parameter_memory(p, name), self._kind.has_master(p), self._where, name)
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

    # --- the plan ------------------------------------------------------------------------------------------------

    def _choose(self, present: list[int], grads: Sequence[Tensor], options: Sequence[Options], treat: Treat) -> None:
        """Make the plan for the parameters that have a gradient now."""
        self.home.refuse_capture()
        self.settle()
        self._forget_plan()
        self._names = [self._entries.name(i) for i in present]
        self._stepped = [self._params[i] for i in present]
        memories = [parameter_memory(p, name) for p, name in zip(self._stepped, self._names, strict=True)]
        dtypes = [m.dtype for m in self._brought(self._local(grads))]
        self.home.require()
        self._entries.admit(present, memories, options, treat)
        self._hidden.update(present)
        self._entered = [self._entries[i] for i in present]
        self._owned = self._entries.owned(present)
        raw = [local(p.detach(), name) for p, name in zip(self._stepped, self._names, strict=True)]
        self._masters = Masters(
            [
                (p, local(e.tensors[MASTER], "a master"))
                for p, e in zip(raw, self._entered, strict=True)
                if e.record.copy
            ]
        )
        self._plain = all(type(p) in PLAIN for p in self._stepped)
        self._pointers, self._layouts = [m.data_ptr() for m in memories], [(p.dtype, p.shape, p.stride()) for p in raw]
        self._shown = [t for e in self._entered for t in (*e.numbers.values(), *e.tensors.values())]
        self._shown_at = list(map(address_of, self._shown))
        self._contiguous = [p.is_contiguous() for p in raw]
        self._strided = [(k, (p.shape, p.stride())) for k, p in enumerate(raw) if not p.is_contiguous()]
        # The only contiguous tensors that autograd leaves negated: imaginary parts of one element.
        self._lazy = [k for k, p in enumerate(raw) if p.is_complex() or p.numel() == 1]
        self._scalars = [i for i, p in zip(present, raw, strict=True) if p.numel() == 1]
        self._complex = {k: p.dtype for k, p in enumerate(raw) if p.is_complex()}
        records = [e.record for e in self._entered]
        self._offsets, self._sizes = np.array([(r.offset, r.size) for r in records], np.int64).reshape(-1, 2).T
        arenas = np.array([id(e.slot.arena) for e in self._entered])
        self._members = [np.flatnonzero(arenas == arena) for arena in dict.fromkeys(arenas.tolist())]
        self._make_plan(dtypes, options, treat, self._kind.flat is not None)
        self._present = present

    def _forget_plan(self) -> None:
        """Before a plan is made: an interrupt must not leave half of it to be used."""
        self._present, self._probe, self._served, self._starts = None, None, 0, b""

    def _make_plan(self, dtypes: list[torch.dtype], options: Sequence[Options], treat: Treat, flat: bool) -> None:
        self.home.refuse_capture()
        self.settle()
        present = self._present
        self._forget_plan()
        records = [e.record for e in self._entered]
        if flat:
            itemsizes = np.array([ITEMSIZE[r.dtype] for r in records])
            placed = self._in_runs(np.array([r.address for r in records], np.uint64), itemsizes)
            flat = placed is not None
            for record, address in zip(records, () if placed is None else placed.tolist(), strict=False):
                record.address = address
        self._flat = flat
        treatments = [treat(options[r.group], p) for r, p in zip(records, self._stepped, strict=True)]
        signs = [-1.0 if o.get("maximize") else 1.0 for o in options]
        stored: Any = [STORED[dtype] for dtype in dtypes]
        self.plan: Plan = self.home.plan(records, stored, treatments, flat, signs)
        self._mirror = Mirror([e.counted for e in self._entered])
        self._dtypes = dtypes
        self._seen_dtypes = [self._complex.get(k, dtype) for k, dtype in enumerate(dtypes)]
        self._extent = np.array([r.size * dtype.itemsize for r, dtype in zip(records, dtypes, strict=True)], np.int64)
        self._present = present


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
