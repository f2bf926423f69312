"""The base of all optimizers: parameters, and the step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, cast

from .arrays import FlatBuffer
from .engine.classes import constructor, keywords_of, option_arguments
from .engine.device import Array, Device, is_array
from .engine.exclusive import exclusive, finish, makes_many
from .engine.host import plan_class
from .engine.options import EMA_OPTIONS, NORM, SCALE, STEP_OPTIONS, as_now, boolean, own_options, ranges_of
from .engine.plan import Plan, Plans
from .engine.step import Request, StepInfo
from .groups import Group
from .inputs import GradientReader, Gradients, Pattern, collect, groups_in
from .kernels.rules.rule import SWITCH
from .states import States

Params = FlatBuffer | Mapping[str, Array] | Iterable[Array] | Iterable[Mapping[str, Any]]
Grads = FlatBuffer | Mapping[str, Array | None] | Sequence[Array | None]


def _begin(opt: Optimizer, params: Params, **arguments: Any) -> None:
    step_options = {name: arguments.pop(name) for name in STEP_OPTIONS}
    Optimizer.__init__(opt, params, arguments, **step_options)


class Optimizer(States):
    """Base class: holds parameters and states, and takes steps by the rule that a subclass selects.

    On a GPU the option ``capturable`` makes the device keep step counts, options and scalars, so that a step can be
    captured into a CUDA graph (after one like it was taken) and replayed. Change options between replays with
    ``upload_options``.

    A class of one's own is made by ``fastopt.optimizer`` of what ``@fastopt.rule`` makes of a function. A rule that is
    not in the library is compiled on first use, which needs Numba (``pip install numba``).

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

    Options of every param group, which all classes take as keywords, too:

        ema_decay: Keep an exponential moving average of the parameters w, in the pass that updates them: the state
            ``ema``, float32 (float64 for float64 parameters). None: no average. d in [0, 1): the first step taken
            copies w to e, each further one adds (1 - d) (w - e), as torch's AveragedModel does with its
            get_ema_multi_avg_fn(d). A parameter without gradient is not averaged in that step. In float32 an average
            with d >= 0.9999 stalls 3e-4 to 5e-3 away from parameters that stand still. ``swap_ema`` puts averages into
            the parameters, ``reset_ema`` lets them begin anew.
        ema_warmup: Take min(d, (1 + n) / (10 + n)) for d in the n-th averaging after the copy, so that the parameters
            of the beginning are forgotten sooner.

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
    """

    _reader: GradientReader  # of the parameters and states as they are now

    def __init__(
        self,
        params: Params,
        defaults: Mapping[str, Any],
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        zero_grads: bool = False,
    ) -> None:
        super().__init__(defaults, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite, zero_grads=zero_grads)
        self._patterns: Plans[Pattern] = Plans()
        self._add(groups_in(params, self._name))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the constructor of the rule's record, where the class writes none."""
        if "rule" in vars(cls) and cls.rule is not None and cls.rule.options:
            switches = dict.fromkeys(("maximize", "capturable", *cls.flags), SWITCH)
            options = {**cls.rule.options, **switches, **EMA_OPTIONS}
            cls.ranges = ranges_of(options)
            if "__init__" not in vars(cls):
                arguments = [*option_arguments(options, Params), *keywords_of(Optimizer.__init__)]
                cls.__init__ = constructor(cls.__qualname__, arguments, _begin)  # type: ignore[method-assign]
        super().__init_subclass__(**kwargs)

    # --- groups --------------------------------------------------------------------------------------------------

    @exclusive
    def add_param_group(self, group: Mapping[str, Any]) -> None:
        """Add parameters, for example when layers are unfrozen.

        Args:
            group: A dict with the key "params" and options that replace the defaults.

        Raises:
            TypeError, ValueError: As for the constructor; the optimizer is then unchanged.
        """
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f'{self._name}.add_param_group: group must be a dict with the key "params", got {group!r}.')
        self._add([group])

    @makes_many
    def _add(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check groups, allocate their states, and only then take them in."""
        first, device = len(self.param_groups), cast(Device, getattr(self, "_device", None))
        parameters, names = list(self._parameters), {p.name for p in self._parameters}
        added: list[Group] = []
        shown: list[dict[str, Any]] = []
        for index, group in enumerate(groups, first):
            where = f"{self._name}: params" if not index else f"{self._name}: params of group {index}"
            known = collect(group["params"], index, len(parameters), device, where)
            device = known.device
            options = {**self.defaults, **own_options(group, self._known_options, self._place(index))}
            self.complete(options)
            known.options = self._normalise(options, known.dtypes, index, device)
            taken = [name for name in known.arrays if name in names]
            if taken:
                raise ValueError(
                    f"{where}: the name {min(taken)!r} is taken by another group; name each parameter once."
                )
            known.seen, known.foreign = as_now(options), group.keys() - options.keys() - {"params"}
            parameters += known.members
            names.update(known.arrays)
            added.append(known)
            shown.append({**group, "params": known.arrays, **options})
        plan_class(device)  # refuses where no kernels can be had, before anything is built
        for known in added:
            for p, name, state in self._allocate(known, known.options):
                p.states[name] = state
        reader = GradientReader([*self._groups, *added], device, self._name)  # refuses memory that is shared

        def take_in() -> None:
            self._device, self._parameters = device, parameters
            self._groups[first:], self.param_groups[first:] = added, shown
            self._rebuild(reader)

        finish(take_in)

    def _rebuild(self, reader: GradientReader | None = None) -> None:
        self._leave_pattern()
        self._patterns = Plans()
        self._reader = reader or GradientReader(self._groups, self._device, self._name)

    # --- options ---------------------------------------------------------------------------------------------------

    def _current_options(self) -> list[dict[str, Any]]:
        if len(self.param_groups) != len(self._groups):
            raise ValueError(
                f"{self._name}: param_groups has {len(self.param_groups)} groups, but {len(self._groups)} were added. "
                "Add groups with add_param_group."
            )
        changed: list[tuple[Group, dict[str, Any], dict[str, Any]]] = []
        for index, (group, known) in enumerate(zip(self.param_groups, self._groups, strict=True)):
            options = dict(group)
            if options.pop("params", None) is not known.arrays:
                raise ValueError(f'{self._name}: param_groups[{index}]["params"] was replaced. Make a new optimizer.')
            for name in known.foreign:
                options.pop(name, None)
            try:
                same = options == known.seen  # a copy: values may change in place
            except ValueError:  # an array where a number belongs has no truth
                same = False
            if not same:
                if options.keys() != known.seen.keys():
                    options = own_options(options, self._known_options, self._place(index))
                    known.foreign = group.keys() - options.keys() - {"params"}
                self.complete(options)
                checked = self._normalise(options, known.dtypes, index, self._device)
                changed.append((known, as_now(options), checked))
        for known, seen, checked in changed:  # nothing is taken over before all groups are checked
            self._take_over(known, checked)
            known.seen, known.options = seen, checked
        return [known.options for known in self._groups]

    def _take_over(self, known: Group, checked: dict[str, Any]) -> None:
        if self.structure(known.options) != self.structure(checked):
            for p, name, state in self._allocate(known, checked):
                p.states[name] = state
            self._rebuild()
        self.complete(self.param_groups[known.index])

    # --- the step ------------------------------------------------------------------------------------------------

    @exclusive
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
        options = self._current_options()
        keep, request = self._keeps(options), self._request
        if (
            keep
            or type(grad_scale) is not float
            or grad_scale != 1.0
            or not (max_grad_norm is max_norm is skip_nonfinite is zero_grads is ...)
        ):
            request = self._requested(grad_scale, keep, max_norm, max_grad_norm, skip_nonfinite, zero_grads)
        listed, flat = self._reader.listed(grads)
        pattern, alive = self._pattern, listed  # alive: another thread may drop the gradients while they are read
        if pattern is None or not pattern.knows(listed, flat, request.zero_grads):
            pattern, alive = self._pattern_of(listed, flat, request.zero_grads, options)
        info = pattern.plan.step(request, options)
        del alive
        vars(self)["last_info"] = info  # an attribute's assignment is looked at, which takes 0.3 µs
        return info

    def _requested(self, grad_scale: float | Array, keep_weights: bool, *given: Any) -> Request:
        """What a step with these arguments is asked to do; ... stands for what the optimizer does in every step."""
        own, where = self._request, f"{type(self).__name__}.step"
        max_norm, max_grad_norm, skip, zero = given
        if max_norm is not ... and max_grad_norm is not ...:
            raise TypeError(f"{where}: max_norm is another name of max_grad_norm; pass one of them.")
        multiplier, scale_at = 1.0, 0
        if type(grad_scale) is not float and is_array(grad_scale):
            scale_at = self._device.scalar(grad_scale, f"{where}: grad_scale")
        if not scale_at and (type(grad_scale) is not float or grad_scale != 1.0):
            multiplier = 1.0 / SCALE(grad_scale, f"{where}: grad_scale")
        norm = own.max_grad_norm
        if max_norm is not ...:
            norm = NORM(max_norm, f"{where}: max_norm")
        elif max_grad_norm is not ...:
            norm = NORM(max_grad_norm, f"{where}: max_grad_norm")
        skip = own.skip_nonfinite if skip is ... else boolean(skip, f"{where}: skip_nonfinite")
        zero = own.zero_grads if zero is ... else boolean(zero, f"{where}: zero_grads")
        return Request(multiplier, scale_at, norm, skip, zero, keep_weights)

    @exclusive
    def upload_options(self) -> None:
        """Write the options of ``param_groups`` to device memory, where a CUDA graph's next replay finds them.

        Needed only between replays of a graph; ``step`` does it itself. The upload goes to the current stream.

        Raises:
            TypeError, ValueError: Options that are wrong; nothing was uploaded.
            RuntimeError: No step was taken yet with ``capturable=True``, or another thread is using this optimizer.
        """
        options = self._current_options()
        if self._plan is None or not all(o.get("capturable") for o in options):
            raise RuntimeError(f"{self._name}.upload_options: no step was taken yet with capturable=True.")
        self._plan.upload_options(options)

    def _pattern_of(
        self, listed: list[Any], flat: bool, write: bool, options: list[dict[str, Any]]
    ) -> tuple[Pattern, list[Any]]:
        """The pattern of these gradients, whose plan reads them, and what is to be kept alive."""
        known = self._patterns.find(lambda pattern: pattern.knows(listed, flat, write))
        if known is not None and self._serve(known):
            return known, listed
        gradients = self._reader.read(listed, flat, write)
        pattern = self._patterns.find(lambda pattern: pattern.serves(gradients))
        if pattern is None or not self._serve(pattern):
            self._leave_pattern()
            pattern = self._patterns.keep(Pattern(gradients, self._make_plan(gradients, options), self._reader.written))
            self._pattern = pattern
        pattern.aim(gradients, listed, write)
        return pattern, [*listed, *gradients.arrays]

    def _serve(self, pattern: Pattern) -> bool:
        """Have a pattern serve that did before; False where its parameters have gone ways of their own."""
        if pattern is not self._pattern:
            self._leave_pattern()
            if not self._patterns.resume(pattern):
                return False
            self._pattern = pattern
        return True

    def _leave_pattern(self) -> None:
        if self._pattern is not None:
            self._pattern.plan.recount()  # a CUDA graph may have been replayed
        self._pattern = None  # parameters may soon count elsewhere

    @makes_many
    def _make_plan(self, gradients: Gradients, options: list[dict[str, Any]]) -> Plan:
        present = [self._parameters[i] for i in gradients.present]
        choices = [self.choose(options[p.group], p.array) for p in present]
        signs = [-1.0 if o.get("maximize") else 1.0 for o in options]
        return plan_class(self._device)(present, gradients.dtypes, choices, gradients.flat, signs, self._device)

    def _keeps(self, options: list[dict[str, Any]]) -> bool:
        return False
