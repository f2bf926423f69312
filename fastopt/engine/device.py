"""A memory that arrays live in, and what all of them have in common: storage dtypes, addresses, whether they overlap.

``arrays.HostDevice`` is the host's, ``engine.cuda.arrays.CudaDevice`` that of a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..kernels.dtypes import COMPUTE, PAIRS

Array = NDArray[Any]
"""An array of NumPy, or one of CuPy, which looks the same to a type checker."""


@runtime_checkable
class Device(Protocol):
    """A memory that arrays live in: that of the host, or that of one GPU."""

    name: str

    def load_kernels(self) -> None:
        """Find what runs kernels here: what is missing is said before anything is built on it."""

    def array(self, array: object, where: str) -> Array:
        """The array itself, or its wrapper in this memory's library, or an error."""

    def parameter(self, array: object, where: str) -> Array:
        """The array as one that can be updated in place, or an error."""

    def gradient(self, array: object, parameter: Array, where: str, write: bool) -> Array:
        """The array as a contiguous gradient of a parameter; a strided one is copied."""

    def plain(self, arrays: list[Any], parameters: list[Array]) -> bool:
        """Whether nothing about any gradient needs a closer look."""

    def address(self, array: Array) -> int:
        """Where the data of a contiguous array begin."""

    def scalar(self, array: Any, where: str) -> int:
        """Address of a float32 array of one element that kernels can read; 0 where its value is to be read now."""

    def zeros(self, size: int, dtype: np.dtype[Any], where: str) -> Array:
        """A new array of zeros that is aligned for every access."""

    def copy(self, array: Array) -> Array:
        """A contiguous copy in this memory."""

    def assign(self, view: Array, values: Any) -> None:
        """Copy values of any memory into an array of this one."""


def check_dtype(dtype: np.dtype[Any], where: str) -> None:
    """Refuse what no kernel computes."""
    if dtype.name not in COMPUTE:
        raise TypeError(f"{where} is {dtype.name}; needed is one of {', '.join(COMPUTE)}.")
    if not dtype.isnative:
        raise TypeError(
            f"{where} has the byte order of another machine ({dtype.str}). Convert it with .astype({dtype.name!r})."
        )


def check_fits(array: Array, parameter: Array, where: str) -> None:
    """Refuse a gradient of another shape, or of a dtype that does not go with the parameter's."""
    if array.shape != parameter.shape:
        raise ValueError(f"{where} has shape {array.shape}, but the parameter has shape {parameter.shape}.")
    if (parameter.dtype.name, array.dtype.name) not in PAIRS:
        raise TypeError(
            f"{where} is {array.dtype.name}, but the parameter is {parameter.dtype.name}. "
            f"Convert it with .astype({parameter.dtype.name!r})."
        )


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


CUDA, CUDA_MANAGED = 2, 13  # device types of DLPack


def on_gpu(array: object) -> bool:
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


def is_array(value: object) -> bool:
    """Whether something is an array of the host or of a GPU, rather than a collection or a number."""
    return isinstance(value, np.ndarray) or on_gpu(value)
