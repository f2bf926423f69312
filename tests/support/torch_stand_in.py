"""The GPUs of torch's tests: real ones, or tensors on the CPU that fastopt.torch takes for tensors on GPUs.

torch's build for the CPU cannot make others. What a tensor says of its device stays "cpu"; all else is as on a GPU:
plans, uploads, launches, and what is waited for.
"""

import contextlib
import sys

import gpus
import torch
from torch.utils.weak import WeakIdKeyDictionary

from fastopt.engine.device import HOST
from fastopt.torch import _devices


class TorchGpus:
    """Two GPUs for torch; ``put`` says which tensors are there. cuda_stand_in.py stands in for them."""

    type = "cpu"  # of a GradScaler

    def __init__(self, monkeypatch):
        self._there = WeakIdKeyDictionary()
        self._stand_in = gpus.StandInGpu(monkeypatch)
        self.capture = self._stand_in.capture
        import cuda_stand_in

        monkeypatch.setattr(_devices, "device_of", self._device_of)
        monkeypatch.setattr(_devices, "tensor_of", lambda array, _: torch.from_numpy(cuda_stand_in.on_host(array)))
        if "cuda_simulator" in sys.modules:  # which knows only of the arrays that the stand-in makes
            monkeypatch.setattr(sys.modules["cuda_simulator"], "is_allowed", lambda address, size: True)

    def runtime(self, device=0):
        """A GPU, which counts what is asked of it."""
        stand_in = self._stand_in.device(device, "torch")
        stand_in.name = "cpu"  # as tensors say
        return stand_in

    def put(self, tensors, device=0):
        """The same tensors, from now on taken for tensors on a GPU."""
        for tensor in tensors:
            self._there[tensor] = device
        return tensors

    def take_back(self, tensors):
        """The same tensors, from now on on the CPU."""
        for tensor in tensors:
            self._there.pop(tensor, None)
        return tensors

    def launched(self):
        """Whether a kernel ran."""
        return bool(self.runtime().launches)

    def downloads(self, device=0):
        """How many times the host waited for results of the GPU."""
        return int(self.runtime(device).downloads)

    def _device_of(self, tensor):
        index = self._there.get(tensor)
        return HOST if index is None else self.runtime(index)


class RealTorchGpus:
    """The GPUs of this machine; one serves as two."""

    type = "cuda"

    def put(self, tensors, device=0):
        """The same tensors, with their data on a GPU."""
        for tensor in tensors:
            tensor.data = tensor.data.to(f"cuda:{device % torch.cuda.device_count()}")
        return tensors

    def take_back(self, tensors):
        """The same tensors, with their data on the CPU."""
        for tensor in tensors:
            tensor.data = tensor.data.cpu()
        return tensors

    def launched(self):
        """Nothing else can step what is there."""
        return True

    def downloads(self, device=0):
        """Not counted: in test_gpu_only.py torch raises where it would wait."""
        return 0

    @contextlib.contextmanager
    def capture(self):
        """A CUDA graph of what is done within; what it yields replays the graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            yield graph.replay


def torch_gpus(monkeypatch, *, real):
    """For a fixture."""
    gpus.forget_devices()
    yield RealTorchGpus() if real else TorchGpus(monkeypatch)
    gpus.forget_devices()
