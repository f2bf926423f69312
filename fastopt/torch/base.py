"""The base of all optimizers for PyTorch: torch's constructor, groups and checkpoints; fastopt's step."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..engine.exclusive import exclusive
from ..engine.step import Request, StepInfo
from . import _devices
from ._checkpoints import Checkpoints
from ._ema import Averages
from ._groups import GroupOptions
from ._options import plain, without_numpy
from ._parameters import Kind
from ._scale import request_for, unscale
from ._shards import why_not_combined
from ._state import State
from ._stepper import Steppers
from ._tensors import local


class TensorOptimizer(Averages, Checkpoints):
    """What all optimizers of ``fastopt.torch`` share; torch's class of the same name supplies the rest.

    Parameters and ``.grad`` stay where they are; a step is one pass over memory for all parameters of all groups. What
    torch promises of its optimizers holds: param groups, schedulers, hooks, closures, checkpoints in both directions.

    Args:
        params: As for ``torch.optim``: an iterable of tensors, of (name, tensor) pairs, or of dicts with "params".
        max_grad_norm: Clip: gradients are multiplied by min(1, max_grad_norm / (norm + 1e-6)) inside the step, where
            norm is the Euclidean norm of all gradients of all groups, after unscaling. ``.grad`` is not changed. inf
            only reports the norm, in ``last_info.grad_norm``.
        skip_nonfinite: Change nothing, not even step counts, where a gradient is infinite or NaN, as a ``GradScaler``
            does; it needs none. ``last_info.skipped`` says so.
        zero_grads: Set gradients to zero in the same pass, also in a skipped step.
        master_weights: Keep float16 and bfloat16 parameters in float32, too, as the state ``master_param``. Steps are
            taken on these, and the parameters are their roundings: small steps add up instead of being rounded away.
            A parameter that somebody else writes in place (not through ``.data``) is taken over.
        flatten: Move parameters and gradients into flat memory (``p.data`` and ``p.grad`` become views of it), for the
            last bit of speed with many small parameters. ``zero_grad`` then zeroes gradients and never sets them to
            None, so that a parameter without gradient is one with a gradient of zero: it decays, and its momentum goes
            on. Parameters with ``requires_grad=False`` stay where they are. Make optimizers after ``model.to`` and
            before DDP; other references to the old memory go stale.
        ema_decay, ema_warmup: Average the parameters in the same pass, as in ``fastopt.Optimizer``; options of param
            groups, too. The state ``ema`` is float32 (float64 for float64 parameters); of 16-bit parameters with a
            master the master is averaged. Buffers, such as the statistics of batch normalization, are the model's:
            ``torch.optim.swa_utils.update_bn`` renews them inside ``swap_ema``.
        **options: The other arguments of the class. ``foreach`` and ``fused`` are accepted and make no difference.
            ``capturable=True``, which all classes take, lets steps on a GPU be captured into CUDA graphs; it makes no
            difference on the CPU. Numbers may be Python's, NumPy's or tensors of one element.

    ``max_grad_norm``, ``skip_nonfinite`` and ``zero_grads`` are attributes, too, which may be set between steps. They
    belong to the program: ``state_dict()`` does not have them.

    Attributes:
        last_info: What the last step did, a ``fastopt.StepInfo``: ``skipped`` and ``grad_norm``. On a GPU reading a
            field waits for the step.

    Raises:
        TypeError, ValueError: As torch's class; for parameters that share memory, that are not dense, or whose dtype
            no kernel computes; and for the arguments above in a param group: they are the whole optimizer's.
        NotImplementedError: ``differentiable=True``; in a step, what needs the norm of gradients whose whole cannot
            be had: FSDP1, Partial DTensors, shards on GPUs.
        ImportError: A parameter is on a GPU, and CuPy is not installed.
    """

    state: Any  # a State, until somebody puts another dict in its place

    _step_supports_amp_scaling = True  # GradScaler then leaves unscaling and skipping to the step
    _checks_for_scaler = False  # fastopt.torch.GradScaler leaves the check to the step, too
    _unscales = True  # ... and may want the gradients to stay scaled

    def __init__(
        self,
        params: Any,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
        master_weights: bool = False,
        flatten: bool = False,
        **options: Any,
    ) -> None:
        where = type(self).__name__
        step_options = {"max_grad_norm": max_grad_norm, "skip_nonfinite": skip_nonfinite, "zero_grads": zero_grads}
        GroupOptions.__init__(self, master_weights, flatten, **step_options)
        options = {name: without_numpy(value) for name, value in options.items()}
        for name, check in self.ranges.items():
            if name in options:
                value = check(plain(options[name], f"{where}: {name}"), f"{where}: {name}")
                if name in self.rule_options:  # torch's keep what they were given
                    options[name] = value
        flags = {name: options.pop(name) for name in self.rule_options if name in options}
        flags = {name: value for name, value in flags.items() if value is not self.rule_options[name]}
        super(GroupOptions, self).__init__(params, **options)  # torch's
        for group in (self.defaults, *self.param_groups):
            group.update({**flags, **group})
        self._accept(0)
        self._complete = True
        self.state = State.moved(self.state, self.param_groups, self.names, flat=self._flat is not None)

    @_disable_dynamo
    @exclusive
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, for example when layers are unfrozen.

        Raises:
            TypeError, ValueError: As for the constructor; the optimizer is then unchanged.
        """
        super().add_param_group(param_group)
        if self._complete:
            try:
                self._accept(len(self.param_groups) - 1)
            except BaseException:
                self.param_groups.pop()
                raise

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
        with torch.no_grad():
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

    @exclusive
    def _step(self) -> StepInfo:
        scale: Any = getattr(self, "grad_scale", None)  # GradScaler sets both around a step
        found: Any = getattr(self, "found_inf", None)
        asked = self._request
        if self._checks_for_scaler:
            asked = dataclasses.replace(asked, skip_nonfinite=True)
        options = self._current_options()
        steppers = self._steppers()
        may_ask = scale is None and found is None and not steppers.have_stepped
        if may_ask and self._asks_for_states(options, steppers):
            lr = self.defaults["lr"]  # states may begin with it
            groups = zip(options, self.param_groups, strict=True)
            begin = [{**o, "lr": plain(g.get("initial_lr", lr), "lr")} for o, g in groups]
            self._make_states(begin)
            return StepInfo(False, 0.0 if asked.needs_norm else None)
        for _ in range(2):
            device = None if steppers.only is None else steppers.only.device
            if self._part is not None:
                self._refuse_part(self._part, asked)
            if self._rates.devices:
                self._rates.check(device, type(self).__name__)
            request: Request | None = asked
            alive: Tensor | None = None  # what the step reads
            if scale is not None or found is not None:
                request, alive = request_for(asked, scale, found, device)
            if request is None:
                if self.zero_grads:
                    self.zero_grad(set_to_none=False)
                return StepInfo(True, math.nan if asked.needs_norm else None)
            info = steppers.step(request, options)
            del alive
            if info is not None:
                if scale is not None and self._unscales and not self.zero_grads:
                    unscale(self._parameters(), scale, steppers.skipped(info))
                return info
            self.state.watch.drop()  # something moved or was changed: once more, from what is there now
            steppers = self._steppers()
        raise AssertionError("what was just derived cannot be stale")

    def _steppers(self) -> Steppers:
        """What is derived from groups and state, anew where they changed."""
        if type(self.state) is not State:
            self.state = State(self.state)
        watch = self.state.watch
        if watch.derived() is None or not watch.derived().describes(self.param_groups):
            self._rules = [self.select_rule(options) for options in self._options]
            kind = Kind(type(self).__name__, self.counts_steps, self._master, self._flat, self._rules, self._slices)
            watch.drop()
            refusals = ((name, why_not_combined(p)) for name, p in self._named_parameters())
            self._part = next((f"{name} is {why}" for name, why in refusals if why), None)
            self._derived = None
            self._derived = Steppers(self.param_groups, self.state, kind)
            watch.derived = weakref.ref(self._derived)
        assert self._derived is not None
        return self._derived

    def _refuse_part(self, part: str, asked: Request) -> None:
        """Refuse a step that needs sums over the whole of a parameter, where they cannot be had."""
        if any(rule.ratio is not None for rule in self._rules):
            reason, cure = "its rule", "Use an optimizer whose rule has no norms, or DDP"
        elif self.max_grad_norm is not None:
            cure = "Leave it out, and clip with torch.nn.utils.clip_grad_norm_ (FSDP1: the module's method)"
            reason = "max_grad_norm"
        elif self.skip_nonfinite:
            cure = "Leave it out, and use torch.amp.GradScaler, or look at the norm of clip_grad_norm_"
            reason = "skip_nonfinite"
        elif asked.needs_norm:
            reason, cure = "fastopt.torch.GradScaler", "Use torch.amp.GradScaler"
        else:
            return
        raise NotImplementedError(f"{type(self).__name__}: {reason} needs sums over all processes, but {part}. {cure}.")

    # --- states without a step -----------------------------------------------------------------------------------

    @_disable_dynamo
    @exclusive
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
        with torch.no_grad():
            self._make_states(self._current_options())

    def _make_states(self, options: list[dict[str, Any]]) -> None:
        for stepper in self._steppers().each:
            stepper.make_states(options)
        self.state.watch.drop()  # the first step begins from these states, with the options of then

    def _asks_for_states(self, options: list[dict[str, Any]], steppers: Steppers) -> bool:
        """Whether this step is one of torch.distributed.checkpoint's helpers, which wants states and nothing else.

        They set every lr to 0 and all gradients to zero, while there is no state. A process may hold nothing but zeros
        of gradients, in a schedule that begins with lr 0: so those that share parameters come to one answer.
        A sharded optimizer has its states from the beginning.
        """
        if any(group.get("lr", True) for group in options) or len(self.state) or self._slices is not None:
            return False
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        if any(_devices.device_of(g).capturing() for g in grads):
            return False
        some, nonzero = bool(grads), any(g.layout is not torch.strided or bool(local(g, "").any()) for g in grads)
        for stepper in steppers.each:
            some, nonzero = stepper.shards.anywhere(some, nonzero)
        return some and not nonzero

    @_disable_dynamo
    @exclusive
    def refresh(self) -> None:
        """Parameters were written from outside, perhaps through ``.data``: masters follow them in the next step.

        Writes that autograd sees (``copy_``, ``model.load_state_dict``) need no call.
        """
        if self._derived is not None:
            for stepper in self._derived.each:
                stepper.refresh()

    def _named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                yield f"parameter {i} of group {g}", p

    @_disable_dynamo
    @exclusive
    def upload_options(self) -> None:
        """Write the options of ``param_groups`` to device memory, where a CUDA graph's next replay finds them.

        Needed only between replays of a graph; ``step`` does it itself. The upload goes to the current stream.

        Raises:
            TypeError, ValueError: Options that are wrong; nothing was uploaded.
            RuntimeError: No step was taken yet with ``capturable=True``, or not with options of this kind.
        """
        options = self._current_options()
        stepper = self._steppers().only
        if stepper is None or not stepper.is_replayable:
            raise RuntimeError(f"{type(self).__name__}.upload_options: no step was taken yet with capturable=True.")
        stepper.serving.plan.upload_options(options)

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, or set them to zero; with ``flatten=True`` always the latter, where it moved them."""
        if self._flat is None:
            super().zero_grad(set_to_none)
            return
        self._flat.zero()
        for p in self._parameters():
            if p.grad is not None and not self._flat.has(p):
                p.grad = None if set_to_none else p.grad.detach().zero_()


TensorOptimizer.step.hooked = True  # type: ignore[attr-defined]  # torch need not wrap it
