"""The loop that sums products of a rule's terms, in the canonical order of ``..reductions``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.extending import intrinsic

from ..dtypes import COMPUTE
from ..environment import enter, leave
from ..layout import BLOCK, LANES, MULTIPLIER
from ..reductions import LANES_TYPE, Squares, taken
from ..rules.rule import Rule
from ..storage import I64, Features, Storage
from .loop import AHEAD, PROMOTED, Access, scalars_intrinsic
from .loop import BLOCK as PREFETCHED

SIGNATURE = types.void(
    types.int64,  # first element, a multiple of BLOCK
    types.int64,  # one past the last element
    types.CPointer(types.voidptr),  # parameter, gradient, states
    types.CPointer(types.float64),  # the rule's scalars
    types.CPointer(types.float64),  # the segment's own, of which the gradient multiplier is read
    types.CPointer(types.float64),  # where the sums go
)
"""C signature of a terms kernel."""


def terms_loop(rule: Rule, p: str, g: str, features: Features) -> Callable[..., None]:
    """The sums of ``rule.products`` for parameters stored as ``p`` and gradients stored as ``g``, to be compiled."""
    compute = getattr(types, COMPUTE[p])
    stored = [Storage(p, features.half), Storage(g, features.half)]
    access = Access(stored + [Storage(COMPUTE[p])] * len(rule.state), compute)
    pointers_of, ahead, load = access.pointers_of(), access.ahead(range(len(access.storages))), access.load()
    scalars_of = scalars_intrinsic(rule, compute)
    terms = njit(error_model="numpy", forceinline=True)(rule.terms or _none)
    scratch = _Scratch(rule, COMPUTE[p], features.fma)
    new, put, clear, add = scratch.new(), scratch.put(), scratch.clear(), scratch.add()

    def loop(lo: Any, hi: Any, buffers: Any, scalars: Any, own: Any, sums: Any) -> None:
        mode: Any = enter()  # type: ignore[call-arg]
        h = scalars_of(scalars, (1.0, 1.0))
        pointers, multiplier = pointers_of(buffers), compute(own[MULTIPLIER])
        factors = new()
        for start in range(lo, hi, BLOCK):
            stop = min(start + BLOCK, hi)
            for first in range(start, stop, PREFETCHED):
                ahead(pointers, first + AHEAD)
                for i in range(first, min(first + PREFETCHED, stop)):
                    stored = load(pointers, i, compute(1.0), h)
                    put(factors, i - start, stored, terms(*load(pointers, i, multiplier, h)))
            rows = -(-(stop - start) // LANES)
            clear(factors, stop - start, rows * LANES)
            add(factors, rows, sums)
        leave(mode)

    return loop


def _none(*_: Any) -> tuple[()]:
    return ()


class _Scratch:
    """A block of each factor of the products, in the compute dtype, on the stack."""

    def __init__(self, rule: Rule, compute: str, fma: bool) -> None:
        self.sources, self.products = rule.sources, rule.products
        self.compute = Storage(compute).memory
        self.squares = Squares(Storage(compute), fma)

    def _at(self, builder: Any, scratch: Any, source: str | int, i: Any) -> Any:
        first = ir.Constant(I64, BLOCK * self.sources.index(source))
        return builder.gep(builder.bitcast(scratch, self.compute.as_pointer()), [builder.add(first, i)])

    def new(self) -> Any:
        """Intrinsic ``() -> scratch``."""

        @intrinsic
        def new(typingctx: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                room = cgutils.alloca_once(builder, ir.ArrayType(self.compute, BLOCK * len(self.sources)))
                return builder.bitcast(room, context.get_value_type(types.voidptr))

            return types.voidptr(), codegen

        return new

    def put(self) -> Any:
        """Intrinsic ``(scratch, i, (p, g, ...), terms)``: the factors of element i."""

        @intrinsic
        def put(typingctx: Any, scratch: Any, i: Any, stored: Any, terms: Any) -> Any:
            if any(kind != stored[0] for kind in terms):
                raise numba.TypingError(f"the rule's terms return {terms}, not values of {stored[0]}: {PROMOTED}")

            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                for source in self.sources:
                    of, k = (args[3], source) if isinstance(source, int) else (args[2], "pg".index(source))
                    builder.store(builder.extract_value(of, k), self._at(builder, args[0], source, args[1]))
                return context.get_dummy_value()

            return types.void(types.voidptr, types.int64, stored, terms), codegen

        return put

    def clear(self) -> Any:
        """Intrinsic ``(scratch, lo, hi)``: factors of zero."""

        @intrinsic
        def clear(typingctx: Any, scratch: Any, lo: Any, hi: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                with cgutils.for_range(builder, builder.sub(args[2], args[1])) as loop:
                    for source in self.sources:
                        at = self._at(builder, args[0], source, builder.add(args[1], loop.index))
                        builder.store(ir.Constant(self.compute, 0.0), at)
                return context.get_dummy_value()

            return types.void(types.voidptr, types.int64, types.int64), codegen

        return clear

    def add(self) -> Any:
        """Intrinsic ``(scratch, rows, sums)``: add the products of the first rows to the sums."""

        @intrinsic
        def add(typingctx: Any, scratch: Any, rows: Any, sums: Any) -> Any:
            def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
                lanes = cgutils.alloca_once_value(builder, ir.Constant(LANES_TYPE, None))
                row = ir.VectorType(self.compute, LANES).as_pointer()
                for k, product in enumerate(self.products):
                    with cgutils.for_range(builder, args[1]) as loop:
                        first = builder.mul(loop.index, ir.Constant(I64, LANES))
                        places = [builder.bitcast(self._at(builder, args[0], x, first), row) for x in product]
                        factors = [builder.load(place) for place in places]
                        for factor in factors:
                            factor.align = self.compute.get_abi_size(context.target_data)
                        self.squares.add(builder, lanes, *factors)
                    at = builder.gep(args[2], [ir.Constant(I64, k)])
                    builder.store(builder.fadd(builder.load(at), taken(builder, lanes)), at)
                return context.get_dummy_value()

            return types.void(types.voidptr, types.int64, types.CPointer(types.float64)), codegen

        return add
