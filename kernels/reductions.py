"""Sums of squares in one canonical order, so that a norm has the same bits on every machine and any number of threads.

A chunk of 65,536 elements is 32 blocks of 2,048 neighbours. A block is 64 rows of 32 lanes: lane j adds the squares of
elements j, j + 32, j + 64, ... in order, then the lanes are added pairwise (j and j + 16, then j and j + 8, ...). The
sums of the blocks are added in order, and so are those of the chunks of an array, and those of the arrays.
Elements beyond the end count as zeros, which changes no bit.

Everything is added in float64, where the square of a float32 is exact and cannot overflow. So the sum is finite
exactly if every float32, float16 or bfloat16 element is: the finite check costs nothing more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

from .dtypes import ITEMSIZE
from .storage import DOUBLE, I64, Storage

LANES = 32
ROWS = 64
BLOCK = LANES * ROWS

SIGNATURE = types.float64(types.int64, types.int64, types.voidptr)
"""C signature of a norm kernel: sum of squares of elements lo to hi - 1 of x; lo is a multiple of BLOCK."""

RATIO_SIGNATURE = types.float64(types.float64, types.float64, types.CPointer(types.float64))
"""C signature of a trust ratio: (weight norm, gradient norm, scalars)."""


def norm_loop(dtype: str, *, soft_half: bool = False) -> Callable[..., float]:
    """The sum of squares over an array stored as ``dtype``, to be compiled."""
    block_sum = _block_sum(Storage(dtype, soft_half))

    def norm(lo: Any, hi: Any, x: Any) -> float:
        total = 0.0
        for start in range(lo, hi, BLOCK):
            total += block_sum(x, start, min(start + BLOCK, hi))
        return total

    return norm


def _block_sum(storage: Storage) -> Any:
    """Intrinsic ``(x, lo, hi) -> sum of squares`` of a block, written with vectors: LLVM must not choose the order."""
    row_type = ir.VectorType(storage.memory, LANES)
    lanes_type = ir.VectorType(DOUBLE, LANES)

    def add_row(builder: Any, lanes: Any, row: Any) -> None:
        values = storage.decode(builder, row)
        if values.type != lanes_type:
            values = builder.fpext(values, lanes_type)
        builder.store(builder.fadd(builder.load(lanes), builder.fmul(values, values)), lanes)

    def add_pairwise(builder: Any, sums: Any) -> Any:
        width = LANES // 2
        while width:
            low, high = (
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width)))
                for first in (0, width)
            )
            sums = builder.fadd(
                builder.shuffle_vector(sums, ir.Constant(sums.type, ir.Undefined), low),
                builder.shuffle_vector(sums, ir.Constant(sums.type, ir.Undefined), high),
            )
            width //= 2
        return builder.extract_element(sums, ir.Constant(ir.IntType(32), 0))

    @intrinsic
    def block_sum(typingctx: Any, x: Any, lo: Any, hi: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer, lo, hi = args
            elements = builder.bitcast(pointer, storage.memory.as_pointer())
            lanes = cgutils.alloca_once_value(builder, ir.Constant(lanes_type, None))
            count = builder.sub(hi, lo)
            rows = builder.udiv(count, ir.Constant(I64, LANES))
            with cgutils.for_range(builder, rows) as loop:
                at = builder.add(lo, builder.mul(loop.index, ir.Constant(I64, LANES)))
                row = builder.load(builder.bitcast(builder.gep(elements, [at]), row_type.as_pointer()))
                row.align = ITEMSIZE[storage.dtype]
                add_row(builder, lanes, row)
            rest = builder.urem(count, ir.Constant(I64, LANES))
            with builder.if_then(builder.icmp_signed(">", rest, ir.Constant(I64, 0)), likely=False):
                padded = cgutils.alloca_once_value(builder, ir.Constant(row_type, None))
                builder.store(ir.Constant(row_type, None), padded)
                source = builder.gep(elements, [builder.sub(hi, rest)])
                itemsize = ir.Constant(I64, ITEMSIZE[storage.dtype])
                cgutils.raw_memcpy(builder, padded, source, rest, itemsize)
                add_row(builder, lanes, builder.load(padded))
            return add_pairwise(builder, builder.load(lanes))

        return types.float64(types.voidptr, types.int64, types.int64), codegen

    return block_sum
