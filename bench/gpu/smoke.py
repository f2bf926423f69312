"""``python -m bench.gpu.smoke``: a few steps of each kind on a GPU, with the bits of the CPU.

With ``--sanitized``, for compute-sanitizer: every array an allocation of its own, and no torch.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import WrongAnswer

CHUNK = 16_384
SHAPES = {"one": (1,), "odd": (3, 7), "chunk": (CHUNK,), "more": (5, CHUNK + 5), "empty": (0,)}

Case = tuple[str, dict[str, Any], str, str, dict[str, Any]]
"""Optimizer, its options, dtypes of parameters and gradients, options of the step."""

CASES: tuple[Case, ...] = (
    ("Adam", {"lr": 1e-3}, "float32", "float32", {}),
    ("Adam", {"lr": 1e-3}, "float32", "float32", {"max_norm": 0.5, "grad_scale": 8.0, "skip_nonfinite": True}),
    ("AdamW", {"lr": 1e-3}, "bfloat16", "bfloat16", {"max_norm": 0.5, "zero_grads": True}),
    ("AdamW", {"lr": 1e-3, "amsgrad": True}, "float32", "float16", {}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, "float64", "float64", {"zero_grads": True, "max_norm": 0.5}),
    ("LARS", {"lr": 0.1, "weight_decay": 1e-4}, "float32", "float32", {}),
    ("NAdam", {"lr": 1e-3, "capturable": True}, "float16", "float16", {"skip_nonfinite": True}),
)


def run(case: Case, put: Callable[[NDArray[Any]], Any], get: Callable[[Any], NDArray[Any]]) -> None:
    """Two steps on the GPU and on the CPU, with the same bits; ``put`` and ``get`` copy there and back."""
    import fastopt

    name, hyper, p, g, options = case
    rng = np.random.default_rng(0)
    shapes = {**SHAPES, "shifted": (CHUNK + 7,)}
    dtypes = [fastopt.FlatBuffer({}, dtype).dtype for dtype in (p, g)]
    params, grads = ({k: rng.standard_normal(s).astype(d) for k, s in shapes.items()} for d in dtypes)
    on_gpu = {key: put(array) for key, array in params.items()}
    # One element from the start of an allocation: elements are taken one by one there.
    on_gpu["shifted"] = put(np.concatenate([params["shifted"][:1], params["shifted"]]))[1:]
    optimizer = getattr(fastopt, name)
    on_cpu = optimizer(params, **{key: value for key, value in hyper.items() if key != "capturable"})
    there = optimizer(on_gpu, **hyper)
    for _ in range(2):
        there.step({key: put(array) for key, array in grads.items()}, **options)
        on_cpu.step({key: array.copy() for key, array in grads.items()}, **options)
    for key, array in params.items():
        if get(on_gpu[key]).tobytes() != array.tobytes():
            raise WrongAnswer(f"{key} differs from the CPU's")


def run_torch(name: str, *, sharded: bool = False) -> None:
    """Two clipped steps of fastopt.torch on the GPU and on the CPU, with the same bits.

    With ``sharded``, on the GPU those of a ShardedOptimizer in an NCCL group of one process.
    """
    import torch

    import fastopt.torch

    drawn = {name: torch.randn(shape, generator=torch.Generator().manual_seed(0)) for name, shape in SHAPES.items()}
    ends = []

    def train(device: str, make: Callable[..., Any]) -> None:
        params = [torch.nn.Parameter(value.to(device)) for value in drawn.values()]
        optimizer = make(params, lr=1e-3, max_grad_norm=0.5)
        for _ in range(2):
            for p, value in zip(params, drawn.values(), strict=True):
                p.grad = (value * 3).to(device)
            optimizer.step()
        ends.append([p.detach().cpu().numpy().tobytes() for p in params])

    kind = getattr(fastopt.torch, name)
    train("cpu", kind)
    if sharded:
        with tempfile.TemporaryDirectory() as folder:
            torch.distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
            try:
                train(
                    "cuda", functools.partial(fastopt.torch.ShardedOptimizer, optimizer_class=kind, bucket_cap_mb=0.1)
                )
            finally:
                torch.distributed.destroy_process_group()
    else:
        train("cuda", kind)
    differ = [name for name, cpu, gpu in zip(drawn, *ends, strict=True) if cpu != gpu]
    if differ:
        raise WrongAnswer(f"{', '.join(differ)} differ from the CPU's")


def main(arguments: list[str]) -> int:
    """Run all cases, also after one that failed; the exit status."""
    import cupy

    runs: list[tuple[str, Callable[[], None]]] = [
        (" ".join(map(str, (case[0], *case[2:]))), functools.partial(run, case, cupy.asarray, cupy.asnumpy))
        for case in CASES
    ]
    if arguments == ["--sanitized"]:
        cupy.cuda.set_allocator(
            None
        )  # every array an allocation of its own: in a pool, nobody sees an access beyond it
    else:
        runs.append(("fastopt.torch.AdamW", functools.partial(run_torch, "AdamW")))
        runs += [
            (f"ShardedOptimizer of {name}", functools.partial(run_torch, name, sharded=True))
            for name in ("AdamW", "LAMB")
        ]
    failed = 0
    for name, work in runs:
        began = time.perf_counter()
        try:
            work()
            said = "same bits as the CPU"
        except Exception as error:  # the next ones may tell more
            failed += 1
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name}: {said} ({time.perf_counter() - began:.1f} s, kernels loaded included)")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
