"""Words of memory whose addresses are integers, and calls of kernels at such addresses."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from ..emit import emitted
from ..storage import DOUBLE, I8, I64

_ADDRESS = types.int64


def _at(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


@emitted(types.int64(_ADDRESS, types.int64))
def word(context: Any, builder: Any, address: Any, index: Any) -> Any:
    """The integer or address at a place, counted in words."""
    return builder.load(_at(builder, address, index, I64))


@emitted(types.void(_ADDRESS, types.int64, types.int64))
def put_word(context: Any, builder: Any, address: Any, index: Any, number: Any) -> None:
    """Store it."""
    builder.store(number, _at(builder, address, index, I64))


@emitted(types.float64(_ADDRESS, types.int64))
def real(context: Any, builder: Any, address: Any, index: Any) -> Any:
    """The float64 at a place."""
    return builder.load(_at(builder, address, index, DOUBLE))


@emitted(types.void(_ADDRESS, types.int64, types.float64))
def put_real(context: Any, builder: Any, address: Any, index: Any, number: Any) -> None:
    """Store it."""
    builder.store(number, _at(builder, address, index, DOUBLE))


@emitted(types.int64(_ADDRESS, types.int64, types.int64))
def count_up(context: Any, builder: Any, address: Any, index: Any, number: Any) -> Any:
    """Add to an integer, as one of several threads; what it was before."""
    return builder.atomic_rmw("add", _at(builder, address, index, I64), number, "monotonic")


@emitted(types.void(_ADDRESS, types.int64))
def clear(context: Any, builder: Any, address: Any, nbytes: Any) -> None:
    """Make bytes zero."""
    cgutils.memset(builder, builder.inttoptr(address, I8.as_pointer()), nbytes, 0)


def _of_call(address: Any, arguments: Any) -> Any:
    return types.void(_ADDRESS, arguments)


@emitted(_of_call)
def call(context: Any, builder: Any, address: Any, arguments: Any) -> None:
    """Call the function at an address with a tuple of integers: in a register they are what addresses are, too."""
    values = cgutils.unpack_tuple(builder, arguments)
    kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
    builder.call(builder.inttoptr(address, kind.as_pointer()), values)
