"""Places in device memory, whose addresses are integers."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from ..layout import HEADER_WORDS, NUMBERS, SEGMENT_WORDS, WORD
from ..storage import I64
from .toolchain import device_function

GLOBAL = 1
"""Address space of device memory: said in the pointer's type, a load needs no check of where it points."""


def at(builder: Any, address: Any, index: Any, element: ir.Type) -> Any:
    """Where the element of an index, a value or an int, is, counted from an address."""
    index = ir.Constant(I64, index) if isinstance(index, int) else index
    return builder.gep(builder.inttoptr(address, ir.PointerType(element, GLOBAL)), [index])


@device_function
def segment_at(segments: Any, s: Any) -> Any:
    """Where the words of a segment begin."""
    return segments + WORD * SEGMENT_WORDS * s


@device_function
def scalars_at(numbers: Any, c: Any) -> Any:
    """Where the numbers of a scalar group begin."""
    return numbers + WORD * (HEADER_WORDS + NUMBERS * c)
