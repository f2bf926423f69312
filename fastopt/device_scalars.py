"""A user's ``scalars``, which returns a dict, in a form that Numba compiles."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping, Sequence
from types import CellType, CodeType, FunctionType
from typing import Any

MADE = "made_scalars"


def compilable(scalars: Any, Scalars: Any, given: Mapping[str, Any]) -> Any:
    """``scalars`` with its dicts made into ``Scalars``, whose other fields are options; None where that cannot be.

    It is made of the source, where every return is a dict display with the names of ``given``.
    """
    code = scalars.__code__
    definition = _definition(scalars)
    if definition is None or len(definition.args.args) < 2 or scalars.__kwdefaults__ or not _ends(definition.body):
        return None
    options = definition.args.args[1].arg
    for node in list(ast.walk(definition)):
        if isinstance(node, ast.Name) and node.id == options and isinstance(node.ctx, ast.Store):
            return None
        if isinstance(node, ast.Return):
            pair = node.value.elts if isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2 else None
            entries = _entries(pair[0] if pair else node.value)
            if entries.keys() != given.keys():
                return None
            texts = {name: "1.0" if name == "ratio" else f"{options}[{name!r}]" for name in Scalars._fields}
            fields = [entries.get(name) or ast.parse(text, mode="eval").body for name, text in texts.items()]
            made = ast.Call(ast.Name(MADE, ast.Load()), fields, [])
            node.value = ast.Tuple([made, pair[1]], ast.Load()) if pair else made
    changed = _code(definition, (*code.co_freevars, MADE), code.co_filename)
    cells = dict(zip(code.co_freevars, scalars.__closure__ or (), strict=True)) | {MADE: CellType(Scalars)}
    closure = tuple(cells[name] for name in changed.co_freevars)
    return FunctionType(changed, scalars.__globals__, scalars.__name__, scalars.__defaults__, closure)


def _definition(function: Any) -> Any:
    """The definition of a function, or of a lambda as one, if its source is there and is what was compiled."""
    code = function.__code__
    try:
        tree = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, SyntaxError, TypeError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            for argument in node.args.args:
                argument.annotation = None
            definition: Any = ast.parse("def scalars(): pass").body[0]
            definition.args = node.args
            definition.body = [ast.Return(node.body)] if isinstance(node, ast.Lambda) else node.body
            first = min(x.lineno for x in (node, *getattr(node, "decorator_list", ())))
            if first == code.co_firstlineno:
                seen = _code(definition, code.co_freevars, code.co_filename)
                if (seen.co_code, seen.co_names, seen.co_consts) == (code.co_code, code.co_names, code.co_consts):
                    return definition
    return None


def _ends(body: list[ast.stmt]) -> bool:
    """Whether statements end with a return whatever happens."""
    last = body[-1]
    if isinstance(last, ast.If):
        return bool(last.orelse) and _ends(last.body) and _ends(last.orelse)
    return isinstance(last, (ast.Return, ast.Raise))


def _entries(node: Any) -> dict[str, ast.expr]:
    """The entries of a dict display by their names; of other things none."""
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {key.value: value for key, value in zip(node.keys, node.values, strict=True)}  # type: ignore[union-attr]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): keyword.value for keyword in node.keywords}
    return {}


def _code(definition: Any, free: Sequence[str], file: str) -> CodeType:
    """The code of a function with these free variables."""
    module = ast.parse(f"def around({', '.join(free)}): pass")
    module.body[0].body = [definition]  # type: ignore[attr-defined]
    code = compile(ast.fix_missing_locations(module), file, "exec", dont_inherit=True)
    for _ in range(2):
        code = next(x for x in code.co_consts if isinstance(x, CodeType))
    return code
