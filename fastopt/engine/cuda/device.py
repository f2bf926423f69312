"""A GPU: arrays on it, and all else that is asked of CuPy: memory, copies, streams, launches.

Arrays are CuPy's, and those of any library that shares memory through DLPack or the CUDA array interface.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..device import Array, Device, is_array, is_gpu_array, type_name

NEEDS_CUPY = 'arrays on a GPU need CuPy: pip install cupy-cuda12x "numba-cuda[cu12]", or with 13 for 12'

Function = Callable[[int, tuple[Any, ...], Any], None]
"""A kernel: called with the number of blocks, its arguments (integers and floats) and a stream, it is launched."""


@functools.cache
def cupy() -> Any:
    """CuPy, imported when the first array on a GPU turns up."""
    try:
        import cupy
    except ImportError as error:
        raise ImportError(f"fastopt: {NEEDS_CUPY} ({error})") from error
    return cupy


def devices() -> tuple[int, int]:
    """How many GPUs there are, and the number of the current one."""
    runtime = cupy().cuda.runtime
    return int(runtime.getDeviceCount()), int(runtime.getDevice())


@functools.cache
def device_at(index: int, source: str) -> CudaDevice:
    """The GPU of this number, for arrays that come from "cupy" or "torch"."""
    return CudaDevice(index, source)


def as_cupy(array: Any, where: str) -> Any:
    """The array as one of CuPy, which shares its memory."""
    library = cupy()
    if isinstance(array, library.ndarray):
        return array
    try:
        return library.from_dlpack(array) if hasattr(array, "__dlpack__") else library.asarray(array)
    except Exception as error:  # each library refuses in its own way: read-only, requires grad, a dtype CuPy lacks
        raise TypeError(f"{where} cannot be shared with CuPy: {error}.") from error


class _TorchStream:
    """PyTorch's current stream, by the protocol through which CuPy takes streams of others."""

    def __init__(self, index: int) -> None:
        self.pointer = int(sys.modules["torch"].cuda.current_stream(index).cuda_stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class CudaDevice(Device):
    """The memory of one GPU. Steps go to the current stream there of the library that the arrays come from.

    Args:
        index: Its number.
        source: "cupy" or "torch".
    """

    on_gpu = True
    library = "cupy"

    def __init__(self, index: int, source: str) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        self._source = source

    def require(self) -> None:
        cupy()  # which kernels are needed depends on the rules: the plan loads them, before anything is written

    # --- arrays that somebody passes ---------------------------------------------------------------------------------

    def array(self, array: object, where: str) -> Array:
        if isinstance(array, np.ndarray):
            raise ValueError(
                f"{where} is a numpy.ndarray in host memory, but the others are on {self.name}. "
                "Move it there with cupy.asarray."
            )
        if not is_array(array):
            raise TypeError(f"{where} is a {type_name(array)}; needed is an array on {self.name}.")
        shared: Any = as_cupy(array, where)
        if shared.device.id != self.index:
            raise ValueError(
                f"{where} is on cuda:{shared.device.id}, but the others are on {self.name}. "
                "An optimizer lives on one device; make one for each."
            )
        return shared  # type: ignore[no-any-return]

    def flags(self, array: Array) -> tuple[bool, bool, bool]:
        return array.flags.c_contiguous, True, True

    def are_usual(self, arrays: list[Any]) -> bool:
        return {*map(type, arrays)} <= {cupy().ndarray} and all(
            [a.flags.c_contiguous and a.device.id == self.index for a in arrays]  # noqa: C419
        )

    def scalar(self, array: Any, where: str) -> int:
        if not is_gpu_array(array):
            return 0
        array = self.array(array, where)
        if array.dtype != np.float32 or array.size != 1:
            raise TypeError(
                f"{where} is {array.dtype.name} of shape {array.shape}; needed is one float32, or a number."
            )
        return self.address(array)

    # --- their elements ----------------------------------------------------------------------------------------------

    def address(self, array: Any) -> int:
        """Where the data of a contiguous array begin, one of CuPy or of torch."""
        return int(array.data_ptr() if hasattr(array, "data_ptr") else array.data.ptr)

    def zeros(self, size: int, dtype: np.dtype[Any], where: str) -> Array:
        try:
            array = self.empty(size, dtype, self.stream())
        except MemoryError as error:
            free, total = self.free_memory()
            raise MemoryError(
                f"{where}: {size * dtype.itemsize / 2**30:.2f} GiB are needed on {self.name}, where "
                f"{free / 2**30:.2f} of {total / 2**30:.0f} GiB are free."
            ) from error
        self.assign(array, 0)
        return array

    def copy(self, array: Array) -> Array:
        with self.current():
            return array.copy(order="C")

    def assign(self, view: Array, values: Any) -> None:
        with self.current():
            if isinstance(values, np.ndarray):
                values = cupy().asarray(values)
            view[...] = as_cupy(values, "array") if is_gpu_array(values) else values

    def to_host(self, array: Any) -> Array:
        return self.download(as_cupy(array, "array"))

    def free_memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all."""
        with self.selected():
            free, total = cupy().cuda.runtime.memGetInfo()
        return int(free), int(total)

    def empty(self, size: int, dtype: np.dtype[Any], stream: Any) -> Array:
        """A new array for a kernel on this stream to fill."""
        with self.selected(), stream:
            return cupy().empty(size, dtype)  # type: ignore[no-any-return]

    def upload(self, array: NDArray[Any]) -> Array:
        """A copy on the device."""
        self.refuse_capture()
        with self.current():
            return cupy().asarray(array)  # type: ignore[no-any-return]

    def download(self, array: Array, stream: Any = None) -> NDArray[Any]:
        """A copy in host memory; waits for the stream, by default the current one."""
        with self.selected(), stream or self.stream():
            return cupy().asnumpy(array)  # type: ignore[no-any-return]

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device can copy from while the host goes on."""
        return np.frombuffer(cupy().cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def send(self, address: int, source: NDArray[np.uint8], stream: Any) -> None:
        """Put a copy from pinned memory on a stream. A graph copies it in each replay, as it is then."""
        runtime = cupy().cuda.runtime
        runtime.memcpyAsync(address, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)

    # --- streams -----------------------------------------------------------------------------------------------------

    def selected(self) -> AbstractContextManager[Any]:
        """Makes this device CuPy's current one."""
        return cupy().cuda.Device(self.index)  # type: ignore[no-any-return]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this device, and the stream that steps go to, CuPy's current ones."""
        with self.selected(), self.stream():
            yield

    def stream(self) -> Any:
        """The stream that steps go to."""
        if self._source == "torch":
            return cupy().cuda.Stream.from_external(_TorchStream(self.index))
        return cupy().cuda.get_current_stream(self.index)

    def event(self, stream: Any) -> Any:
        """Tells when what is on the stream by now is ``done``, and can ``synchronize``."""
        event = cupy().cuda.Event(disable_timing=True)
        event.record(stream)
        return event

    def capturing(self, stream: Any = None) -> bool:
        """Whether what is put on the stream, by default the current one, goes into a CUDA graph."""
        stream = stream or self.stream()
        # Neither the default stream nor the legacy one can be captured, and asking about the latter is an error.
        return stream.ptr > 1 and bool(cupy().cuda.runtime.streamIsCapturing(stream.ptr))

    def refuse_capture(self, stream: Any = None) -> None:
        """Raise where the stream is being captured: a graph would repeat an upload, from memory that has changed."""
        if self.capturing(stream):
            raise RuntimeError(
                "fastopt: a step that is captured into a CUDA graph may upload nothing. Set capturable=True, and take "
                "a step with the same gradients and options before capturing."
            )

    def function(self, ptx: str, symbol: str, threads: int) -> Function:
        """The kernel in some PTX, which the driver translates for this device."""
        library = cupy()
        with self.current():
            try:
                module = library.cuda.Module()
                module.load(ptx.encode())
                kernel = module.get_function(symbol)
            except library.cuda.driver.CUDADriverError as error:
                raise RuntimeError(
                    f"fastopt: {self.name} cannot load {symbol}: {error}. Needed are compute capability 7.5 or "
                    "newer and a driver for CUDA 11 or newer; `fastopt info` says what is here."
                ) from error

        def launch(blocks: int, arguments: tuple[Any, ...], stream: Any) -> None:
            kernel((blocks, 1, 1), (threads, 1, 1), arguments, 0, stream)

        return launch


# --- small uploads ----------------------------------------------------------------------------------------------------

SLOTS = 16
"""Uploads that may wait on the stream before the host waits for one: it may be as many steps ahead."""


CAPTURES = 8
"""Uploads that graphs may hold: each keeps a pinned copy, which cannot be allocated during a capture, for ever."""


@dataclass
class _Slot:
    memory: NDArray[np.uint8]
    done: Any = None  # an event: until it has come, the device may still be reading


class PinnedRing:
    """A few pinned copies of one piece of device memory, used in turn, for uploads that neither wait nor are overtaken:
    the host never writes what the device is still reading.

    Args:
        device: The device.
        address: Where the piece lies.
        nbytes: Its size.
    """

    def __init__(self, device: CudaDevice, address: int, nbytes: int) -> None:
        self._device = device
        self._address = address
        self._nbytes = nbytes
        self._slots: Iterator[_Slot] | None = None
        self._spare: list[NDArray[np.uint8]] = []
        self._sent: bytes | None = None
        self._in_graphs = False

    def send(self, content: NDArray[np.uint8], stream: Any, *, to_graphs: bool = False) -> None:
        """Put an upload on the stream, unless the device has this content already.

        With ``to_graphs`` a graph that is being captured uploads this content in each replay; otherwise an upload is
        refused then.
        """
        sent = content.tobytes()
        if not sent:
            return
        if to_graphs and self._spare and self._device.capturing(stream):
            memory = self._spare.pop()
            memory[:] = content
            self._device.send(self._address, memory, stream)
            self._in_graphs = True
            return
        if sent == self._sent and not self._in_graphs:  # replays upload without the host
            return
        self._device.refuse_capture(stream)
        if self._slots is None:
            pinned = self._device.pinned((SLOTS + CAPTURES) * self._nbytes).reshape(-1, self._nbytes)
            self._slots = itertools.cycle([_Slot(memory) for memory in pinned[:SLOTS]])
            self._spare = list(pinned[SLOTS:])
        slot = next(self._slots)
        if slot.done is not None and not slot.done.done:
            slot.done.synchronize()
        slot.memory[:] = content
        self._device.send(self._address, slot.memory, stream)
        slot.done = self._device.event(stream)
        self._sent = sent

    def forget(self) -> None:
        """The device changed the content itself."""
        self._sent = None
