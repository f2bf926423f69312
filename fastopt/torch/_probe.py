"""Asks torch's C interface where parameters and gradients are: kernels/cpu/tensors.c, one call for all of them."""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Sequence
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


class _Library:
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
def _library() -> _Library | None:
    """None where torch lacks a function, or fastopt was built without its library: then Python asks."""
    path = library_path()
    if path is None:
        return None
    try:
        library = _Library(path)
    except (AttributeError, OSError):
        return None
    return library if library.finds_gradients() else None


class Probe:
    """Knows plain parameters on one device, with or without gradient, as they are now; none is an inference tensor.

    Args:
        params: All parameters.
        gradient_dtypes: The dtype of the gradient that each of them has; None where it must have none.
        states: The tensors in ``state`` that a step writes, and where their elements are.
        device: Where they and their gradients are.
        owned: Addresses and bytes of what a step writes, sorted and apart: no gradient may lie there.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        gradient_dtypes: Sequence[torch.dtype | None],
        states: Sequence[tuple[Tensor, int]],
        device: torch.device,
        owned: tuple[NDArray[np.uint64], NDArray[np.int64]],
    ) -> None:
        library = _library()
        assert library is not None
        self._library = library
        self._alive = params, states  # the addresses of these objects hold while they live
        self._table = library.table(device)
        self._known = np.array(
            [(id(t), t._cdata, address, t.untyped_storage()._cdata) for t, address in states], structure("known")
        )
        self._states = np.array((self._known.ctypes.data, len(states)), structure("states"))
        self._expected = np.zeros(len(params), structure("expected"))
        layouts: dict[Any, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        for entry, p, dtype in zip(self._expected, params, gradient_dtypes, strict=True):
            storage = p.untyped_storage()._cdata
            entry["parameter"] = id(p), p._cdata, p.data_ptr() if dtype is not None else 0, storage
            if dtype is None:
                entry["dim"] = -1
                continue
            layout = p.shape, p.stride()
            if layout not in layouts:
                layouts[layout] = np.array(p.shape, np.int64), np.array(p.stride(), np.int64)
            entry["dim"], entry["nbytes"] = p.dim(), p.numel() * dtype.itemsize
            entry["sizes"], entry["strides"] = (x.ctypes.data for x in layouts[layout])
            if p.grad is not None:
                entry["gradient_storage"] = p.grad.untyped_storage()._cdata
            entry["dtype"], entry["gradient_dtype"] = library.codes[p.dtype], library.codes[dtype]
        self._layouts = layouts
        self._count = sum(dtype is not None for dtype in gradient_dtypes)
        self.pointers: NDArray[np.uint64] = np.zeros(self._count, np.uint64)
        self._held = np.zeros(self._count, np.uint64)
        self._owned = np.array([owned[0], owned[0] + owned[1].astype(np.uint64)])  # where each begins and ends
        begin, end = (row.ctypes.data for row in self._owned)
        self._runs = np.array((begin, end, len(owned[0])), structure("runs"))
        # Reading an array's address takes as long as asking for a gradient.
        self._held_at = self._held.ctypes.data
        self._arguments = (
            self._table.ctypes.data,
            self._expected.ctypes.data,
            len(self._expected),
            self._states.ctypes.data,
            self._runs.ctypes.data,
            self.pointers.ctypes.data,
            self._held_at,
        )

    @staticmethod
    def available() -> bool:
        """Whether there is such a thing here."""
        return _library() is not None

    def hold(self) -> bool:
        """Put the addresses of the gradients into ``pointers`` and keep them alive.

        Returns:
            False, and nothing is kept alive, if something is not as it was, or a gradient lies where the step writes.
        """
        return bool(self._library.gradients(*self._arguments))

    def release(self) -> None:
        """Let the gradients go, if any are kept alive."""
        self._library.release(self._arguments[0], self._held_at, self._count)

    def bump_versions(self) -> bool:
        """Tell autograd that the parameters with a gradient were written; False if one is not the tensor it was."""
        return bool(self._library.bump_versions(*self._arguments[:3]))
