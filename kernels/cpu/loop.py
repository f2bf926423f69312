"""The CPU loop around an update rule. It knows no optimizer: the rule says how many arrays there are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numba
from llvmlite import ir
from numba import njit, types
from numba.core.extending import intrinsic

from .. import reductions
from ..dtypes import COMPUTE, ITEMSIZE
from ..environment import enter, leave, settled
from ..epilogues import Epilogue
from ..layout import BLOCK as REDUCED
from ..layout import LANES, MULTIPLIER, PARAMETER, RATIO, ZERO
from ..reductions import scaled, take_sum
from ..rules.rule import Rule
from ..storage import I64, LINE, Features, Storage, prefetch

SIGNATURE = types.float64(
    types.int64,  # first element
    types.int64,  # one past the last element
    types.CPointer(types.voidptr),  # parameter, gradient, states
    types.CPointer(types.float64),  # the rule's scalars
    types.CPointer(types.float64),  # the segment's own: gradient multiplier, trust ratio, whether to zero the gradient
)
"""C signature of an update kernel. For rules with a trust ratio it returns the sum of squares of the new parameters,
from which the next step has its weight norms; for others 0."""

EPILOGUE_SIGNATURE = types.void(types.int64, types.int64, types.voidptr, types.voidptr, types.CPointer(types.float64))
"""C signature of an epilogue's kernel: elements lo to hi - 1 of the parameter and the target; its number."""

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


def cpu_loop(rule: Rule, p: str, g: str, features: Features) -> Callable[..., float]:
    """The loop of ``rule`` over parameters stored as ``p`` and gradients stored as ``g``, to be compiled."""
    compute = getattr(types, COMPUTE[p])
    stored = [Storage(p, features.half), Storage(g, features.half)]
    access = Access(stored + [Storage(COMPUTE[p])] * len(rule.state), compute)
    pointers_of, ahead = access.pointers_of(), access.ahead(range(len(access.storages)))
    owned = access.ahead([PARAMETER], write=True)
    load, store, clear = access.load(), access.store(), access.clear()
    scalars_of, last = scalars_intrinsic(rule, compute), len(rule.Scalars._fields) - 1  # type: ignore[attr-defined]
    factors = njit(error_model="numpy", forceinline=True)(rule.factors)
    step = njit(error_model="numpy", forceinline=True)(rule.step)

    sums = ("p", "p") in rule.products and not rule.sources
    squares = reductions.Squares(stored[0], features.fma)
    new_lanes, add_row, add_rest, take = squares.new_lanes(), squares.add_row(), squares.add_rest(), take_sum

    def loop(lo: Any, hi: Any, buffers: Any, scalars: Any, own: Any) -> float:
        mode: Any = enter()  # type: ignore[call-arg]
        h = scalars_of(scalars, factors(own[RATIO] * scalars[last]))
        pointers = pointers_of(buffers)
        multiplier = compute(own[MULTIPLIER])
        zero_gradient = own[ZERO] != 0.0
        lanes = new_lanes()
        total = 0.0
        tail = hi - (hi - lo) % BLOCK
        for start in range(lo, tail, BLOCK):
            ahead(pointers, start + AHEAD)
            owned(pointers, start + OWNED)
            for i in range(start, start + BLOCK):
                store(pointers, i, step(*load(pointers, i, multiplier, h)))
            if zero_gradient:
                for i in range(start, start + BLOCK):
                    clear(pointers, i)
            if sums:  # row by row in the order of reductions.py, while the parameters are in registers or nearly so
                for i in range(start, start + BLOCK, LANES):
                    add_row(lanes, pointers[0], i)
                if (start + BLOCK - lo) % REDUCED == 0:
                    total += take(lanes)
        for i in range(tail, hi):
            store(pointers, i, step(*load(pointers, i, multiplier, h)))
            if zero_gradient:
                clear(pointers, i)
        if sums:
            if hi - tail >= LANES:
                add_row(lanes, pointers[0], tail)
                tail += LANES
            add_rest(lanes, pointers[0], tail, hi)
            total += take(lanes)
        total = settled(total)
        leave(mode)
        return total

    return loop


def epilogue_loop(epilogue: Epilogue, p: str, target: str, features: Features) -> Callable[..., None]:
    """The loop of ``epilogue`` over parameters stored as ``p`` and a target stored as ``target``, to be compiled."""
    compute = getattr(types, COMPUTE[p])
    access = Access([Storage(target, features.half), Storage(p, features.half)], compute)
    load, store, ahead = access.load(), access.store(), access.ahead([0], write=True)  # parameters were just written
    step = njit(error_model="numpy", forceinline=True)(epilogue.step)

    def loop(lo: Any, hi: Any, parameter: Any, target: Any, number: Any) -> None:
        mode: Any = enter()  # type: ignore[call-arg]
        pointers, h = (target, parameter), compute(number[0])
        tail = hi - (hi - lo) % BLOCK
        for start in range(lo, tail, BLOCK):
            ahead(pointers, start + AHEAD)
            for i in range(start, start + BLOCK):
                store(pointers, i, step(*load(pointers, i, compute(1.0), h)))
        for i in range(tail, hi):
            store(pointers, i, step(*load(pointers, i, compute(1.0), h)))
        leave(mode)

    return loop


def ratio_function(rule: Rule) -> Callable[..., float]:
    """The ratio of ``rule`` in float64, to be compiled."""
    assert rule.ratio is not None
    scalars_of, sums_of = scalars_intrinsic(rule, types.float64), _sums(rule)
    formula = njit(error_model="numpy", forceinline=True)(rule.ratio)

    def ratio(sums: Any, multiplier: Any, scalars: Any) -> float:
        mode: Any = enter()  # type: ignore[call-arg]
        h = scalars_of(scalars, (1.0, 1.0))
        result = settled(formula(sums_of(sums, settled(multiplier)), h))
        leave(mode)
        return result

    return ratio


def _sums(rule: Rule) -> Any:
    """Intrinsic ``(sums, multiplier) -> (x, ...)``: the products' sums for gradients times the multiplier."""

    @intrinsic
    def sums_of(typingctx: Any, sums: Any, multiplier: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            values = [builder.load(builder.gep(args[0], [ir.Constant(I64, k)])) for k in rule.places]
            values = scaled(context, builder, values, rule.products, args[1])
            return context.make_tuple(builder, signature.return_type, values)

        return types.UniTuple(types.float64, len(rule.products))(sums, types.float64), codegen

    return sums_of


def scalars_intrinsic(rule: Rule, compute: Any) -> Any:
    """Intrinsic ``(scalars, (stretch, ratio)) -> h``: each float64 scalar rounded once to the compute dtype."""
    names = rule.Scalars._fields  # type: ignore[attr-defined]
    count = len(names)

    @intrinsic
    def scalars_of(typingctx: Any, scalars: Any, of_segment: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            doubles = [builder.load(builder.gep(args[0], [ir.Constant(I64, k)])) for k in range(count)]
            if rule.ratio is not None:
                for k, name in enumerate(("stretch", "ratio")):
                    if name in names:
                        doubles[names.index(name)] = builder.extract_value(args[1], k)
            values = [context.cast(builder, x, types.float64, compute) for x in doubles]
            return context.make_tuple(builder, signature.return_type, values)

        return types.NamedUniTuple(compute, count, rule.Scalars)(scalars, of_segment), codegen

    return scalars_of


class Access:
    """Intrinsics that load and store one element of every array.

    The arrays do not overlap (the API refuses it), and each access says so in its metadata: LLVM then needs no
    run-time checks, of which it would give up on six arrays and leave the loop scalar.
    """

    def __init__(self, storages: list[Storage], compute: Any) -> None:
        self.storages = storages
        self.compute = compute
        self.pointers = types.UniTuple(types.voidptr, len(storages))
        self.written = [0, *range(2, len(storages))]  # everything but the gradient

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

        @intrinsic
        def pointers_of(typingctx: Any, buffers: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                places = [builder.gep(args[0], [ir.Constant(I64, k)]) for k in range(len(self.storages))]
                return context.make_tuple(builder, signature.return_type, [builder.load(x) for x in places])

            return self.pointers(buffers), codegen

        return pointers_of

    def load(self) -> Any:
        """Intrinsic ``(pointers, i, multiplier, h) -> (p, multiplier * g, *state, h)``: the arguments of the rule."""

        @intrinsic
        def load(typingctx: Any, pointers: Any, i: Any, multiplier: Any, h: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                values = []
                for k, storage in enumerate(self.storages):
                    element = self._mark(builder, builder.load(self._element(builder, args[0], k, args[1])), k)
                    values.append(storage.decode(builder, element))
                values[1] = builder.fmul(values[1], args[2])
                return context.make_tuple(builder, signature.return_type, [*values, args[3]])

            result = types.Tuple([self.compute] * len(self.storages) + [h])
            return result(pointers, types.int64, self.compute, h), codegen

        return load

    def store(self) -> Any:
        """Intrinsic ``(pointers, i, (p, *state))``: each value rounded once to its storage."""

        @intrinsic
        def store(typingctx: Any, pointers: Any, i: Any, values: Any) -> Any:
            if values != types.UniTuple(self.compute, len(self.written)):
                expected = f"{len(self.written)} values of {self.compute}"
                raise numba.TypingError(f"the rule returns {values}, not {expected}: {PROMOTED}")

            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                for position, k in enumerate(self.written):
                    value = self.storages[k].encode(builder, builder.extract_value(args[2], position))
                    self._mark(builder, builder.store(value, self._element(builder, args[0], k, args[1])), k)
                return context.get_dummy_value()

            return types.void(pointers, types.int64, values), codegen

        return store

    def clear(self) -> Any:
        """Intrinsic ``(pointers, i)``: the gradient's element becomes zero."""

        @intrinsic
        def clear(typingctx: Any, pointers: Any, i: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                zero = ir.Constant(self.storages[1].memory, 0)
                self._mark(builder, builder.store(zero, self._element(builder, args[0], 1, args[1])), 1)
                return context.get_dummy_value()

            return types.void(pointers, types.int64), codegen

        return clear

    def ahead(self, arrays: Iterable[int], write: bool = False) -> Any:
        """Intrinsic ``(pointers, i)``: ask for the cache lines of the block that begins at element i of some arrays."""

        @intrinsic
        def ahead(typingctx: Any, pointers: Any, i: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                for k in arrays:
                    for offset in range(0, BLOCK, LINE // ITEMSIZE[self.storages[k].dtype]):
                        at = builder.add(args[1], ir.Constant(I64, offset))
                        prefetch(builder, self._element(builder, args[0], k, at), level=3, write=write)
                return context.get_dummy_value()

            return types.void(pointers, types.int64), codegen

        return ahead
