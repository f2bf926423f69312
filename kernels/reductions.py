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
from typing import Any

from numba import types

from .rules.rule import Product


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
