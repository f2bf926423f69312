"""Bits that stay: parameters, states and norms after six steps, by optimizer, options and dtypes (golden.json).

A change of bits is a decision. To take one, write the file anew, ``python tests/rules/test_golden.py``, and say in the
commit which cases changed and why.
"""

import functools
import hashlib
import itertools
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

import fastopt

FILE = pathlib.Path(__file__).with_name("golden.json")
OPTIONS = {
    "SGD": (
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "maximize": True},
    ),
    "Adagrad": ({"lr": 0.1}, {"lr": 0.1, "lr_decay": 0.01, "weight_decay": 0.01}),
    "RMSprop": ({"lr": 0.01}, {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.01}),
    "Adam": ({"lr": 0.01}, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01}, {"lr": 0.01, "eps_hat": True}),
    "AdamW": ({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "amsgrad": True}),
    "Adadelta": ({},),
    "Adamax": ({},),
    "NAdam": ({}, {"weight_decay": 0.01}),
    "RAdam": ({}, {"weight_decay": 0.01}),
    "Rprop": ({},),
    "ASGD": ({},),
    "Lion": ({"weight_decay": 0.1},),
    "LARS": (
        {"lr": 1.0, "weight_decay": 1e-3},
        {"lr": 1.0, "nesterov": True, "clip": True},
        {"lr": 1.0, "adapt": True, "lr_in_momentum": False},
    ),
}
SHAPES = {"a": (123, 161), "b": (161,), "c": (), "d": (0,), "e": (5, 7, 11), "f": (33333,)}
DTYPES = {
    "float32.float32": (np.float32, np.float32),
    "float64.float64": (np.float64, np.float64),
    "float16.float16": (np.float16, np.float16),
    "bfloat16.bfloat16": (ml_dtypes.bfloat16, ml_dtypes.bfloat16),
    "float32.float16": (np.float32, np.float16),
    "float32.bfloat16": (np.float32, ml_dtypes.bfloat16),
}
WAYS = {"flat": {}, "clip": {"max_norm": 0.5, "grad_scale": 8.0, "skip_nonfinite": True}}
CASES = {
    f"{name}.{k}.{dtypes}.{way}": (name, options, dtypes, way)
    for name, kinds in OPTIONS.items()
    for (k, options), dtypes, way in itertools.product(enumerate(kinds), DTYPES, WAYS)
}


def digest(array):
    """A hash of the numbers, -0 being 0."""
    return hashlib.sha256((np.asarray(array).astype(np.float64) + 0.0).tobytes()).hexdigest()[:16]


def run(name, options, dtypes, way):
    """The norm of each step, and hashes of all arrays after the last."""
    p_dtype, g_dtype = DTYPES[dtypes]
    rng = np.random.default_rng(7)
    params = {key: np.asarray(rng.standard_normal(shape)).astype(p_dtype) for key, shape in SHAPES.items()}
    if way == "flat":
        params = fastopt.FlatBuffer.from_arrays(params)
    opt = getattr(fastopt, name)(params, **options)
    norms = []
    for _ in range(6):
        grads = {key: np.asarray(rng.standard_normal(shape) * 0.1).astype(g_dtype) for key, shape in SHAPES.items()}
        norm = opt.step(grads, **WAYS[way]).grad_norm
        norms.append(None if norm is None else norm.hex())
    states = {
        f"s.{key}.{state}": digest(x)
        for key in SHAPES
        for state, x in opt.state[key].items()
        if isinstance(x, np.ndarray)
    }
    return {"norms": norms, **{f"p.{key}": digest(params[key]) for key in SHAPES}, **states}


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
