"""The examples of README.md, the user guide and the page on torch run, and print what stands beside them."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/torch.md"])
def test_the_examples_of_a_page_print_what_they_say(page, tmp_path, monkeypatch):
    for package in ("torch", "safetensors", "numba"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 2
    names = {"__name__": "page"}
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, page, "exec"), names)
        assert printed.getvalue().splitlines() == re.findall(r"^print\(.*\)  # (.*)$", block, re.MULTILINE)


def test_two_commands_of_the_readme_do_all_set_up():
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if line.startswith("python3 -m venv .venv")]
    last = [line.rpartition(" && .venv/bin/python -m ")[2] for line in commands]
    assert last == ["bench train --optimizer all", "pytest -n auto"]
    assert all(" && echo " in line and " install -e '.[" in line for line in commands)


def test_no_cell_of_the_pages_says_that_nothing_was_measured():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not [line for line in page.read_text().splitlines() if line.startswith("|") and "not measured" in line]
