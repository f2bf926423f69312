"""A memory that arrays live in: what they must be, how they lie there, whether they overlap.

``Device`` is the host's, ``engine.cuda.device.CudaDevice`` that of a GPU.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..kernels.dtypes import COMPUTE, PAIRS

Array = NDArray[Any]
"""An array of NumPy, or one of CuPy, which looks the same to a type checker."""

ALIGNMENT = 64


class Device:
    """A memory that arrays live in: here that of the host, and NumPy's arrays in it."""

    name = "cpu"
    on_gpu = False
    library = "numpy"  # whose arrays these are

    def require(self) -> None:
        """Refuse to go on where the library of such arrays is missing."""

    # --- arrays that somebody passes ---------------------------------------------------------------------------------

    def array(self, array: object, where: str) -> Array:
        """The array itself, or as one of this memory's library, or an error."""
        if is_gpu_array(array):
            raise ValueError(f"{where} is on a GPU, but the others are in host memory. Keep all of them on one device.")
        if not isinstance(array, np.ndarray):
            kind, hint = type_name(array), ""
            if kind.startswith("torch."):
                hint = " For tensors use the optimizers of fastopt.torch, or pass their .numpy()."
            elif hasattr(array, "__array__"):
                hint = " Pass numpy.asarray of it; as a parameter, which is updated in place, numpy.array of it."
            raise TypeError(f"{where} is a {kind}; needed is a numpy.ndarray.{hint}")
        if isinstance(array, np.ma.MaskedArray):
            raise TypeError(f"{where} is a masked array, whose mask an update would ignore; pass its .data.")
        return array

    def parameter(self, array: object, where: str) -> Array:
        """The array as one that can be updated in place, or an error."""
        array = self.array(array, where)
        check_dtype(array.dtype, where)
        contiguous, aligned, writable = self.flags(array)
        if not contiguous:
            raise ValueError(
                f"{where} has strides {array.strides} for shape {array.shape}; needed is a C-contiguous array. "
                f"Pass {self.library}.ascontiguousarray of it and keep that."
            )
        if not aligned:
            raise ValueError(f"{where} is not aligned to its dtype; pass a copy and keep that.")
        if not writable:
            raise ValueError(f"{where} is read-only, and a step would have to write it; pass a writable copy.")
        return array

    def gradient(self, array: object, parameter: Array, where: str, write: bool) -> Array:
        """The array as a contiguous gradient of a parameter; a strided one is copied, unless it is to be written."""
        if isinstance(array, np.generic):  # NumPy's arithmetic makes scalars of 0-d arrays
            if write:
                raise TypeError(
                    f"{where} is a NumPy scalar, which zero_grads=True cannot zero; pass numpy.array of it."
                )
            array = np.asarray(array)
        array = self.array(array, where)
        if array.shape != parameter.shape:
            raise ValueError(f"{where} has shape {array.shape}, but the parameter has shape {parameter.shape}.")
        if (parameter.dtype.name, array.dtype.name) not in PAIRS:
            raise TypeError(
                f"{where} is {array.dtype.name}, but the parameter is {parameter.dtype.name}. "
                f"Convert it with .astype({parameter.dtype.name!r})."
            )
        check_dtype(array.dtype, where)
        contiguous, aligned, writable = self.flags(array)
        if write and not (contiguous and aligned and writable):
            raise ValueError(f"{where} is read-only or strided, and zero_grads=True would have to write it in place.")
        return array if contiguous and aligned else self.copy(array)

    def flags(self, array: Array) -> tuple[bool, bool, bool]:
        """Whether an array is C-contiguous, aligned to its dtype, and may be written."""
        return array.flags.c_contiguous, array.flags.aligned, array.flags.writeable

    def plain(self, arrays: list[Any], parameters: list[Array]) -> bool:
        """Whether nothing about any gradient needs a closer look."""
        # List by list, because thousands may come every step.
        return (
            self.are_usual(arrays)
            and [a.dtype for a in arrays] == [p.dtype for p in parameters]
            and [a.shape for a in arrays] == [p.shape for p in parameters]
        )

    def are_usual(self, arrays: list[Any]) -> bool:
        """Whether all are arrays of this memory that kernels can read and write as they lie."""
        return {*map(type, arrays)} <= {np.ndarray} and all([a.flags.carray for a in arrays])  # noqa: C419 - a generator is slower

    def scalar(self, array: Any, where: str) -> int:
        """Address of a float32 array of one element that kernels can read; 0 where its value is to be read now."""
        return 0

    # --- their elements ----------------------------------------------------------------------------------------------

    def address(self, array: Array) -> int:
        """Where the data of a contiguous array begin."""
        try:
            # Three times as fast as array.ctypes.data, but only for writable, non-empty arrays of plain dtypes.
            return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
        except (TypeError, ValueError, BufferError):
            return array.ctypes.data

    def zeros(self, size: int, dtype: np.dtype[Any], where: str) -> Array:
        """A new array of zeros that is aligned for every access."""
        raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)  # pages that nobody has touched yet
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size * dtype.itemsize].view(dtype)

    def copy(self, array: Array) -> Array:
        """A contiguous copy in this memory."""
        return array.copy(order="C")

    def assign(self, view: Array, values: Any) -> None:
        """Copy values, of an array in this memory or the host's, or a number, into an array."""
        view[...] = values

    def to_host(self, array: Any) -> Array:
        """The array, or a copy of it in host memory, for which a GPU is waited for."""
        return np.asarray(array)

    # --- graphs ------------------------------------------------------------------------------------------------------

    def capturing(self) -> bool:
        """Whether a step would go into a CUDA graph."""
        return False

    def refuse_capture(self) -> None:
        """Raise where a step would go into a CUDA graph."""


HOST = Device()


def type_name(value: object) -> str:
    """How an error calls the type of something that is no array."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def check_dtype(dtype: np.dtype[Any], where: str) -> None:
    """Refuse what no kernel computes."""
    if dtype.name not in COMPUTE:
        raise TypeError(f"{where} is {dtype.name}; needed is one of {', '.join(COMPUTE)}.")
    if not dtype.isnative:
        raise TypeError(
            f"{where} has the byte order of another machine ({dtype.str}). Convert it with .astype({dtype.name!r})."
        )


def is_array(value: object) -> bool:
    """Whether something is an array of the host or of a GPU, rather than a collection or a number."""
    return isinstance(value, np.ndarray) or is_gpu_array(value)


CUDA, CUDA_MANAGED = 2, 13  # device types of DLPack


def is_gpu_array(array: object) -> bool:
    """Whether something is an array in the memory of a CUDA device."""
    if isinstance(array, np.ndarray):
        return False
    if "cupy" in sys.modules and isinstance(array, sys.modules["cupy"].ndarray):
        return True
    device = getattr(array, "__dlpack_device__", None)
    if device is not None and not isinstance(array, type):
        answer = device()
        try:
            device_type, _ = map(int, answer)
        except (TypeError, ValueError):
            kind = type(array).__qualname__
            raise TypeError(
                f"fastopt: __dlpack_device__() of a {kind} must return two integers, type and number, got {answer!r}."
            ) from None
        return device_type in (CUDA, CUDA_MANAGED)
    return hasattr(array, "__cuda_array_interface__")


# --- where arrays lie -------------------------------------------------------------------------------------------------


ALIGN_ELEMENTS = 32
"""Arrays begin at multiples of this many elements: a 64-byte boundary for 16-bit dtypes and wider ones, and the same
layout whatever the dtype, so that parameters, gradients and states can be walked side by side."""


@dataclass(frozen=True)
class Layout:
    """Where each of a list of named arrays lies in a flat buffer, in elements."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        """Arrays of the given shapes, one after another."""
        sizes = tuple(math.prod(shape) for shape in shapes.values())
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // ALIGN_ELEMENTS) * ALIGN_ELEMENTS
        return cls(tuple(shapes), tuple(shapes.values()), sizes, tuple(offsets), end)

    def views(self, data: Array) -> dict[str, Array]:
        """The named, shaped views of a flat array."""
        return {
            name: data[offset : offset + size].reshape(shape)
            for name, shape, size, offset in zip(self.names, self.shapes, self.sizes, self.offsets, strict=True)
        }


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


def check_apart(starts: NDArray[np.uint64], nbytes: NDArray[np.int64], name: Callable[[int], str], where: str) -> None:
    """Refuse memory of parameters and states that is shared: each would be updated twice."""
    clash = first_overlap(starts, nbytes)
    if clash is not None:
        a, b = map(name, clash)
        raise ValueError(f"{where}: {a} and {b} share memory; they would be updated twice. Pass one of them.")


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
