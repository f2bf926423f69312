"""Finds kernels: the PTX that came with the package, or what Numba makes of a rule, once."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

from ...files import replacing
from ...kernels.dtypes import cuda_prologue_symbol, cuda_terms_symbol, cuda_update_symbol
from ...kernels.layout import THREADS
from ...kernels.registry import RULES
from ...kernels.rules.rule import Rule
from .device import CudaDevice, Function

SYMBOLS: dict[str, Callable[..., str]] = {
    "update": cuda_update_symbol,
    "terms": cuda_terms_symbol,
    "prologue": cuda_prologue_symbol,
}
"""Kinds of kernels, and how one for a rule and, but for a prologue, two dtypes is called."""


@functools.cache
def kernels_of(device: CudaDevice) -> Kernels:
    """The kernels of a device."""
    return Kernels(device)


class Kernels:
    """The kernels of one device, each loaded once."""

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._loaded: dict[tuple[object, ...], Function] = {}

    def update(self, rule: Rule, p: str, g: str) -> Function:
        """The update of a rule for parameters stored as p and gradients stored as g."""
        return self._load("update", rule, p, g)

    def terms(self, rule: Rule, p: str, g: str) -> Function:
        """Sums of a rule's terms, and the ratios by them."""
        return self._load("terms", rule, p, g)

    def prologue(self, rule: Rule) -> Function:
        """Norms, and what a rule makes of them."""
        return self._load("prologue", rule)

    def _load(self, kind: str, rule: Rule, *dtypes: str) -> Function:
        key = (kind, rule, *dtypes)
        if key not in self._loaded:
            path, symbol = ptx_file(kind, rule, *dtypes), SYMBOLS[kind](rule.name, *dtypes)
            self._loaded[key] = self._device.function(str(path), symbol, THREADS)
        return self._loaded[key]


def prebuilt_folder() -> Path | None:
    """Where the package's PTX lies, beside the compiled library (in an editable install away from the sources)."""
    spec = importlib.util.find_spec("fastopt._native")
    folder = Path(spec.origin).parent / "ptx" if spec is not None and spec.origin else None
    return folder if folder is not None and folder.is_dir() else None


def ptx_file(kind: str, rule: Rule, *dtypes: str) -> Path:
    """The PTX of a kernel: from the package, from the cache of an earlier process, or compiled now."""
    symbol = SYMBOLS[kind](rule.name, *dtypes)
    if RULES.get(rule.name) is not rule:  # of the user's: what it closes over cannot be told from its name
        return _of_own_rule(kind, rule, *dtypes)
    for folder in (prebuilt_folder(), cache_folder(), _session_folder()):
        if folder is not None and (folder / f"{symbol}.ptx").is_file():
            return folder / f"{symbol}.ptx"
    text = _compiled(kind, rule, *dtypes)
    try:
        return _write(cache_folder() / f"{symbol}.ptx", text)
    except OSError as error:
        warnings.warn(
            f"fastopt: {symbol} was compiled for this process only, because it cannot be kept ({error}). Name a "
            "folder that can be written in FASTOPT_CACHE_DIR.",
            stacklevel=2,
        )
    return _write(_session_folder() / f"{symbol}.ptx", text)


@functools.cache  # which keeps the rule: no other one gets its id
def _of_own_rule(kind: str, rule: Rule, *dtypes: str) -> Path:
    path = _session_folder() / f"{SYMBOLS[kind](rule.name, *dtypes)}.{id(rule)}.ptx"
    return _write(path, _compiled(kind, rule, *dtypes))


def _compiled(kind: str, rule: Rule, *dtypes: str) -> str:
    try:
        from ...kernels.cuda import compile as compiler
    except ImportError as error:
        raise ImportError(
            f"fastopt: {SYMBOLS[kind](rule.name, *dtypes)} is not among the package's kernels, and compiling it now "
            "needs Numba's CUDA package: "
            f'pip install "numba-cuda[cu12]", or "numba-cuda[cu13]" for CUDA 13 ({error})'
        ) from error
    text: str = getattr(compiler, f"{kind}_ptx")(rule, *dtypes)
    return text


@functools.cache
def _session_folder() -> Path:
    folder, process = tempfile.mkdtemp(prefix="fastopt-"), os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # a fork leaves it to its parent
            shutil.rmtree(folder)

    atexit.register(remove)
    return Path(folder)


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


def _write(path: Path, text: str) -> Path:
    """Whole or not at all: another process may be looking."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(str(path)) as file:
        file.write(text.encode())
    return path
