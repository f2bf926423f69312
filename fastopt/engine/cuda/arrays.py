"""Arrays on a GPU: CuPy's, and those of any library that shares memory through DLPack or the CUDA array interface."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np

from ..device import Array, Device, check_dtype, check_fits, is_array, on_gpu
from .runtime import Runtime, address, cupy, devices


@functools.cache
def device_at(index: int, library: str = "cupy") -> CudaDevice:
    """The GPU of this number, for arrays of one library."""
    return CudaDevice(Runtime(index, library))


def cuda_device(array: Any, where: str) -> CudaDevice:
    """The memory in which an array lives."""
    library = "torch" if type(array).__module__.partition(".")[0] == "torch" else "cupy"
    return device_at(int(_as_cupy(array, where).device.id), library)


def cuda_device_named(name: object, where: str) -> CudaDevice:
    """The memory called "cuda" (the current device's) or "cuda:1"."""
    found = re.fullmatch(r"cuda(?::(\d+))?", name) if isinstance(name, str) else None
    if not found:
        raise ValueError(f'{where} is {name!r}; needed is "cpu", "cuda", or "cuda:" and a number.')
    try:
        count, current = devices()
    except RuntimeError as error:  # CuPy's, of the driver
        raise RuntimeError(f"{where} is {name!r}, but {error}. `fastopt info` says what is missing.") from error
    index = int(found[1]) if found[1] else current
    if index >= count:
        raise ValueError(f"{where} is {name!r}, but the devices are {', '.join(f'cuda:{k}' for k in range(count))}.")
    return device_at(index)


def to_host(array: Any) -> Array:
    """A copy in host memory; waits for the device."""
    return cuda_device(array, "array").runtime.download(_as_cupy(array, "array"))


def _as_cupy(array: Any, where: str) -> Any:
    """The array as one of CuPy, which shares its memory."""
    library = cupy()
    if isinstance(array, library.ndarray):
        return array
    try:
        return library.from_dlpack(array) if hasattr(array, "__dlpack__") else library.asarray(array)
    except Exception as error:  # each library refuses in its own way: read-only, requires grad, a dtype CuPy lacks
        raise TypeError(f"{where} cannot be shared with CuPy: {error}.") from error


class CudaDevice(Device):
    """The memory of one GPU; what is done there goes through ``runtime``."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.name = f"cuda:{runtime.device}"

    def load_kernels(self) -> None:
        pass  # which ones depends on the rules: the plan loads them, before anything is written

    def array(self, array: object, where: str) -> Array:
        if isinstance(array, np.ndarray):
            raise ValueError(
                f"{where} is a numpy.ndarray in host memory, but the others are on {self.name}. "
                "Move it there with cupy.asarray."
            )
        if not is_array(array):
            kind = f"{type(array).__module__}.{type(array).__qualname__}".removeprefix("builtins.")
            raise TypeError(f"{where} is a {kind}; needed is an array on {self.name}.")
        found: Any = _as_cupy(array, where)
        if found.device.id != self.runtime.device:
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
        check_fits(found, parameter, where)
        if found.flags.c_contiguous:
            return found
        if write:
            raise ValueError(f"{where} is strided, and zero_grads=True would have to write it in place.")
        return self.runtime.copy_of(found)

    def plain(self, arrays: list[Any], parameters: list[Array]) -> bool:
        return (
            set(map(type, arrays)) <= {cupy().ndarray}
            and [a.dtype for a in arrays] == [p.dtype for p in parameters]
            and [a.shape for a in arrays] == [p.shape for p in parameters]
            and all([a.flags.c_contiguous and a.device.id == self.runtime.device for a in arrays])  # noqa: C419
        )

    def address(self, array: Array) -> int:
        return address(array)

    def scalar(self, array: Any, where: str) -> int:
        if not on_gpu(array):
            return 0
        found = self.array(array, where)
        if found.dtype != np.float32 or found.size != 1:
            raise TypeError(
                f"{where} is {found.dtype.name} of shape {found.shape}; needed is one float32, or a number."
            )
        return self.address(found)

    def zeros(self, size: int, dtype: np.dtype[Any], where: str) -> Array:
        try:
            return self.runtime.zeros(size, dtype)
        except MemoryError as error:
            free, total = self.runtime.free_memory()
            raise MemoryError(
                f"{where}: {size * dtype.itemsize / 2**30:.2f} GiB are needed on {self.name}, where "
                f"{free / 2**30:.2f} of {total / 2**30:.0f} GiB are free."
            ) from error

    def copy(self, array: Array) -> Array:
        return self.runtime.copy_of(array)

    def assign(self, view: Array, values: Any) -> None:
        if on_gpu(values):
            values = _as_cupy(values, "array")
            if values.device.id != self.runtime.device:
                values = to_host(values)
        self.runtime.assign(view, values)
