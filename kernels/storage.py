"""How one element of each storage dtype becomes a number of the compute dtype and back, as LLVM IR.

Every function works on scalars and on vectors alike. float16 uses the processor's conversions, or integer arithmetic
where it has none (x86-64-v2), where LLVM would call a library function for every element; the bits are the same.
Rounding is to nearest even; NaN stays NaN (its payload is not kept).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llvmlite import ir

LINE = 64
"""Bytes of a cache line."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()


def prefetch(builder: Any, pointer: ir.Value, *, level: int, write: bool = False) -> None:
    """Ask for the cache line at ``pointer``, to be written or read: level 3 is the first-level cache, 2 the second."""
    address = builder.bitcast(pointer, I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [address.type, I32, I32, I32])
    function = builder.module.declare_intrinsic("llvm.prefetch", (address.type,), kind)
    builder.call(function, [address, *(ir.Constant(I32, x) for x in (int(write), level, 1))])


def _like(scalar: ir.Type, value: ir.Value) -> ir.Type:
    """``scalar`` with the shape of ``value``."""
    return ir.VectorType(scalar, value.type.count) if isinstance(value.type, ir.VectorType) else scalar


def _constant(scalar: ir.Type, number: float, value: ir.Value) -> ir.Constant:
    """A number with the shape of ``value``."""
    kind = _like(scalar, value)
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


@dataclass(frozen=True)
class Storage:
    """Loads and stores of one storage dtype, on a processor with or without float16 conversions."""

    dtype: str
    half: bool = True

    @property
    def memory(self) -> ir.Type:
        """Type of an element in memory."""
        return {"float32": FLOAT, "float64": DOUBLE}.get(self.dtype, I16)

    def decode(self, builder: Any, x: ir.Value) -> ir.Value:
        """The number that the memory element ``x`` stands for; exact."""
        if self.dtype == "bfloat16":
            bits = builder.shl(builder.zext(x, _like(I32, x)), _constant(I32, 16, x))
            return builder.bitcast(bits, _like(FLOAT, x))
        if self.dtype == "float16":
            if self.half:
                return builder.fpext(builder.bitcast(x, _like(HALF, x)), _like(FLOAT, x))
            return _half_to_float(builder, x)
        return x

    def encode(self, builder: Any, x: ir.Value) -> ir.Value:
        """The memory element nearest to the number ``x``."""
        if self.dtype == "bfloat16":
            return _float_to_bfloat(builder, x)
        if self.dtype == "float16":
            if self.half:
                return builder.bitcast(builder.fptrunc(x, _like(HALF, x)), _like(I16, x))
            return _float_to_half(builder, x)
        return x


def _float_to_bfloat(builder: Any, x: ir.Value) -> ir.Value:
    """Add half of the last place kept, less one where the kept part is even, and cut."""
    sixteen = _constant(I32, 16, x)
    bits = builder.bitcast(x, _like(I32, x))
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(I32, 1, x))
    rounded = builder.add(builder.add(bits, _constant(I32, 0x7FFF, x)), odd)
    # The sum would carry a NaN over into infinity or zero.
    kept = builder.select(builder.fcmp_unordered("uno", x, x), _constant(I32, 0x7FC0_0000, x), rounded)
    return builder.trunc(builder.lshr(kept, sixteen), _like(I16, x))


def _half_to_float(builder: Any, x: ir.Value) -> ir.Value:
    """Put exponent and fraction in place and let one exact multiplication correct the bias, subnormals included."""
    wide = builder.zext(x, _like(I32, x))
    sign = builder.shl(builder.and_(wide, _constant(I32, 0x8000, x)), _constant(I32, 16, x))
    magnitude = builder.shl(builder.and_(wide, _constant(I32, 0x7FFF, x)), _constant(I32, 13, x))
    scaled = builder.fmul(builder.bitcast(magnitude, _like(FLOAT, x)), _constant(FLOAT, 2.0**112, x))
    special = builder.or_(magnitude, _constant(I32, 0x7F80_0000, x))  # infinity and NaN
    is_special = builder.icmp_unsigned(">=", magnitude, _constant(I32, 0x7C00 << 13, x))
    bits = builder.select(is_special, special, builder.bitcast(scaled, _like(I32, x)))
    return builder.bitcast(builder.or_(bits, sign), _like(FLOAT, x))


def _float_to_half(builder: Any, x: ir.Value) -> ir.Value:
    bits = builder.bitcast(x, _like(I32, x))
    sign = builder.and_(builder.lshr(bits, _constant(I32, 16, x)), _constant(I32, 0x8000, x))
    magnitude = builder.and_(bits, _constant(I32, 0x7FFF_FFFF, x))
    # Normal: change the bias, add half of the last place kept (less one where the kept part is even), cut.
    odd = builder.and_(builder.lshr(magnitude, _constant(I32, 13, x)), _constant(I32, 1, x))
    rebias = _constant(I32, (((15 - 127) << 23) + 0xFFF) % 2**32, x)
    normal = builder.lshr(builder.add(builder.add(magnitude, rebias), odd), _constant(I32, 13, x))
    # Subnormal: the last place of 0.5 is the last place of a subnormal half, so adding 0.5 rounds.
    half = 0.5
    shifted = builder.fadd(builder.bitcast(magnitude, _like(FLOAT, x)), _constant(FLOAT, half, x))
    subnormal = builder.sub(builder.bitcast(shifted, _like(I32, x)), _constant(I32, 0x3F00_0000, x))
    is_subnormal = builder.icmp_unsigned("<", magnitude, _constant(I32, 0x3880_0000, x))  # below 2^-14
    finite = builder.select(is_subnormal, subnormal, normal)
    is_nan = builder.icmp_unsigned(">", magnitude, _constant(I32, 0x7F80_0000, x))
    special = builder.select(is_nan, _constant(I32, 0x7E00, x), _constant(I32, 0x7C00, x))
    is_special = builder.icmp_unsigned(">=", magnitude, _constant(I32, 0x4780_0000, x))  # from 65536 on
    return builder.trunc(builder.or_(builder.select(is_special, special, finite), sign), _like(I16, x))
