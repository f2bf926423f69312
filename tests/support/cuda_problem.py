"""What tests of optimizers on a GPU share: small problems, and the comparison with the same optimizer on the CPU."""

import os

import numpy as np
from cases import CASES
from compare import DTYPES, bits

SHAPES = {"w": (5, 7), "b": (3,), "s": (), "none": (0,), "more": (2, 3, 11)}
FEW = {"w": (5, 7), "b": (3,)}  # a block of the prologue is 256 threads, which take the simulator a tenth of a second

ONE_PER_RULE = list({case.rule: case for case in CASES}.values())
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
"""Then fewer cases do: compiled kernels (test_compiled.py) and GPUs go through all of them in no time."""


def problem(p="float32", g=None, *, shapes=SHAPES, steps=3):
    rng = np.random.default_rng(0)

    def draw(dtype):
        return {k: np.asarray(rng.standard_normal(s)).astype(DTYPES[dtype]) for k, s in shapes.items()}

    return draw(p), [draw(g or p) for _ in range(steps)]


def moved(gpu, named):
    return {name: gpu.put(array) for name, array in named.items()}


def assert_same(gpu, on_gpu, params, opt_gpu, opt):
    """Parameters, states and step counts are the same, bit for bit; which NaN it is differs between machines."""
    for name, array in params.items():
        assert np.array_equal(bits(gpu.get(on_gpu[name])), bits(array)), name
        found, wanted = opt_gpu.state[name], opt.state[name]
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            if isinstance(value, np.ndarray):
                assert np.array_equal(bits(gpu.get(found[key])), bits(value)), (name, key)
            else:
                assert found[key] == value, (name, key)
