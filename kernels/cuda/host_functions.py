"""What the host computes in float64, compiled for a GPU that counts the steps itself: scalars and ratios."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from ..layout import CARRY
from ..reductions import scaled
from ..rules.rule import Rule
from ..storage import DOUBLE, FLOAT, I64
from .memory import at
from .toolchain import intrinsic, types


def scalars_former(rule: Rule) -> Any:
    """Intrinsic ``(t, scalar_group, options, scalars64, scalars32)``: form the scalars of step t from options.

    The rule's own host function is compiled for the device. It finds its options in a dict there, too.
    """
    Scalars: Any = rule.Scalars
    result = types.NamedUniTuple(types.float64, len(Scalars._fields), Scalars)
    names = list(rule.counts)
    kinds = {
        types.literal(name): types.float64 if n == 1 else types.UniTuple(types.float64, n)
        for name, n in rule.counts.items()
    }
    options_type = types.LiteralStrKeyDict(kinds, {name: k for k, name in enumerate(names)})
    Carry = rule.Carry

    @intrinsic
    def form(typingctx: Any, t: Any, scalar_group: Any, options: Any, scalars64: Any, scalars32: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            t, scalar_group, row, scalars64, scalars32 = args
            t = builder.sitofp(t, DOUBLE)  # an integer power would be a loop of multiplications, and less exact

            def number(base: Any, k: int) -> Any:
                return builder.load(at(builder, base, ir.Constant(I64, k), DOUBLE))

            values, place = [], 0
            for name in names:
                numbers = [number(row, place + j) for j in range(rule.counts[name])]
                place += len(numbers)
                kind = kinds[types.literal(name)]
                values.append(numbers[0] if len(numbers) == 1 else context.make_tuple(builder, kind, numbers))
            options = context.make_tuple(builder, options_type, values)
            if Carry is None:
                kind = result(types.float64, options_type)
                formed = context.compile_internal(builder, rule.scalars, kind, [t, options])
            else:
                count = len(Carry._fields)
                carry_type = types.NamedUniTuple(types.float64, count, Carry)
                carry = context.make_tuple(builder, carry_type, [number(scalar_group, CARRY + k) for k in range(count)])
                kind = types.Tuple([result, carry_type])(types.float64, options_type, carry_type)
                both = context.compile_internal(builder, rule.scalars, kind, [t, options, carry])
                formed, carry = builder.extract_value(both, 0), builder.extract_value(both, 1)
                for k in range(count):
                    place = at(builder, scalar_group, ir.Constant(I64, CARRY + k), DOUBLE)
                    builder.store(builder.extract_value(carry, k), place)
            for k, value in enumerate(cgutils.unpack_tuple(builder, formed, result.count)):
                index = ir.Constant(I64, k)
                builder.store(value, at(builder, scalars64, index, DOUBLE))
                builder.store(builder.fptrunc(value, FLOAT), at(builder, scalars32, index, FLOAT))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return form


def ratio_caller(rule: Rule) -> Any:
    """Intrinsic ``(sums, multiplier, scalars64) -> ratio``; 1 for rules without a ratio."""
    Scalars: Any = rule.Scalars
    h_type = types.NamedUniTuple(types.float64, len(Scalars._fields), Scalars)

    @intrinsic
    def call(typingctx: Any, sums: Any, multiplier: Any, scalars: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            if rule.ratio is None:
                return ir.Constant(DOUBLE, 1.0)
            numbers = [builder.load(at(builder, args[2], ir.Constant(I64, k), DOUBLE)) for k in range(h_type.count)]
            h = context.make_tuple(builder, h_type, numbers)
            stored = [builder.extract_value(args[0], place) for place in rule.places]
            values = scaled(context, builder, stored, rule.products, args[1])
            sums_type = types.UniTuple(types.float64, len(values))
            of_products = context.make_tuple(builder, sums_type, values)
            return context.compile_internal(builder, rule.ratio, types.float64(sums_type, h_type), [of_products, h])

        return types.float64(sums, types.float64, types.int64), codegen

    return call
