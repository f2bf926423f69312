"""Where tensors are: the device that serves them, and learning rates on one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.device import HOST, Device


def device_of(tensor: Tensor) -> Device:
    """Where a tensor lives. Those of devices that fastopt does not know are refused later, if they have a gradient."""
    if not tensor.is_cuda:
        return HOST
    if torch.version.hip is not None:
        raise NotImplementedError("fastopt.torch: GPUs other than NVIDIA's are not supported.")
    from ..engine.cuda.device import device_at

    return device_at(tensor.device.index, "torch")


def tensor_of(array: Any, device: Device) -> Tensor:
    """An array that the engine made on a GPU, as a tensor on the same memory."""
    return torch.as_tensor(array, device=device.name)


class DeviceRates:
    """Learning rates that are tensors on a GPU: with ``capturable`` the step reads them there, as in torch.

    Knows which are read there, and what they were when they were first seen.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Tensor, float]] = {}
        self.devices: set[Device] = set()  # where rates are

    def placed(self, groups: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The groups with such an lr as a number, for which the first time is waited, and the place to read it."""
        self.devices.clear()
        return [self._placed(k, group) if group.get("capturable") else group for k, group in enumerate(groups)]

    def _placed(self, k: int, group: Mapping[str, Any]) -> Mapping[str, Any]:
        lr = group.get("lr")
        if not isinstance(lr, Tensor) or lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64):
            return group
        device = device_of(lr)
        if not device.on_gpu:
            return group
        self.devices.add(device)
        if k not in self._seen or self._seen[k][0] is not lr:
            self._seen[k] = lr, lr.item()
        return {**group, "lr": self._seen[k][1], "lr_at": (lr.data_ptr(), lr.itemsize)}

    def check(self, device: Device | None, where: str) -> None:
        """Refuse a rate on another device than the parameters."""
        if self.devices != {device}:
            devices = ", ".join(sorted(d.name for d in self.devices))
            raise ValueError(
                f"{where}: with capturable=True an lr on {devices} must be on the one device of all parameters. "
                "Use a number, or an lr on the CPU."
            )
