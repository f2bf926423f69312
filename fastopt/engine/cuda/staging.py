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


CAPTURES = 8
"""Uploads that graphs may hold: each keeps a pinned copy, which cannot be allocated during a capture, for ever."""


@dataclass
class _Slot:
    memory: NDArray[np.uint8]
    done: Any = None  # an event: until it has come, the device may still be reading


class PinnedRing:
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
