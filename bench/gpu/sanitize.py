"""A short run for compute-sanitizer: every path of the kernels, on arrays that end where their memory ends."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

CHUNK = 16_384
SHAPES = {"one": (1,), "odd": (3, 7), "chunk": (CHUNK,), "more": (5, CHUNK + 5), "empty": (0,)}

CASES: tuple[tuple[str, dict[str, Any], str, str, dict[str, Any]], ...] = (
    ("Adam", {"lr": 1e-3}, "float32", "float32", {}),
    ("Adam", {"lr": 1e-3}, "float32", "float32", {"max_norm": 0.5, "grad_scale": 8.0, "skip_nonfinite": True}),
    ("AdamW", {"lr": 1e-3}, "bfloat16", "bfloat16", {"max_norm": 0.5, "zero_grads": True}),
    ("AdamW", {"lr": 1e-3, "amsgrad": True}, "float32", "float16", {}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}, "float64", "float64", {"zero_grads": True, "max_norm": 0.5}),
    ("LARS", {"lr": 0.1, "weight_decay": 1e-4}, "float32", "float32", {}),
    ("NAdam", {"lr": 1e-3, "capturable": True}, "float16", "float16", {"skip_nonfinite": True}),
)


def run(case: tuple[str, dict[str, Any], str, str, dict[str, Any]]) -> None:
    """Two steps on the GPU and on the CPU, with the same bits."""
    import cupy

    import fastopt

    name, hyper, p, g, options = case
    rng = np.random.default_rng(0)
    dtypes = [fastopt.FlatBuffer({}, dtype).dtype for dtype in (p, g)]
    params, grads = ({k: rng.standard_normal(s).astype(d) for k, s in SHAPES.items()} for d in dtypes)
    on_gpu = {key: cupy.asarray(array) for key, array in params.items()}
    # One element from the start of an allocation: elements are taken one by one there.
    shifted = cupy.empty(CHUNK + 8, dtypes[0])[1:]
    params["shifted"], on_gpu["shifted"] = rng.standard_normal(CHUNK + 7).astype(dtypes[0]), shifted
    grads["shifted"] = rng.standard_normal(CHUNK + 7).astype(dtypes[1])
    shifted.set(params["shifted"])
    optimizer = getattr(fastopt, name)
    on_cpu = optimizer(params, **{key: value for key, value in hyper.items() if key != "capturable"})
    there = optimizer(on_gpu, **hyper)
    for _ in range(2):
        there.step({key: cupy.asarray(array) for key, array in grads.items()}, **options)
        on_cpu.step({key: array.copy() for key, array in grads.items()}, **options)
    for key, array in params.items():
        if cupy.asnumpy(on_gpu[key]).tobytes() != array.tobytes():
            raise SystemExit(f"{case}: {key} differs from the CPU's")


def main() -> int:
    """Run all cases; the exit status."""
    import cupy

    cupy.cuda.set_allocator(None)  # every array an allocation of its own: in a pool, nobody sees an access beyond it
    for case in CASES:
        run(case)
        print(case[0], *case[2:], "same bits as the CPU")
    return 0


if __name__ == "__main__":
    sys.exit(main())
