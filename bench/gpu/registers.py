"""``python -m bench.gpu.registers``: what the driver makes of each kernel's PTX, and how long that takes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

WARP, THREADS = 32, 256
"""Threads of a warp, and of a block of an update."""


class Kernel(NamedTuple):
    """A kernel as it was loaded.

    Attributes:
        symbol: Name of the kernel.
        registers: Of a thread.
        local: Bytes of a thread in local memory: what was spilled.
        seconds: Time to translate and load it.
    """

    symbol: str
    registers: int
    local: int
    seconds: float

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor of 65,536 registers holds: a warp's are handed out 256 at a time."""
        of_a_warp = -(-self.registers * WARP // 256) * 256
        return min(65_536 // (of_a_warp * THREADS // WARP), 2048 // THREADS)


def load(cupy: Any, path: Path) -> Kernel:
    """Load a kernel from its PTX file."""
    began = time.perf_counter()
    kernel = cupy.RawModule(path=str(path)).get_function(path.stem)
    registers, local = int(kernel.num_regs), int(kernel.local_size_bytes)
    return Kernel(path.stem, registers, local, time.perf_counter() - began)


def main() -> int:
    """Print a line for each kernel of the package, those with the most registers first; 1 if one cannot be loaded."""
    import cupy

    from fastopt.engine.cuda.kernels import prebuilt_folder

    folder = prebuilt_folder()
    if folder is None:
        print("this build has no kernels for CUDA: FASTOPT_CUDA=1 pip install . makes them")
        return 1
    kernels, failed = [], 0
    for path in sorted(folder.glob("*.ptx")):
        try:
            kernels.append(load(cupy, path))
        except Exception as error:  # the others go on
            failed += 1
            print(f"{path.stem}: FAILED: {type(error).__name__}: {error}")
    for kernel in sorted(kernels, key=lambda kernel: (-kernel.registers, kernel.symbol)):
        spilled = f", {kernel.local} bytes spilled" if kernel.local else ""
        print(f"{kernel.symbol}: {kernel.registers} registers, {kernel.blocks} blocks of {THREADS}{spilled}")
    print(f"{len(kernels)} kernels loaded in {sum(kernel.seconds for kernel in kernels):.1f} s, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
