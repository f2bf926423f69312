"""Compiles kernels to PTX: ahead of time into files (CMake runs this module), or on first use. No GPU is needed."""

from __future__ import annotations

import argparse
import site
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

if __name__ == "__main__":
    # NVIDIA's packages look for NVVM and NVRTC where packages are installed, but those that pip builds with are only on
    # sys.path.
    site.getsitepackages = lambda prefixes=None: sys.path

from ..dtypes import COMPUTE, PAIRS, cuda_prologue_symbol, cuda_terms_symbol, cuda_update_symbol
from ..registry import RULES
from ..rules.rule import Rule
from . import access
from .prologue import prologue
from .terms import terms_loop
from .toolchain import ptx, types
from .update import update_loop

INTEGER, REAL = types.int64, types.float64
UPDATE = types.void(*[INTEGER] * 7)
TERMS = types.void(*[INTEGER] * 12)
PROLOGUE = types.void(*[INTEGER] * 20, REAL, INTEGER, REAL, *[INTEGER] * 4)


def update_ptx(rule: Rule, p: str, g: str) -> str:
    """The update of ``rule`` for parameters stored as ``p`` and gradients stored as ``g``."""
    text = ptx(update_loop(rule, p, g, access), UPDATE, cuda_update_symbol(rule.name, p, g))
    if COMPUTE[p] == "float32" and ".f64" in text:
        raise TypeError(
            f"Rule {rule.name!r} computes in float64 for {p} parameters: a literal such as 0.5 promotes what it "
            "touches. Put the number into the rule's Scalars."
        )
    return text


def terms_ptx(rule: Rule, p: str, g: str) -> str:
    """The sums of ``rule``'s terms, and the ratios."""
    return ptx(terms_loop(rule, p, g, access), TERMS, cuda_terms_symbol(rule.name, p, g))


def prologue_ptx(rule: Rule) -> str:
    """The prologue for scalar groups of ``rule``."""
    return ptx(prologue(rule, access), PROLOGUE, cuda_prologue_symbol(rule.name))


def _kernels(what: Iterable[str]) -> Iterator[tuple[str, str]]:
    for one in what:
        for rule in RULES.values():
            if one == "prologue":
                yield cuda_prologue_symbol(rule.name), prologue_ptx(rule)
            else:
                p, g = one.split("-")
                yield cuda_update_symbol(rule.name, p, g), update_ptx(rule, p, g)
                if rule.sources:
                    yield cuda_terms_symbol(rule.name, p, g), terms_ptx(rule, p, g)


def main() -> None:
    """Compile some kernels of every rule, as CMake asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only see whether kernels can be compiled here")
    parser.add_argument("directory", type=Path, nargs="?", help="where to write the PTX")
    parser.add_argument("what", nargs="*", help="'prologue', or a pair of storage dtypes such as float32-bfloat16")
    args = parser.parse_args()
    if args.check:
        update_ptx(RULES["sgd"], "float32", "float32")
        return
    if not args.what:
        parser.error("needed are a directory and what to compile")
    for one in args.what:
        if one != "prologue" and tuple(one.split("-")) not in PAIRS:
            parser.error(f"{one} is neither 'prologue' nor a pair of dtypes that is compiled ahead of time")
    args.directory.mkdir(parents=True, exist_ok=True)
    for symbol, text in _kernels(args.what):
        (args.directory / f"{symbol}.ptx").write_text(text)


if __name__ == "__main__":
    main()
