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
from .host_functions import named
from .host_functions import ratio_caller as ratio_caller
from .host_functions import scalars_former as scalars_former
from .memory import GLOBAL, at
from .toolchain import emitted, types


def _loader(element: ir.Type, result: Any) -> Any:
    @emitted(result(types.int64, types.int64))
    def load(context: Any, builder: Any, address: Any, index: Any) -> Any:
        return builder.load(at(builder, address, index, element))

    return load


def _storer(element: ir.Type, value: Any) -> Any:
    @emitted(types.void(types.int64, types.int64, value))
    def store(context: Any, builder: Any, address: Any, index: Any, number: Any) -> None:
        builder.store(number, at(builder, address, index, element))

    return store


word, put_word = _loader(I64, types.int64), _storer(I64, types.int64)
real, put_real = _loader(DOUBLE, types.float64), _storer(DOUBLE, types.float64)
single = _loader(FLOAT, types.float32)


@emitted(types.int64(types.int64, types.int64))
def count_up(context: Any, builder: Any, address: Any, number: Any) -> Any:
    """Add to a word, as one of many blocks; its value before."""
    return builder.atomic_rmw("add", at(builder, address, 0, I64), number, "monotonic")


@emitted(types.float64(types.int64, types.int64))
def fresh_real(context: Any, builder: Any, address: Any, index: Any) -> Any:
    """A number that another block may just have written: never from this processor's own cache."""
    kind = ir.FunctionType(DOUBLE, [I64])  # NVVM knows no atomic or volatile loads
    load = ir.InlineAsm(kind, "ld.volatile.global.f64 $0, [$1];", "=d,l,~{memory}", side_effect=True)
    return builder.call(load, [builder.ptrtoint(at(builder, address, index, DOUBLE), I64)])


@emitted(types.int64(types.int64))
def opaque(context: Any, builder: Any, number: Any) -> Any:
    """The number, of which the compiler no longer knows what it is made of.

    Loops that count by it are not unrolled, and what is computed from it is not kept for the next loop that computes
    the same: either would take registers.
    """
    move = ir.InlineAsm(ir.FunctionType(I64, [I64]), "mov.b64 $0, $1;", "=l,l", side_effect=True)
    return builder.call(move, [number])


def rounded(compute: str) -> Any:
    """Intrinsic ``(address, index) -> number``: a float64, rounded to the compute dtype."""

    @emitted(getattr(types, compute)(types.int64, types.int64))
    def load(context: Any, builder: Any, address: Any, index: Any) -> Any:
        return _rounded(builder, address, index, compute)

    return load


def _rounded(builder: Any, address: Any, index: Any, compute: str) -> Any:
    number = builder.load(at(builder, address, index, DOUBLE))
    return builder.fptrunc(number, FLOAT) if compute == "float32" else number


def scalars_loader(rule: Rule, compute: str) -> Any:
    """Intrinsic ``(scalars, ratio) -> h``: the rule's scalars, rounded to the compute dtype.

    ``ratio`` is where stretch and ratio are, of which a rule has both or the latter.
    """
    kind = named(getattr(types, compute), rule.Scalars)
    in_ratio = ("stretch", "ratio") if rule.ratio is not None else ()

    @emitted(kind(types.int64, types.int64))
    def load(context: Any, builder: Any, scalars: Any, ratio: Any) -> Any:
        places = [
            (ratio, in_ratio.index(name)) if name in in_ratio else (scalars, k) for k, name in enumerate(kind.fields)
        ]
        return cgutils.pack_array(builder, [_rounded(builder, *place, compute) for place in places])

    return load


def add_rows(dtype: str, rows: int) -> Any:
    """Intrinsic ``(total, x, i) -> total``: add the squares of elements i, i + 32, ... of ``rows`` rows, in order."""
    storage = Storage(dtype)

    @emitted(types.float64(types.float64, types.int64, types.int64))
    def add(context: Any, builder: Any, total: Any, x: Any, i: Any) -> Any:
        places = [at(builder, x, builder.add(i, ir.Constant(I64, k * LANES)), storage.memory) for k in range(rows)]
        for element in [builder.load(place) for place in places]:
            number = storage.decode(builder, element)
            total = _add_product(builder, total, number, number)
        return total

    return add


def _add_product(builder: Any, total: Any, x: Any, y: Any) -> Any:
    if x.type == DOUBLE:  # products of float64 are not exact, and so are not fused
        return builder.fadd(total, builder.fmul(x, y))
    return builder.fma(builder.fpext(x, DOUBLE), builder.fpext(y, DOUBLE), total)


class Arrays:
    """Loads and stores of neighbouring elements of every array of a rule.

    Args:
        rule: The rule, or an epilogue, whose target and parameter take the places of parameter and gradient.
        p: Storage dtype of the parameter.
        g: Storage dtype of the gradient.
    """

    def __init__(self, rule: Any, p: str, g: str) -> None:
        self.storages = [Storage(p), Storage(g)] + [Storage(COMPUTE[p])] * len(rule.state)
        self.rule = rule
        self.written = [0, *range(2, len(self.storages))]  # everything but the gradient
        self.compute = getattr(types, COMPUTE[p])
        self.scalars = named(self.compute, rule.Scalars)
        self.pointers = types.UniTuple(types.int64, len(self.storages))
        self.arguments = types.Tuple([self.compute] * len(self.storages) + [self.scalars])  # of the rule
        self.results = types.UniTuple(self.compute, len(self.written))

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

    def pointers_of(self) -> Any:
        """Intrinsic ``(segment, gradient) -> pointers``: addresses of parameter, gradient and states."""

        @emitted(self.pointers(types.int64, types.int64))
        def pointers_of(context: Any, builder: Any, segment: Any, gradient: Any) -> Any:
            places = range(len(self.storages))
            words = [gradient if k == 1 else builder.load(at(builder, segment, k, I64)) for k in places]
            return cgutils.pack_array(builder, words)

        return pointers_of

    def aligned(self, count: int) -> Any:
        """Intrinsic ``(pointers) -> bool``: whether every array may be accessed ``count`` elements at a time."""

        @emitted(types.boolean(self.pointers))
        def aligned(context: Any, builder: Any, pointers: Any) -> Any:
            rests = ir.Constant(I64, 0)
            for k in range(len(self.storages)):
                mask = ir.Constant(I64, count * self._itemsize(k) - 1)
                rests = builder.or_(rests, builder.and_(builder.extract_value(pointers, k), mask))
            return builder.icmp_unsigned("==", rests, ir.Constant(I64, 0))

        return aligned

    def moved(self) -> Any:
        """Intrinsic ``(pointers, i) -> pointers``: the addresses of elements ``i``."""

        @emitted(self.pointers(self.pointers, types.int64))
        def moved(context: Any, builder: Any, pointers: Any, i: Any) -> Any:
            places = [self._place(builder, pointers, k, i) for k in range(len(self.storages))]
            return cgutils.pack_array(builder, [builder.ptrtoint(place, I64) for place in places])

        return moved

    def load(self, count: int) -> Any:
        """Intrinsic ``(pointers, i, multiplier, h) -> arguments of the rule`` for each of ``count`` elements."""

        @emitted(types.UniTuple(self.arguments, count)(self.pointers, types.int64, self.compute, self.scalars))
        def load(context: Any, builder: Any, pointers: Any, i: Any, multiplier: Any, h: Any) -> Any:
            loaded = [self._get(builder, pointers, k, i, count) for k in range(len(self.storages))]
            elements = []
            for memory in zip(*loaded, strict=True):
                values = [storage.decode(builder, x) for storage, x in zip(self.storages, memory, strict=True)]
                values[1] = builder.fmul(values[1], multiplier)
                elements.append(cgutils.pack_struct(builder, [*values, h]))
            return cgutils.pack_array(builder, elements)

        return load

    def apply(self, count: int) -> Any:
        """Intrinsic ``(arguments of the rule of some elements) -> its results``: the rule itself."""

        @emitted(types.UniTuple(self.results, count)(types.UniTuple(self.arguments, count)))
        def apply(context: Any, builder: Any, elements: Any) -> Any:
            return cgutils.pack_array(
                builder,
                [
                    self._call(context, builder, self.rule.step, self.results, cgutils.unpack_tuple(builder, element))
                    for element in cgutils.unpack_tuple(builder, elements)
                ],
            )

        return apply

    def _call(self, context: Any, builder: Any, function: Any, results: Any, values: list[Any]) -> Any:
        return context.compile_internal(builder, function, results(*self.arguments.types), values)

    def add_products(self) -> Any:
        """Intrinsic ``(totals, pointers, i, multiplier, h) -> totals``: add the rule's products of an element.

        "p" and "g" are numbers as they are stored, the gradient without its multiplier.
        """
        rule, totals = self.rule, types.UniTuple(types.float64, len(self.rule.products))
        terms = types.UniTuple(self.compute, rule.term_count)

        @emitted(totals(totals, self.pointers, types.int64, self.compute, self.scalars))
        def add(context: Any, builder: Any, totals: Any, pointers: Any, i: Any, multiplier: Any, h: Any) -> Any:
            values = [s.decode(builder, *self._get(builder, pointers, k, i, 1)) for k, s in enumerate(self.storages)]
            factors: dict[Any, Any] = {"p": values[0], "g": values[1]}
            if rule.terms:
                values[1] = builder.fmul(values[1], multiplier)
                of_element = self._call(context, builder, rule.terms, terms, [*values, h])
                factors |= enumerate(cgutils.unpack_tuple(builder, of_element))
            sums = zip(cgutils.unpack_tuple(builder, totals), rule.products, strict=True)
            return cgutils.pack_array(builder, [_add_product(builder, x, factors[a], factors[b]) for x, (a, b) in sums])

        return add

    def store(self, count: int) -> Any:
        """Intrinsic ``(pointers, i, results of the rule)`` for ``count`` elements, each rounded once to its storage."""

        @emitted(types.void(self.pointers, types.int64, types.UniTuple(self.results, count)))
        def store(context: Any, builder: Any, pointers: Any, i: Any, results: Any) -> None:
            elements = [cgutils.unpack_tuple(builder, result) for result in cgutils.unpack_tuple(builder, results)]
            for k, values in zip(self.written, zip(*elements, strict=True), strict=True):
                self._put(builder, pointers, k, i, [self.storages[k].encode(builder, x) for x in values])

        return store

    def clear(self, count: int) -> Any:
        """Intrinsic ``(pointers, i)``: ``count`` elements of the gradient become zero."""

        @emitted(types.void(self.pointers, types.int64))
        def clear(context: Any, builder: Any, pointers: Any, i: Any) -> None:
            self._put(builder, pointers, 1, i, [ir.Constant(self.storages[1].memory, 0)] * count)

        return clear
