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
