"""The loop that sums products of a rule's terms, in the canonical order of ``..reductions``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..dtypes import COMPUTE
from ..emit import emitted
from ..environment import enter, leave
from ..layout import BLOCK, LANES, MULTIPLIER
from ..reductions import AHEAD, WIDE, add_rows, sum_of_lanes
from ..rules.rule import Rule
from ..storage import I64, Features, Storage
from .loop import BLOCK as PREFETCHED
from .loop import PROMOTED, Access, inlined, scalars_intrinsic

# Rows are added block by block, and what is prefetched goes to the second-level cache, as far ahead as in reductions.
# The sums of LAMB on BERT-base's shapes, 2 threads, ms: rows added 2,048 elements at a time, 512 ahead to the first
# level, 58; 64 at a time 54; 2,048 ahead 51; 4,096 ahead to the second 48.

SIGNATURE = types.void(
    types.int64,  # first element, a multiple of BLOCK
    types.int64,  # one past the last element
    types.CPointer(types.voidptr),  # parameter, gradient, states
    types.CPointer(types.float64),  # the rule's scalars
    types.CPointer(types.float64),  # the segment's own, of which the gradient multiplier is read
    types.CPointer(types.float64),  # what the sums are added to
)
"""C signature of a terms kernel."""


def terms_loop(rule: Rule, p: str, g: str, features: Features) -> Callable[..., None]:
    """The sums of ``rule.products`` for parameters stored as ``p`` and gradients stored as ``g``, to be compiled."""
    access = Access(rule, p, g, features)
    compute, pointers_of, load = access.compute, access.pointers_of(), access.load()
    ahead, scalars_of = access.ahead(range(len(access.storages)), level=2), scalars_intrinsic(rule, compute)
    terms = inlined(rule.terms or _none)
    new_lanes, clear_lanes, new_factors, clear_factors, put, add, total = _scratch(rule, Storage(COMPUTE[p]), features)

    def loop(lo: Any, hi: Any, buffers: Any, scalars: Any, own: Any, sums: Any) -> None:
        mode: Any = enter()  # type: ignore[call-arg]
        h = scalars_of(scalars, (1.0, 1.0))
        pointers, multiplier = pointers_of(buffers), compute(own[MULTIPLIER])
        lanes, factors = new_lanes(), new_factors()
        for start in range(lo, hi, BLOCK):
            clear_lanes(lanes)
            stop = min(start + BLOCK, hi)
            tail = stop - (stop - start) % PREFETCHED
            for first in range(start, tail, PREFETCHED):
                ahead(pointers, first + AHEAD)
                for i in range(first, first + PREFETCHED):
                    stored = load(pointers, i, compute(1.0), h)
                    put(factors, i - first, stored, terms(*load(pointers, i, multiplier, h)))
                add(factors, PREFETCHED // LANES, lanes)
            if tail < stop:
                clear_factors(factors)
                for i in range(tail, stop):
                    stored = load(pointers, i, compute(1.0), h)
                    put(factors, i - tail, stored, terms(*load(pointers, i, multiplier, h)))
                add(factors, -(-(stop - tail) // LANES), lanes)
            total(lanes, sums)
        leave(mode)

    return loop


def _none(*_: Any) -> tuple[()]:
    return ()


def _scratch(rule: Rule, storage: Storage, features: Features) -> tuple[Any, ...]:
    """Intrinsics for a few rows of each factor of the products, in the compute dtype, and for lanes; on the stack.

    The rows are added at once, while the next ones are on their way from memory.
    """
    room = ir.ArrayType(ir.ArrayType(storage.memory, PREFETCHED), len(rule.sources))
    row, all_lanes = ir.VectorType(storage.memory, LANES).as_pointer(), ir.ArrayType(WIDE, len(rule.products))

    def place(builder: Any, scratch: Any, source: str | int, i: Any) -> Any:
        array = builder.bitcast(scratch, room.as_pointer())
        return builder.gep(array, [ir.Constant(I64, 0), ir.Constant(I64, rule.sources.index(source)), i])

    def lanes_of(builder: Any, lanes: Any, k: int) -> Any:
        return builder.gep(builder.bitcast(lanes, all_lanes.as_pointer()), [ir.Constant(I64, 0), ir.Constant(I64, k)])

    def of_size(kind: Any) -> tuple[Any, Any]:
        @emitted(types.voidptr())
        def new(context: Any, builder: Any) -> Any:
            with builder.goto_entry_block():  # alloca_once would store a zero in each element: half of the build's time
                return builder.bitcast(builder.alloca(kind), context.get_value_type(types.voidptr))

        @emitted(types.void(types.voidptr))
        def clear(context: Any, builder: Any, memory: Any) -> None:
            cgutils.memset(builder, memory, ir.Constant(I64, kind.get_abi_size(context.target_data)), 0)

        return new, clear

    def of_terms(scratch: Any, i: Any, stored: Any, terms: Any) -> Any:
        if any(kind != stored[0] for kind in terms):
            raise numba.TypingError(f"the rule's terms return {terms}, not values of {stored[0]}: {PROMOTED}")
        return types.void(scratch, i, stored, terms)

    @emitted(of_terms)
    def put(context: Any, builder: Any, scratch: Any, i: Any, stored: Any, terms: Any) -> None:
        """The factors of element i, of ``(p, g, ...)`` and terms."""
        for source in rule.sources:
            of, k = (terms, source) if isinstance(source, int) else (stored, "pg".index(source))
            builder.store(builder.extract_value(of, k), place(builder, scratch, source, i))

    @emitted(types.void(types.voidptr, types.int64, types.voidptr))
    def add(context: Any, builder: Any, scratch: Any, rows: Any, lanes: Any) -> None:
        """Add the products of the first rows to the lanes."""
        for k, product in enumerate(rule.products):

            def factors(first: Any, product: Any = product) -> list[Any]:
                places = [builder.bitcast(place(builder, scratch, source, first), row) for source in product]
                return [builder.load(x, align=storage.memory.get_abi_size(context.target_data)) for x in places]

            add_rows(builder, storage, features.fma, lanes_of(builder, lanes, k), rows, factors)

    @emitted(types.void(types.voidptr, types.CPointer(types.float64)))
    def total(context: Any, builder: Any, lanes: Any, sums: Any) -> None:
        """Add the sum of the lanes of each product to that product's."""
        for k in range(len(rule.products)):
            at = builder.gep(sums, [ir.Constant(I64, k)])
            builder.store(builder.fadd(builder.load(at), sum_of_lanes(builder, lanes_of(builder, lanes, k))), at)

    (new_lanes, clear_lanes), (new_factors, clear_factors) = of_size(all_lanes), of_size(room)
    return new_lanes, clear_lanes, new_factors, clear_factors, put, add, total
