"""A GPU without one: arrays are CuPy's own, over host memory, and kernels run in Numba's simulator, or, where that is
off (NUMBA_ENABLE_CUDASIM=0), compiled for the CPU.

Only what needs a driver is stood in for, which is what fastopt/engine/cuda/runtime.py asks of CuPy.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
from numba.cuda.core import config
from numpy.typing import NDArray

from fastopt.engine.cuda.runtime import Function, Runtime

if config.ENABLE_CUDASIM:
    from cuda_simulator import allow, kernel_of, launch

    def run(symbol: str, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel; it is done when this returns."""
        kernel, threads = kernel_of(symbol)
        launch(kernel, blocks, arguments, threads)
else:
    import cuda_compiled

    def allow(array: NDArray[Any]) -> NDArray[Any]:
        """Compiled code cannot be kept from reading anything."""
        return array

    def run(symbol: str, blocks: int, arguments: tuple[Any, ...]) -> None:
        """Launch a kernel; it is done when this returns."""
        cuda_compiled.kernel_of(symbol).launch(blocks, arguments)


def on_device(array: Any, device: int = 0) -> Any:
    """A CuPy array with the values of a NumPy array, in host memory that says it is a GPU's."""
    values = np.asarray(array, order="C")  # ascontiguousarray would give a scalar a dimension
    memory = np.zeros(values.nbytes + 512, np.uint8)
    start = -memory.ctypes.data % 256
    memory[start : start + values.nbytes] = values.reshape(-1).view(np.uint8)
    allow(memory)
    block = cupy.cuda.UnownedMemory(memory.ctypes.data + start, max(values.nbytes, 1), memory, device)
    return cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(block, 0))


def on_host(array: Any) -> NDArray[Any]:
    """A view of the memory of such an array."""
    extent = array.nbytes if array.flags.c_contiguous else array.base.nbytes
    memory = (ctypes.c_uint8 * extent).from_address(array.data.ptr)
    flat = np.frombuffer(memory, array.dtype)
    return (
        np.lib.stride_tricks.as_strided(flat, array.shape, array.strides) if array.size else flat.reshape(array.shape)
    )


class StandIn(Runtime):
    """The runtime of such a GPU. It counts what a step does: launches by kernel, bytes uploaded, downloads."""

    def __init__(self, device: int = 0, library: str = "cupy") -> None:
        super().__init__(device, library)
        self.launches: list[str] = []
        self.blocks: list[int] = []
        self.uploads: list[int] = []
        self.downloads = 0
        self.graph: list[Any] | None = None  # what is captured
        self.room = 2**40

    def selected(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        yield

    def stream(self) -> Any:
        return SimpleNamespace(ptr=2)

    def capturing(self, stream: Any) -> bool:
        return self.graph is not None

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Any:
        if size * dtype.itemsize > self.room:
            raise MemoryError("out of memory")
        self.room -= size * dtype.itemsize
        return on_device(np.zeros(size, dtype), self.device)

    def free_memory(self) -> tuple[int, int]:
        return self.room, 2**40

    def empty(self, size: int, dtype: np.dtype[Any], stream: Any) -> Any:
        return on_device(np.full(size, np.nan, dtype), self.device)

    def upload(self, array: NDArray[Any]) -> Any:
        self.refuse_capture(self.stream())
        return on_device(array, self.device)

    def download(self, array: Any, stream: Any = None) -> NDArray[Any]:
        self.downloads += 1
        return on_host(array).copy()

    def assign(self, view: Any, values: Any) -> None:
        on_host(view)[...] = on_host(values) if isinstance(values, cupy.ndarray) else values

    def copy_of(self, array: Any) -> Any:
        return on_device(on_host(array), self.device)

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        return np.zeros(nbytes, np.uint8)

    def copy(self, address: int, source: NDArray[np.uint8], stream: Any) -> Any:
        assert self.graph is None, "what is copied from host memory would be frozen into the graph"
        self.uploads.append(source.nbytes)
        ctypes.memmove(address, source.ctypes.data, source.nbytes)
        return SimpleNamespace(done=True)

    def copy_in_graph(self, address: int, source: NDArray[np.uint8], stream: Any) -> None:
        assert self.graph is not None
        self.graph.append(lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes))

    def function(self, path: str, symbol: str, threads: int) -> Function:
        assert Path(path).stem.startswith(symbol)

        def launch(blocks: int, arguments: tuple[Any, ...], stream: Any) -> None:
            assert all(type(x) in (int, float) for x in arguments), arguments
            self.launches.append(symbol)
            self.blocks.append(blocks)
            if self.graph is not None:
                self.graph.append(lambda: run(symbol, blocks, arguments))
            else:
                run(symbol, blocks, arguments)

        return launch

    @contextlib.contextmanager
    def capture(self) -> Iterator[list[Any]]:
        """Launches within are not run but kept, with their arguments, as a CUDA graph keeps them."""
        self.graph = graph = []
        try:
            yield graph
        finally:
            self.graph = None
