"""Sums over a grid of blocks of threads, in the order of ``..reductions``: device functions that whole blocks call."""

from __future__ import annotations

from typing import Any

from ..layout import BLOCK, LANES
from .toolchain import THREADS, cuda, device_function


def sums(access: Any) -> tuple[Any, Any, Any, Any]:
    """Functions ``lane_of``, ``chunk_sum``, ``sum_of`` and ``is_last``; first comes the shared memory that they use."""
    word, put_word, fresh_real, count_up = access.word, access.put_word, access.fresh_real, access.count_up

    @device_function
    def lane_of(chunks: Any, chunk: Any) -> Any:
        """Where a thread's lane of a chunk begins, and where its block of elements ends, which 32 threads share."""
        block = word(chunks, 3 * chunk + 1) + cuda.threadIdx.x // LANES * BLOCK
        return block + cuda.threadIdx.x % LANES, min(word(chunks, 3 * chunk + 2), block + BLOCK)

    @device_function
    def add_lanes(lanes: Any) -> None:
        """Add up each group of 32 lanes pairwise, into the first of them."""
        thread, width = cuda.threadIdx.x, LANES // 2
        while width > 0:
            cuda.syncthreads()
            if thread % LANES < width:
                lanes[thread] += lanes[thread + width]
            width //= 2
        cuda.syncthreads()

    @device_function
    def chunk_sum(lanes: Any, number: Any) -> Any:
        """Of the sums of all lanes."""
        lanes[cuda.threadIdx.x] = number
        add_lanes(lanes)
        total = 0.0
        for block in range(0, THREADS, LANES):
            total += lanes[block]
        cuda.syncthreads()
        return total

    @device_function
    def sum_of(lanes: Any, numbers: Any, stride: Any, count: Any) -> Any:
        """Of numbers in memory that other blocks may have written."""
        thread, total = cuda.threadIdx.x, 0.0
        if thread < LANES:
            for k in range(thread, count, LANES):
                total += fresh_real(numbers, stride * k)
        lanes[thread] = total
        add_lanes(lanes)
        total = lanes[0]
        cuda.syncthreads()
        return total

    @device_function
    def is_last(last: Any, counter: Any, number: Any, wanted: Any) -> Any:
        """Whether this block is the one that brings a counter to what is wanted. Then the counter is zero again, and
        what the other blocks wrote before can be read."""
        if cuda.threadIdx.x == 0:
            cuda.threadfence()  # whoever sees the count sees what this block wrote
            complete = count_up(counter, number) + number == wanted
            if complete:
                cuda.threadfence()
                put_word(counter, 0, 0)
            last[0] = complete
        cuda.syncthreads()
        return last[0] != 0

    return lane_of, chunk_sum, sum_of, is_last
