"""The command line: ``fastopt info`` tells what this installation is, what it runs on, and how fast its memory is."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import statistics
import sys
import time

from .arrays import FlatBuffer
from .engine import backend
from .engine.cuda.info import cuda_facts
from .kernels.dtypes import PAIRS
from .kernels.registry import RULES
from .optimizers import SGD

BANDWIDTH_ELEMENTS = 32 * 2**20


def facts() -> dict[str, str]:
    """Name and value of each line."""
    chosen = backend.current()
    numba = _optional("numba", "needed to step" if chosen.isa == "numba" else "needed only for rules of your own")
    if chosen.isa != "numba":
        library = importlib.util.find_spec("fastopt._native")
        kernels = f"{len(RULES)} rules × {len(PAIRS)} dtype pairs, in {library and library.origin}"
    else:
        has_numba = importlib.util.find_spec("numba") is not None
        compiled = "compiled on first use" if has_numba else "none, for Numba is missing to compile them"
        kernels = f"{compiled}: {chosen.compiles}"
    return {
        "fastopt": importlib.metadata.version("fastopt"),
        "Python": f"{platform.python_version()} ({sys.executable})",
        "NumPy": importlib.metadata.version("numpy"),
        "machine": f"{platform.machine()}, {_processor()}",
        "instruction set": f"{chosen.isa} (FASTOPT_ISA chooses another)",
        "threads": f"{backend.get_num_threads()} (OMP_NUM_THREADS or fastopt.set_num_threads)",
        "kernels": kernels,
        "Numba": numba,
        "ml_dtypes": _optional("ml_dtypes", "needed for bfloat16 arrays"),
        "safetensors": _optional("safetensors", "needed for fastopt.save and fastopt.load"),
        **cuda_facts(),
        "memory bandwidth": bandwidth(),
    }


def bandwidth() -> str:
    """Speed of an update that reads three arrays and writes two, far larger than the caches."""
    try:
        params = FlatBuffer({"w": (BANDWIDTH_ELEMENTS,)})
        grads = params.zeros_like()
        opt = SGD(params, momentum=0.9)
        opt.step(grads)  # maps the pages
    except (ImportError, MemoryError) as error:
        return f"not measured: {error}"
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        opt.step(grads)
        seconds.append(time.perf_counter() - start)
    moved = 5 * params.nbytes
    middle, best = statistics.median(seconds), min(seconds)
    return f"{moved / middle / 1e9:.1f} GB/s (median of 7; best {moved / best / 1e9:.1f}): momentum on 32 Mi float32"


def _optional(package: str, why: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed, {why}: pip install {package}"


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
