"""``ShardedOptimizer``: ZeRO-1 and ZeRO-2 on torch.distributed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.exclusive import exclusive, makes_many
from ...engine.options import STEP_OPTIONS
from ...engine.step import StepInfo
from .._scale import unscale
from .._tensors import gradient_memory, is_like
from ..base import TensorOptimizer
from .checkpoints import Checkpoints
from .layout import Bucket, Member, bucketed, facts_of
from .reducer import Reducer
from .sums import Slices
from .wire import Facts, Gathering, agree


class Sends(Gathering):
    """Knows whether something was written here that others may lack."""

    has_begun = False

    def begin(self, number: int) -> None:
        """This process has written its slices of this bucket and of those before."""
        self.has_begun = True
        super().begin(number)


class ShardedOptimizer(Checkpoints):
    """An optimizer of which each process of a group keeps and updates an equal part: states and masters take 1/n.

    Parameters are moved into flat buckets. A step updates this process's slice of each bucket and brings it to the
    others, so that all have the same parameters. Given the same gradients, parameters, states and norms have the same
    bits for any number of processes, those of the class itself without sharding. All processes must call the
    constructor, ``step``, ``add_param_group``, ``load_state_dict``, ``full_state_dict`` and ``swap_ema``.

    Args:
        params: As for ``torch.optim``; dense tensors on one device, equal on all processes in order, shape and dtype.
            Values are taken from the first process of the group.
        optimizer_class: A class of ``fastopt.torch``.
        process_group: The processes; None for all.
        bucket_cap_mb: Size of a bucket in MiB of parameters. A parameter lies in one bucket.
        reduce_gradients: Average the gradients over the processes, bucket by bucket, while backward goes on (ZeRO-2);
            ``.grad`` is then taken away. Else they must be the same on all processes, as DDP leaves them (ZeRO-1).
        **defaults: The arguments of the class, ``max_grad_norm`` and the like included, but for ``flatten``.

    Raises:
        TypeError, ValueError: As the class; also for what is not the same on all processes.
        RuntimeError: Another process refused; there is no process group.

    Example:
        >>> import tempfile, torch, fastopt.torch
        >>> path = tempfile.mkdtemp() + "/store"
        >>> torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> opt = fastopt.torch.ShardedOptimizer([w], fastopt.torch.SGD, lr=0.5)
        >>> w.sum().backward()
        >>> opt.step()
        >>> w.tolist()
        [0.5, 0.5]
        >>> torch.distributed.destroy_process_group()
    """

    max_grad_norm: float | None
    skip_nonfinite: bool
    zero_grads: bool

    _step_supports_amp_scaling = True
    _checks_for_scaler = False
    _unscales = True

    def __init__(
        self,
        params: Any,
        optimizer_class: type[TensorOptimizer],
        process_group: Any = None,
        *,
        bucket_cap_mb: float = 25,
        reduce_gradients: bool = False,
        **defaults: Any,
    ) -> None:
        where = f"{type(self).__name__}({getattr(optimizer_class, '__name__', optimizer_class)})"
        self._where, self._users = where, []
        self._group: Any = dist.group.WORLD if process_group is None else process_group
        self._nbytes = 0.0
        self._buckets: list[Bucket] = []
        self._members: list[Member] = []  # in the order of the groups
        self._params: list[Tensor] = []
        self._addresses: list[int] = []  # of the parameters
        self._versions: list[int] = []  # when they were written last
        self._gathering = Sends(self._buckets)
        self._names = getattr(optimizer_class, "option_names", frozenset())
        self._slices: Any = None
        self._inner: Any = None
        self._reducer: Reducer | None = None
        if self._group is None or dist.get_rank(self._group) < 0:
            raise RuntimeError(f"{where}: this process is in no process group; call init_process_group before.")
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, TensorOptimizer)):
            raise TypeError(f"{where}: optimizer_class must be a class of fastopt.torch, not {optimizer_class}.")
        if defaults.get("flatten"):
            raise ValueError(f"{where}: flatten=True is for optimizers that are not sharded; leave it out.")
        super().__init__(params, {})

        def facts() -> Facts:
            tried = [self._inner_group(g, [torch.nn.Parameter(torch.zeros(0))]) for g in self.param_groups]
            optimizer_class(tried, **defaults)
            if not (isinstance(bucket_cap_mb, int | float) and bucket_cap_mb > 0):
                raise ValueError(f"{where}: bucket_cap_mb is {bucket_cap_mb!r}; needed is a number of MiB above 0.")
            shared = {"class": optimizer_class.__name__, "bucket_cap_mb": bucket_cap_mb, "reduce": reduce_gradients}
            return [*shared.items(), *sorted(defaults.items()), *self._facts(self.param_groups)]

        agree(facts, self._group, where)
        self._nbytes = bucket_cap_mb * 2**20
        groups = [self._inner_group(g, [m.piece for m in self._place(g)]) for g in self.param_groups]
        self._inner = optimizer_class(groups, **defaults)
        self._begin()
        self._reducer = Reducer(self._members, self._group) if reduce_gradients else None

    def _facts(self, groups: Sequence[dict[str, Any]]) -> Facts:
        """What must be the same on all processes of the last groups; refuses what cannot be sharded."""
        return facts_of(groups, len(self.param_groups) - len(groups), self._params, self._names, self._where)

    def _place(self, group: dict[str, Any]) -> list[Member]:
        """Move the parameters of a group into buckets."""
        for params in bucketed(group["params"], self._nbytes, self._group.size()):
            self._buckets.append(Bucket(len(self._buckets), params, self._group))
        members = {id(m.param): m for bucket in self._buckets for m in bucket.members}
        placed = [members[id(p)] for p in group["params"]]
        self._members += placed
        self._params += group["params"]
        return placed

    def _inner_group(self, group: dict[str, Any], pieces: list[Tensor]) -> dict[str, Any]:
        return {**{k: v for k, v in group.items() if k not in ("params", "param_names")}, "params": pieces}

    @makes_many
    def _begin(self) -> None:
        """Parameters were placed: make states, and let the groups show all options."""
        self._inner._slices = self._slices = Slices(self._members, self._gathering, self._group, self._where)
        self._inner.init_state()
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            group.update((name, value) for name, value in inner.items() if name not in group)
        self.defaults = self._inner.defaults
        self._wrote()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, on all processes alike; as for the class.

        Raises:
            TypeError, ValueError, RuntimeError: As for the constructor; the optimizer is then unchanged.
        """
        if self._inner is None:  # torch's constructor
            super().add_param_group(param_group)
            return
        self._told()
        super().add_param_group(param_group)
        group = self.param_groups[-1]

        def facts() -> Facts:
            type(self._inner)([self._inner_group(group, [torch.nn.Parameter(torch.zeros(0))])])
            return self._facts([group])

        try:
            self._agree(facts, "add_param_group")
        except BaseException:
            self.param_groups.pop()
            raise
        self._is_broken = True
        placed = self._place(group)
        self._inner.add_param_group(self._inner_group(group, [m.piece for m in placed]))
        self._begin()
        self._is_broken = False
        if self._reducer is not None:
            self._reducer.add(placed)

    # --- the step ------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient, on all processes.

        Args:
            closure: Computes the loss and its gradients, before the step.

        Returns:
            The loss, if there is a closure.

        Raises:
            TypeError, ValueError, RuntimeError: As the class; also for options and gradients that are found to differ
                between processes, which is seen where sums are needed. Nothing was written.
            RuntimeError: Another process died or did not come (torch's error), or a step broke off in the middle.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    @exclusive
    def _step(self) -> None:
        inner = self._told()
        self._follow()
        scale, inner.found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._reducer is not None and inner.found_inf is not None and not self._checks_for_scaler:
            raise RuntimeError(
                f"{self._where}: with reduce_gradients=True there are no gradients that torch.amp.GradScaler, or "
                "unscale_, could look at. Use fastopt.torch.GradScaler without unscale_, and max_grad_norm to clip."
            )
        inner.grad_scale, inner._checks_for_scaler, inner._unscales = scale, self._checks_for_scaler, False
        self._slices.options = self._options
        self._together(self._update)
        if self._reducer is not None:
            self._reducer.drop(stepped=True)
        elif self.zero_grads:
            torch._foreach_zero_([p.grad for p in self._params if p.grad is not None])
        elif scale is not None and self._unscales:
            unscale(self._params, scale, self._steppers().skipped(self.last_info))

    def _update(self) -> None:
        if self._reducer is None:
            self._aim()
        else:
            self._reducer.finish()
        try:
            self._inner.step()
        finally:
            self._slices.options = list
            for m in self._members:
                if m.part.hi:
                    m.piece.grad = None
        self._gathering.finish()

    def _together(self, action: Callable[[], None]) -> None:
        """Do what brings parameters to the others. Where it breaks off in the middle, all that follows is refused."""
        self._told()
        self._is_broken, self._gathering.has_begun = True, False
        try:
            action()
        except (LookupError, OverflowError, RuntimeError, TypeError, ValueError):  # perhaps a refusal
            self._is_broken = self._gathering.has_begun
            raise
        self._is_broken = False
        self._wrote()

    def _options(self) -> Facts:
        """What must be the same on all processes in each step."""
        names, groups = self._inner.option_names, enumerate(self.param_groups)
        return [(f"{name} of group {g}", group[name]) for g, group in groups for name in group if name in names]

    def _follow(self) -> None:
        """Let flat memory follow parameters that somebody gave other memory, and masters those that he wrote."""
        if [p.data_ptr() for p in self._params] != self._addresses:
            for i, m in enumerate(self._members):
                p, view = m.param, m.view
                if p.data_ptr() != view.data_ptr() and p.numel():
                    if (p.shape, p.dtype, p.device) != (view.shape, view.dtype, view.device):
                        raise RuntimeError(
                            f"{self._where}: parameter {i} is now {p.dtype} of shape {tuple(p.shape)} on {p.device}, "
                            f"but was {view.dtype} of shape {tuple(view.shape)} on {view.device}. Move the model "
                            "before the optimizer is made."
                        )
                    m.take_in()
            self._inner.refresh()
        if self._inner._master and [p._version for p in self._params] != self._versions:
            self._inner.refresh()

    def _aim(self) -> None:
        """Give the pieces their parts of the gradients. One without elements only needs to know if there is one."""
        for i, m in enumerate(self._members):
            gradient = m.param.grad
            if gradient is not None and not is_like(gradient, m.view):  # which all processes may refuse
                gradient = gradient_memory(
                    gradient, m.param, m.view, self._inner._master, self._where, f"parameter {i}"
                )
            if not m.part.hi:
                if (gradient is None) is not (m.piece.grad is None):
                    m.piece.grad = None if gradient is None else torch.zeros_like(m.piece)
            elif gradient is not None:
                m.piece.grad = gradient.as_strided(m.shape, m.strides, gradient.storage_offset() + m.part.lo)

    def _wrote(self) -> None:
        torch.autograd.graph.increment_version(self._params)
        self._addresses = [p.data_ptr() for p in self._params]
        self._versions = [p._version for p in self._params] if self._inner._master else []

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """A block whose backward passes leave gradients on this process, to be added to those of the next one.

        For gradient accumulation with ``reduce_gradients=True``; under DDP use the model's.

        Raises:
            RuntimeError: The optimizer does not reduce gradients.
        """
        if self._reducer is None:
            raise RuntimeError(f"{self._where}.no_sync: without reduce_gradients=True use the no_sync of DDP's model.")
        before, self._reducer.waits = self._reducer.waits, True
        try:
            yield
        finally:
            self._reducer.waits = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, also those that were reduced already, or set them to zero."""
        super().zero_grad(set_to_none)
        if self._reducer is not None:
            self._reducer.drop()

    # --- what is the inner optimizer's ----------------------------------------------------------------------------

    @property
    def last_info(self) -> StepInfo:
        """What the last step did, the same on all processes."""
        info: StepInfo = self._inner.last_info
        return info

    def _steppers(self) -> Any:
        return self._inner._steppers()

    def refresh(self) -> None:
        """Parameters were written from outside, perhaps through ``.data``: masters follow them in the next step."""
        self._inner.refresh()

    def init_state(self) -> None:
        """Nothing: states exist from the start."""

    def reset_ema(self) -> None:
        """Let averages begin anew, as copies of the parameters as they are now; as for the class."""
        self._inner.reset_ema()

    @contextlib.contextmanager
    def swap_ema(self) -> Iterator[None]:
        """A block in which the parameters of all processes hold their averages; as for the class."""
        try:
            with self._inner.swap_ema():
                self._together(self._gathering.finish)
                yield
        finally:
            if not self._is_broken:
                self._together(self._gathering.finish)

    def __repr__(self) -> str:
        return f"{type(self).__name__} over {self._group.size()} processes of {self._inner!r}"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"{self._where} cannot be copied or pickled: it belongs to its processes. Use state_dict().")


def _forwarded(name: str) -> property:
    def read(self: ShardedOptimizer) -> Any:
        return getattr(self._inner, name)

    def write(self: ShardedOptimizer, value: Any) -> None:
        setattr(self._inner, name, value)

    return property(read, write)


for _name in STEP_OPTIONS:
    setattr(ShardedOptimizer, _name, _forwarded(_name))
