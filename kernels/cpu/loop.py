"""The CPU loop around an update rule. It knows no optimizer: the rule says how many arrays there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numba
from llvmlite import ir
from numba import njit, types

from ..dtypes import COMPUTE, ITEMSIZE
from ..emit import emitted
from ..environment import enter, leave
from ..layout import MULTIPLIER, PARAMETER, RATIO
from ..reductions import scaled
from ..rules.rule import Rule
from ..storage import I64, LINE, Features, Storage, prefetch

SIGNATURE = types.void(
    types.int64,  # first element
    types.int64,  # one past the last element
    types.CPointer(types.voidptr),  # parameter, gradient, states
    types.CPointer(types.float64),  # the rule's scalars
    types.CPointer(types.float64),  # the segment's own: gradient multiplier, trust ratio
)
"""C signature of an update kernel."""

RATIO_SIGNATURE = types.void(*[types.CPointer(types.float64)] * 3)
"""C signature of a ratio: (sums of a segment, the rule's scalars, the segment's own, where the ratio goes)."""

PROMOTED = "a literal such as 2 promotes what it touches, so make it an option or one of the scalars"

BLOCK = 64  # elements per block: a few cache lines of each array
AHEAD = 512  # elements between the block that is computed and the block that is prefetched
# Speed against a stream of the same reads and writes, 64 M float32, 2 threads, medians of one run: without prefetching
# Adam 0.85, momentum 0.87, Lion 0.80; ahead by 512 0.97, 1.00, 0.96; by 1024 0.96, 1.00, 0.96; by 4096 into the
# second-level cache 0.95, 0.97, 0.95. The hardware's prefetchers do not keep up with four to six arrays.

OWNED = 128  # elements between the block that is computed and the block whose parameters are prefetched to be written
# The cores have all read the parameters in the forward pass, so that lines have copies in other caches, and the first
# store to one would wait for these to go. A step in a training run (transformer of 3.3 M parameters, 53 arrays, 2
# threads, right after backward()), µs without and with: AdamW 2739, 1877; momentum 2697, 1305; Adagrad 2682, 1438;
# torch fused AdamW 2400. With 25 M parameters no difference. States, which nobody else reads, gain nothing. On one
# array of 48 M it is no slower (0.99 to 1.00); asking 512 ahead for writing instead of reading is, by 1 to 5 %.


inlined = njit(error_model="numpy", forceinline=True)


def update_loop(rule: Rule, p: str, g: str, features: Features) -> Callable[..., None]:
    """The loop of ``rule`` over parameters stored as ``p`` and gradients stored as ``g``, to be compiled."""
    access = Access(rule, p, g, features)
    compute, pointers_of, load, store = access.compute, access.pointers_of(), access.load(), access.store()
    ahead, owned = access.ahead(range(len(access.storages))), access.ahead([PARAMETER], write=True)
    scalars_of, last = scalars_intrinsic(rule, compute), len(rule.Scalars._fields) - 1  # type: ignore[attr-defined]
    factors, step = inlined(rule.factors), inlined(rule.step)

    def loop(lo: Any, hi: Any, buffers: Any, scalars: Any, own: Any) -> None:
        mode: Any = enter()  # type: ignore[call-arg]
        h = scalars_of(scalars, factors(own[RATIO] * scalars[last]))
        pointers = pointers_of(buffers)
        multiplier = compute(own[MULTIPLIER])
        tail = hi - (hi - lo) % BLOCK
        for start in range(lo, tail, BLOCK):
            ahead(pointers, start + AHEAD)
            owned(pointers, start + OWNED)
            for i in range(start, start + BLOCK):
                store(pointers, i, step(*load(pointers, i, multiplier, h)))
        for i in range(tail, hi):
            store(pointers, i, step(*load(pointers, i, multiplier, h)))
        leave(mode)

    return loop


def ratio_function(rule: Rule, features: Features) -> Callable[..., None]:
    """The ratio of ``rule`` in float64, to be compiled."""
    assert rule.ratio is not None
    scalars_of, formula = scalars_intrinsic(rule, types.float64), inlined(rule.ratio)
    doubles = types.CPointer(types.float64)

    @emitted(types.UniTuple(types.float64, len(rule.products))(doubles, types.float64))
    def sums_of(context: Any, builder: Any, sums: Any, multiplier: Any) -> Any:
        values = [builder.load(builder.gep(sums, [ir.Constant(I64, k)])) for k in rule.places]
        values = scaled(context, builder, values, rule.products, multiplier)
        return context.make_tuple(builder, types.UniTuple(types.float64, len(values)), values)

    def ratio(sums: Any, scalars: Any, own: Any) -> None:
        mode: Any = enter()  # type: ignore[call-arg]
        own[RATIO] = formula(sums_of(sums, own[MULTIPLIER]), scalars_of(scalars, (1.0, 1.0)))
        leave(mode)

    return ratio


def scalars_type(rule: Rule, compute: Any) -> Any:
    """Numba's type of the scalars of a rule."""
    return types.NamedUniTuple(compute, len(rule.Scalars._fields), rule.Scalars)  # type: ignore[attr-defined]


def scalars_intrinsic(rule: Rule, compute: Any) -> Any:
    """Intrinsic ``(scalars, (stretch, ratio)) -> h``: each float64 scalar rounded once to the compute dtype."""
    names = rule.Scalars._fields  # type: ignore[attr-defined]
    result = scalars_type(rule, compute)

    @emitted(result(types.CPointer(types.float64), types.UniTuple(types.float64, 2)))
    def scalars_of(context: Any, builder: Any, scalars: Any, of_segment: Any) -> Any:
        doubles = [builder.load(builder.gep(scalars, [ir.Constant(I64, k)])) for k in range(len(names))]
        if rule.ratio is not None:
            for k, name in enumerate(("stretch", "ratio")):
                if name in names:
                    doubles[names.index(name)] = builder.extract_value(of_segment, k)
        return context.make_tuple(builder, result, [context.cast(builder, x, types.float64, compute) for x in doubles])

    return scalars_of


class Access:
    """Intrinsics that load and store one element of every array of a rule.

    The arrays do not overlap (the API refuses it), and each access says so in its metadata: LLVM then needs no
    run-time checks, of which it would give up on six arrays and leave the loop scalar.
    """

    def __init__(self, rule: Rule, p: str, g: str, features: Features) -> None:
        self.storages = [Storage(d, features.half) for d in (p, g, *[COMPUTE[p]] * len(rule.state))]
        self.compute = getattr(types, COMPUTE[p])
        self.pointers = types.UniTuple(types.voidptr, len(self.storages))
        self.written = [0, *range(2, len(self.storages))]  # everything but the gradient
        self.h = scalars_type(rule, self.compute)

    def _element(self, builder: Any, pointers: Any, k: int, i: Any) -> Any:
        typed = builder.bitcast(builder.extract_value(pointers, k), self.storages[k].memory.as_pointer())
        return builder.gep(typed, [i])

    def _mark(self, builder: Any, access: Any, k: int) -> Any:
        module = builder.module
        domain = module.add_metadata([ir.MetaDataString(module, "fastopt")])
        scopes = [
            module.add_metadata([ir.MetaDataString(module, f"fastopt.array{j}"), domain])
            for j in range(len(self.storages))
        ]
        access.set_metadata("alias.scope", module.add_metadata([scopes[k]]))
        access.set_metadata("noalias", module.add_metadata([s for j, s in enumerate(scopes) if j != k]))
        return access

    def pointers_of(self) -> Any:
        """Intrinsic ``(buffers) -> pointers``."""

        @emitted(self.pointers(types.CPointer(types.voidptr)))
        def pointers_of(context: Any, builder: Any, buffers: Any) -> Any:
            places = [builder.gep(buffers, [ir.Constant(I64, k)]) for k in range(len(self.storages))]
            return context.make_tuple(builder, self.pointers, [builder.load(place) for place in places])

        return pointers_of

    def load(self) -> Any:
        """Intrinsic ``(pointers, i, multiplier, h) -> (p, multiplier * g, *state, h)``: the arguments of the rule."""
        result = types.Tuple([self.compute] * len(self.storages) + [self.h])

        @emitted(result(self.pointers, types.int64, self.compute, self.h))
        def load(context: Any, builder: Any, pointers: Any, i: Any, multiplier: Any, h: Any) -> Any:
            values = []
            for k, storage in enumerate(self.storages):
                element = self._mark(builder, builder.load(self._element(builder, pointers, k, i)), k)
                values.append(storage.decode(builder, element))
            values[1] = builder.fmul(values[1], multiplier)
            return context.make_tuple(builder, result, [*values, h])

        return load

    def store(self) -> Any:
        """Intrinsic ``(pointers, i, (p, *state))``: each value rounded once to its storage."""

        def signature(pointers: Any, i: Any, values: Any) -> Any:
            if values != types.UniTuple(self.compute, len(self.written)):
                expected = f"{len(self.written)} values of {self.compute}"
                raise numba.TypingError(f"the rule returns {values}, not {expected}: {PROMOTED}")
            return types.void(pointers, types.int64, values)

        @emitted(signature)
        def store(context: Any, builder: Any, pointers: Any, i: Any, values: Any) -> None:
            for position, k in enumerate(self.written):
                value = self.storages[k].encode(builder, builder.extract_value(values, position))
                self._mark(builder, builder.store(value, self._element(builder, pointers, k, i)), k)

        return store

    def ahead(self, arrays: Iterable[int], write: bool = False, level: int = 3) -> Any:
        """Intrinsic ``(pointers, i)``: ask for the cache lines of the block that begins at element i of some arrays."""

        @emitted(types.void(self.pointers, types.int64))
        def ahead(context: Any, builder: Any, pointers: Any, i: Any) -> None:
            for k in arrays:
                for offset in range(0, BLOCK, LINE // ITEMSIZE[self.storages[k].dtype]):
                    at = builder.add(i, ir.Constant(I64, offset))
                    prefetch(builder, self._element(builder, pointers, k, at), level=level, write=write)

        return ahead
