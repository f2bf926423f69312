"""Sums of squares in one canonical order, so that a norm has the same bits on every machine and any number of threads.

A chunk of 16,384 elements is 8 blocks of 2,048 neighbours. A block is 64 rows of 32 lanes: lane j adds the squares of
elements j, j + 32, j + 64, ... in order, then the lanes are added pairwise (j and j + 16, then j and j + 8, ...). The
sums of the eight blocks are added in order. Those of the chunks of an array are again added in 32 lanes and then
pairwise, and so are those of the arrays. Elements beyond the end count as zeros, which changes no bit.

Everything is added in float64, where the square of a float32 is exact and cannot overflow. So the sum is finite
exactly if every float32, float16 or bfloat16 element is, and the finite check costs nothing more; and a fused
multiply-add gives the same bits as a multiplication and an addition, so it is used where the processor has one.
(float64 elements have no exact squares: there the two stay apart.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from .dtypes import ITEMSIZE
from .environment import enter, leave, settled
from .layout import BLOCK, LANES
from .rules.rule import Product
from .storage import DOUBLE, I64, LINE, Features, Storage, prefetch

AHEAD = 4096  # elements from a row to the row that is prefetched
# 64 M float32, 2 threads, GB/s, medians of one run: no prefetch 25.6; ahead by 256: 31, 512: 36, 1024: 38, 4096: 41 (to
# the first-level cache) and 45 (to the second); past all caches (NTA): 13. A loop that only reads, unprefetched: 37.

SIGNATURE = types.float64(types.int64, types.int64, types.voidptr)
"""C signature of a squares kernel: sum of squares of elements lo to hi - 1 of x; lo is a multiple of BLOCK."""

RATIO_SIGNATURE = types.float64(types.CPointer(types.float64), types.float64, types.CPointer(types.float64))
"""C signature of a ratio: (sums of a segment, gradient multiplier, scalars)."""


def squares_loop(dtype: str, features: Features) -> Callable[..., float]:
    """The sum of squares over an array stored as ``dtype``, to be compiled."""
    squares = Squares(Storage(dtype, features.half), features.fma)
    new_lanes, add_row, add_rest, take = squares.new_lanes(), squares.add_row(ahead=True), squares.add_rest(), take_sum

    def sum_squares(lo: Any, hi: Any, x: Any) -> float:
        mode: Any = enter()  # type: ignore[call-arg]
        lanes = new_lanes()
        total = 0.0
        for start in range(lo, hi, BLOCK):
            stop = min(start + BLOCK, hi)
            tail = stop - (stop - start) % LANES
            for i in range(start, tail, LANES):
                add_row(lanes, x, i)
            if tail < stop:
                add_rest(lanes, x, tail, stop)
            total += take(lanes)
        total = settled(total)
        leave(mode)
        return total

    return sum_squares


LANES_TYPE = ir.VectorType(DOUBLE, LANES)


class Squares:
    """Intrinsics that add squares into the lanes of a block.

    They are written with vectors, so that LLVM does not choose the order. The lanes are a variable on the stack, which
    LLVM keeps in registers.
    """

    def __init__(self, storage: Storage, fma: bool) -> None:
        self.storage = storage
        self.fma = fma and storage.dtype != "float64"
        self.row_type = ir.VectorType(storage.memory, LANES)

    def new_lanes(self) -> Any:
        """Intrinsic ``() -> lanes``, all zero."""

        @intrinsic
        def new_lanes(typingctx: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                lanes = cgutils.alloca_once_value(builder, ir.Constant(LANES_TYPE, None))
                return builder.bitcast(lanes, context.get_value_type(types.voidptr))

            return types.voidptr(), codegen

        return new_lanes

    def add_row(self, *, ahead: bool = False) -> Any:
        """Intrinsic ``(lanes, x, i)``: add the squares of the row that begins at element i of x."""

        @intrinsic
        def add_row(typingctx: Any, lanes: Any, x: Any, i: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                lanes, x, i = args
                elements = builder.bitcast(x, self.storage.memory.as_pointer())
                row = builder.load(builder.bitcast(builder.gep(elements, [i]), self.row_type.as_pointer()))
                row.align = ITEMSIZE[self.storage.dtype]
                for offset in range(0, LANES, LINE // ITEMSIZE[self.storage.dtype]) if ahead else ():
                    at = builder.add(i, ir.Constant(I64, AHEAD + offset))
                    prefetch(builder, builder.gep(elements, [at]), level=2)
                self.add(builder, lanes, row)
                return context.get_dummy_value()

            return types.void(types.voidptr, types.voidptr, types.int64), codegen

        return add_row

    def add_rest(self) -> Any:
        """Intrinsic ``(lanes, x, lo, hi)``: add the squares of the fewer than LANES elements from lo to hi - 1."""

        @intrinsic
        def add_rest(typingctx: Any, lanes: Any, x: Any, lo: Any, hi: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                lanes, x, lo, hi = args
                padded = cgutils.alloca_once(builder, self.row_type)
                builder.store(ir.Constant(self.row_type, None), padded)
                source = builder.gep(builder.bitcast(x, self.storage.memory.as_pointer()), [lo])
                itemsize = ir.Constant(I64, ITEMSIZE[self.storage.dtype])
                cgutils.raw_memcpy(builder, padded, source, builder.sub(hi, lo), itemsize)
                self.add(builder, lanes, builder.load(padded))
                return context.get_dummy_value()

            return types.void(types.voidptr, types.voidptr, types.int64, types.int64), codegen

        return add_rest

    def add(self, builder: Any, lanes: Any, row: Any, other: Any = None) -> None:
        """Add the squares of a row into lanes, or its products with another."""
        values = self._wide(builder, row)
        factors = values if other is None else self._wide(builder, other)
        place = builder.bitcast(lanes, LANES_TYPE.as_pointer())
        sums = builder.load(place)
        if self.fma:
            kind = ir.FunctionType(LANES_TYPE, [LANES_TYPE] * 3)
            fused = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f64")
            sums = builder.call(fused, [values, factors, sums])
        else:
            sums = builder.fadd(sums, builder.fmul(values, factors))
        builder.store(sums, place)

    def _wide(self, builder: Any, row: Any) -> Any:
        values = self.storage.decode(builder, row)
        return values if values.type == LANES_TYPE else builder.fpext(values, LANES_TYPE)


def taken(builder: Any, place: Any) -> Any:
    """The sum of the lanes, added pairwise; the lanes are zero again."""
    sums = builder.load(place)
    builder.store(ir.Constant(LANES_TYPE, None), place)
    width = LANES // 2
    while width:
        undefined = ir.Constant(sums.type, ir.Undefined)
        half = ir.VectorType(ir.IntType(32), width)
        low, high = (ir.Constant(half, list(range(first, first + width))) for first in (0, width))
        sums = builder.fadd(builder.shuffle_vector(sums, undefined, low), builder.shuffle_vector(sums, undefined, high))
        width //= 2
    return builder.extract_element(sums, ir.Constant(ir.IntType(32), 0))


@intrinsic
def take_sum(typingctx: Any, lanes: Any) -> Any:
    """The same of lanes that ``new_lanes`` made."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return taken(builder, builder.bitcast(args[0], LANES_TYPE.as_pointer()))

    return types.float64(types.voidptr), codegen


def scaled(context: Any, builder: Any, sums: list[Any], products: tuple[Product, ...], multiplier: Any) -> list[Any]:
    """Sums of products of what is stored, for gradients times a multiplier, in the IR of a CPU or a GPU."""
    results = []
    for total, product in zip(sums, products, strict=True):
        if product == ("g", "g"):
            kind = types.float64(types.float64, types.float64)
            total = context.compile_internal(builder, squared_norm, kind, [total, multiplier])
        else:
            for _ in range(product.count("g")):
                total = builder.fmul(total, multiplier)
        results.append(total)
    return results


def squared_norm(squares: float, multiplier: float) -> float:
    """Its root is the norm of the gradients as they are stored, times the multiplier, to the bit."""
    norm = abs(multiplier) * math.sqrt(squares)
    return norm * norm
