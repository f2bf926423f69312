"""What the host computes in float64, compiled for a GPU that counts the steps itself: scalars and ratios."""

from __future__ import annotations

from typing import Any

from numba.core import cgutils

from ..layout import CARRY
from ..reductions import scaled
from ..rules.rule import Rule
from ..storage import DOUBLE
from .memory import at
from .toolchain import emitted, types


def _numbers(builder: Any, address: Any, first: int, count: int) -> list[Any]:
    return [builder.load(at(builder, address, first + k, DOUBLE)) for k in range(count)]


def _put(builder: Any, address: Any, first: int, numbers: Any) -> None:
    for k, number in enumerate(cgutils.unpack_tuple(builder, numbers)):
        builder.store(number, at(builder, address, first + k, DOUBLE))


def named(number: Any, kind: Any) -> Any:
    """Numba's type of a NamedTuple of such numbers."""
    return types.NamedUniTuple(number, len(kind._fields), kind)


def scalars_former(rule: Rule) -> Any:
    """Intrinsic ``(t, scalar_group, options, scalars)``: form the scalars of step t from options.

    The rule's own host function is compiled for the device. It finds its options in a dict there, too.
    """
    kinds = [types.float64 if n == 1 else types.UniTuple(types.float64, n) for n in rule.counts.values()]
    options_type = types.LiteralStrKeyDict(
        {types.literal(name): kind for name, kind in zip(rule.counts, kinds, strict=True)},
        {name: k for k, name in enumerate(rule.counts)},
    )
    result, Carry = named(types.float64, rule.Scalars), rule.Carry

    @emitted(types.void(*[types.int64] * 4))
    def form(context: Any, builder: Any, t: Any, scalar_group: Any, options: Any, scalars: Any) -> None:
        t = builder.sitofp(t, DOUBLE)  # an integer power would be a loop of multiplications, and less exact
        values, place = [], 0
        for n in rule.counts.values():
            numbers = _numbers(builder, options, place, n)
            values.append(numbers[0] if n == 1 else cgutils.pack_array(builder, numbers))
            place += n
        options = context.make_tuple(builder, options_type, values)
        if Carry is None:
            kind = result(types.float64, options_type)
            formed = context.compile_internal(builder, rule.scalars, kind, [t, options])
        else:
            carry = cgutils.pack_array(builder, _numbers(builder, scalar_group, CARRY, len(Carry._fields)))
            carried = named(types.float64, Carry)
            kind = types.Tuple([result, carried])(types.float64, options_type, carried)
            both = context.compile_internal(builder, rule.scalars, kind, [t, options, carry])
            formed, carry = cgutils.unpack_tuple(builder, both)
            _put(builder, scalar_group, CARRY, carry)
        _put(builder, scalars, 0, formed)

    return form


def ratio_caller(rule: Rule) -> Any:
    """Intrinsic ``(sums of the products, multiplier, scalars) -> ratio``; of sums and scalars the addresses."""
    h_type, sums_type = named(types.float64, rule.Scalars), types.UniTuple(types.float64, len(rule.products))

    @emitted(types.float64(types.int64, types.float64, types.int64))
    def call(context: Any, builder: Any, sums: Any, multiplier: Any, scalars: Any) -> Any:
        h = cgutils.pack_array(builder, _numbers(builder, scalars, 0, h_type.count))
        stored = _numbers(builder, sums, 0, sums_type.count)
        of_products = cgutils.pack_array(builder, scaled(context, builder, stored, rule.products, multiplier))
        return context.compile_internal(builder, rule.ratio, types.float64(sums_type, h_type), [of_products, h])

    return call
