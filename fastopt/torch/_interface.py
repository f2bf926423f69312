"""Torch's C interface, which kernels/cpu/tensors.c asks where parameters and gradients are, all in one call."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.library import library_path, open_library
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

    def __init__(self, path: str) -> None:
        own = open_library(
            path, ctypes.PyDLL
        )  # which keeps Python's lock: no other thread may drop a gradient meanwhile
        folder = pathlib.Path(torch.__file__).parent / "lib"
        torch_cpu = ctypes.CDLL(str(folder / "libtorch_cpu.so"))  # with what that is linked to
        functions = {name: getattr(torch_cpu, NAMES.get(name, f"aoti_torch_{name}")) for name in FUNCTIONS}
        self._functions = {
            name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()
        }
        self.gradients, self.release = own.fastopt_gradients, own.fastopt_release
        self.gradients.restype, self.release.restype = ctypes.c_bool, None
        self.gradients.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 4]
        self.release.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.bump_versions = own.fastopt_bump_versions
        self.bump_versions.restype = ctypes.c_bool
        self.bump_versions.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self._impl_at = _impl_offset()
        self.codes = {dtype: self._code(dtype) for dtype in STORED}

    def table(self, device: torch.device) -> NDArray[Any]:
        """What the library is told: torch's functions, where tensors must be, and where objects have their impl."""
        where = DEVICE_TYPES[device.type], device.index or 0, self._impl_at
        return np.array((*self._functions.values(), *where), structure("torch_functions"))

    def _code(self, dtype: torch.dtype) -> int:
        """The number that torch's C interface has for a dtype."""
        tensor, code = torch.empty(0, dtype=dtype), ctypes.c_int32()
        impl = ctypes.c_void_p(tensor._cdata)
        get_dtype = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)(self._functions["get_dtype"])
        if get_dtype(ctypes.addressof(impl), ctypes.addressof(code)):
            raise OSError("torch's C interface does not answer")
        return code.value

    def finds_gradients(self) -> bool:
        """Whether what it takes for a parameter's gradient is that."""
        parameter = torch.nn.Parameter(torch.zeros(2))
        parameter.grad = torch.zeros(2)
        grad = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(self._functions["grad"])
        at = grad(parameter._cdata)
        return at is not None and ctypes.c_uint64.from_address(at).value == parameter.grad._cdata


def _impl_offset() -> int:
    """Where in a Python object of class Tensor the address of its TensorImpl stands.

    ``torch.utils.swap_tensors`` puts another one there, and the old one may be gone: so it must be looked up in every
    step. Where that is, no interface says; it is found by looking for it in tensors of several kinds, and tried.
    """
    tensors = [torch.zeros(2), torch.nn.Parameter(torch.zeros(3)), torch.zeros(4, dtype=torch.float64)[1:]]
    for offset in range(0, torch.Tensor.__basicsize__, 8):
        if all(_address_at(t, offset) == t._cdata for t in tensors):
            break
    else:
        raise OSError("torch's Python objects are not as expected")
    a, b = torch.zeros(2), torch.zeros(3)
    before = a._cdata, b._cdata
    torch.utils.swap_tensors(a, b)  # type: ignore[no-untyped-call]
    if (_address_at(b, offset), _address_at(a, offset)) != before or (b._cdata, a._cdata) != before:
        raise OSError("torch's Python objects are not as expected")
    return offset


def _address_at(tensor: Tensor, offset: int) -> int:
    return ctypes.c_uint64.from_address(id(tensor) + offset).value


@functools.cache
def library() -> Library | None:
    """None where torch lacks a function, or fastopt was built without its library: then Python asks."""
    path = library_path()
    if path is None:
        return None
    try:
        known = Library(path)
    except (AttributeError, OSError):
        return None
    return known if known.finds_gradients() else None
