"""Small uploads that neither wait nor are overtaken: the host never writes what the device is still reading."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .runtime import Runtime

SLOTS = 16
"""Uploads that may wait on the stream before the host waits for one: it may be as many steps ahead."""


@dataclass
class _Slot:
    memory: NDArray[np.uint8]
    done: Any = None  # an event: until it has come, the device may still be reading


class Staging:
    """A few pinned copies of one piece of device memory, used in turn.

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
        self._sent: bytes | None = None

    def send(self, content: NDArray[np.uint8], stream: Any) -> bool:
        """Put an upload on the stream, unless the device has this content already; whether it was needed."""
        sent = content.tobytes()
        if sent == self._sent or not sent:
            return False
        self._runtime.refuse_capture(stream)
        if self._slots is None:
            pinned = self._runtime.pinned(SLOTS * self._nbytes).reshape(SLOTS, self._nbytes)
            self._slots = itertools.cycle([_Slot(memory) for memory in pinned])
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
