"""``optimizer.state`` as torch has it, a dict of tensors for each parameter: what a step reads and writes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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

if TYPE_CHECKING:
    from ..engine.plan import StepCount

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
        alike: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
        for g, group in enumerate(groups):
            for p in group["params"]:
                values = items.get(p)
                if values and isinstance(values, dict):
                    try:
                        memory = parameter_memory(p, "")
                    except (NotImplementedError, TypeError, ValueError):
                        continue  # such as one on the meta device: a step says so, if it gets that far
                    params, memories = alike.setdefault((memory.dtype, memory.device, g if flat else 0), ([], []))
                    params.append(p)
                    memories.append(memory)
        layouts: dict[Any, Any] = {}  # one object for equal ones
        copies: tuple[list[Tensor], list[Tensor]] = [], []  # targets and sources
        for params, memories in alike.values():
            arena = Arena(memories)
            for index, (p, memory) in enumerate(zip(params, memories, strict=True)):
                layout = layout_of(memory)
                slot = Slot(arena, index, layouts.setdefault(layout, layout))
                moved = {name: _moved(name, x, names, slot, p, copies) for name, x in items[p].items()}
                dict.__setitem__(state, p, ParameterState(state.watch, moved, slot))
        with torch.no_grad():
            if copies[0] and {*map(type, copies[0]), *map(type, copies[1])} <= PLAIN:
                torch._foreach_copy_(*copies)
            else:
                for target, source in zip(*copies, strict=True):
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


def _moved(
    name: str, value: Any, names: Names, slot: Slot, parameter: Tensor, copies: tuple[list[Tensor], list[Tensor]]
) -> Any:
    """What becomes of a value: memory in the arena, if a step may write it there; what must be copied is listed."""
    arena, index, layout = slot
    if name == STEP or name in names.numbers:
        arena.begin(name, index, number(value), is_number=True)
        return arena.number(name, index)
    if isinstance(value, float):  # of an older checkpoint
        return torch.tensor(value, dtype=torch.float64)
    if not isinstance(value, Tensor):
        return value
    if name in names.states and value.shape == parameter.shape:
        if name not in arena.names:
            arena.begin(name, index, 0.0, is_number=False)
        made = arena.state(name, index, parameter, layout)
        copies[0].append(made)
        copies[1].append(value)
        return made
    return value.detach().clone() if value.dim() == 0 else value.detach().to(parameter.device, copy=True)


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
        self._starts: dict[str, tuple[int, int]] = {}  # address and itemsize
        self._given: dict[str, bytearray] = {}  # whether somebody has the memory of a parameter
        self._dtype = COMPUTED[memories[0].dtype]

    @property
    def names(self) -> Collection[str]:
        """Of all that was begun."""
        return self._starts.keys()

    def begin(self, name: str, index: int, value: float, *, is_number: bool) -> None:
        """Have memory for a state or a number of a parameter, which nobody has; let it begin with a value."""
        is_new = name not in self._starts
        if is_new:
            if is_number:
                array: Any = np.zeros(self.size, np.float32 if name == STEP else np.float64)
                self.numbers[name], start = array, array.ctypes.data
            else:
                flat = torch.zeros(self._total, dtype=self._dtype, device=self.device)
                # Parts of an array of NumPy are made in half the time.
                array = self.arrays[name] = flat.numpy() if self.device.type == "cpu" else flat
                start = flat.data_ptr()
            self._starts[name], self._given[name] = (start, array.itemsize), bytearray(self.size)
        if is_number:
            self.numbers[name][index] = value
        elif value or not is_new:
            self.arrays[name][self.offsets[index] : self.offsets[index] + self._sizes[index]] = value

    def state(self, name: str, index: int, parameter: Tensor, layout: tuple[Any, ...]) -> Tensor:
        """A tensor of a state of a parameter that lies so."""
        self._given[name][index] = True
        offset = self.offsets[index]
        view = part_of(self.arrays[name], offset, offset + self._sizes[index], layout)
        return shaped_like(parameter, view)

    def number(self, name: str, index: int) -> Tensor:
        """A tensor of a number. Step counts are float32, as in torch; what a rule carries is exact."""
        self._given[name][index] = True
        return torch.from_numpy(self.numbers[name][index : index + 1].reshape(()))

    def place(self, name: str, index: int) -> int:
        """Where something of a parameter begins; 0 if nothing of this name was made."""
        start, itemsize = self._starts.get(name, (0, 0))
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


class Counted(Protocol):
    """A parameter whose numbers ``state`` shows."""

    arena: Arena
    index: int
    step_count: StepCount
    loose: Mapping[str, Tensor]  # numbers that the user put there
