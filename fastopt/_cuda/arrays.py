"""Arrays on a GPU: CuPy's, and those of any library that shares its memory through DLPack or the CUDA array interface."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from .._arrays import Array, check_dtype, is_array, to_host as host_copy
from ..kernels.dtypes import PAIRS

NEEDS_CUPY = 'arrays on a GPU need CuPy: pip install "fastopt[cuda12]", or "fastopt[cuda13]" for CUDA 13'


@functools.cache
def cupy() -> Any:
    """CuPy, imported when the first array on a GPU turns up."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(f"fastopt: {NEEDS_CUPY} ({error})") from error
    return cupy


def _device_count(where: str) -> int:
    try:
        return int(cupy().cuda.runtime.getDeviceCount())
    except cupy().cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"{where}: no usable GPU: {error}. `fastopt info` says what is missing.") from error


@functools.cache
def _space(device: int) -> Cuda:
    return Cuda(device)


def cuda_space(array: Any, where: str) -> Cuda:
    """The memory in which an array lives."""
    return _space(int(_as_cupy(array, where).device.id))


def cuda_space_called(name: object, where: str) -> Cuda:
    """The memory called "cuda" (the current device's) or "cuda:1"."""
    found = re.fullmatch(r"cuda(?::(\d+))?", name) if isinstance(name, str) else None
    if not found:
        raise ValueError(f'{where} is {name!r}; needed is "cpu", "cuda", or "cuda:" and a number.')
    count = _device_count(where)
    device = int(found[1]) if found[1] else int(cupy().cuda.runtime.getDevice())
    if device >= count:
        raise ValueError(f"{where} is {name!r}, but there are {count} GPUs, cuda:0 to cuda:{count - 1}.")
    return _space(device)


def to_host(array: Any) -> Array:
    """A copy in host memory; waits for the device."""
    copied: Array = cupy().asnumpy(_as_cupy(array, "array"))
    return copied


def _as_cupy(array: Any, where: str) -> Any:
    """The array as one of CuPy, which shares its memory."""
    library = cupy()
    if isinstance(array, library.ndarray):
        return array
    try:
        if hasattr(array, "__dlpack__"):
            return library.from_dlpack(array)
        return library.asarray(array)
    except Exception as error:  # each library refuses in its own way: read-only, requires grad, a dtype CuPy lacks
        raise TypeError(f"{where} cannot be shared with CuPy ({error}).") from error


class Cuda:
    """The memory of one GPU."""

    def __init__(self, device: int) -> None:
        self.device = device
        self.name = f"cuda:{device}"

    def load_kernels(self) -> None:
        from .kernels import check_driver

        check_driver()

    def array(self, array: object, where: str) -> Array:
        if not is_array(array):
            kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"{where} is a {kind}; needed is an array on {self.name}.")
        if isinstance(array, np.ndarray):
            raise ValueError(
                f"{where} is a numpy.ndarray in host memory, but the others are on {self.name}. "
                "Move it there with cupy.asarray."
            )
        found: Any = _as_cupy(array, where)
        if found.device.id != self.device:
            raise ValueError(
                f"{where} is on cuda:{found.device.id}, but the others are on {self.name}. "
                "An optimizer lives on one device; make one for each."
            )
        return found  # type: ignore[no-any-return]

    def parameter(self, array: object, where: str) -> Array:
        found = self.array(array, where)
        check_dtype(found.dtype, where)
        if not found.flags.c_contiguous:
            raise ValueError(
                f"{where} has strides {found.strides} for shape {found.shape}; needed is a C-contiguous array. "
                "Pass cupy.ascontiguousarray of it and keep that."
            )
        return found

    def gradient(self, array: object, parameter: Array, where: str, write: bool) -> Array:
        found = self.array(array, where)
        if found.shape != parameter.shape:
            raise ValueError(f"{where} has shape {found.shape}, but the parameter has shape {parameter.shape}.")
        if (parameter.dtype.name, found.dtype.name) not in PAIRS:
            raise TypeError(
                f"{where} is {found.dtype.name}, but the parameter is {parameter.dtype.name}. "
                f"Convert it with .astype({parameter.dtype.name!r})."
            )
        if found.flags.c_contiguous:
            return found
        if write:
            raise ValueError(f"{where} is strided, and zero_grads=True would have to write it in place.")
        return found.copy(order="C")

    def plain(self, arrays: list[Any], parameters: list[Array]) -> bool:
        return (
            set(map(type, arrays)) <= {cupy().ndarray}
            and [a.dtype for a in arrays] == [p.dtype for p in parameters]
            and [a.shape for a in arrays] == [p.shape for p in parameters]
            and all([a.flags.c_contiguous and a.device.id == self.device for a in arrays])  # noqa: C419
        )

    def address(self, array: Any) -> int:
        return int(array.data.ptr)

    def scalar(self, array: Any, where: str) -> int:
        if isinstance(array, np.ndarray):
            return 0
        found = self.array(array, where)
        if found.dtype != np.float32 or found.size != 1:
            raise TypeError(f"{where} is {found.dtype.name} of shape {found.shape}; needed is one float32, or a number.")
        return self.address(found)

    def zeros(self, size: int, dtype: np.dtype[Any], where: str) -> Array:
        library = cupy()
        with self.current():
            try:
                return library.zeros(size, dtype)  # type: ignore[no-any-return]
            except library.cuda.memory.OutOfMemoryError as error:
                free, total = library.cuda.runtime.memGetInfo()
                needed = size * dtype.itemsize
                raise MemoryError(
                    f"{where}: {needed / 2**30:.2f} GiB are needed on {self.name}, of whose {total / 2**30:.0f} GiB "
                    f"{free / 2**30:.2f} GiB are free."
                ) from error

    def assign(self, view: Any, values: Any) -> None:
        with self.current():
            view[...] = cupy().asarray(host_copy(values)) if is_array(values) else values

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this device and the stream in use on it CuPy's current ones."""
        with cupy().cuda.Device(self.device), self.stream():
            yield

    def stream(self) -> Any:
        """The stream that step goes to: PyTorch's current one where PyTorch is used on this device, else CuPy's."""
        return cupy().cuda.get_current_stream()
