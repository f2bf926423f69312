"""``optimizer.state`` as torch has it, a dict of tensors for each parameter, on top of flat memory."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._plan import Parameter, Progress
from ..flat import Layout
from ._devices import CPU, Home
from ._tensors import COMPUTED, STORED, like

STEP = "step"


class Watch:
    """Holds what was derived from the state, until somebody changes the state."""

    __slots__ = ("derived",)

    def __init__(self) -> None:
        self.derived: Any = None

    def settle(self) -> None:
        """Somebody reads the state: let it show what until now only a GPU knows."""
        if self.derived is not None:
            self.derived.settle()

    def drop(self) -> None:
        """Forget what was derived, with the state up to date."""
        self.settle()
        self.derived = None


def _watched(name: str, tell: Callable[[Watch], None] = Watch.drop) -> Callable[..., Any]:
    method = getattr(defaultdict, name)

    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        tell(self.watch)
        return method(self, *args, **kwargs)

    return watched


class _Watched(defaultdict[Any, Any]):
    """A dict that tells its ``Watch`` when it is read, and of every change to its entries.

    Saved and copied, it is an ordinary dict.
    """

    watch: Watch

    __getitem__ = _watched("__getitem__", Watch.settle)
    __contains__ = _watched("__contains__", Watch.settle)
    __iter__ = _watched("__iter__", Watch.settle)
    __len__ = _watched("__len__", Watch.settle)
    __repr__ = _watched("__repr__", Watch.settle)
    get = _watched("get", Watch.settle)
    keys = _watched("keys", Watch.settle)
    values = _watched("values", Watch.settle)
    items = _watched("items", Watch.settle)
    __setitem__ = _watched("__setitem__")
    __delitem__ = _watched("__delitem__")
    __ior__ = _watched("__ior__")
    clear = _watched("clear")
    pop = _watched("pop")
    popitem = _watched("popitem")
    setdefault = _watched("setdefault")
    update = _watched("update")


class ParameterState(_Watched):
    """The state of one parameter."""

    def __init__(self, watch: Watch, items: Mapping[str, Any]) -> None:
        super().__init__(None, items)
        self.watch = watch
        self.slot: Slot | None = None

    @property
    def in_place(self) -> bool:
        """Whether the entries are still those that were made for the slot."""
        return self.slot is not None and all(dict.get(self, name) is entry for name, entry in self.slot.entries.items())

    def show(self, slot: Slot) -> None:
        """Take the entries of the slot."""
        self.slot = slot
        for name, entry in slot.entries.items():
            dict.__setitem__(self, name, entry)

    def __copy__(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), None, None, iter(self.items())


class State(_Watched):
    """The states of all parameters."""

    def __init__(self, items: Mapping[Any, Any]) -> None:
        super().__init__(dict)
        self.watch = Watch()
        for key, value in items.items():
            dict.__setitem__(self, key, value)

    def of(self, parameter: Tensor) -> ParameterState:
        """The state of a parameter, watched from now on."""
        found = dict.get(self, parameter, {})
        if type(found) is not ParameterState or found.watch is not self.watch:
            found = ParameterState(self.watch, found)
        return found

    def keep(self, parameter: Tensor, state: ParameterState) -> None:
        """Let a state that ``of`` returned be that of the parameter."""
        dict.__setitem__(self, parameter, state)

    def __missing__(self, key: Any) -> Any:
        value = self.of(key) if isinstance(key, Tensor) else {}
        dict.__setitem__(self, key, value)
        return value

    def __copy__(self) -> dict[Any, Any]:  # type: ignore[override]
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())


class Block:
    """States of parameters that got their first gradient together: one flat tensor per name, and their numbers.

    The flat tensors are on the parameters' device. The numbers are on the CPU, where torch has step counts, too.

    Args:
        memories: The real tensors of the parameters, of one compute dtype.
        home: Where they live.
    """

    def __init__(self, memories: Sequence[Tensor], home: Home) -> None:
        self.home = home
        self.layout = Layout.of({str(i): (m.numel(),) for i, m in enumerate(memories)})
        self.size = len(memories)
        self.arrays: dict[str, Any] = {}
        self._dtype: torch.dtype = COMPUTED[memories[0].dtype]
        self._tensors: dict[str, Tensor] = {}
        self._homes: dict[str, Home] = {}

    def state(self, name: str) -> Tensor:
        """The flat tensor of a state."""
        return self._tensor(name, self.layout.total, self._dtype, self.home)

    def numbers(self, name: str) -> Tensor:
        """A number per parameter. Step counts are float32, as in torch; what a rule carries is exact."""
        return self._tensor(name, self.size, torch.float32 if name == STEP else torch.float64, CPU)

    def _tensor(self, name: str, size: int, dtype: torch.dtype, home: Home) -> Tensor:
        if name not in self._tensors:
            self._tensors[name] = home.zeros(size, dtype)
            self._homes[name] = home
            self.arrays[name] = home.array(self._tensors[name])
        return self._tensors[name]

    def tensors(self) -> Iterable[Tensor]:
        """The flat tensors."""
        return self._tensors.values()

    def refresh(self) -> None:
        """Find the memory again, which ``Tensor.share_memory_`` moves."""
        for name, tensor in self._tensors.items():
            self.arrays[name] = self._homes[name].array(tensor)

    def record(self, index: int, parameter: Tensor, memory: Tensor, group: int, progress: Progress) -> Parameter:
        """The plan's record of a parameter."""
        offsets = (*self.layout.offsets, self.layout.total)
        return Parameter(
            name=str(index),
            array=parameter,  # type: ignore[arg-type]
            size=memory.numel(),
            dtype=STORED[memory.dtype].name,
            group=group,
            offset=offsets[index],
            extent=offsets[index + 1] - offsets[index],
            address=memory.data_ptr(),
            states=self.arrays,
            progress=progress,
        )


@dataclass(eq=False)
class Slot:
    """The place of a parameter in a block, how the parameter lies in memory, and what ``state`` shows of it."""

    block: Block
    index: int
    layout: tuple[Any, ...]
    entries: dict[str, Tensor] = field(default_factory=dict)

    def add_number(self, name: str) -> None:
        """Show a number."""
        if name not in self.entries:
            self.entries[name] = self.block.numbers(name)[self.index]

    def add_state(self, name: str, parameter: Tensor, value: Tensor | None, start: float, where: str) -> None:
        """Show a state, which begins with ``value`` where there is one, else with ``start``."""
        if value is not None and value.shape != parameter.shape:
            raise ValueError(
                f"{where}: state {name!r} has shape {tuple(value.shape)}, but the parameter has shape "
                f"{tuple(parameter.shape)}."
            )
        entry, flat = like(parameter, self.block.state(name), self.block.layout.offsets[self.index])
        if value is not None:
            entry.copy_(value)
        elif start:
            flat.fill_(start)
        self.entries[name] = entry


def number(value: Any) -> float:
    """A step count or another number of a state, which older checkpoints hold as a Python number."""
    return float(value.item() if isinstance(value, Tensor) else value)


class Mirror:
    """Shows how far cohorts have come in the tensors of ``state``, and notices where somebody else wrote these."""

    def __init__(self, records: Sequence[Parameter], slots: Sequence[Slot]) -> None:
        places: dict[tuple[int, int], list[int]] = {}
        for k, (record, slot) in enumerate(zip(records, slots, strict=True)):
            places.setdefault((id(record.progress), id(slot.block)), []).append(k)
        self._shown: list[tuple[NDArray[Any], Any, Progress, str]] = []
        self._values: list[Any] = []
        for members in places.values():
            slot, progress = slots[members[0]], records[members[0]].progress
            indices = [slots[k].index for k in members]
            where: Any = slice(None) if indices == list(range(slot.block.size)) else np.array(indices)
            names = [name for name in (STEP, *(progress.carry or {})) if name in slot.entries]
            self._shown += [(slot.block.arrays[name], where, progress, name) for name in names]
        for array, where, progress, name in self._shown:
            self._values.append(self._value(array, progress, name))
            array[where] = self._values[-1]
        self._arrays = list({id(array): array for array, *_ in self._shown}.values())
        self._seen = [array.tobytes() for array in self._arrays]

    @staticmethod
    def _value(array: NDArray[Any], progress: Progress, name: str) -> Any:
        return array.dtype.type(progress.steps if name == STEP else (progress.carry or {})[name])

    def holds(self) -> bool:
        """Whether the tensors say what was shown last."""
        return [array.tobytes() for array in self._arrays] == self._seen  # three times as fast as comparing numbers

    def show(self) -> None:
        """Write what the cohorts know; what only a GPU knows is left to ``settle``."""
        for k, (array, where, progress, name) in enumerate(self._shown):
            if progress.fetch is None:
                self._values[k] = array[where] = self._value(array, progress, name)
        self._seen = [array.tobytes() for array in self._arrays]

    def settle(self) -> None:
        """Write what the GPU knows, but where somebody else wrote meanwhile; waits for it."""
        expected = {id(array): array.copy() for array in self._arrays}
        for k, (array, where, progress, name) in enumerate(self._shown):
            value = self._value(array, progress, name)
            array[where] = np.where(array[where] == self._values[k], value, array[where])
            self._values[k] = expected[id(array)][where] = value
        self._seen = [array.tobytes() for array in expected.values()]
