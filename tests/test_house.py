"""The order of the house: how large the tests may grow, how tests are named, and what the README begins with."""

import ast
import collections
import functools
import importlib
import io
import pathlib
import re
import sys
import tokenize

import numpy as np
import pytest

import fastopt

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(ROOT.glob("tests/**/*.py"))
MOST_LINES = 13_100
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(text):
    """Lines with at least one token that is neither a comment nor part of a docstring."""
    docs = set()
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", None)
        for each in body if isinstance(body, list) else ():
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                docs.update(range(each.lineno, (each.end_lineno or each.lineno) + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def test_lines_of_code_are_counted_without_comments_and_docstrings():
    assert code_lines('"""Doc,\nmore."""\n\n# a comment\nx = """a\nb"""  # another\n\n\ndef f():\n    "doc"\n') == 3


def test_tests_do_not_outgrow_what_they_test():
    assert sum(code_lines(file.read_text()) for file in FILES) <= MOST_LINES


def test_no_test_hides_another_and_none_is_written_twice_in_a_folder():
    names = collections.Counter(
        (file.parent, node.name)
        for file in FILES
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    )
    assert [f"{folder.name}: {name}" for (folder, name), count in names.items() if count > 1] == []


def test_the_readme_has_two_commands():
    commands = [x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith("python3 -m venv .venv")]
    assert len(commands) == 2
    assert "pytest" not in commands[0]
    assert commands[1].endswith("pytest -n auto")


def test_attributes_are_born_in_constructors():
    """Of each class of the library, or of one that it derives from; annotations in the class and setters count, too."""
    classes = {}
    for file in (*ROOT.glob("fastopt/**/*.py"), *ROOT.glob("kernels/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases], *born_and_set(node)
    for name, (bases, born, later) in classes.items():
        seen = {*born}
        for base in (waiting := [*bases]):  # which grows
            seen |= classes[base][1] if base in classes else set()
            waiting += [b for b in classes.get(base, [()])[0] if b not in waiting]
        assert later <= seen, (name, later - seen)


def born_and_set(node):
    fields = [x for s in node.body if isinstance(s, ast.Assign | ast.AnnAssign) for x in ast.walk(s)]
    born = {x.id for x in fields if isinstance(x, ast.Name)}
    born |= {x.value for x in fields if isinstance(x, ast.Constant) and isinstance(x.value, str)}  # __slots__
    later = set()
    for method in (m for m in node.body if isinstance(m, ast.FunctionDef)):
        stored = [a for a in ast.walk(method) if isinstance(a, ast.Attribute) and isinstance(a.ctx, ast.Store)]
        owned = {a.attr for a in stored if ast.unparse(a.value) == "self"}
        (born if method.name == "__init__" else later).update(owned)
        born |= {method.name} if method.decorator_list else set()
    return born, later


def imported(file, lazily=False):
    """What a file of the library imports when it is imported (``lazily``: or later), by dotted name."""
    package = ["fastopt"] * (file.relative_to(ROOT).parts[0] == "kernels") + [*file.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(file.read_text())
    types = [x for x in ast.walk(tree) if isinstance(x, ast.If) and ast.unparse(x.test) == "TYPE_CHECKING"]
    types = {node for each in types for node in ast.walk(each)}
    for node in ast.walk(tree) if lazily else tree.body:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node not in types:
            start = ".".join([*package[: len(package) - node.level + 1]] if node.level else [])
            stem = ".".join(filter(None, [start, node.module]))
            yield from (f"{stem}.{name.name}" for name in node.names)


MODULES = {
    ".".join(
        ["fastopt"] * (f.relative_to(ROOT).parts[0] == "kernels") + [*f.relative_to(ROOT).with_suffix("").parts]
    ).removesuffix(".__init__"): f
    for f in (*ROOT.glob("fastopt/**/*.py"), *ROOT.glob("kernels/**/*.py"))
}


@pytest.mark.parametrize(
    ("where", "allowed"),
    [
        (r"fastopt\.kernels\.", r"fastopt\.kernels|(?!fastopt)"),
        (
            r"fastopt\.kernels\.rules\.(?!rule$|__init__)",
            r"__future__|collections\.abc|math|typing|fastopt\.kernels\.rules\.rule",
        ),
        (r"fastopt\.engine\.", r"fastopt\.(engine|kernels|files)\b|(?!fastopt|torch|cupy)"),
    ],
    ids=[
        "kernels import nothing of the API",
        "a rule imports the record and numbers",
        "the engine is below front ends",
    ],
)
def test_rooms_import_only_what_is_below_them(where, allowed):
    wrong = {m: n for m, f in MODULES.items() if re.match(where, m) for n in imported(f) if not re.match(allowed, n)}
    assert not wrong


def layers(lazily=False):
    """The modules of the library in layers, each of which imports only what is below."""
    needs = {
        m: {each if each in MODULES else each.rpartition(".")[0] for each in imported(f, lazily)} & MODULES.keys() - {m}
        for m, f in MODULES.items()
        if not m.startswith("fastopt.kernels")
    }
    while needs:
        lowest = {module for module, below in needs.items() if not below & needs.keys()}
        assert lowest, f"a circle among {sorted(needs)}"
        needs = {module: below for module, below in needs.items() if module not in lowest}
        yield lowest


def test_imports_have_few_layers():
    assert len(list(layers())) <= 7


def test_imports_have_no_circle_not_even_a_lazy_one():
    assert list(layers(lazily=True))


def test_files_can_be_read_in_one_go():
    files = [*FILES, *MODULES.values()]
    assert not [file.name for file in files if len(file.read_text().splitlines()) > 400]


def test_stubs_say_what_constructors_take():
    pytest.importorskip("torch")
    import stubs

    for path, text in stubs.stubs().items():
        assert path.read_text() == text, f"write {path} anew: python tests/support/stubs.py"


@pytest.mark.parametrize(
    ("front", "most"), [("numpy", 6), ("torch", 8), pytest.param("gpu", 9, marks=pytest.mark.full)]
)
def test_a_steady_step_passes_through_few_files(front, most, request):
    if front == "torch":
        torch = pytest.importorskip("torch")
        w = torch.nn.Parameter(torch.ones(64))
        w.grad = torch.ones(64)
        step = importlib.import_module("fastopt.torch").AdamW([w]).step
    else:
        put = request.getfixturevalue("stand_in").put if front == "gpu" else np.asarray
        w, g = ({"w": put(np.ones(64, np.float32))} for _ in range(2))
        step = functools.partial(fastopt.AdamW(w).step, g)
    for _ in range(20):
        step()
    passed = set()
    sys.setprofile(lambda frame, event, arg: event == "call" and passed.add(frame.f_code.co_filename))
    step()
    sys.setprofile(None)
    parts = [{*pathlib.Path(f).parts, f} for f in passed]
    simulated = {"kernels", "cuda"}  # which a GPU runs
    library = [x for x in parts if x & {"fastopt", "kernels"} and "support" not in x and not simulated <= x]
    assert 3 < len(library) <= most, library
