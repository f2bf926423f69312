"""Infinities, and numbers at the ends of float32, for rules that torch does not have."""

import math

import numpy as np
import pytest

import fastopt

BUILD = {
    "Lion": lambda p: fastopt.Lion(p, lr=0.5),
    "LARS": lambda p: fastopt.LARS(p, lr=0.5),
    "LARS, all layers": lambda p: fastopt.LARS([x.reshape(1, -1) for x in p], lr=0.5, momentum=0.0, adapt=False),
    "LARS with Nesterov": lambda p: fastopt.LARS(p, lr=0.5, nesterov=True),
}


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_an_infinite_parameter_without_decay_stays(build, isa):
    p = np.array([math.inf, -math.inf, math.inf, -math.inf, 1.0], np.float32)
    opt, grad = build([p]), np.array([0.0, 0.0, 0.5, 0.5, 0.0], np.float32)
    for _ in range(3):
        opt.step([grad.reshape(x.shape) for x in opt.param_groups[0]["params"].values()])
    assert p.tolist() == [math.inf, -math.inf, math.inf, -math.inf, 1.0]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("dtype", "w", "g"), [("f4", 1.0, 1e-42), ("f4", 1.0, -1e-44), ("f4", 1e35, 1e-12), ("f8", 1.0, 1e-150)]
)
@pytest.mark.parametrize("lr", [0.0, 0.1, 100.0])
@pytest.mark.parametrize("lr_in_momentum", [False, True])
def test_a_trust_ratio_beyond_float32(dtype, w, g, lr, nesterov, lr_in_momentum, isa):
    """The ratio of a layer of equal elements times its gradient is trust_coefficient w, whatever the gradient."""
    p, grad = np.full((40, 5), w, dtype), np.full((40, 5), g, dtype)
    fastopt.LARS([p], lr=lr, nesterov=nesterov, lr_in_momentum=lr_in_momentum).step([grad])
    moved = lr * 1e-3 * w * (1.9 if nesterov else 1.0)
    np.testing.assert_allclose(p, w - math.copysign(moved, g), rtol=1e-6, atol=1e-6 * w)
