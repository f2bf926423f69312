"""What is derived for one pattern of gradients: the plan, and what must be as it was for the plan to be right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.device import first_hit, first_overlap
from ..engine.plan import StepCount
from ..kernels.dtypes import ITEMSIZE
from ..kernels.layout import structure
from ..kernels.rules.rule import Options
from . import _interface
from ._master import MASTER, MasterWeights
from ._state import STEP
from ._tensors import PLAIN, STORED, address_of, layout_of, local, real

if TYPE_CHECKING:
    from ..engine.plan import Plan
    from ._parameters import Parameters, TensorParameter


class StateSync:
    """Shows how far scalar groups have come in the tensors of ``state``, and notices where somebody else wrote these.

    Args:
        parameters: Whose numbers they are.
        counts: Whether ``state`` has step counts.
    """

    def __init__(self, parameters: Iterable[TensorParameter], counts: bool) -> None:
        alike: dict[tuple[int, int], list[TensorParameter]] = {}
        for p in parameters:
            alike.setdefault((id(p.step_count), id(p.slot.arena)), []).append(p)
        self._shown: list[tuple[NDArray[Any], Any, StepCount, str]] = []
        for members in alike.values():
            step_count, arena = members[0].step_count, members[0].slot.arena
            for name in [STEP] * counts + list(step_count.carry or ()):
                loose = [p.loose[name] for p in members if name in p.loose]
                self._shown += [(x.detach().numpy().reshape(-1), slice(None), step_count, name) for x in loose]
                indices = [p.slot.row for p in members if name not in p.loose]
                where: Any = slice(None) if indices == list(range(arena.size)) else np.array(indices, np.int64)
                if indices:
                    self._shown.append((arena.numbers[name], where, step_count, name))
        self._values = [self._value(array, step_count, name) for array, _, step_count, name in self._shown]
        self._arrays = list({id(array): array for array, *_ in self._shown}.values())
        self._seen = [array.tobytes() for array in self._arrays]

    @staticmethod
    def _value(array: NDArray[Any], step_count: StepCount, name: str) -> Any:
        return array.dtype.type(step_count.steps if name == STEP else (step_count.carry or {})[name])

    def holds(self) -> bool:
        """Whether the tensors say what was shown last."""
        return [array.tobytes() for array in self._arrays] == self._seen  # three times as fast as comparing numbers

    def agrees(self) -> bool:
        """Whether the tensors say what the scalar groups know now, after others wrote both."""
        for k, (array, where, step_count, name) in enumerate(self._shown):
            self._values[k] = value = self._value(array, step_count, name)
            if not (array[where] == value).all():
                return False
        self._seen = [array.tobytes() for array in self._arrays]
        return True

    def show(self) -> None:
        """Write what the scalar groups know; what only a GPU knows is left to ``settle``."""
        for k, (array, where, step_count, name) in enumerate(self._shown):
            if step_count.fetch is None:
                self._values[k] = array[where] = self._value(array, step_count, name)
        self._seen = [array.tobytes() for array in self._arrays]

    def settle(self) -> None:
        """Write what the GPU knows, but where somebody else wrote meanwhile; waits for it."""
        expected = {id(array): array.copy() for array in self._arrays}
        for k, (array, where, step_count, name) in enumerate(self._shown):
            value = self._value(array, step_count, name)
            array[where] = np.where(array[where] == self._values[k], value, array[where])
            self._values[k] = expected[id(array)][where] = value
        self._seen = [array.tobytes() for array in expected.values()]


class Probe:
    """Knows plain parameters on one device, with or without gradient, as they are now; none is an inference tensor.

    Args:
        params: All parameters.
        present: Indices of those that have a gradient; the others must have none.
        dtypes: Of the gradients.
        states: The tensors in ``state`` that a step writes, and where their elements are.
        device: Where they and their gradients are.
        owned: Addresses and bytes of what a step writes, sorted and apart: no gradient may lie there.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        present: Sequence[int],
        dtypes: Sequence[torch.dtype],
        states: Sequence[tuple[Tensor, int]],
        device: torch.device,
        owned: tuple[NDArray[np.uint64], NDArray[np.int64]],
    ) -> None:
        library = _interface.library()
        assert library is not None
        self._library = library
        self._alive = params, states  # the addresses of these objects hold while they live
        self._table = library.table(device)
        self._known = np.array([_known(t, address) for t, address in states], structure("known"))
        self._states = np.array((self._known.ctypes.data, len(states)), structure("states"))
        stepped = [params[i] for i in present]
        expected = self._expected = np.zeros(len(params), structure("expected"))
        expected["parameter"] = [_known(p, 0) for p in params]
        expected["dim"] = -1
        layouts = [(p.shape, p.stride()) for p in stepped]
        self._layouts = {layout: np.array(layout, np.int64) for layout in layouts}
        places = {layout: numbers.ctypes.data for layout, numbers in self._layouts.items()}
        columns = {
            "dim": [p.dim() for p in stepped],
            "nbytes": [p.numel() * dtype.itemsize for p, dtype in zip(stepped, dtypes, strict=True)],
            "sizes": [places[layout] for layout in layouts],
            "strides": [places[layout] + 8 * len(layout[0]) for layout in layouts],
            "dtype": [library.codes[p.dtype] for p in stepped],
            "gradient_dtype": [library.codes[dtype] for dtype in dtypes],
            "gradient_storage": [0 if p.grad is None else p.grad.untyped_storage()._cdata for p in stepped],
        }
        chosen = list(present)
        for name, column in columns.items():
            expected[name][chosen] = column
        expected["parameter"]["data"][chosen] = [p.data_ptr() for p in stepped]
        self._count = len(stepped)
        self.pointers: NDArray[np.uint64] = np.zeros(self._count, np.uint64)
        self._held = np.zeros(self._count, np.uint64)
        self._owned = np.array([owned[0], owned[0] + owned[1].astype(np.uint64)])  # where each begins and ends
        begin, end = (row.ctypes.data for row in self._owned)
        self._runs = np.array((begin, end, len(owned[0])), structure("runs"))
        # Reading an array's address takes as long as asking for a gradient.
        arrays = self._table, expected, self._states, self._runs, self.pointers, self._held
        table, tensors, *others = (array.ctypes.data for array in arrays)
        self._arguments = table, tensors, len(expected), *others

    def hold(self) -> bool:
        """Put the addresses of the gradients into ``pointers`` and keep them alive.

        Returns:
            False, and nothing is kept alive, if something is not as it was, or a gradient lies where the step writes.
        """
        return bool(self._library.gradients(*self._arguments))

    def release(self) -> None:
        """Let the gradients go, if any are kept alive."""
        self._library.release(self._arguments[0], self._arguments[-1], self._count)

    def bump_versions(self) -> bool:
        """Tell autograd that the parameters with a gradient were written; False if one is not the tensor it was."""
        return bool(self._library.bump_versions(*self._arguments[:3]))


def _known(tensor: Tensor, address: int) -> tuple[int, ...]:
    return id(tensor), tensor._cdata, address, tensor.untyped_storage()._cdata


class Pattern:
    """A plan for the parameters that have a gradient, whose states exist.

    Args:
        parameters: All parameters of the device.
        present: Indices of those that have a gradient.
        dtypes: Of the gradients.
        flat: Whether neighbours in flat memory may be walked in one run.
        options: Of each group.
        make: The class of the plan.
    """

    def __init__(
        self,
        parameters: Parameters,
        present: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
        flat: bool,
        options: Sequence[Options],
        make: type[Plan],
    ) -> None:
        self._parameters, self._where = parameters, parameters.kind.name
        self.present, self.dtypes = present, dtypes
        self.key = present, dtypes, flat
        records = self._records = [parameters[i] for i in present]
        self.stepped = [parameters.params[i] for i in present]
        self._plain = all(type(p) in PLAIN and not p.is_complex() for p in self.stepped)
        own = self.stepped if self._plain else parameters.memories(present)
        # The only contiguous real tensors that autograd leaves negated: imaginary parts of one element.
        self._scalars = [k for k, r in enumerate(records) if r.size == 1]
        self._owned = parameters.owned(present)
        pairs = [(p, local(r.tensors[MASTER], "a master")) for p, r in zip(own, records, strict=True) if r.copy]
        self.masters = MasterWeights(pairs) if pairs else None
        self._itemsizes = np.array([dtype.itemsize for dtype in dtypes], np.int64)
        self._offsets, self._sizes = np.array([(r.offset, r.size) for r in records], np.int64).reshape(-1, 2).T
        self._extent = self._sizes * self._itemsizes
        arenas = np.array([id(r.slot.arena) for r in records])
        self._members = [np.flatnonzero(arenas == arena) for arena in dict.fromkeys(arenas.tolist())]
        if flat:
            itemsizes = np.array([ITEMSIZE[r.dtype] for r in records])
            placed = self._in_runs(np.array([r.address for r in records], np.uint64), itemsizes)
            flat = placed is not None
            for record, address in zip(records, () if placed is None else placed.tolist(), strict=False):
                record.address = address
        self._flat = flat
        signs = [-1.0 if o.get("maximize") else 1.0 for o in options]
        stored: Any = [STORED[dtype] for dtype in dtypes]
        memory = parameters.device
        self.plan = make(records, stored, [r.beginning.choice for r in records], flat, signs, memory)
        if parameters.shards:
            adapted = parameters.adapted(options)
            parameters.shards.join(self.plan, present, not adapted.keys().isdisjoint(parameters.shards.members))
            self.plan.ratios_wait = any(rule.sources for rule in adapted.values())
        self.sync = StateSync(records, parameters.kind.counts)
        self._served = 0  # steps that the plan has taken without a probe
        self.probe: Probe | None = None
        self._shown: list[tuple[Tensor, int]] = []  # tensors in ``state``, and where they were
        self.look_at_shown()
        self._starts = b""  # where the plan finds the gradients, as the bytes of an array

    # --- whether all is as it was --------------------------------------------------------------------------------

    @property
    def kept(self) -> int:
        """How many patterns an optimizer keeps."""
        return self.plan.kept

    def resume(self) -> bool:
        """Serve again, after other patterns did; False where parameters that went together no longer do."""
        return self.plan.resume()

    def look_at_shown(self) -> None:
        """Tensors were shown, which somebody may move from now on."""
        self.probe = None
        self._shown = [shown for r in self._records for shown in zip(r.tensors.values(), r.addresses, strict=True)]

    def knows(self) -> bool:
        """Whether the gradients are those of this pattern, as far as torch's C interface sees."""
        if self.probe is None or not self.probe.hold():
            return False
        self.probe.release()
        return True

    def hold(self, write: bool) -> bool:
        """Have torch's C interface find the gradients; False where something is not as it was. The probe holds them."""
        return (
            self.probe is not None
            and self.probe.hold()
            and self.sync.holds()
            and not _is_negated([self.stepped[k].grad for k in self._scalars])
            and self._are_where_they_were(write)
        )

    def _are_where_they_were(self, write: bool) -> bool:
        """Whether the plan knows where the gradients are, or may be told without a closer look."""
        assert self.probe is not None
        starts = self.probe.pointers
        stay = starts.tobytes() == self._starts
        if not stay and self._parameters.kind.flat is not None:  # gradients outside flat memory must be gathered
            return False
        return (stay and not write) or self.aim(starts.copy(), write)

    def is_stale(self) -> bool:
        """Whether some parameter or state is not where it was, or says something else."""
        own = self.stepped if self._plain else [real(local(p, self._where).detach()) for p in self.stepped]
        return (
            [p.data_ptr() for p in own] != [r.pointer for r in self._records]
            or [layout_of(p) for p in own] != [r.slot.layout for r in self._records]
            or any(address_of(t) != address for t, address in self._shown)
            or not self.sync.holds()
        )

    def look_for(self, grads: Sequence[Tensor]) -> None:
        """The pattern seems to last: have torch's C interface look from now on, where it can."""
        self._served += 1
        parameters = self._parameters
        if self._served < 2 or self.probe is not None or _interface.library() is None or not self._is_simple(grads):
            return
        device = torch.device(parameters.device.name)
        self.probe = Probe(parameters.params, self.present, self.dtypes, self._shown, device, self._owned)

    def _is_simple(self, grads: Sequence[Tensor]) -> bool:
        """Whether parameters and gradients are what kernels read and write, with nothing in between."""
        if not self._plain or any(p.is_inference() for p in self._parameters.params):
            return False
        return {*map(type, grads), *(type(t) for t, _ in self._shown)} <= PLAIN

    # --- gradients -----------------------------------------------------------------------------------------------

    def aim(self, starts: NDArray[np.uint64], write: bool) -> bool:
        """Have the plan read gradients at these addresses; False where it walks flat memory and they do not lie so."""
        hit = first_hit(starts, self._extent, *self._owned)
        if hit is not None:
            raise ValueError(
                f"{self._where}: the gradient of {self._records[hit].name} shares memory with a parameter or a state, "
                "which the step writes. Set .grad to a copy."
            )
        clash = first_overlap(starts, self._extent) if write else None
        if clash is not None:
            a, b = (self._records[k].name for k in clash)
            raise ValueError(
                f"{self._where}: the gradients of {a} and {b} share memory, so zero_grads=True would zero one before "
                "it is read. Set one to a copy."
            )
        placed = self._in_runs(starts, self._itemsizes) if self._flat else starts
        if placed is None:
            return False
        self.plan.point_at(placed)
        self._starts = starts.tobytes()
        return True

    def _in_runs(self, starts: NDArray[np.uint64], itemsizes: NDArray[np.int64]) -> NDArray[np.uint64] | None:
        """Addresses by the layout of the blocks, or None if the arrays do not lie so. An empty tensor says nothing."""
        bases = starts.astype(np.int64) - self._offsets * itemsizes
        for members in self._members:
            full = members[self._sizes[members] > 0]
            if full.size:
                if (bases[full] != bases[full[0]]).any() or (itemsizes[full] != itemsizes[full[0]]).any():
                    return None
                bases[members] = bases[full[0]]
        placed: NDArray[np.uint64] = (bases + self._offsets * itemsizes).astype(np.uint64)
        return placed


def _is_negated(grads: Sequence[Any]) -> bool:
    """Whether some are lazily negated or conjugated: their memory holds something else."""
    return any(g is not None and (g.is_neg() or g.is_conj()) for g in grads)
