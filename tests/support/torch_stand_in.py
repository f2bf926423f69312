"""Tensors on the CPU that fastopt.torch takes for tensors on GPUs, which cuda_stand_in.py stands in for.

torch's build for the CPU cannot make others. What a tensor says of its device stays "cpu"; all else is as on a GPU:
plans, uploads, launches, and what is waited for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import gpus
import pytest
import torch
from torch.utils.weak import WeakIdKeyDictionary

from fastopt.torch import _devices


class TorchGpus:
    """Two GPUs for torch; ``put`` says which tensors are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._there: Any = WeakIdKeyDictionary()
        self._stand_in = gpus.StandInGpu(monkeypatch)
        self._homes: dict[int, _devices.Gpu] = {}
        import cuda_stand_in

        monkeypatch.setattr(_devices, "home_of", self._home_of)
        monkeypatch.setattr(_devices.Gpu, "tensor", lambda _, array: torch.from_numpy(cuda_stand_in.on_host(array)))
        if "cuda_simulator" in sys.modules:  # which knows only of the arrays that the stand-in makes
            monkeypatch.setattr(sys.modules["cuda_simulator"], "_is_allowed", lambda address, size: True)

    def runtime(self, device: int = 0) -> Any:
        """The runtime of a GPU, which counts what is asked of it."""
        return self._stand_in.device(device, "torch")

    def put(self, tensors: Any, device: int = 0) -> Any:
        """The same tensors, from now on taken for tensors on a GPU."""
        for tensor in tensors:
            self._there[tensor] = device
        return tensors

    def take_back(self, tensors: Any) -> Any:
        """The same tensors, from now on on the CPU."""
        for tensor in tensors:
            self._there.pop(tensor, None)
        return tensors

    def _home_of(self, tensor: torch.Tensor) -> _devices.Home:
        device = self._there.get(tensor)
        if device is None:
            return _devices.CPU
        if device not in self._homes:
            space = _devices._TorchCuda(self.runtime(device))
            self._homes[device] = _devices.Gpu(torch.device("cpu"), space)
        return self._homes[device]


def torch_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchGpus]:
    """For a fixture."""
    gpus.forget_devices()
    yield TorchGpus(monkeypatch)
    gpus.forget_devices()
