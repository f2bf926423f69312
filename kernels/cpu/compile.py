"""Compiles kernels: ahead of time to object files (CMake runs this module), or on first use into the running process.

Ahead of time, Numba translates each loop once, without optimising; LLVM then optimises that for every instruction set.
One process serves them all and a kernel costs about 0.1 s. (One process for each instruction set, in which Numba
optimises for the processor named by NUMBA_CPU_NAME, takes three times as long.)
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["NUMBA_OPT"] = "0"  # read when Numba is imported
    os.environ.pop("NUMBA_DEBUG_INFO", None)

import llvmlite.binding as llvm
from numba import cfunc

from .. import reductions
from ..dtypes import COMPUTE, PAIRS, symbol
from ..epilogues import KINDS, kinds_of
from ..registry import RULES
from ..storage import Features
from . import loop, schedule, terms

KERNELS: dict[str, tuple[Callable[..., Callable[..., None]], Any]] = {
    "update": (loop.update_loop, loop.SIGNATURE),
    "terms": (terms.terms_loop, terms.SIGNATURE),
    "ratio": (loop.ratio_function, loop.RATIO_SIGNATURE),
    "squares": (reductions.squares_loop, reductions.SIGNATURE),
    "schedule": (schedule.schedule, schedule.SIGNATURE),
}
"""What each kind of kernel is made by, from what it is of and the processor's features, and its C signature."""


def compiled(features: Features, kind: str, *of: Any) -> Any:
    """A kernel of this processor. Its ``address`` fits the schedule; keep it alive.

    Args:
        features: What the processor can do.
        kind: One of ``KERNELS``.
        of: Rule and storage dtypes of parameter and gradient; of a ratio the rule, of squares the dtype alone.
    """
    make, signature = KERNELS[kind]
    return cfunc(signature, error_model="numpy")(make(*of, features))


def features_of(isa: str) -> Features:
    """What every processor with the instruction set can do; "native" is this one."""
    if isa != "native":
        return Features(half=isa != "x86-64-v2", fma=isa != "x86-64-v2")
    if platform.machine() != "x86_64":
        return Features(half=True, fma=True)
    found = llvm.get_host_cpu_features()
    return Features(half=found.get("f16c", False), fma=found.get("fma", False))


# --- ahead of time -----------------------------------------------------------------------------------------------


def write_objects(directory: Path, p: str, g: str, isas: list[str]) -> None:
    """Compile every rule for one pair of storage dtypes, and what belongs to that pair, to one object per ISA."""
    machines = {isa: _machine(isa) for isa in isas}
    modules: dict[str, Any] = {}
    translated: dict[tuple[Any, ...], tuple[str, str]] = {}
    for isa in isas:
        features = features_of(isa)
        for depends, *kernel in _kernels(p, g):
            key = (*kernel, features if depends else None)
            if key not in translated:
                function = compiled(features, *kernel)
                translated[key] = function.inspect_llvm(), function.native_name
            kind, *of = kernel
            module = _optimise(*translated[key], symbol(kind, *(getattr(x, "name", x) for x in of), isa), machines[isa])
            if isa in modules:
                modules[isa].link_in(module)
            else:
                modules[isa] = module
    for isa, module in modules.items():
        (directory / f"{p}_{g}.{isa}.o").write_bytes(machines[isa].emit_object(module))


def _kernels(p: str, g: str) -> Iterator[tuple[Any, ...]]:
    """The kernels of one pair, and before each whether features change its code."""
    for rule in RULES.values():
        yield "float16" in (p, g), "update", rule, p, g
        if rule.sources:
            yield True, "terms", rule, p, g
        if rule.ratio is not None and p == g == "float64":
            yield False, "ratio", rule
    if p == g:
        yield True, "squares", p
        for epilogue, target in (KINDS[k] for k in kinds_of(p)):
            yield "float16" in (p, target), "update", epilogue, target, p
    if p == g == "float64":
        yield False, "schedule"


def _machine(isa: str) -> Any:
    # LLVM would use half of the 512-bit registers of x86-64-v4; whole ones are 1 to 3 % faster (Adam, momentum, Lion).
    # Prefetching for a write is no part of x86-64-v3, but every processor with AVX2 has it; Haswell alone ignores it.
    extra = {"x86-64-v3": "+prfchw", "x86-64-v4": "+prfchw,-prefer-256-bit"}
    cpu, features = isa, extra.get(isa, "")
    if isa == "native":
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="default")


def _optimise(text: str, name: str, symbol: str, machine: Any) -> Any:
    """An LLVM module that exports ``symbol`` alone, vectorised for ``machine``."""
    # Numba asks for its functions not to be inlined; the entry is only a wrapper.
    module = llvm.parse_assembly(text.replace(name, symbol).replace("{ noinline }", "{ alwaysinline }"))
    for definition in [*module.functions, *module.global_variables]:
        if not definition.is_declaration and definition.name != symbol:
            definition.linkage = "internal"  # else the objects of two instruction sets clash
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = True
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    return module


def main() -> None:
    """Compile one pair of dtypes, as CMake asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, help="where to write the objects")
    parser.add_argument("parameter", choices=sorted(COMPUTE), help="storage dtype of the parameters")
    parser.add_argument("gradient", choices=sorted(COMPUTE), help="storage dtype of the gradients")
    parser.add_argument("--isa", action="append", required=True, help="x86-64-v2, x86-64-v3, x86-64-v4 or native")
    args = parser.parse_args()
    if (args.parameter, args.gradient) not in PAIRS:
        parser.error(f"{args.parameter} parameters with {args.gradient} gradients are not compiled ahead of time")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    args.directory.mkdir(parents=True, exist_ok=True)
    write_objects(args.directory, args.parameter, args.gradient, args.isa)


if __name__ == "__main__":
    main()
