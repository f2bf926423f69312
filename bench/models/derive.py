"""Writes the files of shapes from published configurations: ``python -m bench.models.derive``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import language, vision
from .layers import Model

MODELS = vision.MODELS | language.MODELS


def text(model: Model) -> str:
    """What stands in a model's file."""
    shapes = model.architecture(**model.config)
    parameters = sum(map(math.prod, shapes.values()))
    fields = {
        "source": json.dumps(model.source),
        "config": _lines(model.config),
        "parameters": str(parameters),
        "shapes": _lines(shapes),
    }
    return "{\n" + ",\n".join(f'  "{name}": {value}' for name, value in fields.items()) + "\n}\n"


def _lines(values: Mapping[str, Any]) -> str:
    """An object with a line for each of its members, which json.dumps(indent=...) would tear apart."""
    return (
        "{\n" + ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()) + "\n  }"
    )


def main(arguments: Sequence[str] | None = None, folder: Path = Path(__file__).parent) -> int:
    """Write the files, or with ``--check`` say which are not what would be written."""
    parser = argparse.ArgumentParser(prog="python -m bench.models.derive", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a file is not as derived")
    check = parser.parse_args(arguments).check
    wrong = 0
    for name, model in MODELS.items():
        file, derived = folder / f"{name}.json", text(model)
        if not check:
            file.write_text(derived)
        elif not file.exists() or file.read_text() != derived:
            print(f"{file} is not what bench.models.derive writes", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
