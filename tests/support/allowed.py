"""The memory that kernels in the simulator may access."""

import bisect
import math
import weakref


class BadAccess(AssertionError):
    """A GPU would have stopped the kernel, or read or written what is not the kernel's."""


_allowed = []  # first address of each array and one past the last, sorted


def allow(array):
    """Let kernels access an array, as long as this very object lives; the array itself."""
    start, stop = array.ctypes.data, array.ctypes.data + array.nbytes
    if array.nbytes:
        assert array.flags.c_contiguous
        place = bisect.bisect(_allowed, (start, stop))
        neighbours = _allowed[max(place - 1, 0) : place + 1]
        assert all(stop <= other[0] or other[1] <= start for other in neighbours), "a part of it is allowed already"
        _allowed.insert(place, (start, stop))
        weakref.finalize(array, _allowed.remove, (start, stop))
    return array


def is_allowed(address, size):
    place = bisect.bisect(_allowed, (address, math.inf)) - 1
    nearest = _allowed[place : place + 1]
    # The garbage collector may take arrays away meanwhile, in another thread: then every place has changed.
    return any(
        start <= address and address + size <= stop for ranges in (nearest, _allowed) for start, stop in [*ranges]
    )
