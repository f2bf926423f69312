"""What a fresh process pays: the import beyond NumPy, and the first step."""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import Any

from rich.console import Console

PROGRAM = """
import sys, time
import numpy as np
a = time.perf_counter()
import fastopt
b = time.perf_counter()
params = fastopt.FlatBuffer.from_arrays({"w": np.ones(1000, np.float32)})
opt, grads = fastopt.Adam(params), params.zeros_like()
c = time.perf_counter()
opt.step(grads)
print(b - a, time.perf_counter() - c, "numba" in sys.modules)
"""
BARS_MS = {"import": 60.0, "first step": 5.0}


def measure(console: Console, repeats: int = 11) -> dict[str, Any]:
    """Run fresh processes and print the medians."""
    imports, steps, numba = [], [], set()
    for _ in range(repeats):
        run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        first, second, third = run.stdout.split()
        imports.append(float(first))
        steps.append(float(second))
        numba.add(third)
    console.print(f"startup, {repeats} fresh processes")
    for (what, limit), values in zip(BARS_MS.items(), (imports, steps), strict=True):
        middle = 1e3 * statistics.median(values)
        verdict = "reached" if middle <= limit else "MISSED"
        console.print(
            f"  {verdict}: {what} ≤ {limit:g} ms: {middle:.2f} ms ({1e3 * min(values):.2f} to {1e3 * max(values):.2f})"
        )
    console.print(f"  Numba imported: {', '.join(sorted(numba))}")
    return {"import": imports, "first step": steps, "numba imported": sorted(numba)}
