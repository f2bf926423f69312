"""PTX of every kernel, compiled ahead of time as CMake does it: what stands in it, and what ptxas makes of it.

No GPU is needed. The compilers run in processes of their own, without the simulator that conftest.py switches on.
"""

import fcntl
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
from collections import Counter
from typing import NamedTuple

import pytest
from fastopt.kernels.dtypes import COMPUTE, PAIRS, cuda_symbol
from fastopt.kernels.registry import RULES
from fresh import program

ROOT = pathlib.Path(__file__).parents[2]
WHAT = [*map("-".join, PAIRS), "prologue"]

pytest.importorskip("numba_cuda")
pytestmark = pytest.mark.full


# --- compilers -------------------------------------------------------------------------------------------------------


def compile_cli(*arguments):
    return program("-m", "kernels.cuda.compile", *arguments, cwd=ROOT, timeout=None, NUMBA_ENABLE_CUDASIM="0")


@pytest.fixture(scope="session", params=WHAT)
def kernels(request, shared):
    """The PTX file of every rule for a pair of dtypes or the prologue, compiled once for all processes of pytest, or
    taken from a folder of compiled ones, FASTOPT_TEST_PTX."""
    pair, symbols = request.param.split("-"), {cuda_symbol("prologue", rule): (rule,) for rule in RULES}
    if request.param != "prologue":
        symbols = {cuda_symbol("update", rule, *pair): (rule, *pair) for rule in RULES}
        symbols |= {cuda_symbol("terms", rule, *pair): ("terms", pair[0]) for rule in RULES if RULES[rule].ratio}
    directory, done = shared / f"ptx-{request.param}", shared / f"ptx-{request.param}.done"
    with (shared / f"ptx-{request.param}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists() and (ready := os.environ.get("FASTOPT_TEST_PTX")):
            shutil.copytree(ready, directory, ignore=lambda _, names: [n for n in names if n[:-4] not in symbols])
        elif not done.exists():
            compiled = compile_cli(directory, request.param)
            assert compiled.returncode == 0, compiled.stderr
        done.touch()
    assert {path.name for path in directory.iterdir()} == {f"{symbol}.ptx" for symbol in symbols}
    return {directory / f"{symbol}.ptx": kernel for symbol, kernel in symbols.items()}


def ptxas():
    """The assembler on PATH, or the one that comes with NVIDIA's compiler from PyPI."""
    found = shutil.which("ptxas")
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        path = pathlib.Path(place) / "cuda_nvcc" / "bin" / "ptxas"
        found = found or (str(path) if path.exists() else None)
    return found or pytest.skip("ptxas is neither on PATH nor installed from PyPI (nvidia-cuda-nvcc)")


class Assembled(NamedTuple):
    """What ptxas tells of a kernel, the most of all functions in it; numbers of bytes but for registers."""

    registers: int
    stack: int
    stored: int
    loaded: int


def assemble(path, architecture, *options):
    output = path.parent / f"{os.getpid()}.cubin"
    command = [ptxas(), "--verbose", *options, f"--gpu-name={architecture}", f"--output-file={output}", str(path)]
    run = subprocess.run(command, capture_output=True, text=True)
    output.unlink(missing_ok=True)
    assert run.returncode == 0, run.stderr
    told = run.stdout + run.stderr
    assert "warning" not in told, told
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", told)
    registers = re.findall(r"Used (\d+) registers", told)
    return Assembled(max(map(int, registers)), *(max(map(int, numbers)) for numbers in zip(*frames, strict=True)))


# --- the text --------------------------------------------------------------------------------------------------------

LOAD = {"float32": r"v4\.[fb]32", "float64": r"v2\.[fb]64", "float16": r"v2\.[ub]32", "bfloat16": r"v2\.[ub]32"}
STORE = {**LOAD, "float16": r"v4\.[ub]16", "bfloat16": r"v4\.[ub]16"}
"""One access of all the elements that a thread takes at a time: 16 bytes of the widest array."""


def check_head(text, symbol):
    assert re.findall(r"^\.version (.*)$", text, re.MULTILINE) == ["7.0"]
    assert re.findall(r"^\.target (.*)$", text, re.MULTILINE) == ["sm_75"]
    assert re.findall(r"^\.visible \.entry (\w+)\($", text, re.MULTILINE) == [symbol]
    assert text.count(".entry") == 1
    assert ".maxntid 256, 1, 1" in text
    assert ".local" not in text


def check_arithmetic(text, compute):
    """Every operation is rounded by itself, and none is in another precision than the compute dtype, to which scalars
    are rounded when they are loaded."""
    operations = re.findall(r"\b(?:add|sub|mul|mad|fma|div|rcp|sqrt|rsqrt)\.\S*f(?:32|64)\b", text)
    allowed = {f"{name}.rn.f{compute[-2:]}" for name in ("add", "sub", "mul", "div", "rcp", "sqrt")}
    assert operations
    assert not set(operations) - allowed
    other = re.findall(r"\S+\.f64\b" if compute == "float32" else r"\S+\.f32\b", text)
    assert set(other) <= {"ld.global.f64", "cvt.rn.f32.f64"}
    assert not re.search(r"\bfma\.|\bcall|\.approx|\.ftz", text)


def check_accesses(text, arrays):
    """Each array is accessed whole vectors at a time."""
    load = LOAD if {"float32", "float64"} & {*arrays} else dict.fromkeys(LOAD, r"v4\.[ub]32")
    for access, kinds, dtypes in (("ld", load, arrays), ("st", STORE, [arrays[0], *arrays[2:]])):
        for kind, count in Counter(kinds[dtype] for dtype in dtypes).items():
            assert len(re.findall(rf"\b{access}\.global\.{kind}", text)) >= count
    assert re.search(rf"\bst\.global\.{STORE[arrays[1]]}", text)  # zeroes the gradient


def check_update(text, rule, p, g):
    check_head(text, cuda_symbol("update", rule, p, g))
    check_arithmetic(text, COMPUTE[p])
    check_accesses(text, [p, g] + [COMPUTE[p]] * len(RULES[rule].state))


def test_what_stands_in_the_files(kernels):
    for path, (rule, *pair) in kernels.items():
        if rule in RULES and pair:
            check_update(path.read_text(), rule, *pair)
        else:
            check_head(path.read_text(), path.stem)
            assert not pair or not re.search(r"\.approx|\.ftz", path.read_text())
            order = re.findall(r"\b(membar|atom|bar)\.", path.read_text())  # every counter: fences on either side
            assert " ".join(order).count("membar atom membar bar") == (1 if pair else 2)


# What a mistake in the compiler's options or in kernels/cuda/access.py would do to the text of Adam.
FAULTS = {
    "contraction allowed": ("mul.rn.f32", "mul.f32"),
    "contraction": ("add.rn.f32", "fma.rn.f32"),
    "approximate division": ("div.rn.f32", "div.approx.f32"),
    "subnormals flushed": ("sqrt.rn.f32", "sqrt.rn.ftz.f32"),
    "a literal": ("mul.rn.f32", "mul.rn.f64"),
    "memory on the stack": ("ld.global.f32", "ld.local.f32"),
    "loads of single elements": ("ld.global.v4.f32", "ld.global.f32"),
    "stores of single elements": ("st.global.v4.f32", "st.global.f32"),
    "gradients loaded one by one": ("ld.global.v2.u32", "ld.global.u16"),
    "another version": (".version 7.0", ".version 8.8"),
}


@pytest.mark.parametrize("kernels", ["float32-bfloat16"], indirect=True)
@pytest.mark.parametrize(("text", "fault"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_text_is_found(kernels, text, fault):
    (path,) = (path for path, (rule, *_) in kernels.items() if rule == "adam")
    correct = path.read_text()
    assert text in correct
    with pytest.raises(AssertionError):
        check_update(correct.replace(text, fault), "adam", "float32", "bfloat16")


# --- machine code ----------------------------------------------------------------------------------------------------

EVERYTHING_FOR = ["sm_90"]
SAMPLES_FOR = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"]  # everything would take 10 s for each
SAMPLES = ("sgd", "lion", "adamw", "lars", "rmsprop_centered_momentum")  # from no state to three

REGISTERS = {"float32": (64, 64, 80, 96), "float64": (64, 72, 96, 112)}
"""At most, by compute dtype and number of states: with 64 a processor holds 1024 threads, with 80 768, else 512."""
PROLOGUE_REGISTERS = 64
STACK, STORED, LOADED = 16, 16, 32
"""ptxas may park up to four words on the stack to stay below 64 or 80 registers, where it deems that worth it. More
would be a vector that left the registers."""


def check_assembled(told, rule, p=None, g=None):
    limit = PROLOGUE_REGISTERS if p is None else REGISTERS[COMPUTE[p]][2 if rule == "terms" else len(RULES[rule].state)]
    assert told.registers <= limit
    assert told.stack <= STACK
    assert told.stored <= STORED
    assert told.loaded <= LOADED


@pytest.mark.parametrize("architecture", [*EVERYTHING_FOR, *SAMPLES_FOR])
def test_kernels_assemble_without_leaving_the_registers(kernels, architecture):
    for path, (rule, *pair) in kernels.items():
        if architecture in EVERYTHING_FOR or rule in (*SAMPLES, "terms"):
            check_assembled(assemble(path, architecture), rule, *pair)


@pytest.mark.parametrize("kernels", ["float32-float32"], indirect=True)
def test_too_few_registers_are_found(kernels, tmp_path):
    (path,) = (path for path, (rule, *_) in kernels.items() if rule == "amsgrad")
    squeezed = tmp_path / path.name
    squeezed.write_text(path.read_text().replace(".maxntid 256, 1, 1", ".maxntid 1024, 1, 1\n.minnctapersm 2"))
    check_assembled(assemble(path, "sm_90"), "amsgrad", "float32", "float32")
    with pytest.raises(AssertionError):
        check_assembled(assemble(squeezed, "sm_90"), "amsgrad", "float32", "float32")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        *(
            (("prologue", what), f"{what} is neither 'prologue' nor a pair of dtypes that is compiled ahead of time")
            for what in ("float16-float32", "float32", "int8-int8", "prologues")
        ),
        ((), "needed are a directory and what to compile"),
    ],
)
def test_what_cannot_be_compiled_is_refused(arguments, said, tmp_path):
    run = compile_cli(tmp_path / "out", *arguments)
    assert run.returncode == 2
    assert f"error: {said}" in run.stderr
    assert not (tmp_path / "out").exists()


def test_checking_whether_kernels_can_be_compiled_writes_nothing(tmp_path):
    run = compile_cli("--check", tmp_path / "out", "prologue")
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "out").exists()
