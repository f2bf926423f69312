"""The GPU of the benchmark's tests: memory of the host, and a clock in the place of events."""

import contextlib
import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("cupy")

from bench.gpu import contenders as gpu_contenders
from bench.gpu.device import Gpu


class FakeGpu(Gpu):
    """Memory of the host, kernels in Numba's simulator, and a clock in the place of events."""

    torch_device = "cpu"

    def __init__(self, stand_in: Any) -> None:
        self._stand_in = stand_in
        self.default_stream = None
        self.l2, self.copy_bytes = 100, 4096
        self.broken = False

    def properties(self) -> dict[str, Any]:
        numbers = {"totalGlobalMem": 2**30, "multiProcessorCount": 2, "major": 9, "minor": 0}
        return {"name": b"stand-in", **numbers}

    def versions(self) -> dict[str, Any]:
        return {"cuda driver": 13000, "cuda runtime": 13000, "cupy": "14.2.0"}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._stand_in.put(np.full(shape, 7, dtype))

    def copy(self, to: int, source: int, nbytes: int, stream: Any = None) -> None:
        ctypes.memmove(to, source, nbytes)

    def write(self, to: int, array: Any) -> None:
        ctypes.memmove(to, array.ctypes.data, array.nbytes)

    def read(self, source: int, count: int, dtype: Any) -> Any:
        array = np.empty(count, dtype)
        ctypes.memmove(array.ctypes.data, source, array.nbytes)
        return array

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("an illegal memory access was encountered")

    def idle(self) -> bool:
        return False

    def stream(self) -> Any:
        return contextlib.nullcontext()

    def capture(self, stream: Any, step: Callable[[], object]) -> Callable[[], None]:
        with self._stand_in.device().capture() as graph:
            step()

        def replay() -> None:
            for launch in graph:
                launch()

        return replay

    def seconds(self, work: Callable[[], None], before: Callable[[Any], None], stream: Any = None) -> float:
        before(stream)
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def free(self) -> None:
        pass


ADAM = {"lr": 1e-3}
SMALL = {"w": (5, 7), "b": (3,)}


class Raises(gpu_contenders.Fastopt):
    def make(self) -> Any:
        raise MemoryError("no room")
