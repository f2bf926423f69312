"""Threads for builds without a C compiler, in the place of OpenMP's (launch.c)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

BARRIER = ctypes.CFUNCTYPE(None)
SCHEDULE = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5, BARRIER)
ALONE = BARRIER(lambda: None)


def run(schedule: int, table: int, act: int, flags: int, threads: int) -> None:
    """Have a team of at most so many threads run the schedule at an address, which frees Python's lock meanwhile."""
    if threads == 1:
        SCHEDULE(schedule)(table, act, flags, 0, 1, ALONE)
        return
    # Other threads do the work: an interrupt is raised here, and there nothing is left half done.
    done = _pool().submit(_run, SCHEDULE(schedule), (table, act, flags), threads)
    try:
        done.result()
    finally:
        wait([done])


def _run(schedule: Any, arguments: tuple[int, ...], threads: int) -> None:
    complete, others = threading.Event(), list[Future[None]]()

    def take_part(me: int) -> None:
        complete.wait()
        if me <= len(others):  # else its start was reported as failed
            schedule(*arguments, me, 1 + len(others), barrier)

    with contextlib.suppress(RuntimeError):  # no more threads can be started
        for me in range(1, threads):
            others.append(_pool().submit(take_part, me))
    barrier = BARRIER(threading.Barrier(1 + len(others)).wait)
    complete.set()
    take_part(0)
    wait(others)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2048, "fastopt")  # threads are started when they are needed


os.register_at_fork(after_in_child=_pool.cache_clear)
