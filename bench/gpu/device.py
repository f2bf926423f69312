"""All that the benchmark asks of CuPy: memory by address, events, streams, graphs. And what machine this is."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray

L2_BYTES = 60_000_000  # of an H200
COPY_BYTES = 2**31


class NoGpu(Exception):
    """There is nothing to measure on; says why."""


class Gpu:
    """The current GPU."""

    torch_device = "cuda"

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise NoGpu(f'CuPy is missing: pip install -e ".[cuda12]", or ".[cuda13]" ({error})') from error
        self._cupy, self._runtime = cupy, cupy.cuda.runtime
        try:
            count = self._runtime.getDeviceCount()
        except self._runtime.CUDARuntimeError as error:
            raise NoGpu(f"there is no GPU ({error}); `fastopt info` says what is missing") from error
        if not count:
            raise NoGpu("there is no GPU; `fastopt info` says what is missing")
        self.default_stream: Any = cupy.cuda.Stream.null
        self.l2 = max(L2_BYTES, int(self.properties().get("l2CacheSize", 0)))
        self.copy_bytes = COPY_BYTES

    def properties(self) -> dict[str, Any]:
        """What CUDA tells about the GPU."""
        found: dict[str, Any] = self._runtime.getDeviceProperties(self._runtime.getDevice())
        return found

    def versions(self) -> dict[str, Any]:
        """Versions of CUDA as 1000 * major + 10 * minor: what the driver supports, what CuPy has; and CuPy's own."""
        return {
            "cuda driver": int(self._runtime.driverGetVersion()),
            "cuda runtime": int(self._runtime.runtimeGetVersion()),
            "cupy": str(self._cupy.__version__),
        }

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """A new array, not filled."""
        return self._cupy.empty(shape, dtype)

    def copy(self, to: int, source: int, nbytes: int, stream: Any = None) -> None:
        """Put a copy from one place on the GPU to another on a stream."""
        kind = self._runtime.memcpyDeviceToDevice
        self._runtime.memcpyAsync(to, source, nbytes, kind, (stream or self.default_stream).ptr)

    def write(self, to: int, array: NDArray[Any]) -> None:
        """Copy a contiguous array of the host to a place on the GPU."""
        self._runtime.memcpy(to, array.ctypes.data, array.nbytes, self._runtime.memcpyHostToDevice)

    def read(self, source: int, count: int, dtype: Any) -> NDArray[Any]:
        """The elements at a place on the GPU, which has to be idle."""
        array = np.empty(count, dtype)
        self._runtime.memcpy(array.ctypes.data, source, array.nbytes, self._runtime.memcpyDeviceToHost)
        return array

    def synchronize(self) -> None:
        """Wait for everything on the GPU."""
        self._runtime.deviceSynchronize()

    def idle(self) -> bool:
        """Whether everything on the default stream is done."""
        return bool(self.default_stream.done)

    def stream(self) -> AbstractContextManager[Any]:
        """A new stream; current in a ``with`` block."""
        made: AbstractContextManager[Any] = self._cupy.cuda.Stream(non_blocking=True)
        return made

    def capture(self, stream: Any, step: Callable[[], object]) -> Callable[[], None]:
        """What replays the CUDA graph of a step, which is not taken."""
        with stream:
            stream.begin_capture()
            try:
                step()
            finally:
                graph = stream.end_capture()
        return lambda: graph.launch(stream)

    def seconds(self, work: Callable[[], None], before: Callable[[Any], None], stream: Any = None) -> float:
        """Time on the GPU between two events around ``work``; the host gets ahead while ``before`` is running there."""
        stream = stream or self.default_stream
        start, stop = self._cupy.cuda.Event(), self._cupy.cuda.Event()
        before(stream)
        start.record(stream)
        work()
        stop.record(stream)
        stop.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(start, stop)) / 1e3

    def free(self) -> None:
        """Give back the memory of arrays that are gone."""
        gc.collect()
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._cupy.get_default_pinned_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()


def address(array: Any) -> int:
    """Where an array of CuPy or a tensor of torch begins."""
    return int(array.data_ptr() if hasattr(array, "data_ptr") else array.data.ptr)


def machine(gpu: Gpu) -> dict[str, Any]:
    """What was measured on."""
    import fastopt
    from fastopt.engine.cuda.kernels import cache_folder, prebuilt_folder

    properties = gpu.properties()
    folder = prebuilt_folder()
    return {
        "gpu": properties["name"].decode(),
        "memory": properties["totalGlobalMem"],
        "multiprocessors": properties["multiProcessorCount"],
        "capability": f"{properties['major']}.{properties['minor']}",
        "l2": gpu.l2,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"),
        **gpu.versions(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("numpy", "torch", "numba", "numba-cuda")},
        "fastopt": fastopt.__version__,
        "revision": _output("git", "rev-parse", "HEAD"),
        "kernels": cache_folder().name,  # a digest of their sources and the compiler's versions
        "prebuilt kernels": len(list(folder.glob("*.ptx"))) if folder else 0,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None
