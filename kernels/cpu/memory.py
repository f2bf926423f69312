"""Words of memory whose addresses are integers, and calls of kernels at such addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..emit import emitted
from ..storage import DOUBLE, I8, I64, LINE

_ADDRESS = types.int64


def at(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    """Where the element of an index is, counted from an address."""
    index = ir.Constant(I64, index) if isinstance(index, int) else index
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


def _accessors(element: ir.Type, kind: Any) -> tuple[Any, Any]:
    @emitted(kind(_ADDRESS, types.int64))
    def load(context: Any, builder: Any, address: Any, index: Any) -> Any:
        return builder.load(at(builder, address, index, element))

    @emitted(types.void(_ADDRESS, types.int64, kind))
    def store(context: Any, builder: Any, address: Any, index: Any, number: Any) -> None:
        builder.store(number, at(builder, address, index, element))

    return load, store


word, put_word = _accessors(I64, types.int64)
real, put_real = _accessors(DOUBLE, types.float64)


@emitted(types.int64(_ADDRESS, types.int64, types.int64))
def count_up(context: Any, builder: Any, address: Any, index: Any, number: Any) -> Any:
    """Add to an integer, as one of several threads; what it was before."""
    return builder.atomic_rmw("add", at(builder, address, index, I64), number, "monotonic")


@emitted(types.void(_ADDRESS, types.int64))
def clear(context: Any, builder: Any, address: Any, nbytes: Any) -> None:
    """Make bytes zero."""
    cgutils.memset(builder, builder.inttoptr(address, I8.as_pointer()), nbytes, 0)


def stack(nbytes: int) -> Any:
    """Intrinsic ``() -> address``: bytes that last until the kernel returns."""

    @emitted(_ADDRESS())
    def new(context: Any, builder: Any) -> Any:
        with builder.goto_entry_block():  # alloca_once would store a zero in each element: half of the build's time
            place = builder.alloca(ir.ArrayType(I8, nbytes))
            place.align = LINE
            return builder.ptrtoint(place, I64)

    return new


@emitted(lambda address, arguments: types.void(_ADDRESS, arguments))
def call(context: Any, builder: Any, address: Any, arguments: Any) -> None:
    """Call the function at an address with a tuple of integers: in a register they are what addresses are, too."""
    values = cgutils.unpack_tuple(builder, arguments)
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(builder.inttoptr(address, kind.as_pointer()), values)
