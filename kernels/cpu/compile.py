"""Compiles kernels: ahead of time to object files (CMake runs this module), or on first use into the running process.

Ahead of time, Numba translates each loop once, without optimising; LLVM then optimises that for every instruction set.
One process serves them all and a kernel costs about 0.1 s. (One process for each instruction set, in which Numba
optimises for the processor named by NUMBA_CPU_NAME, takes three times as long.)
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["NUMBA_OPT"] = "0"  # read when Numba is imported
    os.environ.pop("NUMBA_DEBUG_INFO", None)

import llvmlite.binding as llvm
from numba import cfunc, types

from ..dtypes import COMPUTE, PAIRS, symbol
from ..epilogues import KINDS, kinds_of
from ..registry import RULES
from . import loop, schedule, sums

KERNELS: dict[str, Callable[..., Callable[..., None]]] = {
    "update": loop.update_loop,
    "terms": sums.terms_loop,
    "ratio": loop.ratio_function,
    "squares": sums.squares_loop,
    "schedule": schedule.schedule,
}
"""What each kind of kernel is made by, from what it is of and whether the processor converts float16. All its arguments
are integers: numbers of elements, and addresses."""


@functools.cache
def compiled(half: bool, kind: str, *of: Any) -> Any:
    """A kernel of this processor, whose ``address`` fits the schedule.

    Args:
        half: Whether the processor converts float16.
        kind: One of ``KERNELS``.
        of: Rule and storage dtypes of parameter and gradient; of a ratio the rule, of squares the dtype alone.
    """
    kernel = KERNELS[kind](*of, half)
    arguments = [types.int64] * len(inspect.signature(kernel).parameters)
    return cfunc(types.void(*arguments), error_model="numpy")(kernel)


def converts_half(isa: str) -> bool:
    """Whether every processor with the instruction set converts float16; "native" is this one."""
    if isa == "native" and platform.machine() == "x86_64":
        return bool(llvm.get_host_cpu_features().get("f16c", False))
    return isa != "x86-64-v2"


# --- ahead of time -----------------------------------------------------------------------------------------------


def write_objects(directory: Path, p: str, g: str, isas: list[str]) -> None:
    """Compile every rule for one pair of storage dtypes, and what belongs to that pair, to one object per ISA."""
    for isa in isas:
        machine, half = _machine(isa), converts_half(isa)
        first, *others = (
            # Without float16 one translation serves all.
            _optimise(compiled(half or "float16" not in kernel, *kernel), symbol(*kernel, isa), machine)
            for kernel in _kernels(p, g)
        )
        for module in others:
            first.link_in(module)
        (directory / f"{p}_{g}.{isa}.o").write_bytes(machine.emit_object(first))


def _kernels(p: str, g: str) -> Iterator[tuple[Any, ...]]:
    """The kernels of one pair."""
    for rule in {rule.step: rule for rule in RULES.values()}.values():
        yield "update", rule, p, g
        if rule.sources:
            yield "terms", rule, p, g
        if rule.ratio is not None and p == g == "float64":
            yield "ratio", rule
    if p == g:
        yield "squares", p
        yield from (("update", *KINDS[k], p) for k in kinds_of(p))
    if p == g == "float64":
        yield ("schedule",)


def _machine(isa: str) -> Any:
    # LLVM would use half of the 512-bit registers of x86-64-v4; whole ones are 1 to 3 % faster (Adam, momentum, Lion).
    # Prefetching for a write is no part of x86-64-v3, but every processor with AVX2 has it; Haswell alone ignores it.
    extra = {"x86-64-v3": "+prfchw", "x86-64-v4": "+prfchw,-prefer-256-bit"}
    cpu, features = isa, extra.get(isa, "")
    if isa == "native":
        cpu, features = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="default")


def _optimise(function: Any, symbol: str, machine: Any) -> Any:
    """An LLVM module that exports ``symbol`` alone, vectorised for ``machine``."""
    # Numba asks for its functions not to be inlined; the entry is only a wrapper.
    text = function.inspect_llvm().replace(function.native_name, symbol)
    module = llvm.parse_assembly(text.replace("{ noinline }", "{ alwaysinline }"))
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
