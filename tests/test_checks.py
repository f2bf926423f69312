"""Bad input is refused with one error that says what is wrong, and nothing is written."""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import fastopt
from fastopt import _backend

F32 = np.float32
CLASSES = [cls for cls in vars(fastopt).values() if isinstance(cls, type) and cls.__module__ != "fastopt.optimizer"]
CLASSES = [cls for cls in CLASSES if issubclass(cls, fastopt.Optimizer)]


def gradients(**replaced: Any) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    return {"w": rng.standard_normal((3, 2)).astype(F32), "b": rng.standard_normal(3).astype(F32)} | replaced


def trained(cls: Any = fastopt.AdamW, **options: Any) -> Any:
    """An optimizer that took a step, so that neither its states nor its counts are zero."""
    rng = np.random.default_rng(1)
    opt = cls({"w": rng.standard_normal((3, 2)).astype(F32), "b": np.ones(3, F32)}, **{"lr": 0.1} | options)
    opt.step(gradients())
    return opt


def fingerprint(opt: Any) -> Any:
    """Every byte that an optimizer has, and its options."""
    groups = [[(k, v) for k, v in group.items() if k != "params"] for group in opt.param_groups]
    arrays = {name: array.tobytes() for group in opt.param_groups for name, array in group["params"].items()}
    state = {
        name: {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in entry.items()}
        for name, entry in opt.state.items()
    }
    return repr(groups), arrays, state


@contextlib.contextmanager
def refused(error: type[Exception], *words: str, opt: Any = None) -> Iterator[None]:
    """The block raises ``error`` itself, with these words, and leaves ``opt`` as it was."""
    before = fingerprint(opt) if opt else None
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert opt is None or fingerprint(opt) == before


# --- parameters ------------------------------------------------------------------------------------------------------

BASE = np.ones(8, F32)
BAD_PARAMETERS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "strided": (np.ones(8, F32)[::2], ValueError, ("['x'] has strides (8,) for shape (4,)", "C-contiguous")),
    "transposed": (np.ones((2, 3), F32).T, ValueError, ("['x'] has strides (4, 12)", "C-contiguous")),
    "channels-last": (np.ones((2, 4, 4, 3), F32).transpose(0, 3, 1, 2), ValueError, ("['x'] has strides", "C-contig")),
    "reversed": (np.ones(3, F32)[::-1], ValueError, ("['x'] has strides (-4,)",)),
    "broadcast": (np.broadcast_to(F32(1), 3), ValueError, ("['x'] has strides (0,)",)),
    "read-only": (np.frombuffer(bytes(8), F32), ValueError, ("['x'] is read-only", "writable")),
    "misaligned": (np.frombuffer(bytearray(9), np.uint8)[1:].view(F32), ValueError, ("['x'] is not aligned",)),
    "byte-swapped": (np.ones(3, ">f4"), TypeError, ("['x'] has the byte order of another machine", "float32")),
    "integers": (np.ones(3, int), TypeError, ("['x'] is int64", "float32, float64, float16, bfloat16")),
    "complex": (np.ones(3, complex), TypeError, ("['x'] is complex128", "float32")),
    "booleans": (np.ones(3, bool), TypeError, ("['x'] is bool", "float32")),
    "objects": (np.ones(3, object), TypeError, ("['x'] is object", "float32")),
    "longdouble": (np.ones(3, np.longdouble), TypeError, ("['x'] is", "float32")),
    "structured": (np.ones(3, [("a", F32)]), TypeError, ("['x'] is", "float32")),
    "masked": (np.ma.masked_array([1.0, 2.0], [True, False]), TypeError, ("['x'] is a masked array", ".data")),
    "list": ([1.0, 2.0], TypeError, ("['x'] is a list", "numpy.ndarray")),
    "None": (None, TypeError, ("['x'] is a NoneType", "numpy.ndarray")),
    "scalar": (F32(1), TypeError, ("['x'] is a numpy.float32", "numpy.ndarray")),
    "string": ("weights", TypeError, ("['x'] is a str", "numpy.ndarray")),
}
BAD_LISTS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "no list": ([], ValueError, ("is empty", "at least one parameter")),
    "no mapping": ({}, ValueError, ("is empty",)),
    "no buffer": (fastopt.FlatBuffer({}), ValueError, ("is empty",)),
    "bare array": (BASE, TypeError, ("is one array", "[array]")),
    "bare 0-d array": (np.ones(()), TypeError, ("is one array",)),
    "string": ("weights", TypeError, ()),
    "number": (3, TypeError, ("is 3", "sequence of arrays")),
    "None": (None, TypeError, ("is None", "sequence of arrays")),
    "number as name": ({1: np.ones(3, F32)}, TypeError, ("names are strings, got 1",)),
    "same array twice": ({"x": BASE, "y": BASE}, ValueError, ("'x' and 'y' are the same array",)),
    "overlapping": ({"x": BASE[:5], "y": BASE[4:]}, ValueError, ("'x' and 'y' share memory",)),
    "one inside": ({"x": BASE[2:3], "y": BASE}, ValueError, ("'y' and 'x' share memory",)),
    "other shape": ({"x": BASE, "y": BASE.reshape(2, 4)}, ValueError, ("'x' and 'y' share memory",)),
    "other dtype": ({"x": BASE, "y": BASE.view(np.float16)[15:]}, ValueError, ("'x' and 'y' share memory",)),
}
BAD_LISTS |= {name: ({"x": array}, *rest) for name, (array, *rest) in BAD_PARAMETERS.items()}  # type: ignore[misc]


@pytest.mark.parametrize("params", BAD_LISTS)
def test_bad_parameters_are_refused(params: str) -> None:
    bad, error, words = BAD_LISTS[params]
    with refused(error, "AdamW: param", *words):
        fastopt.AdamW(bad)
    opt = trained()
    with refused(error, "AdamW: param", *words, opt=opt):
        opt.add_param_group({"params": bad, "lr": 0.5})
    assert len(opt.param_groups) == 1
    opt.step(gradients())


def test_torch_tensors_are_refused() -> None:
    torch = pytest.importorskip("torch")
    with refused(TypeError, "SGD: params['0'] is a torch.", "numpy.ndarray"):
        fastopt.SGD([torch.ones(3)])
    opt = trained()
    with refused(TypeError, "AdamW.step: grads['b'] is a torch.Tensor", "numpy.ndarray", opt=opt):
        opt.step(gradients(b=torch.ones(3)))


def test_what_one_group_has_another_cannot_have() -> None:
    opt = trained()
    w, moment = opt.param_groups[0]["params"]["w"], opt.state["w"]["exp_avg"]
    for again, words in {"x": "'w' and 'x' are the same array", "w": "the name 'w' is taken"}.items():
        with refused(ValueError, "AdamW", words, opt=opt):
            opt.add_param_group({"params": {again: w}})
    with refused(ValueError, "AdamW", "'w' and 'x' share memory", opt=opt):
        opt.add_param_group({"params": {"x": w.reshape(-1)[:2]}})
    with refused(ValueError, "AdamW", opt=opt):
        opt.add_param_group({"params": {"x": moment}})  # a state, which is written at the same time
    with refused(ValueError, "SGD", "the same array"):
        fastopt.SGD([{"params": {"x": w}}, {"params": {"y": w}}])
    with refused(ValueError, "SGD", "'x' is taken"):
        fastopt.SGD([{"params": {"x": w}}, {"params": {"x": w.copy()}}])


@pytest.mark.parametrize("group", [{}, {"lr": 0.1}, [np.ones(3)], None, "params"], ids=repr)
def test_what_is_no_group_is_refused(group: Any) -> None:
    opt = trained()
    with refused(TypeError, "AdamW.add_param_group: group must be a dict", "params", opt=opt):
        opt.add_param_group(group)
    with refused(TypeError, "AdamW: params[1]", "params"):
        fastopt.AdamW([{"params": [np.ones(3)]}, group])


# --- gradients -------------------------------------------------------------------------------------------------------

BAD_GRADIENTS: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    "short": (gradients(b=np.ones(2, F32)), ValueError, ("grads['b'] has shape (2,)", "has shape (3,)")),
    "transposed": (gradients(w=np.ones((2, 3), F32)), ValueError, ("grads['w'] has shape (2, 3)", "(3, 2)")),
    "flattened": (gradients(w=np.ones(6, F32)), ValueError, ("grads['w'] has shape (6,)", "(3, 2)")),
    "0-d": (gradients(b=np.ones((), F32)), ValueError, ("grads['b'] has shape ()", "(3,)")),
    "float64": (gradients(b=np.ones(3)), TypeError, ("grads['b'] is float64, but the parameter is float32",)),
    "integers": (gradients(b=np.ones(3, np.int32)), TypeError, ("grads['b'] is int32", "float32")),
    "byte-swapped": (gradients(b=np.ones(3, ">f4")), TypeError, ("grads['b'] has the byte order", "float32")),
    "masked": (gradients(b=np.ma.masked_array(np.ones(3, F32))), TypeError, ("grads['b'] is a masked array",)),
    "list": (gradients(b=[1.0, 1.0, 1.0]), TypeError, ("grads['b'] is a list", "numpy.ndarray")),
    "scalar": (gradients(b=1.0), TypeError, ("grads['b'] is a float", "numpy.ndarray")),
    "name missing": ({"w": gradients()["w"]}, ValueError, ("grads lacks 'b'", "None")),
    "name unknown": (gradients(x=None), ValueError, ("grads has names that no parameter has", "'x'")),
    "too few": ([np.ones((3, 2), F32)], ValueError, ("grads has 1 arrays", "2 parameters")),
    "too many": ([None, None, None], ValueError, ("grads has 3 arrays", "2 parameters")),
    "none": (None, TypeError, ("grads is a NoneType", "sequence of arrays")),
    "bare array": (np.ones((2, 3), F32), TypeError, ("grads is a ndarray", "sequence of arrays")),
    "string": ("wb", TypeError, ("grads is a str", "sequence of arrays")),
    "other buffer": (fastopt.FlatBuffer({"w": (3, 2)}), ValueError, ("grads lacks 'b'",)),
    "wide buffer": (fastopt.FlatBuffer({"w": (3, 2), "b": (3,)}, "float64"), TypeError, ("grads['w'] is float64",)),
}


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("grads", BAD_GRADIENTS)
def test_bad_gradients_are_refused(grads: str, zero_grads: bool) -> None:
    bad, error, words = BAD_GRADIENTS[grads]
    opt = trained()
    with refused(error, "AdamW.step: ", *words, opt=opt):
        opt.step(bad, zero_grads=zero_grads, max_norm=1.0)


def test_gradients_that_a_step_would_overwrite_are_refused() -> None:
    opt = trained()
    params, state = opt.param_groups[0]["params"], opt.state
    for own in (params["b"], params["w"].reshape(-1)[1:4], state["b"]["exp_avg"], state["w"]["exp_avg_sq"][0:2, 0:1]):
        grad = own if own.shape == (3,) else np.resize(own.base, 3)
        if np.shares_memory(grad, own):
            with refused(ValueError, "AdamW.step: grads['b'] shares memory with a parameter or a state", opt=opt):
                opt.step(gradients(b=grad))


def test_gradients_that_cannot_be_zeroed_are_refused() -> None:
    opt = trained()
    read_only, shared = np.ones(3, F32), np.ones(6, F32)
    read_only.flags.writeable = False
    for bad in (read_only, np.ones(6, F32)[::2], np.broadcast_to(F32(1), 3)):
        with refused(ValueError, "AdamW.step: grads['b'] is read-only or strided", "zero_grads=True", opt=opt):
            opt.step(gradients(b=bad), zero_grads=True)
        assert (bad == 1).all()
    with refused(ValueError, "AdamW.step: grads['w'] and ['b'] share memory", "zero_grads=True", opt=opt):
        opt.step({"w": shared.reshape(3, 2), "b": shared[3:]}, zero_grads=True)
    again = gradients()
    for _ in range(3):
        opt.step(again, zero_grads=True)
    again["w"].flags.writeable = False  # of gradients that are known already
    with refused(ValueError, "AdamW.step: grads['w'] is read-only", opt=opt):
        opt.step(again, zero_grads=True)


# --- hyperparameters -------------------------------------------------------------------------------------------------

NO_NUMBERS = (math.nan, -math.inf, -1.0, True, np.True_, "0.1", None, 0.1j, [0.1], np.array([0.1]), np.array("x"))
NO_BOOLEANS = (1, 0.0, "True", math.nan, [True])


def bad_options(cls: Any) -> Iterator[tuple[str, Any]]:
    for name, default in trained(cls).defaults.items():
        if isinstance(default, bool) or name == "adapt":
            yield from ((name, bad) for bad in NO_BOOLEANS)
        elif isinstance(default, tuple):
            yield from ((name, bad) for bad in (0.9, None, "ab", (0.9,), (0.9, 0.9, 0.9)))
            for bad in NO_NUMBERS:
                yield from ((name, pair) for pair in ((bad, default[1]), (default[0], bad)))
        else:
            yield from ((name, bad) for bad in (*NO_NUMBERS, *([] if name == "t0" else [math.inf])))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_option_refuses_what_it_cannot_mean(cls: Any) -> None:
    opt = trained(cls)
    for name, bad in bad_options(cls):
        for call in (lambda: cls([np.ones(3)], **{"lr": 0.1} | {name: bad}), lambda: opt.step(gradients())):  # noqa: B023
            good, opt.param_groups[0][name] = opt.param_groups[0][name], bad
            before = fingerprint(opt)
            with pytest.raises((TypeError, ValueError)) as caught:
                call()
            assert str(caught.value).startswith(f"{cls.__name__}: {name}"), (bad, str(caught.value))
            assert fingerprint(opt) == before
            opt.param_groups[0][name] = good
    opt.step(gradients())


OUT_OF_RANGE: list[tuple[Any, dict[str, Any], str]] = [
    (fastopt.Adam, {"betas": (1.0, 0.999)}, "Adam: betas[0] must be in [0, 1), got 1.0"),
    (fastopt.Lion, {"betas": (0.9, 1.0)}, "Lion: betas[1] must be in [0, 1), got 1.0"),
    (fastopt.Adadelta, {"rho": 1.0}, "Adadelta: rho must be in [0, 1), got 1.0"),
    (fastopt.RMSprop, {"alpha": 1.0}, "RMSprop: alpha must be in [0, 1), got 1.0"),
    (fastopt.SGD, {"momentum": 1.1}, "SGD: momentum must be in [0, 1], got 1.1"),
    (fastopt.Adam, {"eps": 0.0}, "Adam: eps must be in (0, inf)"),
    (fastopt.Adamax, {"eps": 1e-50}, "Adamax: eps=1e-50 rounds to zero in float32"),
    (fastopt.Rprop, {"etas": (1.0, 1.2)}, "Rprop: etas[0] must be in (0, 1), got 1.0"),
    (fastopt.Rprop, {"etas": (0.5, 1.0)}, "Rprop: etas[1] must be in (1, inf), got 1.0"),
    (fastopt.Rprop, {"step_sizes": (2.0, 1.0)}, "Rprop: step_sizes[0] must not exceed step_sizes[1], got (2.0, 1.0)"),
    (fastopt.SGD, {"nesterov": True}, "SGD: nesterov=True needs momentum > 0 and dampening 0, got momentum=0.0"),
    (fastopt.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    (fastopt.LARS, {"nesterov": True, "momentum": 0.0}, "LARS: nesterov=True needs momentum > 0, got 0"),
    (fastopt.AdamW, {"lr": 0.0, "fully_decoupled": True}, "AdamW: fully_decoupled=True needs an initial lr > 0, got 0"),
    (fastopt.SGD, {"lr": 10**400}, "SGD: lr must be in [0, inf)"),
]


@pytest.mark.parametrize(("cls", "options", "message"), OUT_OF_RANGE, ids=lambda x: str(x) if type(x) is dict else "")
def test_options_out_of_range_are_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with refused(ValueError, message):
        cls([np.ones(3, F32)], **{"lr": 0.1} | options)
    opt = trained(cls)
    with refused(ValueError, message.replace(": ", ": group 1: ", 1), opt=opt):
        opt.add_param_group({"params": {"x": np.ones(3, F32)}, **options})


