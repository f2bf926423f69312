"""A GPU without one: arrays are CuPy's own, over host memory, and kernels run in Numba's simulator, or, where that is
off (NUMBA_ENABLE_CUDASIM=0), compiled for the CPU.

Only what needs a driver is stood in for, which is what fastopt/engine/cuda/device.py asks of CuPy.
"""

import contextlib
import ctypes
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np
from numba.cuda.core import config

from fastopt.engine.cuda.device import CudaDevice

if config.ENABLE_CUDASIM:
    from cuda_simulator import allow, kernel_of, launch

    def run(symbol, blocks, arguments):
        """Launch a kernel; it is done when this returns."""
        kernel, threads = kernel_of(symbol)
        launch(kernel, blocks, arguments, threads)
else:
    import cuda_compiled

    def allow(array):
        """Compiled code cannot be kept from reading anything."""
        return array

    def run(symbol, blocks, arguments):
        """Launch a kernel; it is done when this returns."""
        cuda_compiled.kernel_of(symbol).launch(blocks, arguments)


def on_device(array, device=0):
    """A CuPy array with the values of a NumPy array, in host memory that says it is a GPU's."""
    values = np.asarray(array, order="C")  # ascontiguousarray would give a scalar a dimension
    memory = np.zeros(values.nbytes + 512, np.uint8)
    start = -memory.ctypes.data % 256
    memory[start : start + values.nbytes] = values.reshape(-1).view(np.uint8)
    allow(memory)
    block = cupy.cuda.UnownedMemory(memory.ctypes.data + start, max(values.nbytes, 1), memory, device)
    return cupy.ndarray(values.shape, values.dtype, cupy.cuda.MemoryPointer(block, 0))


def on_host(array):
    """A view of the memory of such an array."""
    extent = array.nbytes if array.flags.c_contiguous else array.base.nbytes
    memory = (ctypes.c_uint8 * extent).from_address(array.data.ptr)
    flat = np.frombuffer(memory, array.dtype)
    return (
        np.lib.stride_tricks.as_strided(flat, array.shape, array.strides) if array.size else flat.reshape(array.shape)
    )


class StandIn(CudaDevice):
    """Such a GPU. It counts what a step does: launches by kernel, bytes uploaded, downloads."""

    def __init__(self, index, source):
        super().__init__(index, source)
        self.launches: list[str] = []
        self.blocks: list[int] = []
        self.uploads: list[int] = []
        self.downloads = 0
        self.graph: list[Any] | None = None  # what is captured
        self.room = 2**40

    def selected(self):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def current(self):
        yield

    def stream(self):
        return SimpleNamespace(ptr=2)

    def capturing(self, stream=None):
        return self.graph is not None

    def address(self, array):
        return array.ctypes.data if isinstance(array, np.ndarray) else super().address(array)

    def free_memory(self):
        return self.room, 2**40

    def empty(self, size, dtype, stream):
        if size * dtype.itemsize > self.room:
            raise MemoryError("out of memory")
        self.room -= size * dtype.itemsize
        return on_device(np.full(size, np.nan, dtype), self.index)

    def upload(self, array):
        self.refuse_capture()
        return on_device(array, self.index)

    def download(self, array, stream=None):
        self.downloads += 1
        return on_host(array).copy()

    def assign(self, view, values):
        on_host(view)[...] = on_host(values) if isinstance(values, cupy.ndarray) else values

    def copy(self, array):
        return on_device(on_host(array), self.index)

    def pinned(self, nbytes):
        return np.zeros(nbytes, np.uint8)

    def send(self, address, source, stream):
        if self.graph is not None:
            self.graph.append(lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes))
            return
        self.uploads.append(source.nbytes)
        ctypes.memmove(address, source.ctypes.data, source.nbytes)

    def event(self, stream):
        assert self.graph is None, "what is copied from host memory would be frozen into the graph"
        return SimpleNamespace(done=True)

    def function(self, ptx, symbol, threads):
        assert ptx == symbol  # see gpus.py

        def launch(blocks, arguments, stream):
            assert all(type(x) in (int, float) for x in arguments), arguments
            self.launches.append(symbol)
            self.blocks.append(blocks)
            if self.graph is not None:
                self.graph.append(lambda: run(symbol, blocks, arguments))
            else:
                run(symbol, blocks, arguments)

        return launch

    @contextlib.contextmanager
    def capture(self):
        """Launches within are not run but kept, with their arguments, as a CUDA graph keeps them."""
        self.graph = graph = []
        try:
            yield graph
        finally:
            self.graph = None
