"""The devices that parameters live on: which memory and plans serve them, and what torch does there for a step."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from ..arrays import HOST
from ..engine.cuda.arrays import CudaDevice, device_at
from ..engine.cuda.runtime import cupy
from ..engine.device import Device


class TorchDevice:
    """A device that parameters live on: here the CPU."""

    on_gpu = False

    def __init__(self, device: torch.device, memory: Device) -> None:
        self.torch_device = device
        self.memory = memory

    def require(self) -> None:
        """Find what runs kernels here: what is missing is said before anything is built on it."""
        self.memory.load_kernels()

    def zeros(self, size: int, dtype: torch.dtype) -> Tensor:
        """A flat tensor."""
        return torch.zeros(size, dtype=dtype, device=self.torch_device)

    def array(self, tensor: Tensor) -> Any:
        """A flat tensor as plans take it; one of 16 bits as integers."""
        return (tensor.view(torch.int16) if tensor.itemsize == 2 else tensor).numpy()

    def view(self, array: Any, begin: int, end: int, layout: tuple[Any, ...]) -> Tensor:
        """A part of a flat array as a tensor of this shape, strides and dtype, with a storage that covers no more."""
        return laid_out(torch.from_numpy(array[begin:end]), layout)

    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph."""
        return False

    def tensor(self, array: Any) -> Tensor:
        """An array of what runs kernels here as a tensor on the same memory."""
        return torch.from_numpy(array)

    def refuse_capture(self) -> None:
        """Raise where a step would go into a CUDA graph."""


def laid_out(part: Tensor, layout: tuple[Any, ...]) -> Tensor:
    shape, strides, dtype = layout
    if part.dtype is torch.int16:
        part = part.view(dtype)
    return part if part.shape == shape else part.as_strided(shape, strides, 0)


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


CPU = TorchDevice(torch.device("cpu"), HOST)


def device_of(tensor: Tensor) -> TorchDevice:
    """Where a tensor lives. Those of devices that fastopt does not know are refused later, if they have a gradient."""
    return gpu(tensor.device.index) if tensor.is_cuda else CPU
