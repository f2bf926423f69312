"""GPUs that parameters live on. They are imported when there is such a parameter."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ..engine.cuda.arrays import CudaDevice, device_at
from ..engine.cuda.runtime import cupy
from ._devices import TorchDevice, laid_out


class Gpu(TorchDevice):
    """A GPU. Steps go to torch's current stream there."""

    on_gpu = True

    def __init__(self, device: torch.device, memory: CudaDevice) -> None:
        super().__init__(device, memory)
        self._runtime = memory.runtime

    def require(self) -> None:
        cupy()

    def array(self, tensor: Tensor) -> Any:
        return tensor

    def view(self, array: Any, begin: int, end: int, layout: tuple[Any, ...]) -> Tensor:
        return laid_out(from_dlpack(to_dlpack(array[begin:end])), layout)

    def capturing(self) -> bool:
        with self._runtime.selected():
            return self._runtime.capturing(self._runtime.stream())

    def refuse_capture(self) -> None:
        with self._runtime.selected():
            self._runtime.refuse_capture(self._runtime.stream())

    def tensor(self, array: Any) -> Tensor:
        return torch.as_tensor(array, device=self.torch_device)


class _TorchCudaDevice(CudaDevice):
    """The memory of one GPU, for plans whose arrays are torch's."""

    def address(self, array: Any) -> int:
        return array.data_ptr() if isinstance(array, Tensor) else super().address(array)


@functools.cache
def gpu(index: int) -> Gpu:
    """The GPU of this number."""
    if torch.version.hip is not None:
        raise NotImplementedError("fastopt.torch: GPUs other than NVIDIA's are not supported.")
    return Gpu(torch.device("cuda", index), _TorchCudaDevice(device_at(index, "torch").runtime))
