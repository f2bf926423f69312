"""The compiled things: rules that stay in float32, and the library's machine code as objdump shows it."""

import functools
import importlib.util
import inspect
import re
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
from fastopt.kernels.dtypes import COMPUTE, COPIES, PAIRS
from fastopt.kernels.dtypes import symbol as symbol_of
from fastopt.kernels.epilogues import KINDS, kinds_of
from fastopt.kernels.registry import RULES
from fastopt.kernels.rules.rule import Rule

import fastopt
from fastopt.engine import backend as _backend

RULE_NAMES = sorted(RULES)
KERNELS = sorted({rule.step.__name__ for rule in RULES.values()})
ROOTED = [name for name in RULE_NAMES if "sqrt" in inspect.getsource(RULES[name].step)]
UPDATES = [(rule, p, g, isa) for rule in KERNELS for p, g in PAIRS for isa in _backend.ISAS]
TERMS = [update for update in UPDATES if RULES[update[0]].sources]
EPILOGUES = [(KINDS[k][0].name, KINDS[k][1], p, isa) for p in COMPUTE for k in kinds_of(p) for isa in _backend.ISAS]


# --- rules -----------------------------------------------------------------------------------------------------------


def returned(rule, dtype):
    """The types that the rule returns when Numba compiles it for scalars of this dtype."""
    numba = pytest.importorskip("numba")
    step = numba.njit(error_model="numpy")(rule.step)
    one = dtype(1)
    step(*[one] * (2 + len(rule.state)), rule.Scalars(*[one] * len(rule.Scalars._fields)))
    return [[str(t) for t in signature.return_type] for signature in step.nopython_signatures]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", RULE_NAMES)
def test_no_literal_promotes_a_rule(name, dtype):
    assert returned(RULES[name], dtype) == [[dtype.__name__] * (1 + len(RULES[name].state))]


def with_literal(p, g, h):
    return (p - 0.5 * h.lr * g,)


BROKEN = Rule("broken", with_literal, RULES["sgd"].Scalars, RULES["sgd"].scalars)


def test_a_literal_would_be_seen():
    assert returned(BROKEN, np.float32) == [["float64"]]


def test_a_rule_with_a_literal_does_not_compile(monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(fastopt.SGD, "select_rule", lambda self, options: BROKEN)
    w = np.ones(3, np.float32)
    opt = fastopt.SGD([w])
    with pytest.raises(numba.TypingError, match="float32"):
        opt.step([np.ones(3, np.float32)])
    assert (w == 1).all()
    assert opt.state["0"]["step"] == 0


# --- the library -----------------------------------------------------------------------------------------------------


def library():
    spec = importlib.util.find_spec("fastopt._native")
    if spec is None or spec.origin is None:
        pytest.skip("this fastopt was built without its compiled library")
    return spec.origin


def binutils(tool, *arguments):
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} (binutils) is not installed")
    return subprocess.run([tool, *arguments, library()], capture_output=True, text=True, check=True).stdout


@functools.cache
def functions():
    """Address and size of every function that the library exports."""
    found = {}
    for line in binutils("readelf", "--dyn-syms", "--wide").splitlines():
        fields = line.split()
        if len(fields) >= 8 and fields[3] == "FUNC" and fields[6] != "UND":
            found[fields[7].split("@")[0]] = int(fields[1], 16), int(fields[2], 0)
    return found


@functools.cache
def instructions():
    """Mnemonic and operands of every instruction of every exported function."""
    code = {}
    for line in binutils("objdump", "--disassemble", "--no-show-raw-insn", "--wide").splitlines():
        if match := re.match(r" *([0-9a-f]+):\t(?:(?:data16|cs|notrack|bnd|rep\w*|lock) )*(\S+) *(.*)", line):
            code[int(match[1], 16)] = match[2], match[3]
    places = sorted(code)
    starts = np.searchsorted(places, [start for start, _ in functions().values()])
    ends = np.searchsorted(places, [start + size for start, size in functions().values()])
    return {name: [code[place] for place in places[a:b]] for name, a, b in zip(functions(), starts, ends, strict=True)}


def mnemonics(symbol):
    """The mnemonics in a function; AVX's without their v, so that they compare with SSE's."""
    return {name.removeprefix("v") for name, _ in instructions()[symbol]}


def calls(symbol):
    """What a function calls or, at its end, jumps to."""
    start, size = functions()[symbol]
    targets = set()
    for name, operands in instructions()[symbol]:
        if name.startswith(("call", "j")):
            inside = re.match(r"[0-9a-f]+", operands) and start <= int(operands.split()[0], 16) < start + size
            if name.startswith("call") or not inside:
                targets.add(operands.split("<")[-1].rstrip(">").split("@")[0])
    return targets


needs_x86 = pytest.mark.skipif(_backend.load().isa == "native", reason="the library has other kernels than x86-64's")


@needs_x86
def test_every_kernel_is_in_the_library():
    wanted = {symbol_of("update", *update) for update in UPDATES} | {symbol_of("terms", *update) for update in TERMS}
    wanted |= {symbol_of("squares", dtype, isa) for dtype in COMPUTE for isa in _backend.ISAS}
    wanted |= {symbol_of("update", *epilogue) for epilogue in EPILOGUES}
    wanted |= {symbol_of("ratio", name, isa) for name in RULE_NAMES if RULES[name].ratio for isa in _backend.ISAS}
    wanted |= {symbol_of("schedule", isa) for isa in _backend.ISAS}
    parts = ("run", "isa", "layout", "default_threads", "look", "unchanged", "gradients", "release", "bump_versions")
    others = {f"fastopt_{part}" for part in parts}
    exported = {name for name in functions() if name.startswith("fastopt_")}
    assert wanted - exported == set()
    assert exported - wanted == others
    assert set(functions()) - exported <= {"_init", "_fini"}  # names that would clash with those of other libraries


@needs_x86
@pytest.mark.parametrize("isa", _backend.ISAS)
def test_arithmetic_is_packed(isa):
    for rule, p, g, _ in (update for update in UPDATES if update[3] == isa):
        symbol = symbol_of("update", rule, p, g, isa)
        kind = "pd" if p == "float64" else "ps"
        found = mnemonics(symbol)
        assert f"mul{kind}" in found, symbol
        assert {f"add{kind}", f"sub{kind}"} & found, symbol
        if rule in ROOTED and kind == "ps":  # two float64 roots at a time may not pay
            assert {"sqrtps", "divps"} <= found, symbol
        wide = {"x86-64-v2": "%xmm", "x86-64-v3": "%ymm", "x86-64-v4": "%[yz]mm"}[isa]
        packed = [operands for name, operands in instructions()[symbol] if name.endswith(f"mul{kind}")]
        assert any(re.search(wide, operands) for operands in packed), symbol


def arithmetic(*kinds):
    return {operation + kind for operation in ("add", "sub", "mul", "div", "sqrt") for kind in kinds}


@needs_x86
@pytest.mark.parametrize("isa", _backend.ISAS)
def test_float32_is_not_computed_in_float64(isa):
    for rule, p, g, _ in (update for update in UPDATES if update[3] == isa):
        wrong = arithmetic("ps", "ss") if p == "float64" else arithmetic("pd", "sd")
        if RULES[rule].ratio:  # the weight norm of the next step is taken in passing, and norms are added in float64
            wrong -= {"addpd", "addsd", "mulpd", "mulsd"}
        found = mnemonics(symbol_of("update", rule, p, g, isa)) & wrong
        assert not found, (rule, p, g, found)


@needs_x86
def test_nothing_is_contracted_or_approximated():
    fused = re.compile(r"v?fn?m(add|sub)|vfmaddsub|vfmsubadd")
    approximate = re.compile(r"v?(rsqrt|rcp)")
    for symbol, code in instructions().items():
        found = {m for m, _ in code if fused.match(m)}
        # In float64 the square of a narrower number is exact, so fusing it with the addition changes no bit.
        exact = re.match(r"fastopt_(squares|terms_lamb)_(?!float64)", symbol)
        assert not found or (exact and all(m.endswith("pd") for m in found)), (symbol, found)
        assert not [m for m, _ in code if approximate.match(m)], symbol


@needs_x86
def test_kernels_call_nothing():
    # The factors of a part of a block are a memset, and the tail of a norm is a memcpy.
    for update in UPDATES + EPILOGUES:
        assert calls(symbol_of("update", *update)) == set(), update
    assert not any(calls(symbol_of("terms", *update)) - {"memset"} for update in TERMS)
    for isa in _backend.ISAS:
        for dtype in COMPUTE:
            assert calls(symbol_of("squares", dtype, isa)) <= {"memcpy"}, (dtype, isa)
        for name in RULE_NAMES:
            if RULES[name].ratio:
                assert calls(symbol_of("ratio", name, isa)) == set(), (name, isa)


@needs_x86
@pytest.mark.parametrize("isa", _backend.ISAS)
@pytest.mark.parametrize("dtype", COPIES)
def test_rounding_is_packed(isa, dtype):
    wide = {"x86-64-v2": "%xmm", "x86-64-v3": "%ymm", "x86-64-v4": "%zmm"}[isa]
    symbol = symbol_of("update", "rounded", dtype, "float32", isa)
    conversions = [operands for name, operands in instructions()[symbol] if name == "vcvtps2ph"]
    shifts = [operands for name, operands in instructions()[symbol] if "psrld" in name]
    native = dtype == "float16" and isa != "x86-64-v2"
    assert any(wide in operands for operands in (conversions if native else shifts)), symbol


@needs_x86
def test_old_processors_meet_no_new_instruction():
    for symbol, code in instructions().items():
        if symbol.endswith("v2"):
            assert not [m for m, operands in code if m.startswith("v") or "%ymm" in operands], symbol
        elif symbol.endswith("v3"):
            assert not [m for m, operands in code if "%zmm" in operands or "%k" in operands], symbol
        elif not symbol.endswith("v4"):  # what is written in C runs everywhere
            assert not [m for m, operands in code if m.startswith("v")], symbol


def test_one_openmp_runtime_is_shared_under_its_plain_name():
    needed = re.findall(r"NEEDED.*\[(.+)\]", binutils("readelf", "--dynamic", "--wide"))
    assert "libgomp.so.1" in needed
    assert set(needed) <= {"libgomp.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert not re.search(r"R(UN)?PATH", binutils("readelf", "--dynamic", "--wide"))


def test_rooted_rules_are_found():
    assert {"adam", "rmsprop_centered_momentum", "adagrad", "adadelta"} <= set(ROOTED)
    assert not {"sgd", "lion", "rprop", "asgd", "lars"} & set(ROOTED)


@pytest.mark.parametrize("isa", _backend.ISAS)
def test_parameters_alone_are_prefetched_for_writing(isa):
    symbol = symbol_of("update", "adam", "float32", "float32", isa)
    lines = Counter(name for name, _ in instructions()[symbol] if "prefetch" in name)
    if isa == "x86-64-v2":  # which has no such instruction
        assert lines.keys() == {"prefetcht0"}
    else:
        assert lines["prefetcht0"] == 4 * lines["prefetchw"]  # gradient and two states, and the parameter once more
