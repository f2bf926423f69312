"""Where kernels for GPUs come from: the package, a cache, or Numba at first use. No GPU is needed to compile them."""

import contextlib
import importlib.metadata
import sys
from typing import NamedTuple
from unittest.mock import Mock

import fastopt.kernels.cuda
import pytest
from fastopt.kernels.registry import RULES
from fresh import python
from refusal import refused

import fastopt
from fastopt.engine.cuda import kernels
from fastopt.engine.cuda.device import CudaDevice


class Scalars(NamedTuple):
    text: str


COMPILE = """
import functools, math, os, time
from typing import NamedTuple
import fastopt
from fastopt.engine.cuda import kernels
from fastopt.kernels.registry import RULES
from fastopt.kernels.rules.rule import Option

kernels.prebuilt_folder = lambda: None
class Scalars(NamedTuple):
    lr: float
update, prologue = (functools.partial(kernels.ptx, kind) for kind in ("update", "prologue"))
"""


def run(program, cache):
    """What a process without the simulator prints."""
    pytest.importorskip("numba_cuda")
    return python(COMPILE + program, timeout=None, NUMBA_ENABLE_CUDASIM="0", FASTOPT_CACHE_DIR=str(cache))


@pytest.mark.full
def test_a_rule_of_the_package_is_compiled_once_for_all_processes(tmp_path):
    program = "print(update(RULES['sgd'], 'float32', 'float16') + prologue(RULES['sgd']))"
    texts = run(program, tmp_path)
    (folder,) = tmp_path.iterdir()
    paths = [folder / "fastopt_cuda_sgd_float32_float16.ptx", folder / "fastopt_cuda_prologue_sgd.ptx"]
    assert {*folder.iterdir()} == {*paths}  # nothing half-written
    for path in paths:
        assert f".entry {path.stem}(" in path.read_text()
    assert texts.strip() == "".join(path.read_text() for path in paths).strip()
    for path in paths:
        path.write_text("as it was left")
    assert run(program, tmp_path).strip() == 2 * "as it was left"


@pytest.mark.full
def test_an_own_rule_is_compiled_by_each_process(tmp_path):
    program = """
def sign(p, g, h):
    return (p - math.copysign(h.lr, g),)
mine = fastopt.Rule("sgd", sign, Scalars, lambda t, o: Scalars(o["lr"]), options={"lr": Option()})
text = update(mine, "float32", "float32")
print(".entry fastopt_cuda_sgd_float32_float32(" in text, ".entry fastopt_cuda_prologue_sgd(" in prologue(mine))
"""
    assert run(program, tmp_path).split() == ["True", "True"]
    assert list(tmp_path.iterdir()) == []


def test_an_own_rule_that_takes_the_place_of_another_has_a_kernel_of_its_own(monkeypatch):
    """Whether or not the first was loaded, and with the same address in memory."""
    monkeypatch.setattr(kernels, "_compiled", lambda kind, rule, *_: rule.scalars(1, {})[0])
    for text in map(str, range(10)):
        rule = fastopt.Rule("mine", lambda p, g, h: (p,), Scalars, lambda t, options, text=text: Scalars(text))
        assert kernels.ptx("update", rule, "float32", "float32") == text
        del rule


@pytest.mark.full
def test_a_rule_that_computes_in_another_dtype_is_refused(tmp_path):
    program = """
def half(p, g, h):
    return (p - 0.5 * h.lr * g,)
mine = fastopt.Rule("half", half, Scalars, lambda t, o: Scalars(o["lr"]))
try:
    update(mine, "float32", "float32")
except TypeError as error:
    print(error)
"""
    assert "Rule 'half' computes in float64 for float32 parameters" in run(program, tmp_path)


def test_without_numbas_cuda_package_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "prebuilt_folder", lambda: None)
    monkeypatch.setattr(kernels, "cache_folder", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "fastopt.kernels.cuda.compile", None)
    monkeypatch.delattr(fastopt.kernels.cuda, "compile", raising=False)  # another test may have imported it
    with refused(ImportError, "fastopt_cuda_adam_float32_float32", 'pip install "numba-cuda[cu12]"'):
        kernels.ptx("update", RULES["adam"], "float32", "float32")
    assert list(tmp_path.iterdir()) == []


def compile_sgd(monkeypatch, cache):
    """Where a kernel is kept whose compilation takes no time."""
    monkeypatch.setattr(kernels, "prebuilt_folder", lambda: None)
    monkeypatch.setattr(kernels, "_compiled", lambda *_: "text")
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(cache))
    kernels.cache_folder.cache_clear()
    kernels.ptx.cache_clear()
    try:
        assert kernels.ptx("update", RULES["sgd"], "float32", "float32") == "text"
        assert kernels.ptx("update", RULES["sgd"], "float32", "float32") == "text"  # without another warning
        return kernels.cache_folder() / "fastopt_cuda_sgd_float32_float32.ptx"
    finally:
        kernels.cache_folder.cache_clear()
        kernels.ptx.cache_clear()


def test_cached_kernels_can_be_read_by_whom_the_umask_lets(monkeypatch, tmp_path):
    (tmp_path / "usual").touch()
    assert compile_sgd(monkeypatch, tmp_path).stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_where_nothing_can_be_kept_kernels_last_as_long_as_the_process(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    said = r"compiled for this process only.*Not a directory.*FASTOPT_CACHE_DIR"
    with pytest.warns(UserWarning, match=said) as warned:
        compile_sgd(monkeypatch, tmp_path / "file")
    assert len(warned) == 1


@pytest.mark.parametrize("package", ["numba-cuda", "nvidia-cuda-nvcc-cu12", "nvidia-nvvm"])
def test_another_compiler_has_a_cache_of_its_own(monkeypatch, tmp_path, package):
    before = compile_sgd(monkeypatch, tmp_path)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == package else version(name))
    assert compile_sgd(monkeypatch, tmp_path).parent != before.parent


def test_a_driver_that_refuses_the_ptx_is_told_of(monkeypatch):
    class DriverError(RuntimeError):
        pass

    fake = Mock()
    fake.cuda.driver.CUDADriverError = DriverError
    fake.cuda.Module.return_value.load.side_effect = DriverError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
    monkeypatch.setattr("fastopt.engine.cuda.device.cupy", lambda: fake)
    device = CudaDevice(0, "cupy")
    monkeypatch.setattr(device, "current", contextlib.nullcontext)
    with refused(RuntimeError, "cuda:0", "UNSUPPORTED_PTX_VERSION", "compute capability 7.5", "driver for CUDA 11"):
        device.function("PTX", "adam", 256)
