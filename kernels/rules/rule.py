"""The record that describes one update rule to everything that is not the rule: compiler, API, tests, bench."""

from __future__ import annotations

import inspect
import math
import numbers
import pickle
import pkgutil
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..layout import CARRY, DECAY, GRADIENT, PARAMETER, SCALAR_GROUP_WORDS, SUMS, WEIGHT

MAX_STATES = 6
"""State arrays that a segment has room for."""

EMA = "ema"
"""Name in a parameter's state of its average (epilogues.py)."""

Product = tuple[str | int, str | int]
"""What is multiplied and summed: "p" or "g" as stored, or the number of a term."""

Options = Mapping[str, Any]
"""A param group: hyperparameters by name."""

NONNEGATIVE, POSITIVE = "[0, inf)", "(0, inf)"
BELOW_ONE, UP_TO_ONE = "[0, 1)", "[0, 1]"
BETAS = BELOW_ONE, BELOW_ONE

LARGE, STRETCH = 2.0**127, 2.0**100


class Option(NamedTuple):
    """An option of a param group, and an argument of the class."""

    default: Any = ...  # ... where there is none
    range: Any = None  # an interval such as "[0, 1)", a tuple of them, bool, or a function (value, where) -> value;
    # None: as options of this name or default usually are
    keyword: bool = False  # not by position
    noted: bool = False  # no argument: it follows from others


SWITCH = Option(False, keyword=True)


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule and what a launcher needs to know about it.

    Attributes:
        name: Name in the registry and in the symbols of the compiled library.
        step: Scalar function ``(p, g, *state, h) -> (p, *state)``. Plain Python without literals: a literal would
            promote float32 arithmetic to float64.
        Scalars: NamedTuple class of ``h``. Every field is formed on the host in float64 and rounded once to the
            compute dtype.
        scalars: Function ``(t, options) -> Scalars`` for step number ``t`` (from 1). With ``carry`` it is
            ``(t, options, carry) -> (Scalars, carry)``. It runs on the host, or, where a GPU keeps the step counts,
            compiled by Numba there.
        state: Names of the state arrays, in the order of ``step``'s arguments.
        initial: For a state array that does not start at zero, the option that fills it.
        carry: Numbers that a parameter carries from step to step, as a function of the options giving their values
            before step 1, in a NamedTuple, whose class is found by the defaults; None for the rules that need none.
        options: The options of a class of this rule, in the order of its arguments: all that ``scalars`` may read.
        terms: Scalar function ``(p, g, *state, h) -> (x, ...)`` in the compute dtype, of which ``products`` are summed.
            It sees parameter and states as they are before the step, the gradient as ``step`` does, and no ratio.
        products: Pairs of what is multiplied and summed over each parameter, in float64: numbers of terms, or "p" and
            "g" for what is stored. The gradient's multiplier is applied to the sum, once for each "g".
        ratio: Scalar function ``(sums, h) -> ratio`` in float64 of the sums of ``products``, once for each parameter.
            The loop hands the result to ``step`` as ``h.ratio``, times what ``scalars`` has there (in float64, rounded
            once), and that alone where a parameter has no ratio. It must be the last field of ``Scalars``; the field
            before it may be ``stretch``, see ``factors``.
        keeps_zeros: Whether a step leaves a parameter of zeros at zero while its gradients are zero, as the padding of
            flat buffers must be left. None: found out by trying, which takes some 0.1 ms each time that options change.
        variant: Function ``(options) -> name`` of the rule that these options select, for the first of several.
        conflict: Function ``(options) -> text`` that says what is wrong where options do not go together, else None.
        layerwise: Whether the options "adapt" and "decay_1d" say which parameters have a ratio and decay.
        late: States that may be missing where steps were taken.
    """

    name: str
    step: Callable[..., tuple[Any, ...]]
    Scalars: type[tuple[Any, ...]]
    scalars: Callable[..., Any]
    state: tuple[str, ...] = ()
    initial: Mapping[str, str] = field(default_factory=dict)
    carry: Callable[[Options], Any] | None = None
    options: Mapping[str, Option] = field(default_factory=dict)
    terms: Callable[..., tuple[Any, ...]] | None = None
    products: tuple[Product, ...] = ()
    ratio: Callable[..., float] | None = None
    keeps_zeros: bool | None = None
    variant: Callable[[Options], str] | None = None
    conflict: Callable[[Options], str | None] | None = None
    layerwise: bool = False
    late: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many numbers each option has. A GPU that keeps the step counts itself is given them all."""
        values = {name: o.default if isinstance(o.default, tuple) else (o.default,) for name, o in self.options.items()}
        numeric = numbers.Real, type(None), type(...)
        return {name: len(several) for name, several in values.items() if all(isinstance(x, numeric) for x in several)}

    @property
    def Carry(self) -> Any:
        """The NamedTuple in which a parameter carries numbers from step to step, or None."""
        return type(self.carry({name: o.default for name, o in self.options.items()})) if self.carry else None

    @property
    def carried(self) -> tuple[str, ...]:
        """Names of these numbers."""
        return getattr(self.Carry, "_fields", ())

    def start(self, options: Options) -> dict[str, float]:
        """What the state arrays hold before the first step."""
        return {name: float(options[self.initial[name]]) if name in self.initial else 0.0 for name in self.state}

    @property
    def sources(self) -> tuple[str | int, ...]:
        """What is multiplied by a kernel of this rule; none where sums of squares of what is stored are all."""
        if all(product in (("p", "p"), ("g", "g")) for product in self.products):
            return ()
        return tuple(dict.fromkeys(source for product in self.products for source in product))

    @property
    def term_count(self) -> int:
        """How many terms there are: what ``terms`` returns for some numbers."""
        if self.terms is None:
            return 0
        some = dict.fromkeys(("p", "g", *self.state), np.float32(0.75))
        h = types.SimpleNamespace(**{name: np.float32(0.5) for name in self.fields if name != "ratio"})
        terms = tried(self.terms, "terms", f"Rule {self.name!r}: ", {**some, "h": h})
        if terms is ...:
            return 1 + max(x for product in self.products for x in product if isinstance(x, int))
        if not isinstance(terms, tuple):
            raise TypeError(f"Rule {self.name!r}: terms must return a tuple of numbers, got {terms!r}.")
        return len(terms)

    @property
    def places(self) -> tuple[int, ...]:
        """Where among the sums of a segment those of the products are: squares of what is stored have fixed places."""
        stored: dict[Product, int] = {("p", "p"): PARAMETER, ("g", "g"): GRADIENT}
        return tuple(k if self.sources else stored[product] for k, product in enumerate(self.products))

    @property
    def factors(self) -> Callable[[float], tuple[float, float]]:
        """Function ``(ratio) -> (stretch, ratio)`` for the loops, to be compiled.

        A ratio beyond float32 comes in two factors where ``step`` multiplies by both, 1 and the ratio otherwise.
        """
        largest = LARGE if "stretch" in self.fields else math.inf

        def factors(ratio: float) -> tuple[float, float]:
            if ratio > largest:
                return STRETCH, ratio / STRETCH
            return 1.0, ratio

        return factors

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the scalars."""
        return self.Scalars._fields  # type: ignore[attr-defined,no-any-return]

    def __deepcopy__(self, memo: object) -> Rule:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By name: a function that was made a rule is found in its module no more."""
        module = self.step.__module__
        for name, value in getattr(sys.modules.get(module), "__dict__", {}).items():
            if value is self:
                return pkgutil.resolve_name, (f"{module}:{name}",)
        raise pickle.PicklingError(
            f"Rule {self.name!r} cannot be pickled, because no variable of the module {module} is it. Define it at the "
            "top level of a module."
        )

    def __post_init__(self) -> None:
        where, fields, terms = f"Rule {self.name!r}: ", self.fields, self.term_count
        if self.ratio is not None and fields[-1] != "ratio":
            raise TypeError(f"{where}the last field of Scalars must be 'ratio', got {fields[-1]!r}.")
        if bool(self.products) != (self.ratio is not None):
            raise TypeError(f"{where}products are what ratio gets; give both or neither.")
        for source in self.sources:
            if source not in ("p", "g") and not (isinstance(source, int) and 0 <= source < terms):
                raise ValueError(f'{where}products are of "p", "g" and numbers of terms, got {source!r}.')
        if EMA in self.state:
            raise ValueError(f"{where}the state {EMA!r} is the average of the parameters; name it otherwise.")
        unknown = set(self.initial) - set(self.state)
        if unknown:
            raise ValueError(f"{where}initial names no state array: {sorted(unknown)}.")
        for named, room, taken in (
            ("state arrays", MAX_STATES, len(self.state)),
            ("scalars", WEIGHT, len(fields)),
            ("products", SUMS, len(self.products)),
            ("numbers in its options", DECAY, sum(self.counts.values())),
            ("carried numbers", SCALAR_GROUP_WORDS - CARRY, len(self.carried)),
        ):
            if taken > room:
                raise ValueError(f"{where}at most {room} {named}, got {taken}.")


def tried(function: Any, part: str, where: str, arguments: Mapping[str, Any]) -> Any:
    """What a function of a rule returns for these arguments; ... where they may be no numbers that it can compute with.

    A function of p is compiled for the compute dtype, one of sums for float64.
    """
    taken = ", ".join(arguments)
    if not isinstance(function, types.FunctionType):
        raise TypeError(f"{where}{part} must be a Python function of ({taken}), got {function!r}.")
    signature, of_elements = inspect.signature(function), "p" in arguments
    try:
        signature.bind(*arguments.values())
    except TypeError:
        raise TypeError(f"{where}{part} must take ({taken}), but it takes {signature}.") from None
    literals = [x for x in function.__code__.co_consts if isinstance(x, float)]
    if of_elements and literals:
        raise TypeError(
            f"{where}{part} has the literal {literals[0]}, which would promote float32 to float64: make it an option, "
            "or a number that scalars returns."
        )
    try:
        with np.errstate(all="ignore"):
            return function(*arguments.values())
    except Exception as error:
        if isinstance(error, (ArithmeticError, ValueError)) and (of_elements or "sums" in arguments):
            return ...
        raise TypeError(f"{where}{part} cannot be computed: {type(error).__name__}: {error}") from error
