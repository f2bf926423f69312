"""The base of all optimizers: param groups, the step, and state that can be saved."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType, MappingProxyType
from typing import Any
from weakref import ref

import numpy as np

from ._arrays import Array, Space
from ._base import Base
from ._options import own_options, unchanged
from ._params import GradientReader, Memory, collect, listed_groups
from ._plan import Parameter, Plan, Progress, Treatment, initial_states
from ._plans import plan_class
from ._state import StateView, check_states, export_state, import_state
from ._step import StepInfo
from .flat import FlatBuffer, Layout
from .kernels.dtypes import COMPUTE
from .kernels.rule import Options, Rule

Params = FlatBuffer | Mapping[str, Array] | Iterable[Array] | Iterable[Mapping[str, Any]]
Grads = FlatBuffer | Mapping[str, Array | None] | Sequence[Array | None]


@dataclass(eq=False)
class Known:
    """What is known of a param group: its arrays, and its options as they were seen, and as they are computed with."""

    index: int
    arrays: Mapping[str, Array]
    dtypes: set[str]
    seen: dict[str, Any]
    options: dict[str, Any]
    foreign: Collection[str]  # keys of the user's own


class Optimizer(Base):
    """Base class: holds parameters and states, and takes steps by the rule that a subclass selects.

    On a GPU the option ``capturable`` makes the device keep step counts, options and scalars, so that a step can be
    captured into a CUDA graph (after one like it was taken) and replayed. Change options between replays with
    ``upload_options``.

    A subclass declares the ranges of its options in ``ranges``, hands its defaults to ``__init__`` and returns a
    ``fastopt.Rule`` from ``select_rule``. A rule that is not in the library is compiled on first use, which needs Numba
    (``pip install "fastopt[jit]"``).

    Args:
        params: What is optimised: a ``FlatBuffer``, a mapping from names to arrays, a sequence of arrays (named "0",
            "1", ...), or a sequence of param groups, which are dicts with the key "params" (any of the former) and
            options that replace the defaults. Arrays are C-contiguous, writable arrays of any shape, of dtype
            float32, float64, float16 or bfloat16; they are updated in place and never copied or moved. They are
            NumPy's, or on one GPU: CuPy's, or another library's that shares memory by DLPack.
        defaults: Options of the groups that do not give them.
        max_grad_norm: Clip: gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)), where norm is the
            Euclidean norm of all gradients of all groups after unscaling (Pascanu et al. 2013). >= 0; inf only reports
            the norm.
        skip_nonfinite: Change nothing, not even step counts, if a gradient is infinite or NaN (or, in float64, so large
            that its square is).
        zero_grads: Set the gradients to zero in the same pass, also in a skipped step.

    Attributes:
        max_grad_norm, skip_nonfinite, zero_grads: As given; they can be set, and ``step`` can override them. They are
            the program's, like learning rate schedules, and not in ``state_dict``.
        param_groups: One dict per group: "params" (name to array) and the options, which are read anew at each step.
            Other keys are yours and not looked at, unless they seem to be an option misspelt.
        state: For each parameter name its state: "step", and views of its state arrays by their names in torch. The
            arrays can be written, all else is changed by ``load_state_dict``.
        last_info: What the last step did, a ``fastopt.StepInfo``.

    Raises:
        TypeError: Something is of the wrong kind or dtype.
        ValueError: An option is outside its range, there is no parameter, or parameters share memory.
        AttributeError: An option of the param groups is assigned to the optimizer itself.

    Example:
        A rule of one's own, here the sign of the gradient:

        >>> import math, numpy as np, fastopt
        >>> from typing import NamedTuple
        >>> class SignScalars(NamedTuple):
        ...     lr: float
        >>> def sign_sgd(p, g, h):
        ...     return (p - math.copysign(h.lr, g),)
        >>> SIGN_SGD = fastopt.Rule("sign_sgd", sign_sgd, SignScalars, lambda t, options: SignScalars(options["lr"]))
        >>> class SignSGD(fastopt.Optimizer):
        ...     def __init__(self, params, lr=1e-3):
        ...         super().__init__(params, {"lr": lr})
        ...     def select_rule(self, options):
        ...         return SIGN_SGD
        >>> w = np.array([1.0, -1.0])
        >>> info = SignSGD([w], lr=0.5).step([np.array([0.1, -7.0])])
        >>> w.tolist()
        [0.5, -0.5]
    """

    _space: Space  # where the first group's arrays live, and all others must

    def __init__(
        self,
        params: Params,
        defaults: Mapping[str, Any],
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None:
        super().__init__(max_grad_norm, skip_nonfinite, zero_grads)
        self._name = type(self).__name__
        self._lock = threading.Lock()
        self.defaults = dict(defaults)
        self._known_options = {**self.defaults, **self.ranges}
        self._normalise(self.defaults, (), 0)
        self.param_groups: list[dict[str, Any]] = []
        self._parameters: list[Parameter] = []
        self._flat_layout: Layout | None = None
        self._groups: list[Known] = []
        self._plan: Plan | None = None
        for group in listed_groups(params, self._name):
            self._add(group)

    def select_rule(self, options: Options) -> Rule:
        """The update rule for a param group with these options."""
        raise NotImplementedError(f"{self._name} must override select_rule.")

    def treat(self, options: Options, parameter: Array) -> Treatment:
        """What is done to one parameter of a group; LARS leaves some out of the trust ratio."""
        return Treatment(self.select_rule(options), True)

    # --- groups --------------------------------------------------------------------------------------------------

    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters, for example when layers are unfrozen.

        Args:
            group: A dict with the key "params" and options that replace the defaults.

        Raises:
            TypeError, ValueError: As for the constructor; the optimizer is then unchanged.
        """
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f'{self._name}.add_param_group: group must be a dict with the key "params", got {group!r}.')
        with self._exclusive("add_param_group"):
            self._add(group)

    def _add(self, group: Mapping[str, Any]) -> None:
        """Check a group, allocate its state, and only then take it in."""
        index = len(self.param_groups)
        where = f"{self._name}: params" if not index else f"{self._name}: params of group {index}"
        known = getattr(self, "_space", None)
        space, arrays, layout, flat = collect(group["params"], len(self._parameters), known, where)
        options = {**self.defaults, **own_options(group, self._known_options, self._place(index))}
        self.complete(options)
        dtypes = {a.dtype.name for a in arrays.values()}
        checked = self._normalise(options, dtypes, index)
        taken = {p.name for p in self._parameters} & set(arrays)
        if taken:
            raise ValueError(f"{where}: the name {min(taken)!r} is taken by another group; name each parameter once.")
        Memory({p.name: p.array for p in self._parameters} | arrays, self._states(), space, self._name)
        if flat is not None:  # an empty view does not know where it lies
            places = [space.address(flat.data) + offset * flat.dtype.itemsize for offset in layout.offsets]
        else:
            places = [space.address(array) for array in arrays.values()]
        ends = (*layout.offsets[1:], layout.total)
        added = [
            Parameter(
                *(name, array, array.size, array.dtype.name, index, offset, end - offset, place),
                shape=array.shape,
                guard=ref(array),
            )
            for (name, array), offset, end, place in zip(arrays.items(), layout.offsets, ends, places, strict=True)
        ]
        self._check_capturable(checked, space, where)
        space.load_kernels()
        self._allocate(added, layout.total, checked, space)
        self._space = space
        # Merging across the padding of a flat buffer writes that padding, which only one group may own.
        self._flat_layout = layout if flat is not None and not self._parameters else None
        self._parameters += added
        shown = MappingProxyType(arrays)
        self.param_groups.append({**group, "params": shown, **options})
        self._groups.append(Known(index, shown, dtypes, copy.deepcopy(options), checked, set(group) - set(options)))
        self._rebuild()

    def _states(self) -> Iterable[Array]:
        """Every flat state array once."""
        return {id(s): s for p in self._parameters for s in p.states.values()}.values()

    def _rebuild(self) -> None:
        """Parameters or states changed: what was derived from them is derived anew."""
        named = {p.name: p.array for p in self._parameters}
        memory = Memory(named, self._states(), self._space, self._name)
        self._reader = GradientReader(self._parameters, self._flat_layout, memory, self._space, self._name)
        self._plan = None

    def _allocate(self, parameters: list[Parameter], total: int, options: Options, space: Space) -> None:
        """Flat state arrays for parameters of one group, one per state name and compute dtype."""
        flats: dict[tuple[str, str], Array] = {}
        for p in parameters:
            dtype = COMPUTE[p.dtype]
            rule = self.treat(options, p.array).rule
            for name, start in initial_states(rule, options).items():
                if name in p.states:
                    continue
                if (name, dtype) not in flats:
                    flats[name, dtype] = space.zeros(total, np.dtype(dtype), f"{self._name}: state {name!r}")
                p.states[name] = flats[name, dtype]
                if start:
                    space.assign(p.states[name][p.offset : p.offset + p.extent], start)

    # --- options -------------------------------------------------------------------------------------------------

    def _current_options(self) -> list[dict[str, Any]]:
        """Options of every group, checked again where somebody changed them."""
        if len(self.param_groups) != len(self._groups):
            raise ValueError(
                f"{self._name}: param_groups has {len(self.param_groups)} groups, but {len(self._groups)} were added. "
                "Add groups with add_param_group."
            )
        changed: list[tuple[Known, dict[str, Any], dict[str, Any]]] = []
        for index, (group, known) in enumerate(zip(self.param_groups, self._groups, strict=True)):
            options = dict(group)
            if options.pop("params", None) is not known.arrays:
                raise ValueError(f'{self._name}: param_groups[{index}]["params"] was replaced. Make a new optimizer.')
            for name in known.foreign:
                options.pop(name, None)
            if not unchanged(options, known.seen):
                if options.keys() != known.seen.keys():
                    options = own_options(options, self._known_options, self._place(index))
                    known.foreign = group.keys() - options.keys() - {"params"}
                self.complete(options)
                checked = self._normalise(options, known.dtypes, index)
                self._check_capturable(checked, self._space, f"{self._name}: group {index}")
                changed.append((known, copy.deepcopy(options), checked))
        for known, seen, checked in changed:  # nothing is taken over before all groups are checked
            self._take_over(known, checked)
            known.seen, known.options = seen, checked
        return [known.options for known in self._groups]

    def _take_over(self, known: Known, checked: dict[str, Any]) -> None:
        members = [p for p in self._parameters if p.group == known.index]
        changed = any(self.treat(known.options, p.array) != self.treat(checked, p.array) for p in members)
        if changed or known.options.get("maximize") != checked.get("maximize"):
            self._allocate(members, members[-1].offset + members[-1].extent, checked, self._space)
            self._rebuild()
        self.complete(self.param_groups[known.index])

    # --- the step ------------------------------------------------------------------------------------------------

    def step(
        self,
        grads: Grads,
        *,
        grad_scale: float | Array = 1.0,
        max_grad_norm: float | EllipsisType | None = ...,
        skip_nonfinite: bool | EllipsisType = ...,
        zero_grads: bool | EllipsisType = ...,
        max_norm: float | EllipsisType | None = ...,
    ) -> StepInfo:
        """Update all parameters in one pass over memory.

        With ``max_grad_norm`` or ``skip_nonfinite`` a pass that reads the gradients goes before it.

        Args:
            grads: The gradients: a ``FlatBuffer`` or a mapping with the names of the parameters, or a sequence in their
                order. None stands for a parameter without gradient: it is left alone and its step is not counted.
                Shapes are those of the parameters; dtypes too, or float16/bfloat16 for float32 parameters. Gradients
                are only read. A strided gradient is copied first.
            grad_scale: Loss scale, in [1e-37, 1e37]: the gradients are divided by it. On a GPU it may be a float32
                array of one element there, which is read when the step runs.
            max_grad_norm, skip_nonfinite, zero_grads: Override the optimizer's in this step.
            max_norm: Another name of ``max_grad_norm``.

        On a GPU the step is put on the current stream and not waited for; the fields of its result are fetched when
        they are read.

        Returns:
            Whether the step was skipped, and the norm where it was needed; also in ``last_info``.

        Raises:
            TypeError, ValueError: Gradients or options that do not fit; nothing was written.
            RuntimeError: Another thread is stepping this optimizer; or a stream is being captured into a CUDA graph
                without ``capturable``, or before a step of the same kind was taken.
        """
        with self._exclusive("step"):
            options = self._current_options()
            keep = self._keeps(options)
            request = self._requested(grad_scale, max_grad_norm, max_norm, skip_nonfinite, zero_grads, keep)
            gradients, alive = self._reader.read(
                grads, request.zero_grads
            )  # alive: another thread may drop them while we read
            plan = self._plan_for(gradients, options)
            info = plan.step(request, options)
            del alive
            vars(self)["last_info"] = info  # an attribute's assignment is looked at, which takes 0.3 µs
            return info

    def upload_options(self) -> None:
        """Write the options of ``param_groups`` to device memory, where a CUDA graph's next replay finds them.

        Needed only between replays of a graph; ``step`` does it itself. The upload goes to the current stream.

        Raises:
            TypeError, ValueError: Options that are wrong; nothing was uploaded.
            RuntimeError: No step was taken yet with ``capturable=True``, or another thread is using this optimizer.
        """
        with self._exclusive("upload_options"):
            options = self._current_options()
            if self._plan is None or not all(o.get("capturable") for o in options):
                raise RuntimeError(f"{self._name}.upload_options: no step was taken yet with capturable=True.")
            self._plan.upload_options(options)

    def _plan_for(self, gradients: Any, options: list[dict[str, Any]]) -> Plan:
        plan = self._plan
        if gradients is None and plan is not None:
            return plan
        self._reader.forget()  # until the plan is there: if that fails, the next call must not find the old one
        present = [self._parameters[i] for i in gradients.present]
        if plan is None or (plan.flat, plan.dtypes, plan.parameters) != (gradients.flat, gradients.dtypes, present):
            if plan is not None:
                plan.recount()
            treatments = [self.treat(options[p.group], p.array) for p in present]
            signs = [-1.0 if o.get("maximize") else 1.0 for o in options]
            plan = self._plan = plan_class(self._space)(
                present, gradients.dtypes, treatments, gradients.flat, signs, self._space
            )
        plan.point_at(gradients.starts)
        self._reader.remember()
        return plan

    def _keeps(self, options: list[dict[str, Any]]) -> bool:
        return False

    def _exclusive(self, what: str) -> _Exclusive:
        return _Exclusive(self._lock, f"{self._name}.{what}: another thread is using this optimizer.")

    # --- state ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> StateView:
        """State of each parameter by name: "step", host scalars, and views of its state arrays."""
        if self._plan is not None:
            self._plan.recount()  # a CUDA graph may have been replayed
        shown = {
            p.name: StateView({"step": p.progress.steps, **(p.progress.carry or {}), **self._views(p)}, self._name)
            for p in self._parameters
        }
        return StateView(shown, self._name)

    @staticmethod
    def _views(p: Parameter) -> dict[str, Array]:
        return {name: flat[p.offset : p.offset + p.size].reshape(p.array.shape) for name, flat in p.states.items()}

    def state_dict(self) -> dict[str, Any]:
        """A copy of everything that a later ``load_state_dict`` needs to go on with the same bits.

        Returns:
            A dict like torch's: "state" (by index of the parameter over all groups: "step" and arrays by their names in
            torch), "param_groups" (options, "params" as indices, "param_names"), and "optimizer" and "version".
        """
        with self._exclusive("state_dict"):
            groups = [{"params": group["params"], **self._options_of(group)} for group in self.param_groups]
            return export_state(self._name, groups, self.state, self._space.copy)

    def full_state_dict(self) -> dict[str, Any]:
        """The states as plain arrays, for other programs: "state" and "param_groups" of ``state_dict``.

        Arrays are float32 (float64 for float64 parameters) and whole, however the optimizer stores them.
        """
        return {key: value for key, value in self.state_dict().items() if key in ("state", "param_groups")}

    def init_state(self) -> None:
        """Have all states exist, as before the first step. They do from the constructor on, so it changes nothing.

        Raises:
            TypeError, ValueError: Options that are wrong.
        """
        with self._exclusive("init_state"):
            self._current_options()

    def refresh(self) -> None:
        """Say that somebody else wrote the parameters: what was kept of them (LARS's norms) is taken anew."""
        if self._plan is not None:
            self._plan.forget_weights()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over step counts, states and options that ``state_dict`` of the same optimizer returned.

        Args:
            state_dict: As returned by ``state_dict``; it is copied, never kept.

        Raises:
            TypeError, ValueError: It belongs to another optimizer, other parameters or another version; nothing was
                changed.
        """
        with self._exclusive("load_state_dict"):
            where = f"{self._name}.load_state_dict"
            saved = import_state(state_dict, self._name, self.param_groups, where)
            for known, options in zip(self._groups, saved.groups, strict=True):
                if "capturable" in known.options:  # it is about this machine, not about what was saved
                    options["capturable"] = known.options["capturable"]
                options = {**self.defaults, **options}
                self.complete(options)
                checked = self._normalise(options, known.dtypes, known.index)
                for p, found in zip(self._parameters, saved.parameters, strict=True):
                    if p.group == known.index:
                        check_states(found, p, self.treat(checked, p.array).rule, checked, where)
            for group, options in zip(self.param_groups, saved.groups, strict=True):
                for name in self._options_of(group):
                    del group[name]
                group.update({**self.defaults, **options})
            self._current_options()  # allocates what the options now ask for
            for p, found in zip(self._parameters, saved.parameters, strict=True):
                self._add_states(p, found.arrays)
                for name, view in self._views(p).items():
                    self._space.assign(view, found.arrays.get(name, 0))
                p.progress = Progress(found.step, found.carry or None)
            self._rebuild()

    def _add_states(self, p: Parameter, names: Iterable[str]) -> None:
        """Room for states that the current rule does not use: saved after momentum, say, was switched off."""
        members = [q for q in self._parameters if q.group == p.group]
        for name in set(names) - set(p.states):
            dtype = COMPUTE[p.dtype]
            total = members[-1].offset + members[-1].extent
            flat = self._space.zeros(total, np.dtype(dtype), f"{self._name}: state {name!r}")
            for q in members:
                if COMPUTE[q.dtype] == dtype:
                    q.states.setdefault(name, flat)


class _Exclusive:
    """Holds a lock that must be free: two steps at once would be a race over the user's parameters."""

    def __init__(self, lock: threading.Lock, message: str) -> None:
        self._lock = lock
        self._message = message

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(self._message)

    def __exit__(self, *exception: object) -> None:
        self._lock.release()
