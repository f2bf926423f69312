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

from .dtypes import ITEMSIZE
from .emit import emitted
from .environment import enter, leave
from .layout import BLOCK, LANES
from .rules.rule import Product
from .storage import DOUBLE, I32, I64, LINE, Features, Storage, prefetch

AHEAD = 4096  # elements from a row to the row that is prefetched
# 64 M float32, 2 threads, GB/s, medians of one run: no prefetch 25.6; ahead by 256: 31, 512: 36, 1024: 38, 4096: 41 (to
# the first-level cache) and 45 (to the second); past all caches (NTA): 13. A loop that only reads, unprefetched: 37.

FUSED = f"llvm.fma.v{LANES}f64"

SIGNATURE = types.void(types.int64, types.int64, types.voidptr, types.CPointer(types.float64))
"""C signature of a squares kernel: (lo, hi, x, sum), to which the squares of elements lo to hi - 1 of x are added; lo
is a multiple of BLOCK."""


def squares_loop(dtype: str, features: Features) -> Callable[..., None]:
    """The sum of squares over an array stored as ``dtype``, to be compiled."""
    storage = Storage(dtype, features.half)
    row_type = ir.VectorType(storage.memory, LANES)

    @emitted(types.float64(types.voidptr, types.int64, types.int64))
    def of_block(context: Any, builder: Any, x: Any, lo: Any, hi: Any) -> Any:
        elements = builder.bitcast(x, storage.memory.as_pointer())
        count, lanes = builder.sub(hi, lo), ir.Constant(I64, LANES)

        def row(first: Any) -> list[Any]:
            for offset in range(0, LANES, LINE // ITEMSIZE[dtype]):
                at = builder.add(builder.add(lo, first), ir.Constant(I64, AHEAD + offset))
                prefetch(builder, builder.gep(elements, [at]), level=2)
            place = builder.gep(elements, [builder.add(lo, first)])
            return 2 * [builder.load(builder.bitcast(place, row_type.as_pointer()), align=ITEMSIZE[dtype])]

        def rest(first: Any) -> list[Any]:
            padded = cgutils.alloca_once(builder, row_type)
            builder.store(ir.Constant(row_type, None), padded)
            source, itemsize = builder.gep(elements, [builder.add(lo, first)]), ir.Constant(I64, ITEMSIZE[dtype])
            cgutils.raw_memcpy(builder, padded, source, builder.sub(count, first), itemsize)
            return 2 * [builder.load(padded)]

        sums = cgutils.alloca_once_value(builder, ir.Constant(WIDE, None))
        rows = builder.udiv(count, lanes)
        add_rows(builder, storage, features.fma, sums, rows, row)
        first = builder.mul(rows, lanes)
        with builder.if_then(builder.icmp_signed("<", first, count), likely=False):
            add_rows(builder, storage, features.fma, sums, ir.Constant(I64, 1), lambda _: rest(first))
        return sum_of_lanes(builder, sums)

    def squares(lo: Any, hi: Any, x: Any, total: Any) -> None:
        mode: Any = enter()  # type: ignore[call-arg]
        for start in range(lo, hi, BLOCK):
            total[0] += of_block(x, start, min(start + BLOCK, hi))
        leave(mode)

    return squares


WIDE = ir.VectorType(DOUBLE, LANES)


def add_rows(builder: Any, storage: Storage, fma: bool, lanes: Any, rows: Any, row: Callable[[Any], list[Any]]) -> None:
    """Add the products of the elements of rows to lanes, a variable in memory that LLVM keeps in registers meanwhile.

    It is written with vectors, so that LLVM does not choose the order.

    Args:
        builder: Where the code goes.
        storage: Of the elements.
        fma: Whether the processor has a fused multiply-add.
        lanes: Where they are.
        rows: How many rows there are.
        row: Loads the two factors of the row that begins at an element.
    """

    def wide(x: Any) -> Any:
        x = storage.decode(builder, x)
        return x if x.type == WIDE else builder.fpext(x, WIDE)

    with cgutils.for_range(builder, rows) as loop:
        x, y = (wide(factor) for factor in row(builder.mul(loop.index, ir.Constant(I64, LANES))))
        if fma and storage.dtype != "float64":
            fused = cgutils.get_or_insert_function(builder.module, ir.FunctionType(WIDE, [WIDE] * 3), FUSED)
            builder.store(builder.call(fused, [x, y, builder.load(lanes)]), lanes)
        else:
            builder.store(builder.fadd(builder.load(lanes), builder.fmul(x, y)), lanes)


def sum_of_lanes(builder: Any, lanes: Any) -> Any:
    """The sum of lanes, which are added pairwise."""
    total, width = builder.load(lanes), LANES // 2
    while width:
        halves = (ir.Constant(ir.VectorType(I32, width), [*range(first, first + width)]) for first in (0, width))
        total = builder.fadd(*(builder.shuffle_vector(total, ir.Constant(total.type, ir.Undefined), x) for x in halves))
        width //= 2
    return builder.extract_element(total, ir.Constant(I32, 0))


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
