"""The CPU loop around an update rule. It knows no optimizer: the rule says how many arrays there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numba
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils

from ..dtypes import COMPUTE, ITEMSIZE
from ..emit import emitted
from ..environment import enter, leave
from ..layout import MULTIPLIER, PARAMETER, RATIO
from ..reductions import scaled
from ..rules.rule import Rule
from ..storage import DOUBLE, I64, LINE, Storage, prefetch
from .memory import at, put_real, real

PROMOTED = "a literal such as 2 promotes what it touches, so make it an option or one of the scalars"

PREFETCHED = 64  # elements that are asked for together: a few cache lines of each array
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


def update_loop(rule: Rule, p: str, g: str, half: bool) -> Callable[..., None]:
    """The loop of ``rule`` over parameters stored as ``p`` and gradients stored as ``g``, to be compiled.

    Args of the loop: first element; one past the last; addresses of a table of arrays (parameter, gradient, states), of
    the rule's scalars, and of the segment's own.
    """
    access = Access(rule, p, g, half)
    compute, load, store, pointers_of = access.compute, access.load, access.store, access.pointers_of
    ahead, owned = access.ahead(range(len(access.storages))), access.ahead([PARAMETER], write=True)
    scalars_of, last, step = scalars_reader(rule, compute), len(rule.fields) - 1, inlined(rule.step)

    def loop(lo: Any, hi: Any, arrays: Any, scalars: Any, own: Any) -> None:
        mode = enter()
        h = scalars_of(scalars, real(own, RATIO) * real(scalars, last))
        pointers = pointers_of(arrays)
        multiplier = compute(real(own, MULTIPLIER))
        tail = hi - (hi - lo) % PREFETCHED
        for start in range(lo, tail, PREFETCHED):
            ahead(pointers, start + AHEAD)
            owned(pointers, start + OWNED)
            for i in range(start, start + PREFETCHED):
                store(pointers, i, step(*load(pointers, i, multiplier, h)))
        for i in range(tail, hi):
            store(pointers, i, step(*load(pointers, i, multiplier, h)))
        leave(mode)

    return loop


def ratio_function(rule: Rule, half: bool) -> Callable[..., None]:
    """The ratio of ``rule`` in float64, to be compiled: of a segment's sums, to where its own are."""
    assert rule.ratio is not None
    scalars_of, formula = scalars_reader(rule, types.float64), inlined(rule.ratio)
    result = types.UniTuple(types.float64, len(rule.products))

    @emitted(result(types.int64, types.float64))
    def sums_of(context: Any, builder: Any, sums: Any, multiplier: Any) -> Any:
        values = [builder.load(at(builder, sums, k, DOUBLE)) for k in rule.places]
        return context.make_tuple(builder, result, scaled(context, builder, values, rule.products, multiplier))

    def ratio(sums: Any, scalars: Any, own: Any) -> None:
        mode = enter()
        put_real(own, RATIO, formula(sums_of(sums, real(own, MULTIPLIER)), scalars_of(scalars, 1.0)))
        leave(mode)

    return ratio


def scalars_type(rule: Rule, compute: Any) -> Any:
    """Numba's type of the scalars of a rule."""
    return types.NamedUniTuple(compute, len(rule.fields), rule.Scalars)


def scalars_reader(rule: Rule, compute: Any) -> Any:
    """Intrinsic ``(scalars, ratio) -> h``: each float64 scalar rounded once to the compute dtype."""
    result, pair = scalars_type(rule, compute), types.UniTuple(types.float64, 2)

    @emitted(result(types.int64, types.float64))
    def scalars_of(context: Any, builder: Any, scalars: Any, ratio: Any) -> Any:
        doubles = {name: builder.load(at(builder, scalars, k, DOUBLE)) for k, name in enumerate(rule.fields)}
        if rule.ratio is not None:
            factors = context.compile_internal(builder, rule.factors, pair(types.float64), [ratio])
            split = zip(("stretch", "ratio"), cgutils.unpack_tuple(builder, factors), strict=True)
            doubles |= {name: factor for name, factor in split if name in doubles}
        rounded = [context.cast(builder, x, types.float64, compute) for x in doubles.values()]
        return context.make_tuple(builder, result, rounded)

    return scalars_of


class Access:
    """Intrinsics that load and store one element of every array of a rule.

    The arrays do not overlap (the API refuses it), and each access says so in its metadata: LLVM then needs no
    run-time checks, of which it would give up on six arrays and leave the loop scalar.

    Attributes:
        pointers_of: ``(address of a table of arrays) -> pointers``.
        load: ``(pointers, i, multiplier, h) -> (p, multiplier * g, *state, h)``: the arguments of the rule.
        store: ``(pointers, i, (p, *state))``: each value rounded once to its storage.
    """

    def __init__(self, rule: Rule, p: str, g: str, half: bool) -> None:
        self.storages = [Storage(d, half) for d in (p, g, *[COMPUTE[p]] * len(rule.state))]
        self.compute = getattr(types, COMPUTE[p])
        self._pointers = types.UniTuple(types.int64, len(self.storages))
        self._written = [0, *range(2, len(self.storages))]  # everything but the gradient
        h = scalars_type(rule, self.compute)
        self._arguments = types.Tuple([self.compute] * len(self.storages) + [h])
        self.pointers_of = emitted(self._pointers(types.int64))(self._pointers_of)
        self.load = emitted(self._arguments(self._pointers, types.int64, self.compute, h))(self._load)
        self.store = emitted(self._of_store)(self._store)

    def ahead(self, arrays: Iterable[int], write: bool = False, level: int = 3) -> Any:
        """Intrinsic ``(pointers, i)``: ask for the cache lines of the block that begins at element i of some arrays."""

        @emitted(types.void(self._pointers, types.int64))
        def ahead(context: Any, builder: Any, pointers: Any, i: Any) -> None:
            for k in arrays:
                for offset in range(0, PREFETCHED, LINE // ITEMSIZE[self.storages[k].dtype]):
                    element = self._element(builder, pointers, k, builder.add(i, ir.Constant(I64, offset)))
                    prefetch(builder, element, level=level, write=write)

        return ahead

    def _element(self, builder: Any, pointers: Any, k: int, i: Any) -> Any:
        return at(builder, builder.extract_value(pointers, k), i, self.storages[k].memory)

    def _mark(self, builder: Any, access: Any, k: int) -> Any:
        module, arrays = builder.module, range(len(self.storages))
        domain = module.add_metadata([ir.MetaDataString(module, "fastopt")])
        scopes = [module.add_metadata([ir.MetaDataString(module, f"fastopt.array{j}"), domain]) for j in arrays]
        access.set_metadata("alias.scope", module.add_metadata([scopes[k]]))
        access.set_metadata("noalias", module.add_metadata([s for j, s in enumerate(scopes) if j != k]))
        return access

    def _pointers_of(self, context: Any, builder: Any, arrays: Any) -> Any:
        words = [builder.load(at(builder, arrays, k, I64)) for k in range(len(self.storages))]
        return context.make_tuple(builder, self._pointers, words)

    def _load(self, context: Any, builder: Any, pointers: Any, i: Any, multiplier: Any, h: Any) -> Any:
        values = []
        for k, storage in enumerate(self.storages):
            element = self._mark(builder, builder.load(self._element(builder, pointers, k, i)), k)
            values.append(storage.decode(builder, element))
        values[1] = builder.fmul(values[1], multiplier)
        return context.make_tuple(builder, self._arguments, [*values, h])

    def _of_store(self, pointers: Any, i: Any, values: Any) -> Any:
        if values != types.UniTuple(self.compute, len(self._written)):
            expected = f"{len(self._written)} values of {self.compute}"
            raise numba.TypingError(f"the rule returns {values}, not {expected}: {PROMOTED}")
        return types.void(pointers, types.int64, values)

    def _store(self, context: Any, builder: Any, pointers: Any, i: Any, values: Any) -> None:
        for position, k in enumerate(self._written):
            value = self.storages[k].encode(builder, builder.extract_value(values, position))
            self._mark(builder, builder.store(value, self._element(builder, pointers, k, i)), k)
