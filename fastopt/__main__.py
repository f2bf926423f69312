"""The command line: ``fastopt info`` tells what this installation is, what it runs on, and how fast its memory is."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import platform
import statistics
import sys
import timeit

from .arrays import FlatBuffer
from .engine import backend
from .engine.cuda.device import cupy
from .engine.cuda.kernels import cache_folder, prebuilt_folder
from .engine.library import library_path
from .kernels.dtypes import PAIRS
from .kernels.registry import RULES
from .optimizers import SGD

BANDWIDTH_ELEMENTS = 32 * 2**20


def facts() -> dict[str, str]:
    """Name and value of each line."""
    chosen = backend.current()
    why, kernels = "only for rules of your own", f"{len(RULES)} rules × {len(PAIRS)} dtype pairs, in {library_path()}"
    if chosen.isa == "numba":
        missing = importlib.util.find_spec("numba") is None
        compiled = "none, for Numba is missing to compile them" if missing else "compiled on first use"
        why, kernels = "to step", f"{compiled}: {chosen.compiles}"
    return {
        "fastopt": importlib.metadata.version("fastopt"),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "NumPy": importlib.metadata.version("numpy"),
        "machine": f"{platform.machine()}, {_processor()}",
        "instruction set": f"{chosen.isa} (FASTOPT_ISA chooses another)",
        "threads": f"{backend.get_num_threads()} (OMP_NUM_THREADS or fastopt.set_num_threads)",
        "kernels": kernels,
        "Numba": _package("numba", why),
        "ml_dtypes": _package("ml_dtypes", "for bfloat16 arrays"),
        "safetensors": _package("safetensors", "for fastopt.save and fastopt.load"),
        **cuda_facts(),
        "memory bandwidth": bandwidth(),
    }


def cuda_facts() -> dict[str, str]:
    """Those about GPUs: what there is, or what brings it."""
    driver, folder = _driver_version(), prebuilt_folder()
    numba = _package("numba-cuda", "for that", f'"numba-cuda[cu{13 if driver >= 13000 else 12}]"')
    compiled = f"compiled on first use, into {cache_folder()}; numba-cuda: {numba}"
    return {
        "CUDA driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "not found; ask nvidia-smi",
        "GPUs": _gpus(),
        "CUDA kernels": compiled if folder is None else f"{len([*folder.glob('*.ptx')])} prebuilt, in {folder}",
    }


def _driver_version() -> int:
    """The CUDA version that the driver supports, such as 12080 for 12.8; 0 without a driver."""
    version = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def _gpus() -> str:
    try:
        runtime = cupy().cuda.runtime
        each = [runtime.getDeviceProperties(k) for k in range(runtime.getDeviceCount())]
        names = [f"{x['name'].decode()} (sm_{x['major']}{x['minor']}, {x['totalGlobalMem'] >> 30} GiB)" for x in each]
        return f"{', '.join(names)}; CuPy {cupy().__version__}"
    except Exception as error:  # each broken installation fails in its own way, and info must go on
        return f"not usable: {error}"


def bandwidth() -> str:
    """Speed of an update that reads three arrays and writes two, far larger than the caches."""
    try:
        params = FlatBuffer({"w": (BANDWIDTH_ELEMENTS,)})
        grads = params.zeros_like()
        opt = SGD(params, momentum=0.9)
        opt.step(grads)  # maps the pages
    except (ImportError, MemoryError) as error:
        return f"not measured: {error}"
    speeds = [5e-9 * params.nbytes / seconds for seconds in timeit.repeat(lambda: opt.step(grads), number=1, repeat=7)]
    return f"{statistics.median(speeds):.1f} GB/s (median of 7; best {max(speeds):.1f}): momentum on 32 Mi float32"


def _package(name: str, why: str, command: str | None = None) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed, needed {why}: pip install {command or name}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
            return next(names, "unknown processor")
    except OSError:
        return "unknown processor"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="fastopt", description="The update step of training as fast as memory allows."
    )
    parser.add_argument("--version", action="version", version=f"fastopt {importlib.metadata.version('fastopt')}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="version, instruction set, threads, kernels, optional packages, memory bandwidth")
    parser.parse_args(argv)
    lines = facts()
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
