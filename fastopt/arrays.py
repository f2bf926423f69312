"""NumPy's arrays in the host's memory: whether a kernel may touch them. And where any array lives."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from .engine.device import Array, Device, check_dtype, check_fits, on_gpu
from .kernels.dtypes import COMPUTE

ALIGNMENT = 64


def dtype_of(dtype: Any, where: str) -> np.dtype[Any]:
    """The NumPy dtype called ``dtype``; bfloat16 comes from ml_dtypes."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(f"{where}: bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes") from None
        dtype = ml_dtypes.bfloat16
    try:
        checked: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{where} is {dtype!r}; needed is one of {', '.join(COMPUTE)}.") from None
    check_dtype(checked, where)
    return checked


class HostDevice(Device):
    """The host's memory, and NumPy's arrays in it."""

    name = "cpu"

    def load_kernels(self) -> None:
        from .engine.backend import current

        current().require()

    def array(self, array: object, where: str) -> Array:
        if not isinstance(array, np.ndarray) and on_gpu(array):
            raise ValueError(f"{where} is on a GPU, but the others are in host memory. Keep all of them on one device.")
        if not isinstance(array, np.ndarray):
            kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
            hint = ""
            if kind.startswith("torch."):
                hint = " For tensors use the optimizers of fastopt.torch, or pass their .numpy()."
            elif hasattr(array, "__array__"):
                hint = " Pass numpy.asarray of it; as a parameter, which is updated in place, numpy.array of it."
            raise TypeError(f"{where} is a {kind}; needed is a numpy.ndarray.{hint}")
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{where} is a masked array, whose mask an update would ignore; pass its .data.")
        return array

    def parameter(self, array: object, where: str) -> Array:
        array = self.array(array, where)
        check_dtype(array.dtype, where)
        if not array.flags.c_contiguous:
            raise ValueError(
                f"{where} has strides {array.strides} for shape {array.shape}; needed is a C-contiguous array. "
                "Pass numpy.ascontiguousarray of it and keep that."
            )
        if not array.flags.aligned:
            raise ValueError(f"{where} is not aligned to its dtype; pass a copy and keep that.")
        if not array.flags.writeable:
            raise ValueError(f"{where} is read-only, and a step would have to write it; pass a writable copy.")
        return array

    def gradient(self, array: object, parameter: Array, where: str, write: bool) -> Array:
        if isinstance(array, np.generic):  # NumPy's arithmetic makes scalars of 0-d arrays
            if write:
                raise TypeError(
                    f"{where} is a NumPy scalar, which zero_grads=True cannot zero; pass numpy.array of it."
                )
            array = np.asarray(array)
        array = self.array(array, where)
        check_fits(array, parameter, where)
        check_dtype(array.dtype, where)
        if write and not (array.flags.writeable and array.flags.c_contiguous and array.flags.aligned):
            raise ValueError(f"{where} is read-only or strided, and zero_grads=True would have to write it in place.")
        return array if array.flags.c_contiguous and array.flags.aligned else array.copy(order="C")

    def plain(self, arrays: list[Any], parameters: list[Array]) -> bool:
        # List by list, because thousands may come every step.
        return (
            set(map(type, arrays)) <= {np.ndarray}
            and [a.dtype for a in arrays] == [p.dtype for p in parameters]
            and [a.shape for a in arrays] == [p.shape for p in parameters]
            and all([a.flags.carray for a in arrays])  # noqa: C419 - a generator is slower
        )

    def address(self, array: Array) -> int:
        try:
            # Three times as fast as array.ctypes.data, but only for writable, non-empty arrays of plain dtypes.
            return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
        except (TypeError, ValueError, BufferError):
            return array.ctypes.data

    def scalar(self, array: Any, where: str) -> int:
        return 0

    def zeros(self, size: int, dtype: np.dtype[Any], where: str) -> Array:
        raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)  # pages that nobody has touched yet
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size * dtype.itemsize].view(dtype)

    def copy(self, array: Array) -> Array:
        return array.copy()

    def assign(self, view: Array, values: Any) -> None:
        view[...] = to_host(values) if on_gpu(values) else values


HOST = HostDevice()


def device_of(array: object, where: str) -> Device:
    """Where an array lives."""
    if isinstance(array, np.ndarray) or not on_gpu(array):
        return HOST
    from .engine.cuda.arrays import cuda_device

    return cuda_device(array, where)


def device_named(name: object, where: str) -> Device:
    """The memory of the device called "cpu", "cuda" or "cuda:1"."""
    if name == "cpu":
        return HOST
    from .engine.cuda.arrays import cuda_device_named

    return cuda_device_named(name, where)


def to_host(array: Any) -> Array:
    """The array itself, or a copy in host memory of one on a GPU."""
    if isinstance(array, np.ndarray) or not on_gpu(array):
        return np.asarray(array)
    from .engine.cuda.arrays import to_host as download

    return download(array)
