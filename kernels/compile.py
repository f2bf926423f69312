"""Compiles kernels: ahead of time to object files (CMake runs this module), or on first use into the running process.

Ahead of time, Numba translates each loop once, without optimising; LLVM then optimises that for every instruction set.
One process serves them all and a kernel costs about 0.15 s. (One process for each instruction set, in which Numba
optimises for the processor named by NUMBA_CPU_NAME, takes three times as long.)
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["NUMBA_OPT"] = "0"  # read when Numba is imported
    os.environ.pop("NUMBA_DEBUG_INFO", None)

import llvmlite.binding as llvm
from numba import cfunc

from . import loops, reductions
from .dtypes import COMPUTE, PAIRS, norm_symbol, ratio_symbol, update_symbol
from .registry import RULES
from .rule import Rule


class Kernel(NamedTuple):
    """Something to compile: the name it gets, a Python loop, its C signature."""

    symbol: str
    function: Callable[..., Any]
    signature: Any


def update_kernel(rule: Rule, p: str, g: str, isa: str, *, soft_half: bool = False) -> Kernel:
    """The update of ``rule`` for parameters stored as ``p`` and gradients stored as ``g``."""
    loop = loops.cpu_loop(rule, p, g, soft_half=soft_half)
    return Kernel(update_symbol(rule.name, p, g, isa), loop, loops.SIGNATURE)


def norm_kernel(dtype: str, isa: str, *, soft_half: bool = False) -> Kernel:
    """The sum of squares of an array stored as ``dtype``."""
    return Kernel(norm_symbol(dtype, isa), reductions.norm_loop(dtype, soft_half=soft_half), reductions.SIGNATURE)


def ratio_kernel(rule: Rule, isa: str) -> Kernel:
    """The trust ratio of ``rule``."""
    return Kernel(ratio_symbol(rule.name, isa), loops.ratio_function(rule), reductions.RATIO_SIGNATURE)


def jit(kernel: Kernel) -> Any:
    """Compile for this processor, now. The result's ``address`` fits the schedulers; keep it alive."""
    return cfunc(kernel.signature, error_model="numpy")(kernel.function)


def host_lacks_half() -> bool:
    """Whether float16 conversions would be library calls on this processor."""
    return platform.machine() == "x86_64" and not llvm.get_host_cpu_features().get("f16c", False)


# --- ahead of time -----------------------------------------------------------------------------------------------


def write_objects(directory: Path, p: str, g: str, isas: list[str]) -> None:
    """Compile every rule for one pair of storage dtypes, and what belongs to that pair, to one object per ISA."""
    groups: dict[bool, list[str]] = {}
    for isa in isas:
        groups.setdefault(isa == "x86-64-v2" and "float16" in (p, g), []).append(isa)
    for soft_half, group in groups.items():
        machines = {isa: _machine(isa) for isa in group}
        modules: dict[str, list[Any]] = {isa: [] for isa in group}
        for kernel in _kernels(p, g, soft_half):
            text, name = _translate(kernel)
            for isa in group:
                modules[isa].append(_optimise(text, name, kernel.symbol + isa.replace("-", "_"), machines[isa]))
        for isa, (first, *others) in modules.items():
            for other in others:
                first.link_in(other)
            (directory / f"{p}_{g}.{isa}.o").write_bytes(machines[isa].emit_object(first))


def _kernels(p: str, g: str, soft_half: bool) -> Iterator[Kernel]:
    """The kernels of one pair; the name of the instruction set is still to be added to their symbols."""
    for rule in RULES.values():
        yield update_kernel(rule, p, g, "", soft_half=soft_half)
        if rule.ratio is not None and p == g == "float64":
            yield ratio_kernel(rule, "")
    if p == g:
        yield norm_kernel(p, "", soft_half=soft_half)


def _translate(kernel: Kernel) -> tuple[str, str]:
    """Numba's LLVM IR for a kernel, not optimised, and the name of its entry there."""
    compiled = cfunc(kernel.signature, error_model="numpy")(kernel.function)
    return compiled.inspect_llvm(), compiled.native_name


def _machine(isa: str) -> Any:
    cpu, features = isa, ""
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
