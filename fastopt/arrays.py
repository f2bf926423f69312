"""What the API needs to know of arrays: where they live, storage dtype, address, whether a kernel may touch them.

``HostDevice`` says it of NumPy arrays; ``_cuda.arrays.CudaDevice`` of arrays on a GPU.
"""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernels.dtypes import COMPUTE, PAIRS

Array = NDArray[Any]
"""An array of NumPy, or one of CuPy, which looks the same to a type checker."""

ALIGNMENT = 64


class Device(ABC):
    """A memory that arrays live in: that of the host, or that of one GPU."""

    name: str

    @abstractmethod
    def load_kernels(self) -> None:
        """Find what runs kernels here: what is missing is said before anything is built on it."""

    @abstractmethod
    def array(self, array: object, where: str) -> Array:
        """The array itself, or its wrapper in this memory's library, or an error."""

    @abstractmethod
    def parameter(self, array: object, where: str) -> Array:
        """The array as one that can be updated in place, or an error."""

    @abstractmethod
    def gradient(self, array: object, parameter: Array, where: str, write: bool) -> Array:
        """The array as a contiguous gradient of a parameter; a strided one is copied."""

    @abstractmethod
    def plain(self, arrays: list[Any], parameters: list[Array]) -> bool:
        """Whether nothing about any gradient needs a closer look."""

    @abstractmethod
    def address(self, array: Array) -> int:
        """Where the data of a contiguous array begin."""

    @abstractmethod
    def scalar(self, array: Any, where: str) -> int:
        """Address of a float32 array of one element that kernels can read; 0 where its value is to be read now."""

    @abstractmethod
    def zeros(self, size: int, dtype: np.dtype[Any], where: str) -> Array:
        """A new array of zeros that is aligned for every access."""

    @abstractmethod
    def copy(self, array: Array) -> Array:
        """A contiguous copy in this memory."""

    @abstractmethod
    def assign(self, view: Array, values: Any) -> None:
        """Copy values of any memory into an array of this one."""


def dtype_of(dtype: Any, where: str) -> np.dtype[Any]:
    """The NumPy dtype called ``dtype``; bfloat16 comes from ml_dtypes."""
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError:
            raise ImportError(f"{where}: bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes") from None
        dtype = ml_dtypes.bfloat16
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        raise TypeError(f"{where} is {dtype!r}; needed is one of {', '.join(COMPUTE)}.") from None
    check_dtype(found, where)
    return found


def check_dtype(dtype: np.dtype[Any], where: str) -> None:
    """Refuse what no kernel computes."""
    if dtype.name not in COMPUTE:
        raise TypeError(f"{where} is {dtype.name}; needed is one of {', '.join(COMPUTE)}.")
    if not dtype.isnative:
        raise TypeError(
            f"{where} has the byte order of another machine ({dtype.str}). Convert it with .astype({dtype.name!r})."
        )


def check_array(array: object, where: str) -> Array:
    """Refuse what is not a NumPy array."""
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


def check_parameter(array: object, where: str) -> Array:
    """Refuse an array that cannot be updated in place."""
    array = check_array(array, where)
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


def check_fits(array: Array, parameter: Array, where: str) -> None:
    """Refuse a gradient of another shape, or of a dtype that does not go with the parameter's."""
    if array.shape != parameter.shape:
        raise ValueError(f"{where} has shape {array.shape}, but the parameter has shape {parameter.shape}.")
    if (parameter.dtype.name, array.dtype.name) not in PAIRS:
        raise TypeError(
            f"{where} is {array.dtype.name}, but the parameter is {parameter.dtype.name}. "
            f"Convert it with .astype({parameter.dtype.name!r})."
        )


def check_gradient(array: object, parameter: Array, where: str, write: bool) -> Array:
    """The gradient as a C-contiguous array that belongs to ``parameter``; a strided one is copied."""
    if isinstance(array, np.generic):  # NumPy's arithmetic makes scalars of 0-d arrays
        if write:
            raise TypeError(f"{where} is a NumPy scalar, which zero_grads=True cannot zero; pass numpy.array of it.")
        array = np.asarray(array)
    array = check_array(array, where)
    check_fits(array, parameter, where)
    check_dtype(array.dtype, where)
    if write and not (array.flags.writeable and array.flags.c_contiguous and array.flags.aligned):
        raise ValueError(f"{where} is read-only or strided, and zero_grads=True would have to write it in place.")
    return array if array.flags.c_contiguous and array.flags.aligned else array.copy(order="C")


def addresses(arrays: Sequence[Array], device: Device) -> NDArray[np.uint64]:
    """Where the data of C-contiguous arrays begin."""
    return np.fromiter(map(device.address, arrays), np.uint64, len(arrays))


def first_overlap(starts: NDArray[np.uint64], nbytes: NDArray[np.int64]) -> tuple[int, int] | None:
    """Two of the given ranges of memory that share a byte, or None."""
    order = np.argsort(starts, kind="stable")
    order = order[nbytes[order] > 0]
    ends = starts[order] + nbytes[order].astype(np.uint64)
    clash = np.flatnonzero(ends[:-1] > starts[order][1:])
    return (int(order[clash[0]]), int(order[clash[0] + 1])) if clash.size else None


def first_hit(
    starts: NDArray[np.uint64], nbytes: NDArray[np.int64], owned: NDArray[np.uint64], owned_nbytes: NDArray[np.int64]
) -> int | None:
    """The first range that shares a byte with one of the ``owned`` ranges (sorted, disjoint, not empty), or None."""
    if not owned.size or not starts.size:
        return None
    # Of the owned ranges that begin before a range ends, only the last can reach into it.
    last = np.searchsorted(owned, starts + nbytes.astype(np.uint64), side="left") - 1
    ends = owned[last] + owned_nbytes[last].astype(np.uint64)
    hits = np.flatnonzero((last >= 0) & (nbytes > 0) & (ends > starts))
    return int(hits[0]) if hits.size else None


class HostDevice(Device):
    """The host's memory, and NumPy's arrays in it."""

    name = "cpu"

    def load_kernels(self) -> None:
        from .engine.backend import current

        current().require()

    def array(self, array: object, where: str) -> Array:
        return check_array(array, where)

    def parameter(self, array: object, where: str) -> Array:
        return check_parameter(array, where)

    def gradient(self, array: object, parameter: Array, where: str, write: bool) -> Array:
        return check_gradient(array, parameter, where, write)

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


CUDA, CUDA_MANAGED = 2, 13  # device types of DLPack


def on_gpu(array: object) -> bool:
    """Whether something is an array in the memory of a CUDA device."""
    if isinstance(array, np.ndarray):
        return False
    if "cupy" in sys.modules and isinstance(array, sys.modules["cupy"].ndarray):
        return True
    device = getattr(array, "__dlpack_device__", None)
    if device is not None and not isinstance(array, type):
        found = device()
        try:
            device_type, _ = map(int, found)
        except (TypeError, ValueError):
            kind = type(array).__qualname__
            raise TypeError(
                f"fastopt: __dlpack_device__() of a {kind} must return two integers, type and number, got {found!r}."
            ) from None
        return device_type in (CUDA, CUDA_MANAGED)
    return hasattr(array, "__cuda_array_interface__")


def is_array(value: object) -> bool:
    """Whether something is an array of the host or of a GPU, rather than a collection or a number."""
    return isinstance(value, np.ndarray) or on_gpu(value)


def to_host(array: Any) -> Array:
    """The array itself, or a copy in host memory of one on a GPU."""
    if isinstance(array, np.ndarray) or not on_gpu(array):
        return np.asarray(array)
    from .engine.cuda.arrays import to_host as download

    return download(array)
