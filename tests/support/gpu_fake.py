"""The GPU of the benchmark's tests: memory of the host, and a clock in the place of events."""

import contextlib
import ctypes
import time

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("cupy")

from bench.gpu import contenders as gpu_contenders
from bench.gpu.device import Gpu


class FakeGpu(Gpu):
    """Memory of the host, kernels in Numba's simulator, and a clock in the place of events."""

    torch_device = "cpu"

    def __init__(self, stand_in):
        self._stand_in = stand_in
        self.default_stream = None
        self.l2, self.copy_bytes = 100, 4096
        self.broken = False

    def properties(self):
        numbers = {"totalGlobalMem": 2**30, "multiProcessorCount": 2, "major": 9, "minor": 0}
        return {"name": b"stand-in", **numbers}

    def versions(self):
        return {"cuda driver": 13000, "cuda runtime": 13000, "cupy": "14.2.0"}

    def empty(self, shape, dtype):
        return self._stand_in.put(np.full(shape, 7, dtype))

    def copy(self, to, source, nbytes, stream=None):
        ctypes.memmove(to, source, nbytes)

    def write(self, to, array):
        ctypes.memmove(to, array.ctypes.data, array.nbytes)

    def read(self, source, count, dtype):
        array = np.empty(count, dtype)
        ctypes.memmove(array.ctypes.data, source, array.nbytes)
        return array

    def synchronize(self):
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    def idle(self):
        return False

    def stream(self):
        return contextlib.nullcontext()

    def capture(self, stream, step):
        with self._stand_in.device().capture() as graph:
            step()

        def replay():
            for launch in graph:
                launch()

        return replay

    def seconds(self, work, before, stream=None):
        before(stream)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def free(self):
        pass


ADAM = {"lr": 1e-3}
SMALL = {"w": (5, 7), "b": (3,)}


class Raises(gpu_contenders.Fastopt):
    def make(self):
        raise MemoryError("no room")
