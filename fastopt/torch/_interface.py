"""Torch's C interface, which kernels/cpu/tensors.c asks where parameters and gradients are, all in one call."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Callable
from ctypes import c_int32, c_uint64, c_void_p
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.library import locked_library
from ..kernels.layout import STRUCTURES, structure
from ._tensors import STORED

DEVICE_TYPES = {"cpu": 0, "cuda": 1}  # c10::DeviceType

NAMES = {
    "grad": "_ZNK3c1010TensorImpl4gradEv",
    "bump_version": "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",
}
"""Where torch's stable C interface lacks a function: its C++ name."""

FUNCTIONS = [*STRUCTURES["torch_functions"]][:-3]  # behind them: where tensors are, and where they have their impl


class Library:
    """Functions of the compiled library and, for these, of torch."""

    def __init__(self, own: ctypes.CDLL) -> None:
        folder = pathlib.Path(torch.__file__).parent / "lib"
        torch_cpu = ctypes.CDLL(str(folder / "libtorch_cpu.so"))  # with what that is linked to
        functions = [getattr(torch_cpu, NAMES.get(name, f"aoti_torch_{name}")) for name in FUNCTIONS]
        self._functions = [ctypes.cast(function, c_void_p).value or 0 for function in functions]
        self.gradients, self.release = own.fastopt_gradients, own.fastopt_release
        self.bump_versions = own.fastopt_bump_versions
        self._impl_at = _impl_offset()
        get_dtype = ctypes.CFUNCTYPE(c_int32, c_void_p, c_void_p)(self._functions[FUNCTIONS.index("get_dtype")])
        self.codes = {dtype: _code(dtype, get_dtype) for dtype in STORED}
        _check_gradients(ctypes.CFUNCTYPE(c_void_p, c_void_p)(self._functions[FUNCTIONS.index("grad")]))

    def table(self, device: torch.device) -> NDArray[Any]:
        """What the library is told: torch's functions, where tensors must be, and where objects have their impl."""
        where = DEVICE_TYPES[device.type], device.index or 0, self._impl_at
        return np.array((*self._functions, *where), structure("torch_functions"))


def _code(dtype: torch.dtype, get_dtype: Callable[[int, int], int]) -> int:
    """The number that torch's C interface has for a dtype."""
    tensor, code = torch.empty(0, dtype=dtype), c_int32()
    impl = c_void_p(tensor._cdata)
    if get_dtype(ctypes.addressof(impl), ctypes.addressof(code)):
        raise OSError("torch's C interface does not answer")
    return code.value


def _check_gradients(grad: Callable[[int], int | None]) -> None:
    """Refuse where what it takes for a parameter's gradient is not that."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.zeros(2)
    at = grad(parameter._cdata)
    if at is None or c_uint64.from_address(at).value != parameter.grad._cdata:
        raise OSError("torch's C++ interface is not as expected")


def _impl_offset() -> int:
    """Where in a Python object of class Tensor the address of its TensorImpl stands.

    ``torch.utils.swap_tensors`` puts another one there, and the old one may be gone: so it must be looked up in every
    step. Where that is, no interface says; it is found by looking for it in tensors of several kinds, and tried.
    """
    tensors = [torch.zeros(2), torch.nn.Parameter(torch.zeros(3)), torch.zeros(4, dtype=torch.float64)[1:]]
    places = range(0, torch.Tensor.__basicsize__, 8)
    offset = next((x for x in places if all(_address_at(t, x) == t._cdata for t in tensors)), None)
    a, b = torch.zeros(2), torch.zeros(3)
    before = a._cdata, b._cdata
    torch.utils.swap_tensors(a, b)  # type: ignore[no-untyped-call]
    if offset is None or not before == (_address_at(b, offset), _address_at(a, offset)) == (b._cdata, a._cdata):
        raise OSError("torch's Python objects are not as expected")
    return offset


def _address_at(tensor: Tensor, offset: int) -> int:
    return c_uint64.from_address(id(tensor) + offset).value


@functools.cache
def library() -> Library | None:
    """None where torch lacks a function, or fastopt was built without its library: then Python asks."""
    own = locked_library()
    try:
        return None if own is None else Library(own)
    except (AttributeError, OSError):
        return None
