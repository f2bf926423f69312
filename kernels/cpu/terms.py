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
from ..reductions import sum_of_rows
from ..rules.rule import Rule
from ..storage import I64, Features, Storage
from .loop import AHEAD, PROMOTED, Access, inlined, scalars_intrinsic
from .loop import BLOCK as PREFETCHED

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
    ahead, scalars_of = access.ahead(range(len(access.storages))), scalars_intrinsic(rule, compute)
    terms, (new, clear, put, add) = inlined(rule.terms or _none), _scratch(rule, Storage(COMPUTE[p]), features)

    def loop(lo: Any, hi: Any, buffers: Any, scalars: Any, own: Any, sums: Any) -> None:
        mode: Any = enter()  # type: ignore[call-arg]
        h = scalars_of(scalars, (1.0, 1.0))
        pointers, multiplier = pointers_of(buffers), compute(own[MULTIPLIER])
        factors = new()
        for start in range(lo, hi, BLOCK):
            stop = min(start + BLOCK, hi)
            if stop < start + BLOCK:
                clear(factors)
            tail = stop - (stop - start) % PREFETCHED
            for first in range(start, tail, PREFETCHED):
                ahead(pointers, first + AHEAD)
                for i in range(first, first + PREFETCHED):
                    stored = load(pointers, i, compute(1.0), h)
                    put(factors, i - start, stored, terms(*load(pointers, i, multiplier, h)))
            for i in range(tail, stop):
                stored = load(pointers, i, compute(1.0), h)
                put(factors, i - start, stored, terms(*load(pointers, i, multiplier, h)))
            add(factors, -(-(stop - start) // LANES), sums)
        leave(mode)

    return loop


def _none(*_: Any) -> tuple[()]:
    return ()


def _scratch(rule: Rule, storage: Storage, features: Features) -> tuple[Any, Any, Any, Any]:
    """Intrinsics for a block of each factor of the products, in the compute dtype, on the stack."""
    room = ir.ArrayType(ir.ArrayType(storage.memory, BLOCK), len(rule.sources))
    row = ir.VectorType(storage.memory, LANES).as_pointer()

    def place(builder: Any, scratch: Any, source: str | int, i: Any) -> Any:
        array = builder.bitcast(scratch, room.as_pointer())
        return builder.gep(array, [ir.Constant(I64, 0), ir.Constant(I64, rule.sources.index(source)), i])

    @emitted(types.voidptr())
    def new(context: Any, builder: Any) -> Any:
        with builder.goto_entry_block():  # alloca_once would store a zero in each element: half of the build's time
            return builder.bitcast(builder.alloca(room), context.get_value_type(types.voidptr))

    @emitted(types.void(types.voidptr))
    def clear(context: Any, builder: Any, scratch: Any) -> None:
        cgutils.memset(builder, scratch, ir.Constant(I64, room.get_abi_size(context.target_data)), 0)

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

    @emitted(types.void(types.voidptr, types.int64, types.CPointer(types.float64)))
    def add(context: Any, builder: Any, scratch: Any, rows: Any, sums: Any) -> None:
        """Add the products of the first rows to the sums."""
        for k, product in enumerate(rule.products):

            def factors(first: Any, product: Any = product) -> list[Any]:
                places = [builder.bitcast(place(builder, scratch, source, first), row) for source in product]
                return [builder.load(x, align=storage.memory.get_abi_size(context.target_data)) for x in places]

            at = builder.gep(sums, [ir.Constant(I64, k)])
            total = sum_of_rows(builder, storage, features.fma, rows, factors)
            builder.store(builder.fadd(builder.load(at), total), at)

    return new, clear, put, add
