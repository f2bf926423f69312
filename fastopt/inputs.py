"""What a user passes as parameters and as gradients, brought into one form."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import FlatBuffer, device_of, named
from .engine.device import HOST, Array, Device, Layout, addresses, first_hit, first_overlap, is_array
from .engine.plan import Parameter, Plan, StepCount
from .groups import Group
from .kernels.dtypes import ITEMSIZE
from .watch import Watch


def _records(arrays: Mapping[str, Array], group: int, layout: Layout, addresses: Iterable[int]) -> list[Parameter]:
    """The plans' records of parameters."""
    step_count, ends = StepCount(), (*layout.offsets[1:], layout.total)
    return [
        Parameter(
            *(name, array, array.size, array.dtype.name, group, offset, end - offset, address),
            step_count=step_count,
            shape=array.shape,
            guard=weakref.ref(array),
        )
        for (name, array), offset, end, address in zip(arrays.items(), layout.offsets, ends, addresses, strict=True)
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


def collect(params: Any, index: int, first: int, device: Device | None, where: str) -> Group:
    """The param group of this index: a FlatBuffer, a mapping, or a sequence, whose arrays are numbered from ``first``.

    They live in ``device``, or, where that is None, where the first of them lives.
    """
    arrays = named(params, where, first)
    if not arrays:
        raise ValueError(f"{where} is empty; an optimizer needs at least one parameter.")
    by_name = isinstance(params, Mapping)
    places = [f"{where}[{name!r}]" if by_name else f"{where}[{i}]" for i, name in enumerate(arrays)]
    if device is None:
        device = device_of(next(iter(arrays.values())), places[0])
    arrays = {name: device.parameter(array, place) for (name, array), place in zip(arrays.items(), places, strict=True)}
    is_flat = isinstance(params, FlatBuffer)
    if is_flat:
        data, layout, start = params.data, params.layout, device.address(params.data)
        # An empty view does not know where it lies.
        members = _records(arrays, index, layout, [start + offset * data.itemsize for offset in layout.offsets])
        written = _records({"FlatBuffer.data": data}, index, Layout.of({"FlatBuffer.data": data.shape}), [start])
    else:
        layout = Layout.of({name: a.shape for name, a in arrays.items()})
        members = written = _records(arrays, index, layout, map(device.address, arrays.values()))
    dtypes = {p.dtype for p in members}
    return Group(index, device, MappingProxyType(arrays), members, written, layout, is_flat, dtypes)


class Memory:
    """The memory that a step writes: parameters and states. Gradients must not lie in it.

    Raises:
        ValueError: A parameter shares a byte with another, or with a state.
    """

    def __init__(self, parameters: Sequence[Parameter], device: Device, where: str) -> None:
        states = list({id(state): state for p in parameters for state in p.states.values()}.values())
        addressed, sizes = [p.address for p in parameters], [p.size * ITEMSIZE[p.dtype] for p in parameters]
        starts = np.concatenate([np.array(addressed, np.uint64), addresses(states, device)])
        nbytes = np.concatenate([np.array(sizes, np.int64), _nbytes(states)])
        clash = first_overlap(starts, nbytes)
        if clash is not None:
            a, *others = (parameters[k] for k in clash if k < len(parameters))  # states never share memory
            if not others:
                raise ValueError(f"{where}: parameter {a.name!r} shares memory with a state of this optimizer.")
            same = "are the same array" if a.array is others[0].array else "share memory"
            names = f"{a.name!r} and {others[0].name!r}"
            raise ValueError(f"{where}: parameters {names} {same}; each would be updated twice. Pass one.")
        order = np.argsort(starts, kind="stable")
        order = order[nbytes[order] > 0]
        self._sorted = starts[order], nbytes[order]

    def hit_by(self, starts: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> int | None:
        """Index of the first given range that shares memory with parameters or states, or None."""
        return first_hit(starts, nbytes, *self._sorted)


class Gradients(NamedTuple):
    """Checked gradients: those that are there, by the index of their parameter."""

    arrays: list[Any]  # to be kept alive during the step: the arrays (copies of strided ones) or one flat buffer
    present: tuple[int, ...]
    dtypes: list[np.dtype[Any]]
    starts: NDArray[np.uint64]
    flat: bool
    copied: bool  # whether some are copies, which have to be made again each time


class Pattern:
    """Which parameters have a gradient, of which dtypes, flat or not: the plan for such gradients.

    It knows gradients again that did not move. They are not kept alive, which would double their memory.

    Args:
        gradients: The first ones.
        plan: The plan for such gradients.
        parameters: Arrays that are looked at again together with gradients.
    """

    def __init__(self, gradients: Gradients, plan: Plan, parameters: Sequence[Array]) -> None:
        self.plan, self._parameters = plan, parameters
        self.kept, self.resume = plan.kept, plan.resume
        self._flat, self._present, self._dtypes = gradients.flat, gradients.present, gradients.dtypes
        self._starts: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._watch: Watch | None = None  # of the gradients, where they seem to stay, and of the parameters
        self._written = False  # whether the gradients were checked for being written

    def knows(self, listed: list[Any], flat: bool, write: bool) -> bool:
        """Whether these are the very gradients at which the plan points, which were checked."""
        watch = self._watch
        return watch is not None and flat == self._flat and self._written >= write and watch.unchanged(listed)

    def serves(self, gradients: Gradients) -> bool:
        """Whether the plan is for such gradients."""
        mine = self._flat, self._dtypes, self._present
        return mine == (gradients.flat, gradients.dtypes, gradients.present)

    def aim(self, gradients: Gradients, listed: list[Any], write: bool) -> None:
        """Have the plan read these gradients, which are watched from now on if they lie where the last ones lay."""
        self._watch = None  # until the plan knows these: if that fails, the next call must not find the old ones
        self.plan.point_at(gradients.starts)
        stayed = not gradients.copied and np.array_equal(gradients.starts, self._starts)
        self._starts, self._written = gradients.starts, write
        self._watch = Watch(self._parameters, listed) if stayed else None


class GradientReader:
    """Turns what ``step`` is given into ``Gradients``.

    It also looks at the parameters again, whether they are as they were when they were checked.

    Args:
        groups: The param groups.
        device: Where gradients must live.
        where: Name of the optimizer, for errors.
    """

    def __init__(self, groups: Sequence[Group], device: Device, where: str) -> None:
        self._written = [p for group in groups for p in group.written]
        self.written = [p.array for p in self._written]
        members = [p for group in groups for p in group.members]
        self._names = [p.name for p in members]
        self._parameters = [p.array for p in members]
        # That of a flat buffer of gradients that is walked in one run. Merging across the padding of a flat buffer
        # writes that padding, which only one group may own.
        self._layout = groups[0].layout if len(groups) == 1 and groups[0].is_flat else None
        self._memory = Memory(members, device, where)
        self._device = device
        self._step = f"{where}.step"
        self._where = f"{where}.step: grads"
        self._watch: Watch | None = None  # of the parameters

    def listed(self, grads: Any) -> tuple[list[Any], bool]:
        """The gradients in the order of the parameters, or a flat buffer's data; and whether it is the latter."""
        if isinstance(grads, FlatBuffer) and self._is_laid_out(grads.layout):
            return [grads.data], True
        return self._in_order(grads), False

    def _is_laid_out(self, layout: Layout) -> bool:
        if layout is not self._layout:
            if layout != self._layout:
                return False
            self._layout = layout  # to compare that of 10,000 arrays takes a while
        return True

    def read(self, listed: list[Any], flat: bool, write: bool) -> Gradients:
        """Check gradients, and parameters again."""
        if self._watch is None or not self._watch.unchanged([]):
            self._watch = self._look_again()
        return self._read_flat(listed[0], write) if flat else self._read_arrays(listed, write)

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
        return Watch(self.written)

    def _in_order(self, grads: Any) -> list[Any]:
        """The gradients in the order of the parameters."""
        if type(grads) is not list and isinstance(grads, Mapping):
            if type(grads) is not dict:
                grads = dict(grads)  # a defaultdict would make what it lacks
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

    def _read_flat(self, data: Array, write: bool) -> Gradients:
        assert self._layout is not None
        self._device.gradient(data, self.written[0], f"{self._where}{self._place(0)}", write)
        start, offsets = np.uint64(self._device.address(data)), np.array(self._layout.offsets, np.uint64)
        self._check_memory(np.array([start]), np.array([data.nbytes]), [0])
        starts, count = start + offsets * np.uint64(data.itemsize), len(offsets)
        return Gradients([data], tuple(range(count)), [data.dtype] * count, starts, True, False)

    def _read_arrays(self, listed: list[Any], write: bool) -> Gradients:
        present = tuple(i for i, g in enumerate(listed) if g is not None)
        arrays = [listed[i] for i in present]
        parameters = [self._parameters[i] for i in present]
        copied = False
        if not self._device.plain(arrays, parameters):
            given = arrays
            arrays = [
                self._device.gradient(g, p, f"{self._where}{self._place(i)}", write)
                for g, p, i in zip(given, parameters, present, strict=True)
            ]
            copied = not all(map(operator.is_, given, arrays))
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
        return Gradients(arrays, present, [a.dtype for a in arrays], starts, False, copied)

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
