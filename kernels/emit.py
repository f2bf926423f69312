"""Functions that kernels call and that emit their LLVM IR themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from numba.core.extending import intrinsic


def emitted(signature: Any, intrinsic: Any = intrinsic) -> Callable[[Callable[..., Any]], Any]:
    """Decorates ``(context, builder, *values) -> value or None``, which emits the code of a call.

    Args:
        signature: Numba's signature, or a function that returns it for the types of the arguments.
        intrinsic: Numba's decorator, for the CPU, or of its CUDA package.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        def codegen(context: Any, builder: Any, _: Any, values: Any) -> Any:
            result = emit(context, builder, *values)
            return context.get_dummy_value() if result is None else result

        def definition(typingctx: Any, *types: Any) -> Any:
            return signature(*types) if inspect.isroutine(signature) else signature, codegen

        names = ("typingctx", *list(inspect.signature(emit).parameters)[2:])
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        definition.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return intrinsic(definition)

    return decorate
