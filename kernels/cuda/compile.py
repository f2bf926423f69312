"""Compiles kernels to PTX: ahead of time into files (CMake runs this module), or on first use. No GPU is needed."""

from __future__ import annotations

import argparse
import itertools
import site
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # NVIDIA's packages look for NVVM and NVRTC where packages are installed, but those that pip builds with are only on
    # sys.path.
    site.getsitepackages = lambda prefixes=None: sys.path

from ..dtypes import COMPUTE, PAIRS, cuda_symbol
from ..registry import RULES
from ..rules.rule import Rule
from . import access
from .prologue import prologue
from .terms import terms_loop
from .toolchain import ptx, types
from .update import update_loop

INTEGER, REAL = types.int64, types.float64
KERNELS: dict[str, tuple[Any, Any]] = {
    "update": (update_loop, types.void(*[INTEGER] * 5)),
    "terms": (terms_loop, types.void(*[INTEGER] * 7)),
    "prologue": (prologue, types.void(*[INTEGER] * 11, REAL, INTEGER, REAL, *[INTEGER] * 4)),
}
"""What makes the kernels of a kind, and their signature."""


def kernel_ptx(kind: str, rule: Rule, *dtypes: str) -> str:
    """The PTX of a kernel; see ``cuda_symbol``."""
    loop, signature = KERNELS[kind]
    text = ptx(loop(rule, *dtypes, access), signature, cuda_symbol(kind, rule.name, *dtypes))
    if kind == "update" and COMPUTE[dtypes[0]] == "float32" and "cvt.f64" in text:
        raise TypeError(
            f"Rule {rule.name!r} computes in float64 for {dtypes[0]} parameters: a literal such as 0.5 promotes what "
            "it touches. Put the number into the rule's Scalars."
        )
    return text


def _kernels(what: str) -> Iterator[tuple[str, Rule, tuple[str, ...]]]:
    """Kind, rule and dtypes of the kernels that are asked for."""
    for rule in RULES.values():
        if what == "prologue":
            yield "prologue", rule, ()
        else:
            yield "update", rule, tuple(what.split("-"))
            if rule.ratio is not None:
                yield "terms", rule, tuple(what.split("-"))


def main() -> None:
    """Compile some kernels of every rule, as CMake asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only see whether kernels can be compiled here")
    parser.add_argument("directory", type=Path, nargs="?", help="where to write the PTX")
    parser.add_argument("what", nargs="*", help="'prologue', or a pair of storage dtypes such as float32-bfloat16")
    args = parser.parse_args()
    if args.check:
        kernel_ptx("update", RULES["sgd"], "float32", "float32")
        return
    if not args.what:
        parser.error("needed are a directory and what to compile")
    for one in args.what:
        if one != "prologue" and tuple(one.split("-")) not in PAIRS:
            parser.error(f"{one} is neither 'prologue' nor a pair of dtypes that is compiled ahead of time")
    args.directory.mkdir(parents=True, exist_ok=True)
    for kind, rule, dtypes in itertools.chain.from_iterable(map(_kernels, args.what)):
        path = args.directory / f"{cuda_symbol(kind, rule.name, *dtypes)}.ptx"
        path.write_text(kernel_ptx(kind, rule, *dtypes))


if __name__ == "__main__":
    main()
