"""Finds kernels: the PTX that came with the package, or what Numba makes of a rule, once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import warnings
from pathlib import Path

from ...files import replacing
from ...kernels.dtypes import cuda_symbol
from ...kernels.layout import THREADS
from ...kernels.registry import RULES
from ...kernels.rules.rule import Rule
from .device import CudaDevice, Function


@functools.cache
def load(device: CudaDevice, kind: str, rule: Rule, *dtypes: str) -> Function:
    """A kernel of a rule on a device, loaded once; see ``cuda_symbol``."""
    return device.function(ptx(kind, rule, *dtypes), cuda_symbol(kind, rule.name, *dtypes), THREADS)


def prebuilt_folder() -> Path | None:
    """Where the package's PTX lies, beside the compiled library (in an editable install away from the sources)."""
    spec = importlib.util.find_spec("fastopt._native")
    folder = Path(spec.origin).parent / "ptx" if spec is not None and spec.origin else None
    return folder if folder is not None and folder.is_dir() else None


@functools.cache
def ptx(kind: str, rule: Rule, *dtypes: str) -> str:
    """The PTX of a kernel: from the package, from the cache of an earlier process, or compiled now."""
    symbol = cuda_symbol(kind, rule.name, *dtypes)
    if RULES.get(rule.name) is not rule:  # of the user's: what it closes over cannot be told from its name
        return _compiled(kind, rule, *dtypes)
    kept = cache_folder() / f"{symbol}.ptx"
    for folder in (prebuilt_folder(), kept.parent):
        if folder is not None and (folder / kept.name).is_file():
            return (folder / kept.name).read_text()
    text = _compiled(kind, rule, *dtypes)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(str(kept)) as file:  # whole or not at all: another process may be looking
            file.write(text.encode())
    except OSError as error:
        warnings.warn(
            f"fastopt: {symbol} was compiled for this process only, because it cannot be kept ({error}). Name a "
            "folder that can be written in FASTOPT_CACHE_DIR.",
            stacklevel=2,
        )
    return text


def _compiled(kind: str, rule: Rule, *dtypes: str) -> str:
    try:
        from ...kernels.cuda import compile as compiler
    except ImportError as error:
        raise ImportError(
            f"fastopt: {cuda_symbol(kind, rule.name, *dtypes)} is not among the package's kernels, and compiling it "
            "now needs Numba's CUDA package: "
            f'pip install "numba-cuda[cu12]", or "numba-cuda[cu13]" for CUDA 13 ({error})'
        ) from error
    return compiler.kernel_ptx(kind, rule, *dtypes)


@functools.cache
def cache_folder() -> Path:
    """Where kernels compiled on first use are kept: FASTOPT_CACHE_DIR, else ~/.cache/fastopt. Whatever shapes the PTX
    has a part in the name: the sources of the kernels, and the versions of Numba, LLVM and NVVM."""
    spec = importlib.util.find_spec("fastopt.kernels")
    assert spec is not None
    assert spec.origin is not None
    digest = hashlib.sha256()
    for source in sorted(Path(spec.origin).parent.glob("**/*.py")):
        digest.update(source.read_bytes())
    for package in ("numba", "numba-cuda", "llvmlite", "nvidia-cuda-nvcc-cu12", "nvidia-nvvm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(importlib.metadata.version(package).encode())
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    digest.update(os.path.realpath(toolkit).encode())  # its NVVM is used where no package brings one
    folder = os.environ.get("FASTOPT_CACHE_DIR")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastopt")
    return Path(folder, digest.hexdigest()[:16])
