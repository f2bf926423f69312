"""The loops that sum squares, and products of a rule's terms, in the canonical order of ``..reductions``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..dtypes import COMPUTE, ITEMSIZE
from ..emit import emitted
from ..environment import enter, leave
from ..layout import BLOCK, LANES, MULTIPLIER
from ..rules.rule import Rule
from ..storage import DOUBLE, I32, I64, LINE, Storage, prefetch
from .loop import PREFETCHED, PROMOTED, Access, inlined, scalars_reader
from .memory import at, clear, put_real, real, stack

AHEAD = 4096  # elements from what is added to what is prefetched
# 64 M float32, 2 threads, GB/s, medians of one run: no prefetch 25.6; ahead by 256: 31, 512: 36, 1024: 38, 4096: 41 (to
# the first-level cache) and 45 (to the second); past all caches (NTA): 13. A loop that only reads, unprefetched: 37.
# The sums of LAMB on BERT-base's shapes, 2 threads, ms: rows added 2,048 elements at a time, 512 ahead to the first
# level, 58; 64 at a time 54; 2,048 ahead 51; 4,096 ahead to the second 48.

WIDE = ir.VectorType(DOUBLE, LANES)


def squares_loop(dtype: str, half: bool) -> Callable[..., None]:
    """The sum of squares over an array stored as ``dtype``, to be compiled.

    Args of the loop: first element, a multiple of BLOCK; one past the last; addresses of the array, and of what the
    squares are added to.
    """
    storage, itemsize = Storage(dtype, half), ITEMSIZE[dtype]
    row_type = ir.VectorType(storage.memory, LANES)

    @emitted(types.float64(types.int64, types.int64, types.int64))
    def of_block(context: Any, builder: Any, x: Any, lo: Any, hi: Any) -> Any:
        count = builder.sub(hi, lo)

        def row(first: Any) -> list[Any]:
            first = builder.add(lo, first)
            for offset in range(0, LANES, LINE // itemsize):
                ahead = builder.add(first, ir.Constant(I64, AHEAD + offset))
                prefetch(builder, at(builder, x, ahead, storage.memory), level=2)
            place = builder.bitcast(at(builder, x, first, storage.memory), row_type.as_pointer())
            return 2 * [builder.load(place, align=itemsize)]

        def rest(first: Any) -> list[Any]:
            padded = cgutils.alloca_once_value(builder, ir.Constant(row_type, None))
            source = at(builder, x, builder.add(lo, first), storage.memory)
            cgutils.raw_memcpy(builder, padded, source, builder.sub(count, first), ir.Constant(I64, itemsize))
            return 2 * [builder.load(padded)]

        lanes = cgutils.alloca_once_value(builder, ir.Constant(WIDE, None))
        rows = builder.udiv(count, ir.Constant(I64, LANES))
        add_rows(builder, storage, lanes, rows, row)
        first = builder.mul(rows, ir.Constant(I64, LANES))
        with builder.if_then(builder.icmp_signed("<", first, count), likely=False):
            add_rows(builder, storage, lanes, ir.Constant(I64, 1), lambda _: rest(first))
        return sum_of_lanes(builder, lanes)

    def squares(lo: Any, hi: Any, x: Any, total: Any) -> None:
        mode = enter()
        for start in range(lo, hi, BLOCK):
            put_real(total, 0, real(total, 0) + of_block(x, start, min(start + BLOCK, hi)))
        leave(mode)

    return squares


def add_rows(builder: Any, storage: Storage, lanes: Any, rows: Any, row: Callable[[Any], list[Any]]) -> None:
    """Add the products of the elements of rows to lanes, a variable in memory that LLVM keeps in registers meanwhile.

    It is written with vectors, so that LLVM does not choose the order.

    Args:
        builder: Where the code goes.
        storage: Of the elements.
        lanes: Where they are.
        rows: How many rows there are.
        row: Loads the two factors of the row that begins at an element.
    """
    fused = () if storage.dtype == "float64" else ("contract",)

    def wide(x: Any) -> Any:
        x = storage.decode(builder, x)
        return x if x.type == WIDE else builder.fpext(x, WIDE)

    with cgutils.for_range(builder, rows) as loop:
        x, y = (wide(factor) for factor in row(builder.mul(loop.index, ir.Constant(I64, LANES))))
        product = builder.fmul(x, y, flags=fused)
        builder.store(builder.fadd(builder.load(lanes), product, flags=fused), lanes)


def sum_of_lanes(builder: Any, lanes: Any) -> Any:
    """The sum of lanes, which are added pairwise."""
    total, width = builder.load(lanes), LANES // 2
    while width:
        halves = (ir.Constant(ir.VectorType(I32, width), [*range(first, first + width)]) for first in (0, width))
        total = builder.fadd(*(builder.shuffle_vector(total, ir.Constant(total.type, ir.Undefined), x) for x in halves))
        width //= 2
    return builder.extract_element(total, ir.Constant(I32, 0))


def terms_loop(rule: Rule, p: str, g: str, half: bool) -> Callable[..., None]:
    """The sums of ``rule.products`` for parameters stored as ``p`` and gradients stored as ``g``, to be compiled.

    A few rows of each factor are kept on the stack and added at once, while the next ones are on their way from memory.

    Args of the loop: as of an update, the first element a multiple of BLOCK, and the address of what the sums are
    added to.
    """
    access, compute_type = Access(rule, p, g, half), Storage(COMPUTE[p])
    compute, pointers_of, load = access.compute, access.pointers_of, access.load
    ahead, scalars_of = access.ahead(range(len(access.storages)), level=2), scalars_reader(rule, compute)
    terms, memory, itemsize = inlined(rule.terms or (lambda *_: ())), compute_type.memory, ITEMSIZE[COMPUTE[p]]
    lanes_bytes, factors_bytes = 8 * LANES * len(rule.products), itemsize * PREFETCHED * len(rule.sources)
    new_lanes, new_factors = stack(lanes_bytes), stack(factors_bytes)

    def factor(builder: Any, factors: Any, source: str | int, i: Any) -> Any:
        row = ir.Constant(I64, PREFETCHED * rule.sources.index(source))
        return at(builder, factors, builder.add(row, i), memory)

    def of_terms(factors: Any, i: Any, stored: Any, terms: Any) -> Any:
        if any(kind != stored[0] for kind in terms):
            raise numba.TypingError(f"the rule's terms return {terms}, not values of {stored[0]}: {PROMOTED}")
        return types.void(factors, i, stored, terms)

    @emitted(of_terms)
    def put(context: Any, builder: Any, factors: Any, i: Any, stored: Any, terms: Any) -> None:
        """The factors of element i, of ``(p, g, ...)`` and terms."""
        for source in rule.sources:
            of, k = (terms, source) if isinstance(source, int) else (stored, "pg".index(source))
            builder.store(builder.extract_value(of, k), factor(builder, factors, source, i))

    @emitted(types.void(types.int64, types.int64, types.int64))
    def add(context: Any, builder: Any, factors: Any, rows: Any, lanes: Any) -> None:
        """Add the products of the first rows to the lanes."""
        row_pointer = ir.VectorType(memory, LANES).as_pointer()
        for k, product in enumerate(rule.products):

            def row(first: Any, product: Any = product) -> list[Any]:
                places = (factor(builder, factors, source, first) for source in product)
                return [builder.load(builder.bitcast(x, row_pointer), align=itemsize) for x in places]

            add_rows(builder, compute_type, at(builder, lanes, k, WIDE), rows, row)

    @emitted(types.void(types.int64, types.int64))
    def total(context: Any, builder: Any, lanes: Any, sums: Any) -> None:
        """Add the sum of the lanes of each product to that product's."""
        for k in range(len(rule.products)):
            place = at(builder, sums, k, DOUBLE)
            builder.store(builder.fadd(builder.load(place), sum_of_lanes(builder, at(builder, lanes, k, WIDE))), place)

    def loop(lo: Any, hi: Any, arrays: Any, scalars: Any, own: Any, sums: Any) -> None:
        mode = enter()
        h = scalars_of(scalars, 1.0)
        pointers, multiplier = pointers_of(arrays), compute(real(own, MULTIPLIER))
        lanes, factors = new_lanes(), new_factors()
        for start in range(lo, hi, BLOCK):
            clear(lanes, lanes_bytes)
            stop = min(start + BLOCK, hi)
            tail = stop - (stop - start) % PREFETCHED
            for first in range(start, tail, PREFETCHED):
                ahead(pointers, first + AHEAD)
                for i in range(first, first + PREFETCHED):
                    stored = load(pointers, i, compute(1.0), h)
                    put(factors, i - first, stored, terms(*load(pointers, i, multiplier, h)))
                add(factors, PREFETCHED // LANES, lanes)
            if tail < stop:
                clear(factors, factors_bytes)
                for i in range(tail, stop):
                    stored = load(pointers, i, compute(1.0), h)
                    put(factors, i - tail, stored, terms(*load(pointers, i, multiplier, h)))
                add(factors, -(-(stop - tail) // LANES), lanes)
            total(lanes, sums)
        leave(mode)

    return loop
