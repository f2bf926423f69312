"""``optimizer.state`` as torch has it, a dict of tensors for each parameter: what a step reads and writes."""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..arrays import Layout
from ..engine.plan import StepCount
from ..kernels.epilogues import EMA, EMA_STEP
from ..kernels.registry import RULES
from ..kernels.rules.rule import Rule
from . import _devices
from ._devices import TorchDevice
from ._master import MASTER
from ._tensors import COMPUTED, address_of, parameter_memory, shaped_like

STEP = "step"


class Names(NamedTuple):
    """Names of what a state may hold beside the step count."""

    states: frozenset[str]  # tensors that have their parameter's shape
    numbers: frozenset[str]

    @classmethod
    def of(cls, *rules: Rule) -> Names:
        """Those of some rules."""
        states = frozenset(name for rule in rules for name in rule.state)
        numbers = frozenset(name for rule in rules for name in rule.carried)
        return cls(states | {MASTER, EMA}, numbers | {EMA_STEP})


LIBRARY = Names.of(*RULES.values())
"""Those of all rules of the library."""


class Watch:
    """Knows what was derived from the state, until somebody changes the state.

    The optimizer owns it: a reference from here would be a cycle, which only the garbage collector frees.
    """

    __slots__ = ("_derived",)

    def __init__(self) -> None:
        self._derived: weakref.ref[Any] | None = None

    @property
    def derived(self) -> Any:
        """What was derived, or None."""
        return None if self._derived is None else self._derived()

    @derived.setter
    def derived(self, derived: Any) -> None:
        self._derived = weakref.ref(derived)

    def settle(self) -> None:
        """Somebody reads the state: let it show all steps that were taken."""
        derived = self.derived
        if derived is not None:
            derived.settle()

    def drop(self) -> None:
        """Forget what was derived, with the state up to date."""
        self.settle()
        self._derived = None


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

    def __init__(self, watch: Watch, items: Mapping[str, Any], slot: Slot | None = None) -> None:
        super().__init__(None, items)
        self.watch = watch
        self.slot = slot
        self.untouched: dict[str, tuple[Tensor, int]] = {}  # made without a step, and their versions then

    def show(self, slot: Slot, tensors: Mapping[str, Tensor]) -> None:
        """Take what a step reads and writes."""
        self.slot = slot
        for name, tensor in tensors.items():
            dict.__setitem__(self, name, tensor)

    def remember(self) -> None:
        """The states are what they were made as, without a step."""
        self.untouched = {name: (tensor, tensor._version) for name, tensor in dict.items(self)}

    @property
    def is_untouched(self) -> bool:
        """Whether the states were made without a step, and nobody wrote them since."""
        return bool(self.untouched) and all(
            dict.get(self, name) is tensor and tensor._version == version
            for name, (tensor, version) in self.untouched.items()
        )

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

    @classmethod
    def moved(
        cls, items: Mapping[Any, Any], groups: Iterable[Mapping[str, Any]], names: Names, *, flat: bool, copy: bool
    ) -> State:
        """States in memory that is made for parameters together, so that a step can write all numbers at once.

        Args:
            items: The states.
            groups: The param groups.
            names: What there may be in ``items``.
            flat: Whether parameters are neighbours in memory: then their states are moved, too.
            copy: Whether ``items`` has tensors of others, which are copied; else they stay what they are.
        """
        state = cls(items)
        alike: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for g, group in enumerate(groups):
            for p in group["params"]:
                if dict.get(state, p) and isinstance(state._raw(p), dict):
                    try:
                        memory = parameter_memory(p, "")
                    except (NotImplementedError, TypeError, ValueError):
                        continue  # such as one on the meta device: a step says so, if it gets that far
                    alike.setdefault((memory.dtype, g if flat else 0, _devices.device_of(p)), []).append((p, memory))
        for (*_, device), members in alike.items():
            arena = Arena([memory for _, memory in members], device)
            for index, (p, memory) in enumerate(members):
                slot, values = Slot(arena, index, layout_of(memory)), dict(state._raw(p))
                for name, value in values.items():
                    if name == STEP or name in names.numbers:
                        values[name] = slot.add_number(name, number(value))
                    elif (
                        name in names.states and (copy or flat) and isinstance(value, Tensor) and value.shape == p.shape
                    ):
                        values[name] = slot.add_state(name, p, memory)
                        values[name].copy_(value.detach())
                state.keep(p, ParameterState(state.watch, values, slot))
        return state

    def _raw(self, parameter: Tensor) -> Any:
        return dict.get(self, parameter, {})

    def of(self, parameter: Tensor) -> ParameterState:
        """The state of a parameter, watched from now on."""
        state = self._raw(parameter)
        if type(state) is not ParameterState or state.watch is not self.watch:
            state = ParameterState(self.watch, state)
        return state

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


class Arena:
    """Memory for the states of parameters that get theirs together: one flat array per name, and their numbers.

    A tensor in it has a storage of its own that covers its bytes: whoever saves, copies or shares one takes no others
    along. The flat arrays are on the parameters' device. The numbers are on the CPU, where torch has step counts, too.

    Args:
        memories: The real tensors of the parameters, of one compute dtype.
        device: Where they live.
    """

    def __init__(self, memories: Sequence[Tensor], device: TorchDevice) -> None:
        self.device = device
        self.size = len(memories)
        layout = Layout.of({str(i): (m.numel(),) for i, m in enumerate(memories)})
        self.offsets, self._total = layout.offsets, layout.total
        self.extents = np.diff([*layout.offsets, layout.total]).tolist()
        self.arrays: dict[str, Any] = {}
        self.numbers: dict[str, NDArray[Any]] = {}
        self._dtype = COMPUTED[memories[0].dtype]

    def array(self, name: str) -> Any:
        """The flat array of a state, as plans take it."""
        if name not in self.arrays:
            self.arrays[name] = self.device.array(self.device.zeros(self._total, self._dtype))
        return self.arrays[name]

    def number(self, name: str) -> NDArray[Any]:
        """A number per parameter. Step counts are float32, as in torch; what a rule carries is exact."""
        if name not in self.numbers:
            self.numbers[name] = np.zeros(self.size, np.float32 if name == STEP else np.float64)
        return self.numbers[name]


@dataclass(eq=False)
class Slot:
    """The place of a parameter in an arena, how the parameter lies in memory, and the tensors that were made there."""

    arena: Arena
    index: int
    layout: tuple[Any, ...]
    entries: dict[str, Tensor] = field(default_factory=dict)
    _addresses: dict[str, int] = field(default_factory=dict)

    def add_number(self, name: str, value: float) -> Tensor:
        """A number."""
        numbers = self.arena.number(name)
        numbers[self.index] = value
        return self._add(name, torch.from_numpy(numbers[self.index : self.index + 1].reshape(())))

    def add_state(self, name: str, parameter: Tensor, memory: Tensor) -> Tensor:
        """A state of zeros for the parameter, whose real tensor is ``memory``."""
        array, offset = self.arena.array(name), self.arena.offsets[self.index]
        return self._add(name, shaped_like(parameter, self.arena.device.view(array, offset, memory)))

    def _add(self, name: str, entry: Tensor) -> Tensor:
        self._addresses[name] = address_of(entry)
        self.entries[name] = entry
        return entry

    def holds(self, name: str, value: Any) -> bool:
        """Whether this is the tensor that was made here under this name, with the memory that it was given."""
        entry = self.entries.get(name)
        return entry is not None and value is entry and address_of(entry) == self._addresses[name]


def layout_of(memory: Tensor) -> tuple[Any, ...]:
    """How a parameter lies in memory, as far as its states must lie likewise."""
    return memory.shape, memory.stride(), COMPUTED[memory.dtype]


def number(value: Any) -> float:
    """A step count or another number of a state, which older checkpoints hold as a Python number."""
    return float(value.item() if isinstance(value, Tensor) else value)


class StateSync:
    """Shows how far scalar groups have come in the tensors of ``state``, and notices where somebody else wrote these.

    Args:
        numbers: Of each parameter its progress, its slot, and the tensors of its numbers by name.
        write: Whether to write what the scalar groups know.
    """

    def __init__(self, numbers: Sequence[tuple[StepCount, Slot, Mapping[str, Tensor]]], *, write: bool = True) -> None:
        places: dict[tuple[int, int, str], list[int]] = {}
        self._shown: list[tuple[NDArray[Any], Any, StepCount, str]] = []
        for k, (step_count, slot, tensors) in enumerate(numbers):
            for name, tensor in tensors.items():
                if slot.holds(name, tensor):
                    places.setdefault((id(step_count), id(slot.arena), name), []).append(k)
                else:
                    self._shown.append((tensor.detach().numpy().reshape(-1), slice(None), step_count, name))
        for (_, _, name), members in places.items():
            step_count, slot, _ = numbers[members[0]]
            indices = [numbers[k][1].index for k in members]
            where: Any = slice(None) if indices == list(range(slot.arena.size)) else np.array(indices)
            self._shown.append((slot.arena.numbers[name], where, step_count, name))
        self._values: list[Any] = []
        for array, where, step_count, name in self._shown:
            self._values.append(self._value(array, step_count, name))
            if write:
                array[where] = self._values[-1]
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
