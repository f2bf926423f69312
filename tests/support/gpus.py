"""The GPU that a test runs on: a real one for tests marked gpu, else the stand-in. Tests see no difference."""

import contextlib

import numpy as np

from fastopt.engine.cuda import device as cuda
from fastopt.engine.cuda import kernels


class StandInGpu:
    """Arrays and launches without a GPU; see cuda_stand_in.py."""

    def __init__(self, monkeypatch):
        import cuda_stand_in

        self._module = cuda_stand_in
        self.devices: dict[int, cuda_stand_in.StandIn] = {}
        monkeypatch.setattr(cuda, "CudaDevice", self.device)
        monkeypatch.setattr(cuda, "devices", lambda: (2, 0))
        monkeypatch.setattr(kernels, "ptx", lambda kind, rule, *dtypes: kernels.cuda_symbol(kind, rule.name, *dtypes))

    def device(self, number=0, source="cupy"):
        """A device, which counts what is asked of it."""
        return self.devices.setdefault(number, self._module.StandIn(number, source))

    def put(self, array, device=0):
        """A copy on the device."""
        return self._module.on_device(array, device)

    def get(self, array):
        """A copy on the host."""
        return np.array(self._module.on_host(array))

    @contextlib.contextmanager
    def capture(self):
        """A CUDA graph of what is done within; what it yields replays the graph."""
        with self.device().capture() as graph:
            yield lambda: [launch() for launch in graph] and None


class RealGpu:
    """The GPU of this machine."""

    def put(self, array, device=0):
        """A copy on the device."""
        import cupy

        with cupy.cuda.Device(device):
            return cupy.asarray(array)

    def get(self, array):
        """A copy on the host."""
        import cupy

        return cupy.asnumpy(array)

    @contextlib.contextmanager
    def capture(self):
        """A CUDA graph of what is done within; what it yields replays the graph."""
        import cupy

        stream, graphs = cupy.cuda.Stream(non_blocking=True), []

        def replay():
            cupy.cuda.runtime.deviceSynchronize()
            graphs[0].launch(stream)
            stream.synchronize()

        cupy.cuda.runtime.deviceSynchronize()
        with stream:
            stream.begin_capture()
            try:
                yield replay
            finally:
                graphs.append(stream.end_capture())


def forget_devices():
    """Make the next optimizer find its device anew."""
    cuda.device_at.cache_clear()
    kernels.load.cache_clear()
