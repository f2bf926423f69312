"""Counts how often the host waits for the GPU in a step: by torch's profiler, and by a GPU that is kept busy."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .contenders import Contender, Copy

STEPS, CONTROL = "bench: steps", "bench: control"
TAKEN = 10
BUSY_COPIES, BUSY_STEPS = 20, 3

Event = Mapping[str, Any]
Trace = Callable[[Callable[[], object], Callable[[], object]], list[Event]]
"""Runs the steps, then the control, and returns what a profiler saw of both, as events of a Chrome trace."""


def count_waits(contender: Contender, copy: Copy, trace: Trace) -> dict[str, Any]:
    """How often the host waits in ten steps, and whether steps return while the GPU is still busy with something else.

    A wait that is known to happen has to be seen, or the count is an error.
    """
    gpu = contender.problem.gpu
    for _ in range(2 * TAKEN):  # pinned memory and the like are there from then on
        contender.step()
    gpu.synchronize()

    def steps() -> None:
        for _ in range(TAKEN):
            contender.step()

    calls = tally(trace(steps, gpu.synchronize))
    for _ in range(BUSY_COPIES):
        copy.run()
    for _ in range(BUSY_STEPS):
        contender.step()
    returned = not gpu.idle()
    gpu.synchronize()
    waits = sum(count for name, count in calls[STEPS].items() if is_wait(name))
    if not any(map(is_wait, calls[CONTROL])):
        raise RuntimeError(f"the profiler did not see a wait that happened; steps returned without one: {returned}")
    return {
        "waits": waits if returned else max(waits, 1),
        "steps": TAKEN,
        "returned while the GPU was busy": returned,
        "calls": calls[STEPS],
    }


def is_wait(call: str) -> bool:
    """Whether the host waits in a function of CUDA, or a copy takes data to where the host waits for them."""
    blocking = ("cudaMemcpy", "cuMemcpy", "cudaMemset", "cuMemset")
    return "Synchronize" in call or "DtoH" in call or (call.startswith(blocking) and "Async" not in call)


def tally(events: Iterable[Event]) -> dict[str, dict[str, int]]:
    """How often each function of CUDA was called, and each kind of copy was made, in the steps and in the control."""
    events = list(events)
    spans = {
        event["name"]: (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event.get("name") in (STEPS, CONTROL)
    }
    counts: dict[str, Counter[str]] = {STEPS: Counter(), CONTROL: Counter()}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver", "gpu_memcpy"):
            for name, (start, stop) in spans.items():
                if start <= event["ts"] <= stop:
                    counts[name][event["name"]] += 1
    return {name: dict(sorted(counter.items())) for name, counter in counts.items()}


def torch_trace(steps: Callable[[], object], control: Callable[[], object]) -> list[Event]:
    """What torch's profiler sees, on the host and on the GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    torch.cuda.synchronize()  # starts CUDA in torch, whose profiler comes too late otherwise
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function(STEPS):
            steps()
        with record_function(CONTROL):
            control()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events: list[Event] = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return events
