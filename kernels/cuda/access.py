"""Memory as kernels see it: addresses are integers, and every load and store is one of these functions.

All of them are made for one kernel. The simulator has the same functions over NumPy arrays
(tests/support/cuda_simulator.py).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from ..dtypes import COMPUTE, ITEMSIZE
from ..layout import LANES
from ..rules.rule import Rule
from ..storage import DOUBLE, FLOAT, I32, I64, Storage
from .host_functions import ratio_caller as ratio_caller
from .host_functions import scalars_former as scalars_former
from .memory import GLOBAL, at
from .toolchain import intrinsic, types


def _loader(element: ir.Type, result: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(at(builder, args[0], args[1], element))

        return result(types.int64, types.int64), codegen

    return load


def _storer(element: ir.Type, value: Any) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, index: Any, number: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[2], at(builder, args[0], args[1], element))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, value), codegen

    return store


word, put_word = _loader(I64, types.int64), _storer(I64, types.int64)
real, put_real = _loader(DOUBLE, types.float64), _storer(DOUBLE, types.float64)
single, put_single = _loader(FLOAT, types.float32), _storer(FLOAT, types.float32)


@intrinsic
def count_up(typingctx: Any, address: Any, index: Any) -> Any:
    """Add one to a word, as one of many blocks; the value before."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = at(builder, args[0], args[1], I64)
        return builder.atomic_rmw("add", place, ir.Constant(I64, 1), "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def fresh_real(typingctx: Any, address: Any, index: Any) -> Any:
    """A number that another block may just have written: never from this processor's own cache."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(DOUBLE, [I64])  # NVVM knows no atomic or volatile loads
        load = ir.InlineAsm(kind, "ld.volatile.global.f64 $0, [$1];", "=d,l,~{memory}", side_effect=True)
        return builder.call(load, [builder.ptrtoint(at(builder, args[0], args[1], DOUBLE), I64)])

    return types.float64(types.int64, types.int64), codegen


@intrinsic
def opaque(typingctx: Any, number: Any) -> Any:
    """The number, of which the compiler no longer knows what it is made of.

    Loops that count by it are not unrolled, and what is computed from it is not kept for the next loop that computes
    the same: either would take registers.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        move = ir.InlineAsm(ir.FunctionType(I64, [I64]), "mov.b64 $0, $1;", "=l,l", side_effect=True)
        return builder.call(move, args)

    return types.int64(types.int64), codegen


def scalars_loader(rule: Rule, compute: str) -> Any:
    """Intrinsic ``(scalars, ratio) -> h``: the rule's scalars, stored in the compute dtype.

    ``ratio`` is where stretch and ratio are, of which a rule has both or the latter.
    """
    names = rule.Scalars._fields  # type: ignore[attr-defined]
    count = len(names)
    kind = getattr(types, compute)
    element = FLOAT if compute == "float32" else DOUBLE

    @intrinsic
    def load(typingctx: Any, scalars: Any, ratio: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            places = [at(builder, args[0], ir.Constant(I64, k), element) for k in range(count)]
            if rule.ratio is not None:
                for k, name in enumerate(("stretch", "ratio")):
                    if name in names:
                        places[names.index(name)] = at(builder, args[1], ir.Constant(I64, k), element)
            values = [builder.load(place) for place in places]
            return context.make_tuple(builder, signature.return_type, values)

        return types.NamedUniTuple(kind, count, rule.Scalars)(types.int64, types.int64), codegen

    return load


def add_rows(dtype: str, rows: int) -> Any:
    """Intrinsic ``(total, x, i) -> total``: add the squares of elements i, i + 32, ... of ``rows`` rows, in order."""
    storage = Storage(dtype)

    @intrinsic
    def add(typingctx: Any, total: Any, x: Any, i: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            total, x, i = args
            places = [at(builder, x, builder.add(i, ir.Constant(I64, k * LANES)), storage.memory) for k in range(rows)]
            for element in [builder.load(place) for place in places]:
                number = storage.decode(builder, element)
                if dtype == "float64":  # its squares are not exact, and so are not fused
                    total = builder.fadd(total, builder.fmul(number, number))
                else:
                    number = builder.fpext(number, DOUBLE)
                    total = builder.fma(number, number, total)
            return total

        return types.float64(types.float64, types.int64, types.int64), codegen

    return add


class Arrays:
    """Loads and stores of neighbouring elements of every array of a rule.

    Args:
        rule: The rule, or an epilogue, whose target and parameter take the places of parameter and gradient.
        p: Storage dtype of the parameter.
        g: Storage dtype of the gradient.
    """

    def __init__(self, rule: Any, p: str, g: str) -> None:
        self.storages = [Storage(p), Storage(g)] + [Storage(COMPUTE[p])] * len(rule.state)
        self.compute = getattr(types, COMPUTE[p])
        self.rule, self.step = rule, rule.step
        self.written = [0, *range(2, len(self.storages))]  # everything but the gradient
        self.pointers = types.UniTuple(types.int64, len(self.storages))

    def _place(self, builder: Any, pointers: Any, k: int, index: Any) -> Any:
        return at(builder, builder.extract_value(pointers, k), index, self.storages[k].memory)

    def _get(self, builder: Any, pointers: Any, k: int, index: Any, count: int) -> list[Any]:
        """``count`` elements of array k from ``index`` on, by one load."""
        place, memory, itemsize = self._place(builder, pointers, k, index), self.storages[k].memory, self._itemsize(k)
        if count == 1:
            return [builder.load(place)]
        per_word = 4 // itemsize or 1  # NVVM would split a vector of 16-bit elements into several loads
        kind = ir.VectorType(I32 if per_word > 1 else memory, count // per_word)
        vector = builder.load(builder.bitcast(place, ir.PointerType(kind, GLOBAL)), align=count * itemsize)
        words = [builder.extract_element(vector, ir.Constant(I32, j)) for j in range(kind.count)]
        if per_word == 1:
            return words
        shifts = [ir.Constant(I32, 8 * itemsize * j) for j in range(per_word)]
        return [builder.trunc(builder.lshr(x, shift), memory) for x in words for shift in shifts]

    def pointers_of(self) -> Any:
        """Intrinsic ``(segment, gradient) -> pointers``: addresses of parameter, gradient and states."""
        places = range(len(self.storages))

        @intrinsic
        def pointers_of(typingctx: Any, segment: Any, gradient: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                words = [
                    args[1] if k == 1 else builder.load(at(builder, args[0], ir.Constant(I64, k), I64)) for k in places
                ]
                return context.make_tuple(builder, signature.return_type, words)

            return self.pointers(types.int64, types.int64), codegen

        return pointers_of

    def aligned(self, count: int) -> Any:
        """Intrinsic ``(pointers) -> bool``: whether every array may be accessed ``count`` elements at a time."""

        @intrinsic
        def aligned(typingctx: Any, pointers: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                rests = ir.Constant(I64, 0)
                for k in range(len(self.storages)):
                    mask = ir.Constant(I64, count * self._itemsize(k) - 1)
                    rests = builder.or_(rests, builder.and_(builder.extract_value(args[0], k), mask))
                return builder.icmp_unsigned("==", rests, ir.Constant(I64, 0))

            return types.boolean(self.pointers), codegen

        return aligned

    def moved(self) -> Any:
        """Intrinsic ``(pointers, i) -> pointers``: the addresses of elements ``i``."""

        @intrinsic
        def moved(typingctx: Any, pointers: Any, n: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                places = [self._place(builder, args[0], k, args[1]) for k in range(len(self.storages))]
                return context.make_tuple(builder, signature.return_type, [builder.ptrtoint(x, I64) for x in places])

            return self.pointers(self.pointers, types.int64), codegen

        return moved

    def load(self, count: int) -> Any:
        """Intrinsic ``(pointers, i, multiplier, h) -> arguments of the rule`` for each of ``count`` elements."""

        @intrinsic
        def load(typingctx: Any, pointers: Any, i: Any, multiplier: Any, h: Any) -> Any:
            arguments = types.Tuple([self.compute] * len(self.storages) + [h])

            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                loaded = [self._get(builder, args[0], k, args[1], count) for k in range(len(self.storages))]
                elements = []
                for memory in zip(*loaded, strict=True):
                    values = [storage.decode(builder, x) for storage, x in zip(self.storages, memory, strict=True)]
                    values[1] = builder.fmul(values[1], args[2])
                    elements.append(context.make_tuple(builder, arguments, [*values, args[3]]))
                return context.make_tuple(builder, signature.return_type, elements)

            return types.UniTuple(arguments, count)(pointers, types.int64, self.compute, h), codegen

        return load

    def apply(self) -> Any:
        """Intrinsic ``(arguments of the rule of some elements) -> its results``: the rule itself."""
        result = types.UniTuple(self.compute, len(self.written))

        @intrinsic
        def apply(typingctx: Any, elements: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                of_one = result(*elements.dtype.types)
                results = [
                    context.compile_internal(
                        builder, self.step, of_one, cgutils.unpack_tuple(builder, builder.extract_value(args[0], j))
                    )
                    for j in range(elements.count)
                ]
                return context.make_tuple(builder, signature.return_type, results)

            return types.UniTuple(result, elements.count)(elements), codegen

        return apply

    def no_sums(self) -> Any:
        """Intrinsic ``() -> totals``: a zero for each product of the rule."""
        totals = types.UniTuple(types.float64, len(self.rule.products))

        @intrinsic
        def no_sums(typingctx: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                return context.make_tuple(builder, totals, [ir.Constant(DOUBLE, 0.0)] * totals.count)

            return totals(), codegen

        return no_sums

    def stored(self) -> Any:
        """Intrinsic ``(pointers, i) -> (p, g)``: numbers as they are stored, the gradient without its multiplier."""

        @intrinsic
        def stored(typingctx: Any, pointers: Any, i: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                memory = [self._get(builder, args[0], k, args[1], 1)[0] for k in range(2)]
                values = [storage.decode(builder, x) for storage, x in zip(self.storages, memory, strict=False)]
                return context.make_tuple(builder, signature.return_type, values)

            return types.UniTuple(self.compute, 2)(pointers, types.int64), codegen

        return stored

    def terms(self) -> Any:
        """Intrinsic ``(arguments of the rule) -> its terms``."""
        result = types.UniTuple(self.compute, self.rule.term_count)

        @intrinsic
        def terms(typingctx: Any, arguments: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                if not self.rule.terms:
                    return context.make_tuple(builder, result, [])
                values = cgutils.unpack_tuple(builder, args[0])
                return context.compile_internal(builder, self.rule.terms, result(*arguments.types), values)

            return result(arguments), codegen

        return terms

    def add_products(self) -> Any:
        """Intrinsic ``(totals, (p, g), terms) -> totals``: add the products of an element."""

        @intrinsic
        def add(typingctx: Any, totals: Any, stored: Any, terms: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                results = []
                for k, product in enumerate(self.rule.products):
                    total = builder.extract_value(args[0], k)
                    x, y = (
                        builder.extract_value(*((args[2], f) if isinstance(f, int) else (args[1], "pg".index(f))))
                        for f in product
                    )
                    if x.type == DOUBLE:  # products of float64 are not exact, and so are not fused
                        results.append(builder.fadd(total, builder.fmul(x, y)))
                    else:
                        results.append(builder.fma(builder.fpext(x, DOUBLE), builder.fpext(y, DOUBLE), total))
                return context.make_tuple(builder, totals, results)

            return totals(totals, stored, terms), codegen

        return add

    def store(self, count: int) -> Any:
        """Intrinsic ``(pointers, i, results of the rule)`` for ``count`` elements, each rounded once to its storage."""

        @intrinsic
        def store(typingctx: Any, pointers: Any, i: Any, results: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                tuples = [builder.extract_value(args[2], j) for j in range(count)]
                for position, k in enumerate(self.written):
                    storage = self.storages[k]
                    values = [storage.encode(builder, builder.extract_value(t, position)) for t in tuples]
                    self._put(builder, args[0], k, args[1], values)
                return context.get_dummy_value()

            expected = types.UniTuple(types.UniTuple(self.compute, len(self.written)), count)
            return types.void(pointers, types.int64, expected), codegen

        return store

    def clear(self, count: int) -> Any:
        """Intrinsic ``(pointers, i)``: ``count`` elements of the gradient become zero."""

        @intrinsic
        def clear(typingctx: Any, pointers: Any, i: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                self._put(builder, args[0], 1, args[1], [ir.Constant(self.storages[1].memory, 0)] * count)
                return context.get_dummy_value()

            return types.void(self.pointers, types.int64), codegen

        return clear

    def _put(self, builder: Any, pointers: Any, k: int, index: Any, values: list[Any]) -> None:
        """Elements of array k from ``index`` on, by one store."""
        place = self._place(builder, pointers, k, index)
        if len(values) == 1:
            builder.store(values[0], place)
            return
        kind = ir.VectorType(values[0].type, len(values))
        vector = ir.Constant(kind, ir.Undefined)
        for j, value in enumerate(values):
            vector = builder.insert_element(vector, value, ir.Constant(I32, j))
        place = builder.bitcast(place, ir.PointerType(kind, GLOBAL))
        builder.store(vector, place, align=len(values) * self._itemsize(k))

    def _itemsize(self, k: int) -> int:
        return ITEMSIZE[self.storages[k].dtype]
