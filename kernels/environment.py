"""The floating-point environment of kernels: IEEE's default, whatever the process has set.

A process may flush subnormals to zero or round otherwise, in one thread and not in another: OpenMP's threads keep the
mode that was set when they were started. So every kernel looks at the mode when it is entered, sets the default
where it is another (round to nearest, keep subnormals, raise no exceptions), and puts back what it saw.

LLVM moves floating-point operations as if no mode existed. They stay between ``enter`` and ``leave`` because their
operands are loaded, and their results stored, in between: setting the mode counts as access to all memory.
Kernels take and leave no floating-point number in a register.
"""

from __future__ import annotations

import platform
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .emit import emitted
from .storage import I32, I64

llvm.initialize_native_asmparser()  # which Numba does not need

X86 = platform.machine() in ("x86_64", "AMD64")
ARM = platform.machine() in ("aarch64", "arm64")
WORD, MODE = (I64, types.uint64) if ARM else (I32, types.uint32)
DEFAULT, CONTROL = (0, 0xFFFF_FFFF) if ARM else (0x1F80, 0xFFFF_FFC0)  # the low bits of MXCSR are the exceptions so far


def _assembly(builder: Any, text: str, constraints: str, result: ir.Type, *operands: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), operands)


def _get(builder: Any) -> ir.Value:
    if ARM:
        return _assembly(builder, "mrs $0, fpcr", "=r,~{memory}", WORD)
    if X86:
        place = cgutils.alloca_once(builder, WORD)
        _assembly(builder, "stmxcsr ($0)", "r,~{memory}", ir.VoidType(), place)
        return builder.load(place)
    return ir.Constant(WORD, DEFAULT)


def _set(builder: Any, mode: ir.Value) -> None:
    if ARM:
        _assembly(builder, "msr fpcr, $0", "r,~{memory}", ir.VoidType(), mode)
    elif X86:
        place = cgutils.alloca_once_value(builder, mode)
        _assembly(builder, "ldmxcsr ($0)", "r,~{memory}", ir.VoidType(), place)


def _is_other(builder: Any, mode: ir.Value) -> ir.Value:
    return builder.icmp_unsigned("!=", builder.and_(mode, ir.Constant(WORD, CONTROL)), ir.Constant(WORD, DEFAULT))


@emitted(MODE())
def enter(context: Any, builder: Any) -> Any:
    """Set the default environment; the mode that was set before."""
    mode = _get(builder)
    with builder.if_then(_is_other(builder, mode), likely=False):
        _set(builder, ir.Constant(WORD, DEFAULT))
    return mode


@emitted(types.void(MODE))
def leave(context: Any, builder: Any, mode: Any) -> None:
    """Put back the mode that ``enter`` returned."""
    with builder.if_then(_is_other(builder, mode), likely=False):
        _set(builder, mode)
