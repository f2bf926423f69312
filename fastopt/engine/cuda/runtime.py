"""Everything that is asked of CuPy once arrays are known: memory, copies, streams, launches, on one device."""

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

Array = NDArray[Any]
"""An array of CuPy."""

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


def address(array: Any) -> int:
    """Where the data of a contiguous array begin."""
    return int(array.data.ptr)


class _TorchStream:
    """PyTorch's current stream, by the protocol through which CuPy takes streams of others."""

    def __init__(self, device: int) -> None:
        self.pointer = int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer


class Runtime:
    """CuPy on one device, with the current streams of one library: "cupy" or "torch"."""

    def __init__(self, device: int, library: str) -> None:
        self.device = device
        self.library = library

    def selected(self) -> AbstractContextManager[Any]:
        """Makes this device CuPy's current one."""
        return cupy().cuda.Device(self.device)  # type: ignore[no-any-return]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes this device, and the stream that steps go to, CuPy's current ones."""
        with self.selected(), self.stream():
            yield

    def stream(self) -> Any:
        """The current stream of the library whose arrays these are."""
        if self.library == "torch":
            return cupy().cuda.Stream.from_external(_TorchStream(self.device))
        return cupy().cuda.get_current_stream(self.device)

    def capturing(self, stream: Any) -> bool:
        """Whether what is put on the stream goes into a CUDA graph."""
        # Neither the default stream nor the legacy one can be captured, and asking about the latter is an error.
        return stream.ptr > 1 and bool(cupy().cuda.runtime.streamIsCapturing(stream.ptr))

    def refuse_capture(self, stream: Any) -> None:
        """Raise where the stream is being captured: a graph would repeat an upload, from memory that has changed."""
        if self.capturing(stream):
            raise RuntimeError(
                "fastopt: a step that is captured into a CUDA graph may upload nothing. Set capturable=True, and take "
                "a step with the same gradients and options before capturing."
            )

    def zeros(self, size: int, dtype: np.dtype[Any]) -> Array:
        """A new array of zeros."""
        with self.current():
            return cupy().zeros(size, dtype)  # type: ignore[no-any-return]

    def free_memory(self) -> tuple[int, int]:
        """Bytes of the device that are free, and all."""
        with self.current():
            free, total = cupy().cuda.runtime.memGetInfo()
        return int(free), int(total)

    def empty(self, size: int, dtype: np.dtype[Any], stream: Any) -> Array:
        """A new array for a kernel on this stream to fill."""
        with self.selected(), stream:
            return cupy().empty(size, dtype)  # type: ignore[no-any-return]

    def upload(self, array: NDArray[Any]) -> Array:
        """A copy on the device."""
        self.refuse_capture(self.stream())
        with self.current():
            return cupy().asarray(array)  # type: ignore[no-any-return]

    def download(self, array: Array, stream: Any = None) -> NDArray[Any]:
        """A copy in host memory; waits for the stream, by default the current one."""
        stream = self.stream() if stream is None else stream
        with self.selected(), stream:
            return cupy().asnumpy(array)  # type: ignore[no-any-return]

    def assign(self, view: Any, values: Any) -> None:
        """Copy values, of an array of either memory or a number, into an array on this device."""
        with self.current():
            view[...] = cupy().asarray(values) if isinstance(values, np.ndarray) else values

    def copy_of(self, array: Any) -> Array:
        """A contiguous copy of an array on this device."""
        with self.current():
            return array.copy(order="C")  # type: ignore[no-any-return]

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that the device can copy from while the host goes on."""
        return np.frombuffer(cupy().cuda.alloc_pinned_memory(nbytes), np.uint8, nbytes)

    def copy(self, address: int, source: NDArray[np.uint8], stream: Any) -> Any:
        """Put a copy from pinned memory on a stream; the result tells when it is ``done``, and can ``synchronize``."""
        library = cupy().cuda
        kind = library.runtime.memcpyHostToDevice
        library.runtime.memcpyAsync(address, source.ctypes.data, source.nbytes, kind, stream.ptr)
        done = library.Event(disable_timing=True)
        done.record(stream)
        return done

    def copy_in_graph(self, address: int, source: NDArray[np.uint8], stream: Any) -> None:
        """Let the graph that is being captured copy from pinned memory, which must stay as it is from then on."""
        runtime = cupy().cuda.runtime
        runtime.memcpyAsync(address, source.ctypes.data, source.nbytes, runtime.memcpyHostToDevice, stream.ptr)

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
                    f"fastopt: cuda:{self.device} cannot load {symbol}: {error}. Needed are compute capability 7.5 or "
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
        runtime: The device.
        address: Where the piece lies.
        nbytes: Its size.
    """

    def __init__(self, runtime: Runtime, address: int, nbytes: int) -> None:
        self._runtime = runtime
        self._address = address
        self._nbytes = nbytes
        self._slots: Iterator[_Slot] | None = None
        self._spare: list[NDArray[np.uint8]] = []
        self._sent: bytes | None = None
        self._in_graphs = False

    def send(self, content: NDArray[np.uint8], stream: Any, *, to_graphs: bool = False) -> bool:
        """Put an upload on the stream, unless the device has this content already; whether it was needed.

        With ``to_graphs`` a graph that is being captured uploads this content in each replay; otherwise an upload is
        refused then.
        """
        sent = content.tobytes()
        if not sent:
            return False
        if to_graphs and self._spare and self._runtime.capturing(stream):
            memory = self._spare.pop()
            memory[:] = content
            self._runtime.copy_in_graph(self._address, memory, stream)
            self._in_graphs = True
            return True
        if sent == self._sent and not self._in_graphs:  # replays upload without the host
            return False
        self._runtime.refuse_capture(stream)
        if self._slots is None:
            pinned = self._runtime.pinned((SLOTS + CAPTURES) * self._nbytes).reshape(-1, self._nbytes)
            self._slots = itertools.cycle([_Slot(memory) for memory in pinned[:SLOTS]])
            self._spare = list(pinned[SLOTS:])
        slot = next(self._slots)
        if slot.done is not None and not slot.done.done:
            slot.done.synchronize()
        slot.memory[:] = content
        slot.done = self._runtime.copy(self._address, slot.memory, stream)
        self._sent = sent
        return True

    def forget(self) -> None:
        """The device changed the content itself."""
        self._sent = None
