"""``optimizer.state`` as torch has it, a dict of tensors for each parameter: what a step reads and writes."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.device import Layout
from ..kernels.epilogues import EMA, EMA_STEP
from ..kernels.registry import RULES
from ..kernels.rules.rule import Rule
from ._master import MASTER
from ._tensors import COMPUTED, PLAIN, layout_of, parameter_memory, part_of, shaped_like

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

    def __init__(self) -> None:
        self.derived: Callable[[], Any] = type(None)  # a weak reference: a call gives what was derived, or None

    def settle(self) -> None:
        """Somebody reads the state: let it show all steps that were taken."""
        derived = self.derived()
        if derived is not None:
            derived.settle()

    def drop(self) -> None:
        """Forget what was derived, with the state up to date."""
        self.settle()
        self.derived = type(None)


class _Watched(defaultdict[Any, Any]):
    """A dict that tells its ``Watch`` when it is read, and of every change to its entries.

    Saved and copied, it is an ordinary dict.
    """

    __slots__ = ()

    watch: Watch

    def copy(self) -> dict[Any, Any]:  # type: ignore[override]
        return dict(self)

    def __or__(self, other: Any) -> dict[Any, Any]:  # type: ignore[override]
        return {**self, **other}

    def __ror__(self, other: Any) -> dict[Any, Any]:  # type: ignore[override]
        return {**other, **self}

    __copy__ = copy  # type: ignore[assignment]


READS = (
    *("__contains__", "__eq__", "__getitem__", "__iter__", "__len__", "__ne__", "__repr__", "__reversed__"),
    *("get", "items", "keys", "values"),
)
CHANGES = ("__delitem__", "__ior__", "__setitem__", "clear", "pop", "popitem", "setdefault", "update")


def _watched(name: str, tell: Callable[[Watch], None]) -> Callable[..., Any]:
    method = getattr(defaultdict, name)

    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        tell(self.watch)
        return method(self, *args, **kwargs)

    return watched


for _name in READS:
    setattr(_Watched, _name, _watched(_name, Watch.settle))
for _name in CHANGES:
    setattr(_Watched, _name, _watched(_name, Watch.drop))


NOTHING: Mapping[str, Any] = MappingProxyType({})


class ParameterState(_Watched):
    """The state of one parameter."""

    __slots__ = ("slot", "untouched", "watch")

    def __init__(self, watch: Watch, items: Mapping[str, Any], slot: Slot | None = None) -> None:
        super().__init__(None, items)
        self.watch = watch
        self.slot = slot
        self.untouched: Mapping[str, tuple[Any, int]] = NOTHING  # tensors made without a step, and their versions then

    def remember(self) -> None:
        """The states are what they were made as, without a step."""
        items: Any = dict.items(self)
        self.untouched = {name: (tensor, tensor._version) for name, tensor in items}

    @property
    def is_untouched(self) -> bool:
        """Whether the states were made without a step, and nobody wrote them since."""
        return bool(self.untouched) and all(
            tensor._version == version and dict.get(self, name) is tensor
            for name, (tensor, version) in self.untouched.items()
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (), None, None, iter(self.items())


class State(_Watched):
    """The states of all parameters."""

    __slots__ = ("watch",)

    def __init__(self, items: Mapping[Any, Any]) -> None:
        super().__init__(dict, items)
        self.watch = Watch()

    @classmethod
    def moved(cls, items: Mapping[Any, Any], groups: Iterable[Mapping[str, Any]], names: Names, *, flat: bool) -> State:
        """Copies of states in memory that is made for parameters together: then a step can write all numbers at once.

        Args:
            items: The states.
            groups: The param groups.
            names: What there may be in ``items``; tensors of other names are copied one by one.
            flat: Whether parameters are neighbours in memory, group by group.
        """
        state = cls(items)
        members: list[tuple[Tensor, Tensor, int]] = []
        for g, group in enumerate(groups):
            for p in group["params"]:
                values = items.get(p)
                if values and isinstance(values, dict):
                    try:
                        members.append((p, parameter_memory(p, ""), g if flat else 0))
                    except (NotImplementedError, TypeError, ValueError):
                        continue  # such as one on the meta device: a step says so, if it gets that far
        copies: list[tuple[Tensor, Tensor]] = []  # target and source
        slots = lay_out([(memory, g) for _, memory, g in members])
        for (p, *_), slot in zip(members, slots, strict=True):
            moved = {name: _moved(name, x, names, slot, p, copies) for name, x in items[p].items()}
            dict.__setitem__(state, p, ParameterState(state.watch, moved, slot))
        with torch.no_grad():
            if copies and {type(x) for pair in copies for x in pair} <= PLAIN:
                targets, sources = zip(*copies, strict=True)
                torch._foreach_copy_(targets, sources)
            else:
                for target, source in copies:
                    target.copy_(source)
        return state

    def of(self, parameter: Tensor) -> ParameterState:
        """The state of a parameter, watched from now on."""
        state = dict.get(self, parameter, NOTHING)
        if type(state) is not ParameterState or state.watch is not self.watch:
            state = ParameterState(self.watch, state)
        return state

    def __missing__(self, key: Any) -> Any:
        value = self.of(key) if isinstance(key, Tensor) else {}
        dict.__setitem__(self, key, value)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict,), None, None, iter(self.items())


def _moved(name: str, value: Any, names: Names, slot: Slot, p: Tensor, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """What becomes of a value: memory in the arena, if a step may write it there; what must be copied is listed."""
    arena, row, _ = slot
    if name == STEP or name in names.numbers:
        arena.begin(name, row, number(value), is_number=True)
        return arena.tensor(name, slot, p)
    if not isinstance(value, Tensor):
        return value
    if name in names.states and value.shape == p.shape:
        if name not in arena.starts:
            arena.begin(name, row, 0.0, is_number=False)
        copies.append((arena.tensor(name, slot, p), value))
        return copies[-1][0]
    return value.detach().clone() if value.dim() == 0 else value.detach().to(p.device, copy=True)


class Arena:
    """Memory for the states of parameters that get theirs together: one flat array per name, and their numbers.

    A tensor in it has a storage of its own that covers its bytes: whoever saves, copies or shares one takes no others
    along. The flat arrays are on the parameters' device. The numbers are on the CPU, where torch has step counts, too.

    Args:
        memories: The real tensors of the parameters, of one compute dtype and device.
    """

    def __init__(self, memories: Sequence[Tensor]) -> None:
        self.device = memories[0].device
        self.size = len(memories)
        layout = Layout.of({str(i): (m.numel(),) for i, m in enumerate(memories)})
        self.offsets, self._total = layout.offsets, layout.total
        self._sizes = layout.sizes
        self.extents = np.diff([*layout.offsets, layout.total]).tolist()
        self.arrays: dict[str, Any] = {}
        self.numbers: dict[str, NDArray[Any]] = {}
        self.starts: dict[str, tuple[int, int]] = {}  # of all that was begun: address and itemsize
        self._given: dict[str, bytearray] = {}  # whether somebody has the memory of a parameter
        self._dtype = COMPUTED[memories[0].dtype]

    def begin(self, name: str, index: int, value: float, *, is_number: bool) -> None:
        """Have memory for a state or a number of a parameter, which nobody has; let it begin with a value."""
        is_new = name not in self.starts
        if is_new:
            if is_number:
                array: Any = np.zeros(self.size, np.float32 if name == STEP else np.float64)
                self.numbers[name], start = array, array.ctypes.data
            else:
                flat = torch.zeros(self._total, dtype=self._dtype, device=self.device)
                # Parts of an array of NumPy are made in half the time.
                array = self.arrays[name] = flat.numpy() if self.device.type == "cpu" else flat
                start = flat.data_ptr()
            self.starts[name], self._given[name] = (start, array.itemsize), bytearray(self.size)
        if is_number:
            self.numbers[name][index] = value
        elif value or not is_new:
            self.arrays[name][self.offsets[index] : self.offsets[index] + self._sizes[index]] = value

    def tensor(self, name: str, slot: Slot, parameter: Tensor) -> Tensor:
        """A tensor of a number, or of a state that lies as its parameter. Step counts are float32, as in torch."""
        self._given[name][slot.row] = True
        if name in self.numbers:
            return torch.from_numpy(self.numbers[name][slot.row : slot.row + 1].reshape(()))
        offset = self.offsets[slot.row]
        view = part_of(self.arrays[name], offset, offset + self._sizes[slot.row], slot.layout)
        return shaped_like(parameter, view)

    def place(self, name: str, index: int) -> int:
        """Where something of a parameter begins; 0 if nothing of this name was made."""
        start, itemsize = self.starts.get(name, (0, 0))
        return start + itemsize * (index if name in self.numbers else self.offsets[index])

    def misses(self, index: int, state: dict[str, Any]) -> bool:
        """Whether something is missing in a state that was made here: who took it out may still have it."""
        return any(given[index] and dict.get(state, name) is None for name, given in self._given.items())


class Slot(NamedTuple):
    """The place of a parameter in an arena, and how the parameter lies in memory."""

    arena: Arena
    row: int
    layout: tuple[Any, ...]


def number(value: Any) -> float:
    """A step count or another number of a state, which older checkpoints hold as a Python number."""
    return float(value.item() if isinstance(value, Tensor) else value)


def lay_out(members: Sequence[tuple[Tensor, int]]) -> list[Slot]:
    """Slots of parameters, given their real tensors and groups: one arena for all of one dtype, group and device."""
    keys = [(memory.dtype, group, memory.device) for memory, group in members]
    alike: dict[Any, list[Tensor]] = {}
    for key, (memory, _) in zip(keys, members, strict=True):
        alike.setdefault(key, []).append(memory)
    arenas = {key: (Arena(memories), itertools.count()) for key, memories in alike.items()}
    layouts: dict[Any, Any] = {}  # one object for equal ones
    slots = []
    for key, (memory, _) in zip(keys, members, strict=True):
        (arena, rows), layout = arenas[key], layout_of(memory)
        slots.append(Slot(arena, next(rows), layouts.setdefault(layout, layout)))
    return slots
