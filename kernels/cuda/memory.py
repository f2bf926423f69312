"""Places in device memory, whose addresses are integers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

GLOBAL = 1
"""Address space of device memory: said in the pointer's type, a load needs no check of where it points."""


def pointer(builder: Any, address: Any, element: ir.Type) -> Any:
    """The address as a pointer to elements of a type."""
    return builder.inttoptr(address, ir.PointerType(element, GLOBAL))


def at(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    """Where the element of an index is, counted from an address."""
    return builder.gep(pointer(builder, address, element), [index])
