"""A user's ``scalars``, which returns a dict, in a form that Numba compiles."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

MADE = "made_scalars"


def compilable(scalars: Any, Scalars: Any, given: Mapping[str, Any]) -> Any:
    """``scalars`` with its dicts made into ``Scalars``, the other fields from the options; None where that cannot be.

    It is made of the source, where that is a ``def`` whose every return is a dict display with the names of ``given``.
    """
    code = scalars.__code__
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(scalars))).body[0]
    except (OSError, SyntaxError, TypeError):
        return None
    if not isinstance(definition, ast.FunctionDef) or len(definition.args.args) < 2:
        return None
    definition.decorator_list, definition.returns = [], None
    for argument in definition.args.args:
        argument.annotation = None
    seen = _code(definition, code.co_freevars)
    if (seen.co_code, seen.co_names, seen.co_consts) != (code.co_code, code.co_names, code.co_consts):
        return None  # the file is not what was imported
    options = definition.args.args[1].arg
    for node in list(ast.walk(definition)):
        if isinstance(node, ast.Name) and node.id == options and isinstance(node.ctx, ast.Store):
            return None
        if isinstance(node, ast.Return):
            value = node.value
            pair = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == 2 else None
            entries = _entries(pair[0] if pair else value)
            if entries.keys() != given.keys():
                return None
            fields = [
                entries.get(name) or ast.parse("1.0" if name == "ratio" else f"{options}[{name!r}]", mode="eval").body
                for name in Scalars._fields
            ]
            made = ast.Call(ast.Name(MADE, ast.Load()), fields, [])
            node.value = ast.Tuple([made, pair[1]], ast.Load()) if pair else made
    code = _code(definition, (*code.co_freevars, MADE))
    cells = dict(zip(scalars.__code__.co_freevars, scalars.__closure__ or (), strict=True)) | {MADE: CellType(Scalars)}
    closure = tuple(cells[name] for name in code.co_freevars)
    return FunctionType(code, scalars.__globals__, scalars.__name__, scalars.__defaults__, closure)


def _entries(node: Any) -> dict[str, ast.expr]:
    """The entries of a dict display by their names; of other things none."""
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {key.value: value for key, value in zip(node.keys, node.values, strict=True)}  # type: ignore[union-attr]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): keyword.value for keyword in node.keywords}
    return {}


def _code(definition: ast.FunctionDef, free: Sequence[str]) -> CodeType:
    """The code of a function with these free variables."""
    module = ast.parse(f"def around({', '.join(free)}): pass")
    module.body[0].body = [definition]  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(module), "<scalars>", "exec", dont_inherit=True)
    for _ in range(2):
        code = next(x for x in code.co_consts if isinstance(x, CodeType))
    return code
