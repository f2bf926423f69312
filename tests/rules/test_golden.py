"""Bits that stay: parameters, states and norms after six steps, by optimizer, options and dtypes (golden.json).

A change of bits is a decision. To take one, write the file anew and say in the commit which cases changed and why:
``PYTHONPATH=tests/support python tests/rules/test_golden.py``.
"""

import functools
import hashlib
import itertools
import json
import pathlib

import numpy as np
import pytest
from compare import DTYPES
from fastopt.kernels.dtypes import PAIRS

import fastopt

FILE = pathlib.Path(__file__).with_name("golden.json")
# fmt: off
OPTIONS = {
    "SGD": (dict(lr=0.1), dict(lr=0.1, momentum=0.9), dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
            dict(lr=0.1, momentum=0.9, dampening=0.1, maximize=True)),
    "Adagrad": (dict(lr=0.1), dict(lr=0.1, lr_decay=0.01, weight_decay=0.01)),
    "RMSprop": (dict(lr=0.01), dict(lr=0.01, momentum=0.9, centered=True, weight_decay=0.01)),
    "Adam": (dict(lr=0.01), dict(lr=0.01, amsgrad=True, weight_decay=0.01), dict(lr=0.01, eps_hat=True)),
    "AdamW": (dict(lr=0.01, weight_decay=0.1), dict(lr=0.01, amsgrad=True)),
    "Adadelta": ({},), "Adamax": ({},), "NAdam": ({}, dict(weight_decay=0.01)), "RAdam": ({}, dict(weight_decay=0.01)),
    "Rprop": ({},), "ASGD": ({},), "Lion": (dict(weight_decay=0.1),),
    "LARS": (dict(lr=1.0, weight_decay=1e-3), dict(lr=1.0, nesterov=True, clip=True),
             dict(lr=1.0, adapt=True, lr_in_momentum=False)),
}
# fmt: on
SHAPES = {"a": (123, 161), "b": (161,), "c": (), "d": (0,), "e": (5, 7, 11), "f": (33333,)}
WAYS = {"flat": {}, "clip": {"max_norm": 0.5, "grad_scale": 8.0, "skip_nonfinite": True}}
CASES = {
    f"{name}.{k}.{'.'.join(pair)}.{way}": (name, options, pair, way)
    for name, kinds in OPTIONS.items()
    for (k, options), pair, way in itertools.product(enumerate(kinds), PAIRS, WAYS)
}


def digest(array):
    """A hash of the numbers, -0 being 0."""
    return hashlib.sha256((np.asarray(array).astype(np.float64) + 0.0).tobytes()).hexdigest()[:16]


def run(name, options, pair, way):
    """The norm of each step, and hashes of all arrays after the last."""
    rng = np.random.default_rng(7)

    def arrays(dtype, scale):
        return {k: np.asarray(rng.standard_normal(s) * scale).astype(DTYPES[dtype]) for k, s in SHAPES.items()}

    params = arrays(pair[0], 1.0)
    if way == "flat":
        params = fastopt.FlatBuffer.from_arrays(params)
    opt = getattr(fastopt, name)(params, **options)
    norms = []
    for _ in range(6):
        norm = opt.step(arrays(pair[1], 0.1), **WAYS[way]).grad_norm
        norms.append(None if norm is None else norm.hex())
    states = {f"s.{k}.{name}": x for k, state in opt.state.items() for name, x in state.items()}
    states = {key: digest(x) for key, x in states.items() if isinstance(x, np.ndarray)}
    return {"norms": norms, **{f"p.{k}": digest(params[k]) for k in SHAPES}, **states}


@functools.cache
def golden():
    return json.loads(FILE.read_text())


def test_the_file_has_every_case():
    assert golden().keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_bits(case, isa):
    assert run(*CASES[case]) == golden()[case]


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(run(*case))}" for name, case in CASES.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
