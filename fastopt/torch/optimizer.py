"""The base of all optimizers for PyTorch: torch's constructor, groups and checkpoints; fastopt's step."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Mapping
from operator import is_
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .._options import NORM, boolean
from .._plan import Treatment
from .._step import Request, StepInfo
from ..kernels.rule import Options, Rule
from . import _devices
from ._checkpoints import Checkpoints
from ._entries import Kind
from ._flat import FlatGroups
from ._lr import DeviceRates
from ._scale import request_for
from ._several import Several, derive
from ._state import State
from ._tensors import FLOATING, PLAIN, check_apart, parameter_memory
from ._update import Update

FIXED = (bool, int, float, str)
"""Types whose objects never change."""

EXTRAS = {"max_grad_norm": None, "zero_grads": False, "master_weights": False, "flatten": False}
"""What every constructor takes beside torch's arguments, and the defaults."""


class TensorOptimizer(Checkpoints):
    """What all optimizers of ``fastopt.torch`` share; torch's class of the same name supplies the rest.

    Parameters and ``.grad`` stay where they are; a step is one pass over memory for all parameters of all groups. What
    torch promises of its optimizers holds: param groups, schedulers, hooks, closures, checkpoints in both directions.

    Args:
        params: As for ``torch.optim``: an iterable of tensors, of (name, tensor) pairs, or of dicts with "params".
        max_grad_norm: Clip: gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)) inside the step, where
            norm is the Euclidean norm of all gradients, after unscaling. ``.grad`` is not changed. inf only reports the
            norm, in ``last_info.grad_norm``.
        zero_grads: Set gradients to zero in the same pass, also in a skipped step.
        master_weights: Keep float16 and bfloat16 parameters in float32, too, as the state ``master_param``. Steps are
            taken on these, and the parameters are their roundings: small steps add up instead of being rounded away.
            A parameter that somebody else writes in place (not through ``.data``) is taken over.
        flatten: Move parameters and gradients into flat memory (``p.data`` and ``p.grad`` become views of it), for the
            last bit of speed with many small parameters. ``zero_grad`` then zeroes gradients and never sets them to
            None, so that a parameter without gradient is one with a gradient of zero: it decays, and its momentum goes
            on. Make optimizers after ``model.to`` and before DDP; other references to the old memory go stale.
        **kwargs: The other arguments of torch's class. ``foreach`` and ``fused`` are accepted and make no difference.
            ``capturable=True``, which all classes take, lets steps on a GPU be captured into CUDA graphs; it makes no
            difference on the CPU.

    Attributes:
        last_info: What the last step did, a ``fastopt.StepInfo``: ``skipped`` and ``grad_norm``. On a GPU reading a
            field waits for the step.

    Raises:
        TypeError, ValueError: As torch's class; and for parameters that share memory, that are not dense, or whose
            dtype no kernel computes.
        NotImplementedError: ``differentiable=True``.
        ImportError: A parameter is on a GPU, and CuPy is not installed.
    """

    rule_options: ClassVar[Mapping[str, Any]] = {}
    """Options of the rules that torch's class does not have."""

    counts_steps: ClassVar[bool] = True
    """Whether ``state`` has a step count, as in torch."""

    state: Any  # a State, until somebody puts another dict in its place

    _step_supports_amp_scaling = True  # GradScaler then leaves unscaling and skipping to the step
    _adds_capturable = False  # SGD and Adagrad of torch need no such argument
    _skip_nonfinite = False  # fastopt.torch.GradScaler leaves the check to the step, too

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._begin(**{name: kwargs.pop(name, default) for name, default in EXTRAS.items()})
        if kwargs.get("differentiable"):
            raise NotImplementedError(
                f"{type(self).__name__}: differentiable=True is not supported, because kernels have no gradient. "
                "Use torch.optim."
            )
        capturable = self._adds_capturable and kwargs.pop("capturable", False)
        super().__init__(params, *args, **kwargs)
        self._accept(0)
        self._complete = True
        self.state = State.moved(self.state, self.param_groups, flat=self._flat is not None, copy=False)
        if boolean(capturable, f"{type(self).__name__}: capturable"):
            self.defaults["capturable"] = True
            for group in self.param_groups:
                group.setdefault("capturable", True)

    def __init_subclass__(cls) -> None:
        """Show the signature of torch's class and what is added to it."""
        inherited = inspect.signature(super().__init__)
        own = inspect.signature(cls.__init__)
        cls._adds_capturable = "capturable" not in inherited.parameters
        if any(p.kind is p.VAR_KEYWORD for p in own.parameters.values()):
            added = {"capturable": False, **EXTRAS} if cls._adds_capturable else EXTRAS
            keywords = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default)
                for name, default in added.items()
            ]
            parameters = [*list(inherited.parameters.values())[1:], *keywords]
            cls.__signature__ = inherited.replace(parameters=parameters)  # type: ignore[attr-defined]

    def _begin(self, **extras: Any) -> None:
        norm, where = extras["max_grad_norm"], type(self).__name__
        self._max_norm = None if norm is None else NORM(norm, f"{where}: max_grad_norm")
        self._zero_grads, self._master, flatten = (
            boolean(extras[name], f"{where}: {name}") for name in ("zero_grads", "master_weights", "flatten")
        )
        self._flat = FlatGroups() if flatten else None
        self._extras = extras
        self.last_info = StepInfo()
        self._lock = threading.Lock()
        self._complete = False  # whether the constructor is done, or there was none
        self._derived: Update | Several | None = None  # ``state`` knows it, too, but does not keep it alive
        self._seen: list[dict[str, Any]] = []
        self._objects: list[Any] | None = None  # what is in the groups, where nothing but an exchange can change it
        self._options: list[dict[str, Any]] = []
        self._structure: list[Any] = []
        self._rates = DeviceRates()

    def select_rule(self, options: Options) -> Rule:
        """The update rule for a param group with these options."""
        raise NotImplementedError(f"{type(self).__name__} must override select_rule.")

    def treat(self, options: Options, parameter: Tensor) -> Treatment:
        """What is done to one parameter of a group; LARS leaves some out of the trust ratio."""
        return Treatment(self.select_rule(options), True)

    def structure(self, options: Options) -> tuple[Any, ...]:
        """The part of the options that decides on kernels and states."""
        return self.select_rule(options), bool(options.get("maximize"))

    @_disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, for example when layers are unfrozen.

        Raises:
            TypeError, ValueError: As for the constructor; the optimizer is then unchanged.
        """
        self._check_idle("add_param_group")
        with self._lock:
            super().add_param_group(param_group)
            if self._complete:
                try:
                    self._accept(len(self.param_groups) - 1)
                except BaseException:
                    self.param_groups.pop()
                    raise

    def _accept(self, first: int) -> None:
        """Refuse early what a step would refuse in groups from this one on, and flatten them.

        Other devices and layouts may still change before the first step.
        """
        where = type(self).__name__
        named = [
            (f"parameter {i} of group {g}", p, g >= first)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if type(p) in PLAIN
            and p.device.type in ("cpu", "cuda")
            and p.layout is torch.strided
            and p.dtype in FLOATING
        ]
        for home in {_devices.home_of(p) for _, p, new in named if new}:
            if home.on_gpu:
                home.require()
        memories = [parameter_memory(p, f"{where}: {name}") if new else p for name, p, new in named]
        starts, nbytes = [m.data_ptr() for m in memories], [m.nbytes for m in memories]
        check_apart(starts, nbytes, [name for name, *_ in named], where)
        if self._flat is not None:
            for group in self.param_groups[first:]:
                self._flat.add(group["params"], where)

    # --- the step ------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        On a GPU the step is put on torch's current stream and not waited for; a norm over several devices is.

        Args:
            closure: Computes the loss and its gradients, before the step.

        Returns:
            The loss, if there is a closure.

        Raises:
            TypeError, ValueError, RuntimeError: Gradients, parameters or options that cannot be right: nothing was
                written. RuntimeError also for sparse gradients, while another thread steps this optimizer, and in the
                capture of a CUDA graph without ``capturable``, or before a step of the same kind was taken.
        """
        given = () if closure is None else (closure,)
        # A class that overrides step has it wrapped by torch, which then calls the hooks.
        if type(self).step is TensorOptimizer.step and self._is_watched():
            return self._watched_step(*given)
        self._optimizer_step_code()
        return self._plain_step(*given)

    def _plain_step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._lock.locked():
            self._check_idle("step")
        with self._lock, torch.no_grad():
            self.last_info = self._step()
        return loss

    _watched_step = Optimizer.profile_hook_step(_plain_step)

    def _is_watched(self) -> bool:
        """Whether there are hooks to call, or a profiler to tell. Torch wraps each step in both, which takes 10 µs."""
        return bool(
            torch.autograd._profiler_enabled()  # type: ignore[attr-defined]
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )

    def _step(self) -> StepInfo:
        scale: Any = getattr(self, "grad_scale", None)  # GradScaler sets both around a step
        found: Any = getattr(self, "found_inf", None)
        asked = Request(1.0, 0, self._max_norm, self._skip_nonfinite, self._zero_grads)
        options = self._current_options()
        if not dict.__len__(self.state) and scale is None and found is None and self._asks_for_states(options):
            self._make_states(options)
            return StepInfo()
        for _ in range(2):
            update = self._update()
            self._rates.check(update.home, type(self).__name__)
            request: Request | None = asked
            alive: Tensor | None = None  # what the step reads
            if scale is not None or found is not None:
                request, alive = request_for(asked, scale, found, update.home)
            if request is None:
                if self._zero_grads:
                    self.zero_grad(set_to_none=False)
                return StepInfo(True)
            info = update.step(request, options, self.treat)
            del alive
            if info is not None:
                return info
            self.state.watch.drop()  # something moved or was changed: once more, from what is there now
        raise AssertionError("what was just derived cannot be stale")

    def _update(self) -> Update | Several:
        """What is derived from groups and state, anew where they changed."""
        if type(self.state) is not State:
            self.state = State(self.state)
        watch = self.state.watch
        if watch.derived is None or not watch.derived.describes(self.param_groups):
            where = type(self).__name__
            kind = Kind(where, self.counts_steps, self._master, self._flat)
            watch.drop()
            self._derived = None
            self._derived = watch.derived = derive(self.param_groups, self.state, kind)
        assert self._derived is not None
        return self._derived

    # --- states without a step -----------------------------------------------------------------------------------

    @_disable_dynamo
    def init_state(self) -> None:
        """Make the states of all parameters that require a gradient now, with a step count of 0.

        For tools that want states to exist before the first step. Training is the same with and without, and calling
        it again changes nothing.

        Raises:
            TypeError, ValueError, RuntimeError: As ``step``.

        Example:
            >>> import torch, fastopt.torch
            >>> w = torch.nn.Parameter(torch.ones(2))
            >>> opt = fastopt.torch.AdamW([w])
            >>> opt.init_state()
            >>> {name: x.tolist() for name, x in opt.state[w].items()}
            {'step': 0.0, 'exp_avg': [0.0, 0.0], 'exp_avg_sq': [0.0, 0.0]}
        """
        self._check_idle("init_state")
        with self._lock, torch.no_grad():
            self._make_states(self._current_options())

    def _make_states(self, options: list[dict[str, Any]]) -> None:
        self._update().make_states(options, self.treat)
        self.state.watch.drop()  # the first step begins from these states, with the options of then

    def _asks_for_states(self, options: list[dict[str, Any]]) -> bool:
        """Whether this step is one of torch.distributed.checkpoint's helpers, which wants states and nothing else.

        They set every lr to 0 and all gradients to zero. No state exists, as the caller knows.
        """
        if any(group.get("lr") for group in options):
            return False
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads or any(g.layout is not torch.strided or _devices.home_of(g).capturing() for g in grads):
            return False
        return not any(bool(g.any()) for g in grads)

    @_disable_dynamo
    def refresh(self) -> None:
        """Parameters were written from outside, perhaps through ``.data``: masters follow them in the next step.

        Writes that autograd sees (``copy_``, ``model.load_state_dict``) need no call.
        """
        self._check_idle("refresh")
        with self._lock:
            if self._derived is not None:
                self._derived.refresh()

    @_disable_dynamo
    def upload_options(self) -> None:
        """Write the options of ``param_groups`` to device memory, where a CUDA graph's next replay finds them.

        Needed only between replays of a graph; ``step`` does it itself. The upload goes to the current stream.

        Raises:
            TypeError, ValueError: Options that are wrong; nothing was uploaded.
            RuntimeError: No step was taken yet with ``capturable=True``, or not with options of this kind.
        """
        self._check_idle("upload_options")
        with self._lock:
            options = self._current_options()
            derived = self.state.watch.derived if isinstance(self.state, State) else None
            if derived is None or not derived.is_capturable:
                raise RuntimeError(f"{type(self).__name__}.upload_options: no step was taken yet with capturable=True.")
            derived.upload_options(options)

    def _tell_skipped(self, found: Tensor) -> None:
        """Write 1 where the last step was skipped, else 0; not waited for."""
        verdict = self._update().verdict()
        if verdict is None:
            found.fill_(self.last_info.skipped)
        else:
            found.copy_(verdict)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero; with ``flatten=True`` always the latter."""
        if self._flat is None:
            super().zero_grad(set_to_none)
        else:
            self._flat.zero()

    # --- options -------------------------------------------------------------------------------------------------

    def _current_options(self) -> list[dict[str, Any]]:
        """Options of every group as numbers."""
        objects = [x for group in self.param_groups for item in group.items() for x in item]
        # Reading every option takes as long as a small step; but the same objects say the same, unless they can change.
        if self._objects is not None and len(objects) == len(self._objects) and all(map(is_, objects, self._objects)):
            return self._options
        current = [
            {name: _plain(value) for name, value in group.items() if name != "params"}
            for group in self._rates.placed(self.param_groups)
        ]
        if current != self._seen:
            options = [self.complete(o, i) for i, o in enumerate(current)]
            structure = [self.structure(o) for o in options]
            if structure != self._structure and isinstance(self.state, State):
                self.state.watch.drop()
            self._options, self._structure, self._seen = options, structure, current
        values = [value for group in self.param_groups for name, value in group.items() if name != "params"]
        self._objects = objects if all(map(_is_fixed, values)) else None
        return self._options

    def complete(self, options: dict[str, Any], index: int) -> dict[str, Any]:
        """The options of a group with those that torch does not have; refuses what cannot be computed with."""
        options = {**self.rule_options, **options}
        where = f"{type(self).__name__}: group {index}: "
        if options.get("differentiable"):
            raise NotImplementedError(f"{where}differentiable=True is not supported.")
        rule = self.select_rule(options)
        for name in {*rule.options, *rule.initial.values()} & {*options, *self.defaults}:
            value = options.get(name)
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, (int, float)):
                    raise TypeError(f"{where}{name} must be a number, got {value!r}.")
                if math.isnan(number):
                    raise ValueError(f"{where}{name} must be a number, got {value!r}.")
        return options


TensorOptimizer.step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it


def _is_fixed(value: Any) -> bool:
    """Whether the object cannot say something else later."""
    return value is None or type(value) in FIXED or (type(value) is tuple and all(map(_is_fixed, value)))


def _plain(value: Any) -> Any:
    """A tensor as a number; a list as a tuple, since its items may change."""
    if isinstance(value, Tensor):
        return value.item()
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value
