"""What a fresh process pays: the import, and the first step."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from .case import Bar
from .results import Result, Timing

HEAD = "import sys, time\nimport numpy as np\nclock = time.perf_counter\nx = np.ones(1000, np.float32)\n"
PROGRAMS = {
    "fastopt": """
a = clock()
import fastopt
b = clock()
params = fastopt.FlatBuffer.from_arrays({"w": x})
opt, grads = fastopt.Adam(params), params.zeros_like()
c = clock()
opt.step(grads)
d = clock()
assert "numba" not in sys.modules
""",
    "fastopt.torch": """
import torch
a = clock()
import fastopt.torch
b = clock()
p = torch.nn.Parameter(torch.from_numpy(x))
p.grad = torch.ones_like(p)
opt = fastopt.torch.Adam([p])
c = clock()
opt.step()
d = clock()
""",
    "torch fused": """
a = clock()
import torch
b = clock()
p = torch.nn.Parameter(torch.from_numpy(x))
p.grad = torch.ones_like(p)
opt = torch.optim.Adam([p], fused=True)
c = clock()
opt.step()
d = clock()
""",
    "numba": """
from bench.case import Case
a = clock()
from bench.contenders.numba_loop import NumbaLoop
import numba
b = clock()
opt = NumbaLoop(Case("x", "Adam", {"lr": 1e-3}, {"w": (1000,)}, ()), {"w": x}, {"w": np.ones_like(x)}, 1)
c = clock()
opt.step()
d = clock()
""",
}
TAIL = "print(b - a, d - c)\n"
NEEDS = {"fastopt": "numpy", "fastopt.torch": "torch", "torch fused": "torch", "numba": "numba"}

BARS = {"import": Bar("fastopt", 60, unit="ms"), "first step": Bar("fastopt", 5, unit="ms")}


def measure(repeats: int) -> list[Result]:
    """Two results: seconds of the import (beyond NumPy, and torch for fastopt.torch), and of the first step."""
    samples: dict[str, list[tuple[float, ...]]] = {}
    problems = {}
    for _ in range(repeats):
        for name, program in PROGRAMS.items():
            if name in problems:
                continue
            if importlib.util.find_spec(NEEDS[name]) is None:
                problems[name] = f"not installed: pip install {NEEDS[name]}"
                continue
            run = subprocess.run(
                [sys.executable, "-c", HEAD + program + TAIL], capture_output=True, text=True, check=False
            )
            if run.returncode:
                problems[name] = run.stderr.strip().splitlines()[-1]
                samples.pop(name, None)
            else:
                samples.setdefault(name, []).append(tuple(map(float, run.stdout.split())))
    results = []
    for k, (what, bar) in enumerate(BARS.items()):
        result = Result(f"startup-{what}".replace(" ", "-"), "startup", what, "", 0, 0, 1, 0)
        result.timings = {name: Timing([pair[k] for pair in pairs]) for name, pairs in samples.items()}
        result.problems = dict(problems)
        result.judge((bar,))
        results.append(result)
    return results
