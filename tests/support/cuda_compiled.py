"""The LLVM IR of CUDA kernels, as NVVM is given it, compiled for the CPU instead.

The simulator runs the Python loops; this runs what the compiler makes of them: vector accesses, conversions, the
rule's own functions compiled for the device. A block is as many threads as on a GPU; blocks follow one another.
"""

import ctypes
import fcntl
import functools
import itertools
import json
import os
import pathlib
import re
import struct

import greenlet
import llvmlite.binding as llvm
from blocks import take_turns
from fastopt.kernels.cuda import compile as compiler
from fastopt.kernels.cuda.toolchain import THREADS
from fastopt.kernels.dtypes import COMPUTE, cuda_symbol
from fastopt.kernels.registry import RULES
from numba.cuda.cudadrv import nvvm

# What a GPU has in hardware or NVIDIA's library, and a CPU under other names.
HOST = {
    '"__nv_pow"': '"pow"',
    '"__nv_sqrt"': '"llvm.sqrt.f64"', '"__nv_sqrtf"': '"llvm.sqrt.f32"', '"__nv_fabs"': '"llvm.fabs.f64"',
    '"__nv_fabsf"': '"llvm.fabs.f32"', '"__nv_fmax"': '"llvm.maxnum.f64"',
}  # fmt: skip
ADDRESSES = {
    "llvm.nvvm.barrier0": ("void ()", ctypes.PYFUNCTYPE(None)(lambda: greenlet.getcurrent().parent.switch())),
    "pow": ("double (double, double)", ctypes.CDLL("libm.so.6").pow),
}
"""Functions that are called by their addresses: the JIT linker does not find them all by name."""
LOAD = re.compile(r'%"(\S+)" = call double asm sideeffect "ld\.volatile\.global\.f64[^(]*\(i64 (%\S+)\)')
FINITE = """
define i32 @"__nv_isfinited"(double %x) {
  %d = fsub double %x, %x
  %f = fcmp ord double %d, %d
  %i = zext i1 %f to i32
  ret i32 %i
}
"""


class _Captured(Exception):
    """Carries the IR out of the compiler, which need not go on."""


def _ir(symbol):
    """The modules that NVVM would get for a kernel; kept for other processes where FASTOPT_TEST_IR names a folder."""
    folder = os.environ.get("FASTOPT_TEST_IR")
    if folder is None:
        return _compiled(symbol)
    kept = pathlib.Path(folder, f"{symbol}.json")
    with kept.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            kept.write_text(json.dumps(_compiled(symbol)))
    return json.loads(kept.read_text())


def _compiled(symbol):
    def capture(modules, **options):
        assert options["fma"] == 0
        raise _Captured([modules] if isinstance(modules, str) else modules)

    original, nvvm.compile_ir = nvvm.compile_ir, capture
    try:
        for rule in RULES.values():
            if symbol == cuda_symbol("prologue", rule.name):
                compiler.kernel_ptx("prologue", rule)
            for kind, *pair in itertools.product(("update", "terms"), COMPUTE, COMPUTE):
                if symbol == cuda_symbol(kind, rule.name, *pair):
                    compiler.kernel_ptx(kind, rule, *pair)
    except _Captured as captured:
        return captured.args[0]
    finally:
        nvvm.compile_ir = original
    raise LookupError(f"no kernel is called {symbol}")


def _for_host(text):
    text = re.sub(r"^(target|!nvvm|@\"llvm.used\").*$", "", text, flags=re.MULTILINE)
    for name, place in (("tid", "%of_block"), ("ctaid", "%of_grid")):
        text = re.sub(rf'call i32 @"llvm\.nvvm\.read\.ptx\.sreg\.{name}\.x"\(\)', f"add i32 0, {place}", text)
        text = re.sub(rf'call i32 @"llvm\.nvvm\.read\.ptx\.sreg\.{name}\.[yz]"\(\)', "add i32 0, 0", text)
    text = re.sub(r'^.*(call|declare) void @"llvm\.nvvm\.membar\.gl"\(\).*$', "", text, flags=re.MULTILINE)
    text = re.sub(r"^declare .*(nvvm|__nv_isfinited).*$", "", text, flags=re.MULTILINE)
    text = LOAD.sub(r'%"\1.at" = inttoptr i64 \2 to double*\n  %"\1" = load volatile double, double* %"\1.at"', text)
    text = re.sub(r'call i64 asm sideeffect "mov\.b64[^(]*\(i64 (\S+)\)', r"add i64 0, \1", text)
    for pattern, replacement in HOST.items():
        text = re.sub("@" + pattern, "@" + replacement, text)
    for name, (kind, function) in ADDRESSES.items():
        address = ctypes.cast(function, ctypes.c_void_p).value
        text = re.sub(rf'call \w+ @"{name}"', f"call {kind} inttoptr (i64 {address} to {kind}*)", text)
    return re.sub(r"addrspace\([13]\) ?", "", text.replace("addrspacecast", "bitcast"))


def _with_entry(text):
    """Adds a function of one pointer to words: the thread, its block, the arguments of the kernel."""
    match = re.search(r'define void @("[^"]+")\(([^)]*)\)', text)
    assert match
    name, parameters = match[1], [p.split()[0] for p in match[2].split(",")]
    text = text.replace(match[0], f"define void @{name}(i32 %of_block, i32 %of_grid, {match[2]})")
    lines, passed = ["define i8* @entry(i8* %raw) {", "  %words = bitcast i8* %raw to i64*"], []
    for k, kind in enumerate(["i32", "i32", *parameters]):
        lines.append(f"  %at{k} = getelementptr i64, i64* %words, i64 {k}")
        lines.append(f"  %word{k} = load i64, i64* %at{k}")
        lines.append(f"  %value{k} = {'trunc' if kind == 'i32' else 'bitcast'} i64 %word{k} to {kind}")
        passed.append(f"{kind} %value{k}")
    lines += [f"  call void @{name}({', '.join(passed)})", "  ret i8* null", "}", FINITE]
    return "\n".join([text, *lines])


class Kernel:
    """A kernel compiled for this processor."""

    def __init__(self, symbol):
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        kernel, *others = map(_for_host, _ir(symbol))
        module = llvm.parse_assembly(_with_entry(kernel))
        for text in others:
            module.link_in(llvm.parse_assembly(text))
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
        )
        self._engine = llvm.create_mcjit_compiler(module, machine)
        self._engine.finalize_object()
        # The lock is kept: a barrier goes back to Python.
        self._call = ctypes.PYFUNCTYPE(None, ctypes.c_char_p)(self._engine.get_function_address("entry"))

    def launch(self, blocks, arguments):
        """Run all blocks."""
        words = [ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x) for x in arguments]
        raw = b"".join(bytes(word) for word in words)
        for block in range(blocks):
            passed = (struct.pack("qq", thread, block) + raw for thread in range(THREADS))
            take_turns([greenlet.greenlet(functools.partial(self._call, each)) for each in passed])


@functools.cache
def kernel_of(symbol):
    """The kernel of this name (kernels/dtypes.py)."""
    return Kernel(symbol)
