"""The devices that parameters live on: which memory and plans serve them, and what torch does there for a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..arrays import HOST, Device


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


CPU = TorchDevice(torch.device("cpu"), HOST)


def device_of(tensor: Tensor) -> TorchDevice:
    """Where a tensor lives. Those of devices that fastopt does not know are refused later, if they have a gradient."""
    if not tensor.is_cuda:
        return CPU
    from ._gpus import gpu

    return gpu(tensor.device.index)
