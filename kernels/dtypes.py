"""Storage dtypes, what they are computed in, and the names of compiled kernels."""

from __future__ import annotations

from typing import Any

COMPUTE = {"float32": "float32", "float64": "float64", "float16": "float32", "bfloat16": "float32"}
"""Storage dtype to compute dtype; states are stored in the compute dtype of their parameter."""

CODES = {dtype: code for code, dtype in enumerate(COMPUTE)}
"""Numbers of the storage dtypes in tables on a GPU."""

ITEMSIZE = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
"""Bytes of one element."""

COPIES = ("float16", "bfloat16")
"""Storage dtypes that a step may round float32 parameters to, in the pass that writes them."""

PAIRS = (*((dtype, dtype) for dtype in COMPUTE), *(("float32", dtype) for dtype in COPIES))
"""(parameter, gradient) storage for which kernels are compiled ahead of time: equal ones, and gradients of 16 bits for
float32 parameters, which may have such copies."""


def symbol(kind: str, *of: Any) -> str:
    """Name of a kernel in the compiled library: its kind, what it is of, its instruction set.

    Rules that differ in their scalars alone share their kernels, which are named after the function.
    """
    names = (x if isinstance(x, str) else x.step.__name__ for x in of)
    return "_".join(("fastopt", kind, *names)).replace("-", "_")


def cuda_symbol(kind: str, rule: str, *dtypes: str) -> str:
    """Name of a kernel for CUDA, and of the file that holds its PTX: "update" or "terms" of a rule for parameters and
    gradients stored as ``dtypes``, or "prologue" with what is particular to a rule."""
    return symbol("cuda" if kind == "update" else f"cuda_{kind}", rule, *dtypes)
