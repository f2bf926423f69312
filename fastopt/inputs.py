"""What a user passes as parameters and as gradients, brought into one form."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import HOST, device_of
from .engine.device import Array, Device, addresses, first_hit, first_overlap, is_array
from .engine.plan import Parameter, StepCount
from .flat import FlatBuffer, Layout
from .kernels.dtypes import ITEMSIZE
from .watch import Watch


class Group(NamedTuple):
    """The arrays of one param group and their memory, their layout in the state arrays, and the flat buffer they came
    in, if any."""

    device: Device
    arrays: dict[str, Array]
    layout: Layout
    flat: FlatBuffer | None

    def records(self, index: int) -> list[Parameter]:
        """The plans' records of these parameters, as members of the group of this index."""
        layout, flat = self.layout, self.flat
        if flat is not None:  # an empty view does not know where it lies
            places = [self.device.address(flat.data) + offset * flat.dtype.itemsize for offset in layout.offsets]
        else:
            places = [self.device.address(array) for array in self.arrays.values()]
        ends, step_count = (*layout.offsets[1:], layout.total), StepCount()
        return [
            Parameter(
                *(name, array, array.size, array.dtype.name, index, offset, end - offset, place),
                step_count=step_count,
                shape=array.shape,
                guard=weakref.ref(array),
            )
            for (name, array), offset, end, place in zip(self.arrays.items(), layout.offsets, ends, places, strict=True)
        ]

    def written(self, members: list[Parameter]) -> list[Parameter]:
        """The arrays that a step writes, given the records of this group: the parameters, or the whole flat buffer.

        A flat buffer's views are windows on it: as in NumPy, one made read-only does not make its base so, and to look
        at ten thousand views each step would take a sixth of the step.
        """
        if self.flat is None:
            return members
        data = self.flat.data
        return [
            Parameter(
                *("FlatBuffer.data", data, data.size, data.dtype.name, members[0].group, 0, data.size),
                self.device.address(data),
                shape=data.shape,
                guard=weakref.ref(data),
            )
        ]


def groups_in(params: Any, where: str) -> list[Mapping[str, Any]]:
    """The param groups in what a constructor is given: several, or one."""
    if isinstance(params, Mapping) or is_array(params) or not isinstance(params, Iterable):
        return [{"params": params}]
    listed: list[Any] = list(params)
    if not any(isinstance(item, Mapping) for item in listed):
        return [{"params": listed}]
    for i, item in enumerate(listed):
        if not isinstance(item, Mapping) or "params" not in item:
            raise TypeError(f'{where}: params[{i}] is not a param group, a dict with the key "params".')
    return listed


def collect(params: Any, first_index: int, device: Device | None, where: str) -> Group:
    """The arrays of a param group: a FlatBuffer, a mapping, or a sequence, whose arrays are named by their index.

    They live in ``device``, or, where that is None, where the first of them lives.
    """
    if is_array(params):
        raise TypeError(
            f"{where} is a single array; needed is a FlatBuffer, a mapping or a sequence of arrays, such as [array]."
        )
    by_name = isinstance(params, Mapping)
    if isinstance(params, Mapping):
        named: dict[str, Any] = dict(params)
        for name in named:
            if not isinstance(name, str):
                raise TypeError(f"{where}: names are strings, got {name!r}.")
    elif isinstance(params, Iterable) and not isinstance(params, (str, bytes)):
        named = {str(first_index + i): array for i, array in enumerate(params)}
    else:
        raise TypeError(f"{where} is {params!r}; needed is a FlatBuffer, a mapping or a sequence of arrays.")
    if not named:
        raise ValueError(f"{where} is empty; an optimizer needs at least one parameter.")
    places = [f"{where}[{name!r}]" if by_name else f"{where}[{i}]" for i, name in enumerate(named)]
    if device is None:
        device = device_of(next(iter(named.values())), places[0])
    arrays = {name: device.parameter(array, place) for (name, array), place in zip(named.items(), places, strict=True)}
    flat = params if isinstance(params, FlatBuffer) else None
    layout = flat.layout if flat is not None else Layout.of({name: a.shape for name, a in arrays.items()})
    return Group(device, arrays, layout, flat)


class Memory:
    """The memory that a step writes: parameters and states. Gradients must not lie in it."""

    def __init__(self, parameters: Sequence[Parameter], states: Iterable[Array], device: Device, where: str) -> None:
        flats = list(states)
        starts = np.array([p.address for p in parameters], np.uint64)
        sizes = np.array([p.size * ITEMSIZE[p.dtype] for p in parameters], np.int64)
        clash = first_overlap(starts, sizes)
        if clash is not None:
            a, b = (parameters[k] for k in clash)
            same = "are the same array" if a.array is b.array else "share memory"
            raise ValueError(
                f"{where}: parameters {a.name!r} and {b.name!r} {same}; each would be updated twice. Pass it once."
            )
        starts = np.concatenate([starts, addresses(flats, device)])
        sizes = np.concatenate([sizes, _nbytes(flats)])
        clash = first_overlap(starts, sizes)
        if clash is not None:
            name = parameters[min(clash)].name
            raise ValueError(f"{where}: parameter {name!r} shares memory with a state of this optimizer.")
        order = np.argsort(starts, kind="stable")
        order = order[sizes[order] > 0]
        self._starts, self._sizes = starts[order], sizes[order]

    def hit_by(self, starts: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> int | None:
        """Index of the first given range that shares memory with parameters or states, or None."""
        return first_hit(starts, nbytes, self._starts, self._sizes)


class Gradients(NamedTuple):
    """Checked gradients: those that are there, by the index of their parameter."""

    arrays: list[Any]  # to be kept alive during the step: the arrays (copies of strided ones) or one flat buffer
    present: tuple[int, ...]
    dtypes: list[np.dtype[Any]]
    starts: NDArray[np.uint64]
    flat: bool


class GradientReader:
    """Turns what ``step`` is given into ``Gradients``, and knows gradients again that did not move.

    It also looks at the parameters again, whether they are as they were when they were checked.

    Args:
        parameters: All parameters, in their order.
        written: What is looked at again in each step: the parameters, or whole flat buffers.
        layout: Layout that a flat buffer of gradients must have to be walked in one run; None where parameters are
            not one flat buffer.
        memory: Where gradients must not lie.
        device: Where they must live.
        where: Name of the optimizer, for errors.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        written: Sequence[Parameter],
        layout: Layout | None,
        memory: Memory,
        device: Device,
        where: str,
    ) -> None:
        self._written = list(written)
        self._kept = [p.array for p in written]
        self._names = [p.name for p in parameters]
        self._parameters = [p.array for p in parameters]
        self._layout = layout
        self._memory = memory
        self._device = device
        self._step = f"{where}.step"
        self._where = f"{where}.step: grads"
        self._watch: Watch | None = None  # of the parameters
        self._seen: Watch | None = None  # of the gradients of the last step, too
        self._seen_flat: weakref.ref[FlatBuffer] | None = None
        self._candidates: list[Any] | None = None
        self._candidate_flat: weakref.ref[FlatBuffer] | None = None
        self._seen_for_writing = False
        self._last_starts: NDArray[np.uint64] = np.zeros(0, np.uint64)

    def read(self, grads: Any, write: bool) -> tuple[Gradients | None, list[Any]]:
        """Checked gradients, or None where they are the very arrays of the last call; and what keeps them alive."""
        again = self._seen_flat is not None and self._seen_flat() is grads
        flat = again or (isinstance(grads, FlatBuffer) and grads.layout == self._layout)
        listed = [grads.data] if flat else self._in_order(grads)
        if (
            self._seen is not None
            and again == (self._seen_flat is not None)
            and (self._seen_for_writing or not write)
            and self._seen.unchanged(listed)
        ):
            return None, listed
        if self._watch is None or not self._watch.unchanged([]):
            self._watch = self._look_again()
        self.forget()
        found = self._read_flat(grads, write) if flat else self._read_arrays(listed, write)
        present = [g for g in listed if g is not None]
        copied = not all(map(operator.is_, found.arrays, present))  # a copy has to be made again each time
        stayed = not copied and np.array_equal(found.starts, self._last_starts)
        self._candidates = listed if stayed else None  # arrays that stay may come again: worth remembering
        self._candidate_flat = weakref.ref(grads) if flat else None
        self._seen_for_writing = write
        self._last_starts = found.starts
        return found, [*listed, *found.arrays]

    def forget(self) -> None:
        """Know no gradients again."""
        self._seen = self._seen_flat = None

    def remember(self) -> None:
        """The gradients read last are the plan's. They are not kept alive, which would double their memory."""
        if self._candidates is not None:
            self._seen = Watch(self._kept, self._candidates)
            self._seen_flat = self._candidate_flat
            self._candidates = None

    def _look_again(self) -> Watch:
        """Refuse parameters that were changed in place since they were checked."""
        for p in self._written if self._device is HOST else ():  # CuPy's arrays cannot be
            array = self._device.parameter(p.array, f"{self._step}: parameter {p.name!r}")
            if (array.dtype.name, array.shape) != (p.dtype, p.shape):
                raise ValueError(
                    f"{self._step}: parameter {p.name!r} was {p.dtype} of shape {p.shape} when it was given and is now "
                    f"{array.dtype.name} of shape {array.shape}. Make a new optimizer."
                )
            if p.size and self._device.address(array) != p.address:
                raise ValueError(
                    f"{self._step}: parameter {p.name!r} was given other memory in place. Make a new optimizer."
                )
        return Watch(self._kept)

    def _in_order(self, grads: Any) -> list[Any]:
        """The gradients in the order of the parameters."""
        if type(grads) is not list and isinstance(grads, Mapping):
            try:
                listed = [grads[name] for name in self._names]
            except KeyError as missing:
                raise ValueError(
                    f"{self._where} lacks {missing.args[0]!r}; pass None for a parameter without gradient."
                ) from None
            if len(grads) != len(listed):
                unknown = sorted(map(repr, set(grads) - set(self._names)))
                raise ValueError(f"{self._where} has names that no parameter has: {', '.join(unknown)}.")
            return listed
        if is_array(grads) or isinstance(grads, (str, bytes)) or not isinstance(grads, Iterable):
            kind = "single array" if is_array(grads) else type(grads).__name__
            raise TypeError(f"{self._where} is a {kind}; needed is a FlatBuffer, a mapping or a sequence of arrays.")
        listed = list(grads)
        if len(listed) != len(self._names):
            raise ValueError(
                f"{self._where}: as many gradients as parameters are needed, got {len(listed)} for {len(self._names)}."
            )
        return listed

    def _read_flat(self, grads: FlatBuffer, write: bool) -> Gradients:
        assert self._layout is not None
        arrays = list(grads.values())
        if arrays:
            self._device.gradient(arrays[0], self._parameters[0], f"{self._where}{self._place(0)}", write)
        offsets = np.array(self._layout.offsets, np.uint64)
        start = np.uint64(self._device.address(grads.data))
        starts = start + offsets * np.uint64(grads.dtype.itemsize)
        found = Gradients([grads.data], tuple(range(len(arrays))), [grads.dtype] * len(arrays), starts, True)
        self._check_memory(np.array([start]), np.array([grads.nbytes]), [0])
        return found

    def _read_arrays(self, listed: list[Any], write: bool) -> Gradients:
        present = tuple(i for i, g in enumerate(listed) if g is not None)
        arrays = [listed[i] for i in present]
        parameters = [self._parameters[i] for i in present]
        if not self._device.plain(arrays, parameters):
            arrays = [
                self._device.gradient(g, p, f"{self._where}{self._place(i)}", write)
                for g, p, i in zip(arrays, parameters, present, strict=True)
            ]
        starts, nbytes = addresses(arrays, self._device), _nbytes(arrays)
        self._check_memory(starts, nbytes, present)
        if write:
            clash = first_overlap(starts, nbytes)
            if clash is not None:
                a, b = (self._place(present[k]) for k in clash)
                raise ValueError(
                    f"{self._where}{a} and {b} share memory, so zero_grads=True would zero one before it is read. "
                    "Pass a copy of one."
                )
        return Gradients(arrays, present, [a.dtype for a in arrays], starts, False)

    def _place(self, index: int) -> str:
        """A gradient in an error: by its parameter's name, or by its place where it has no other."""
        name = self._names[index]
        return f"[{index}]" if name == str(index) else f"[{name!r}]"

    def _check_memory(self, starts: NDArray[np.uint64], nbytes: NDArray[np.int64], present: Sequence[int]) -> None:
        hit = self._memory.hit_by(starts, nbytes)
        if hit is not None:
            raise ValueError(
                f"{self._where}{self._place(present[hit])} shares memory with a parameter or a state, "
                "which the step writes. Pass a copy."
            )


def _nbytes(arrays: Sequence[Array]) -> NDArray[np.int64]:
    return np.fromiter((a.nbytes for a in arrays), np.int64, len(arrays))


def named_arrays(function: str, params: Any) -> dict[str, Array]:
    """The arrays of a mapping (such as FlatBuffer) or sequence, by name."""
    if isinstance(params, Sequence) and not isinstance(params, (str, bytes)):
        params = {str(index): array for index, array in enumerate(params)}
    if not isinstance(params, Mapping):
        raise TypeError(f"{function}: params must be a FlatBuffer, mapping or sequence, got {type(params).__name__}.")
    for name, array in params.items():
        if not isinstance(name, str):
            raise TypeError(f"{function}: the names of params must be strings, got {name!r}.")
        device_of(array, f"{function}: params[{name!r}]").array(array, f"{function}: params[{name!r}]")
    return dict(params)
