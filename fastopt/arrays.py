"""Arrays: where they live, and ``FlatBuffer``, many in one allocation."""

from __future__ import annotations

import functools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .engine.device import HOST, Array, Device, Layout, check_dtype, is_array, is_gpu_array
from .kernels.dtypes import COMPUTE


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


def device_of(array: object, where: str) -> Device:
    """Where an array lives."""
    if not is_gpu_array(array):
        return HOST
    from .engine.cuda.device import as_cupy, device_at

    source = "torch" if type(array).__module__.partition(".")[0] == "torch" else "cupy"
    return device_at(int(as_cupy(array, where).device.id), source)


def device_named(name: object, where: str) -> Device:
    """The memory of the device called "cpu", "cuda" (the current one) or "cuda:1"."""
    if name == "cpu":
        return HOST
    number = re.fullmatch(r"cuda(?::(\d+))?", name) if isinstance(name, str) else None
    if not number:
        raise ValueError(f'{where} is {name!r}; needed is "cpu", "cuda", or "cuda:" and a number.')
    from .engine.cuda import device as cuda

    try:
        count, current = cuda.devices()
    except RuntimeError as error:  # CuPy's, of the driver
        raise RuntimeError(f"{where} is {name!r}, but {error}. `fastopt info` says what is missing.") from error
    index = int(number[1] or current)
    if index >= count:
        raise ValueError(f"{where} is {name!r}, but the devices are {', '.join(f'cuda:{k}' for k in range(count))}.")
    return cuda.device_at(index, "cupy")


def to_host(array: Any) -> Array:
    """The array itself, or a copy in host memory of one on a GPU."""
    return device_of(array, "array").to_host(array)


def assign(device: Device, view: Array, values: Any) -> None:
    """Copy values, of an array in any memory or a number, into an array of a device."""
    if is_gpu_array(values) and device_of(values, "array").name != device.name:
        values = to_host(values)
    device.assign(view, values)


MAX_SIZE = 2**59  # elements; eight bytes each of them is all that 64-bit addresses reach


def _checked_shape(name: object, shape: Any) -> tuple[int, ...]:
    if not isinstance(name, str):
        raise TypeError(f"FlatBuffer: names are strings, got {name!r}.")
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"FlatBuffer: {name!r} has the shape {shape!r}; needed is a sequence of integers.") from None
    if min(sizes, default=0) < 0 or math.prod(sizes) > MAX_SIZE:
        raise ValueError(f"FlatBuffer: {name!r} has the shape {shape!r}, which no array can have.")
    return sizes


def named(arrays: Any, where: str, first: int = 0) -> dict[str, Any]:
    """What a mapping (such as a FlatBuffer) or a sequence holds, by name; items of a sequence are named by index."""
    if is_array(arrays) or isinstance(arrays, (str, bytes)) or not isinstance(arrays, Iterable):
        kind = "a single array" if is_array(arrays) else repr(arrays)
        raise TypeError(
            f"{where} is {kind}; needed is a FlatBuffer, a mapping or a sequence of arrays, such as [array]."
        )
    if not isinstance(arrays, Mapping):
        return {str(i): array for i, array in enumerate(arrays, first)}
    for name in arrays:
        if not isinstance(name, str):
            raise TypeError(f"{where}: names are strings, got {name!r}.")
    return dict(arrays)


def placed(arrays: Any, where: str) -> tuple[dict[str, Device], dict[str, Array]]:
    """Where each of such arrays lives, and the arrays, checked."""
    listed = named(arrays, where)
    devices = {name: device_of(array, f"{where}[{name!r}]") for name, array in listed.items()}
    return devices, {name: devices[name].array(array, f"{where}[{name!r}]") for name, array in listed.items()}


class FlatBuffer(Mapping[str, Array]):
    """Named arrays of one dtype in one 64-byte-aligned allocation: a mapping from names to shaped views.

    An optimizer that is given its parameters and gradients as flat buffers walks them in one pass, however many arrays
    there are. Each array begins on a 64-byte boundary; the padding between arrays holds zeros, and a step leaves them
    zero. Views write through: ``params["w"] -= 1`` and ``params["w"] = array`` change the buffer. A step writes
    ``data``: as in NumPy, a view that is read-only does not make it so.

    Args:
        shapes: Shape of each array by name, in the order in which they are laid out.
        dtype: float32, float64, float16 or bfloat16 (which needs ml_dtypes).
        device: "cpu", or "cuda" or "cuda:1" for CuPy arrays on the current or another GPU.

    Attributes:
        data: The whole buffer, shape (n,), padding included.
        names: Names in order.
        shapes: Shape of each array by name.
        offsets: First element of each array in ``data`` by name; Python integers, of any size.
        size: Number of elements, padding not counted.
        nbytes: Bytes of the allocation, padding counted.
        dtype: NumPy dtype of all arrays.
        device: "cpu", or "cuda:0" and so on.

    Raises:
        TypeError: The dtype is not one of the four, or a name is not a string.
        ValueError: There is no such device, or a shape that no array can have.
        ImportError: The device is a GPU, and CuPy is missing.
        MemoryError: The device has too little memory.

    Example:
        >>> import numpy as np, fastopt
        >>> params = fastopt.FlatBuffer.from_arrays({"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)})
        >>> params["w"].shape, params.offsets, params.size
        ((2, 3), {'w': 0, 'b': 32}, 9)
        >>> grads = params.zeros_like()
        >>> grads["b"][:] = 1
        >>> float(grads.data.sum())
        3.0
    """

    __slots__ = ("__weakref__", "_data", "_device", "_layout", "_views")

    def __init__(
        self, shapes: Mapping[str, Sequence[int]], dtype: Any = "float32", *, device: str | Device = "cpu"
    ) -> None:
        if not isinstance(shapes, Mapping):
            raise TypeError(f"FlatBuffer: shapes must be a mapping from names to shapes, got {shapes!r}.")
        self._layout = Layout.of({name: _checked_shape(name, shape) for name, shape in shapes.items()})
        self._device = device if isinstance(device, Device) else device_named(device, "FlatBuffer: device")
        self._data = self._device.zeros(self.layout.total, dtype_of(dtype, "FlatBuffer: dtype"), "FlatBuffer")
        self._views = self.layout.views(self.data)

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Array] | Sequence[Array], dtype: Any = None, *, device: str | None = None
    ) -> FlatBuffer:
        """Copy arrays into a new buffer.

        Args:
            arrays: Arrays by name, or a sequence of arrays, which are named "0", "1", ...; of NumPy, or on a GPU.
            dtype: dtype of the buffer; by default that of the arrays, which must then agree.
            device: Where the buffer lives; by default where the first array does.

        Raises:
            TypeError: Something is not an array, or the dtypes differ and ``dtype`` is not given.
            ValueError: No arrays are given and no ``dtype`` either.
        """
        where = "FlatBuffer.from_arrays: arrays"
        devices, arrays = placed(arrays, where)
        for name, array in arrays.items():
            if array.dtype.kind == "c":
                raise TypeError(f"{where}[{name!r}] is {array.dtype.name}; needed are real numbers.")
        if dtype is None:
            dtypes = {array.dtype.name: array.dtype for array in arrays.values()}
            if not dtypes:
                raise ValueError("FlatBuffer.from_arrays: no arrays given, so dtype is needed.")
            if len(dtypes) > 1:
                raise TypeError(
                    f"FlatBuffer.from_arrays: the arrays have several dtypes ({', '.join(dtypes)}). "
                    "Pass dtype= to convert them, or give the arrays to the optimizer as they are."
                )
            dtype = next(iter(dtypes.values())).newbyteorder("=")
            check_dtype(dtype, f"{where}[{next(iter(arrays))!r}]")
        place: Any = device if device is not None else next(iter(devices.values()), HOST)
        buffer = cls({name: array.shape for name, array in arrays.items()}, dtype, device=place)
        for name, array in arrays.items():
            buffer[name] = array
        return buffer

    def zeros_like(self, dtype: Any = None) -> FlatBuffer:
        """A buffer of zeros of the same layout, on the same device, of the same dtype unless another is given."""
        return FlatBuffer(self.shapes, self.dtype if dtype is None else dtype, device=self._device)

    def to(self, device: str | Device) -> FlatBuffer:
        """A copy on a device: "cpu", "cuda" or "cuda:1"."""
        buffer = FlatBuffer(self.shapes, self.dtype, device=device)
        assign(buffer._device, buffer.data, self.data)
        return buffer

    def copy(self) -> FlatBuffer:
        """A buffer of the same layout and contents."""
        return self.to(self._device)

    @property
    def data(self) -> Array:
        return self._data

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def names(self) -> tuple[str, ...]:
        return self.layout.names

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.layout.names, self.layout.shapes, strict=True))

    @property
    def offsets(self) -> dict[str, int]:
        return dict(zip(self.layout.names, self.layout.offsets, strict=True))

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    @property
    def size(self) -> int:
        return sum(self.layout.sizes)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def device(self) -> str:
        return self._device.name

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __setitem__(self, name: str, value: Any) -> None:
        assign(self._device, self._views[name], value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __eq__(self, other: object) -> bool:
        return self is other  # Mapping would compare arrays for truth

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"FlatBuffer({len(self)} arrays, {self.size} elements, {self.dtype.name}, {self.device})"

    def __reduce__(self) -> Any:
        arrays = self.layout.views(to_host(self.data))
        return functools.partial(FlatBuffer.from_arrays, device=self.device), (arrays, self.dtype.name)
