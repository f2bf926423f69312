"""Measures contenders on several processes of this machine, and what the model needs to know of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn

import fastopt
import fastopt.torch

from ..cli import Refusal
from .contenders import CHECKED, HYPER, TOLERANCE, TRAIN, UPDATE, Contender, Problem, WrongAnswer
from .model import FLOAT, PASS

TABLES: dict[str, Mapping[str, Callable[[Problem], Contender]]] = {"update": UPDATE, "train": TRAIN}
EXCHANGES = (2**14, 2**25, 2**26)
"""Bytes that each process gets of others at once to calibrate the network, where the parameters are larger."""
MESSAGE = 2**21
PARTS = 4
"""The kernel is calibrated on this fraction of the parameters."""
TIMEOUT = timedelta(minutes=3)


@dataclass
class Settings:
    """What is asked for."""

    size: int
    rounds: Mapping[str, int]


def measure(settings: Settings, worlds: tuple[int, ...]) -> dict[str, Any]:
    """Samples of everything by number of processes.

    Raises:
        Refusal: A process failed; the others are ended.
    """
    found = {}
    for world in worlds:
        with tempfile.TemporaryDirectory() as folder:
            try:
                spawn(_work, (world, folder, settings), nprocs=world)
            except ProcessException as error:
                raise Refusal(f"one of {world} processes failed: {str(error).strip().splitlines()[-1]}") from None
            found[str(world)] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _work(rank: int, world: int, folder: str, settings: Settings) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    fastopt.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT)
    found = {table: measured(table, world, settings) for table in settings.rounds}
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(table: str, world: int, settings: Settings) -> dict[str, Any]:
    """What one table says of so many processes, on each of which this is called."""
    factor = 1.0 if table == "update" else 1 + (dist.get_rank() - (world - 1) / 2) / world
    problem = Problem(settings.size, factor)
    steps, found = {}, {}
    for name, make in TABLES[table].items():
        try:
            contender, found[name] = checked(make, problem)
            steps[name] = contender.step
        except WrongAnswer as error:
            found[name] = {"problem": str(error)}
    for name, moved, step in _calibrations(table, problem):
        steps[name], found[name] = step, {"moved": moved}
    for name, samples in _rounds(steps, settings.rounds[table]).items():
        found[name]["samples"] = samples
    return found


def checked(make: Callable[[Problem], Contender], problem: Problem) -> tuple[Contender, dict[str, Any]]:
    """Make a contender, check its answer, and count its bytes: in memory, and on the wire in a step.

    Raises:
        WrongAnswer: On all processes, if the answer is wrong on one.
    """
    before = _resident()
    contender = make(problem)
    for _ in range(CHECKED):
        contender.step()
    error = _largest(problem.error(contender.answer()))
    if not error <= TOLERANCE:
        raise WrongAnswer(f"after {CHECKED} steps parameters are {error:.2g} from torch's; allowed are {TOLERANCE:.2g}")
    _resident()  # trims: memory of before is none of a step's
    _forget_peak()
    dist.barrier()
    received = wire()
    contender.step()
    dist.barrier()
    received = wire() - received
    peak = _status("VmHWM") - before
    states, resident = contender.states(), _resident() - before
    bytes_ = {"states": states, "resident": resident, "peak": peak}
    return contender, {"wire": _sum(received) / dist.get_world_size()} | {k: _largest(v) for k, v in bytes_.items()}


def _rounds(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of steps, of the slowest process in each round."""
    times = torch.zeros(len(steps), rounds, dtype=torch.float64)
    gc.collect()
    gc.disable()
    for k in range(-1, rounds):  # one to warm up
        for i, step in enumerate(steps.values()):
            dist.barrier()
            began = time.perf_counter()
            step()
            times[i, k] = time.perf_counter() - began
    gc.enable()
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return dict(zip(steps, times.tolist(), strict=True))


# --- calibration -----------------------------------------------------------------------------------------------------


def _calibrations(table: str, problem: Problem) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """What the model needs, done by all processes at once: name, bytes that each moves, and what is timed."""
    if table == "update":
        parameter = torch.nn.Parameter(torch.randn(problem.elements // PARTS))
        parameter.grad = torch.randn(len(parameter))
        yield "kernel alone", PASS * len(parameter), fastopt.torch.AdamW([parameter], **HYPER).step
        copied = torch.ones(min(problem.elements, MESSAGE))
        count = problem.elements // len(copied)
        fresh = lambda: [torch.zeros_like(copied).copy_(copied) for _ in range(count)]  # noqa: E731
        yield "fresh memory", count * copied.nbytes, fresh
        for size in EXCHANGES if dist.get_world_size() > 1 else ():
            yield _exchange(min(size, FLOAT * problem.elements))
    else:
        model, x = problem.model(), torch.zeros(1, requires_grad=True)

        def backward() -> None:
            model(x).backward()
            model.zero_grad(set_to_none=True)

        yield "backward alone", FLOAT * problem.elements, backward


def _exchange(size: int) -> tuple[str, int, Callable[[], None]]:
    """Each process sends each other one the same, in all so many bytes, and as the sharded optimizer does it."""
    world, me = dist.get_world_size(), dist.get_rank()
    elements = max(1, size // FLOAT // (world - 1))
    mine, theirs = torch.zeros(elements), torch.zeros(world, elements)
    others = [(me + k) % world for k in range(1, world)]

    def exchange() -> None:
        works = [dist.irecv(x, other) for other in others for x in theirs[other].split(MESSAGE // FLOAT)]
        works += [dist.isend(x, other) for other in others for x in mine.split(MESSAGE // FLOAT)]
        for work in works:
            work.wait()

    return f"exchange of {size} bytes", (world - 1) * mine.nbytes, exchange


# --- counts of bytes -------------------------------------------------------------------------------------------------


def wire() -> int:
    """Bytes that this process has received through its TCP connections, as the kernel counts them."""
    total = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(number))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("=Q", info, 128)[0]  # tcpi_bytes_received
    return total


def _status(name: str) -> int:
    """An entry of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _resident() -> int:
    """Bytes of this process in memory, without what is free for its next allocation."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _largest(value: float) -> float:
    return _over(value, dist.ReduceOp.MAX)


def _sum(value: float) -> float:
    return _over(value, dist.ReduceOp.SUM)


def _over(value: float, operation: Any) -> float:
    shared = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(shared, operation)
    return float(shared)
