"""FlatBuffer: a mapping of aligned views of one allocation, whose padding stays zero."""

import copy
import dataclasses
import itertools
import math
import pickle
import weakref
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest
from cases import CASES, RULE_CASES, SHAPES
from compare import DTYPES, build, padding
from fastopt.kernels.registry import RULES
from refusal import refused

import fastopt
from fastopt import FlatBuffer
from fastopt.engine.padding import keeps_zeros

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


# --- a mapping -------------------------------------------------------------------------------------------------------


def test_it_is_a_mapping_in_the_given_order():
    shapes = {"z": (2, 3), "a": (), "m": (0, 4), "": (5,)}
    buffer = FlatBuffer(shapes)
    assert isinstance(buffer, Mapping)
    assert list(buffer) == list(buffer.keys()) == list(buffer.names) == ["z", "a", "m", ""]
    assert buffer.names == ("z", "a", "m", "")
    assert buffer.shapes == {name: array.shape for name, array in buffer.items()} == shapes
    assert list(buffer.shapes) == list(shapes)
    assert buffer.offsets == {"z": 0, "a": 32, "m": 64, "": 64}
    assert all(type(offset) is int for offset in buffer.offsets.values())
    assert (len(buffer), buffer.size) == (4, 6 + 1 + 0 + 5)
    assert ("z" in buffer, "b" in buffer, buffer.get("b")) == (True, False, None)
    for use in (buffer.__getitem__, lambda name: buffer.__setitem__(name, 1.0)):
        with pytest.raises(KeyError, match="'b'"):
            use("b")
    assert repr(buffer) == "FlatBuffer(4 arrays, 12 elements, float32, cpu)"


def test_equality_is_identity():
    a, b = FlatBuffer({"w": (3,)}), FlatBuffer({"w": (3,)})
    assert a == a
    assert a != b
    assert a != dict(a)
    assert len({a, b, a}) == 2
    assert weakref.ref(a)() is a


# --- memory ----------------------------------------------------------------------------------------------------------


@every_dtype
def test_every_array_begins_on_a_64_byte_boundary(dtype):
    for sizes in itertools.product((0, 1, 15, 16, 17, 33), repeat=3):
        buffer = FlatBuffer({str(i): (size,) for i, size in enumerate(sizes)}, dtype)
        for name, array in buffer.items():
            assert array.dtype == buffer.dtype == DTYPES[dtype]
            assert array.flags.c_contiguous
            assert array.flags.writeable
            if array.size:
                assert array.ctypes.data % 64 == 0
                assert array.ctypes.data == buffer.data.ctypes.data + buffer.offsets[name] * array.itemsize
        assert buffer.nbytes == buffer.data.nbytes
        assert not buffer.data.any()
    assert FlatBuffer(SHAPES, dtype).offsets == FlatBuffer(SHAPES).offsets  # the layout of every dtype


def test_views_write_through():
    buffer = FlatBuffer({"w": (2, 3), "b": (3,)})
    buffer["w"][1] = 2.0
    buffer["b"] += 3.0
    buffer["b"] = buffer["b"] * 2
    assert buffer.data[:6].tolist() == [0, 0, 0, 2, 2, 2]
    assert buffer.data[32:35].tolist() == [6, 6, 6]
    buffer.data[...] = 1.0
    assert (buffer["w"] == 1).all()
    with pytest.raises(ValueError, match="broadcast"):
        buffer["w"] = np.ones(4)


def test_the_memory_lives_as_long_as_a_view():
    view = FlatBuffer({"w": (1000,)})["w"]
    view += 1
    assert view.sum() == 1000


def test_nothing_at_all():
    for buffer in (FlatBuffer({}), FlatBuffer({"a": (0,), "b": (2, 0)}), FlatBuffer.from_arrays([], dtype="float16")):
        assert (buffer.size, buffer.nbytes) == (0, 0)
        again = pickle.loads(pickle.dumps(buffer.copy()))
        assert (again.shapes, again.dtype) == (buffer.shapes, buffer.dtype)


# --- copies ----------------------------------------------------------------------------------------------------------


@every_dtype
def test_copies(dtype):
    rng = np.random.default_rng(1)
    buffer = FlatBuffer.from_arrays({k: np.asarray(rng.standard_normal(s)) for k, s in SHAPES.items()}, dtype)
    pickled = [pickle.loads(pickle.dumps(buffer, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for again in (buffer.copy(), copy.copy(buffer), copy.deepcopy(buffer), *pickled):
        assert again.layout == buffer.layout
        assert again.dtype == buffer.dtype
        assert again.data.tobytes() == buffer.data.tobytes()
        assert again.data.ctypes.data % 64 == 0
        again["weight"] = 0.0  # its views are of its own data
        assert not again.data[: again["weight"].size].any()
        assert buffer["weight"].any()


def test_zeros_like():
    buffer = FlatBuffer.from_arrays({"w": np.ones((2, 3)), "b": np.ones(3)})
    for dtype in (None, "float32", np.float16, "bfloat16", ml_dtypes.bfloat16, np.dtype("float64")):
        zeros = buffer.zeros_like(dtype)
        assert zeros.layout == buffer.layout
        assert zeros.dtype == (np.float64 if dtype is None else DTYPES.get(str(dtype), dtype))
        assert not zeros.data.any()
        assert not np.shares_memory(zeros.data, buffer.data)


# --- from arrays -----------------------------------------------------------------------------------------------------


@every_dtype
def test_from_arrays(dtype):
    arrays = {"b": np.arange(3), "w": np.arange(6).reshape(2, 3).T, "scalar": np.full((), 7), "none": np.zeros((3, 0))}
    arrays = {name: array.astype(DTYPES[dtype]) for name, array in arrays.items()}
    assert not arrays["w"].flags.c_contiguous
    for given in (arrays, FlatBuffer.from_arrays(arrays), list(arrays.values()), tuple(arrays.values())):
        buffer = FlatBuffer.from_arrays(given)
        assert list(buffer) == (list("0123") if isinstance(given, (list, tuple)) else list(arrays))
        assert buffer.dtype == DTYPES[dtype]
        for mine, array in zip(buffer.values(), arrays.values(), strict=True):
            assert (mine == array).all()
            assert mine.shape == array.shape
            assert not np.shares_memory(mine, array)
        assert not padding(buffer).any()
    swapped = FlatBuffer.from_arrays([np.arange(3, dtype=">f4")])
    assert swapped.dtype == np.float32
    assert swapped.dtype.isnative
    assert swapped["0"].tolist() == [0, 1, 2]


def test_from_arrays_converts_where_it_is_told_to():
    arrays = {"a": np.full(3, 0.1), "b": np.arange(3), "c": np.full(2, 0.1, np.float16), "d": np.array([True, False])}
    buffer = FlatBuffer.from_arrays(arrays, dtype="bfloat16")
    assert buffer.dtype == ml_dtypes.bfloat16
    assert (buffer["a"] == np.float64(0.1).astype(ml_dtypes.bfloat16)).all()
    assert buffer["b"].astype(int).tolist() == [0, 1, 2]
    assert buffer["d"].astype(bool).tolist() == [True, False]


def test_what_is_no_buffer_is_refused():
    ones, w = np.ones(3, np.float32), {"w": (3,)}
    with refused(ValueError, "FlatBuffer.from_arrays: no arrays given, so dtype is needed"):
        FlatBuffer.from_arrays({})
    with refused(TypeError, "FlatBuffer: dtype has the byte order of another machine"):
        FlatBuffer(w, ">f4")
    with refused(TypeError, "FlatBuffer.from_arrays: the arrays have several dtypes (float32, float64)", "dtype="):
        FlatBuffer.from_arrays({"w": ones, "b": np.ones(3)})
    for bad, said in (
        ([1.0], "a list; needed is a numpy.ndarray"),
        (1.0, "a float; needed is a numpy.ndarray"),
        (None, "a NoneType; needed is a numpy.ndarray"),
        ("w", "a str; needed is a numpy.ndarray"),
        (np.float32(1), "a numpy.float32; needed is a numpy.ndarray"),
        (np.ones(3, complex), "complex"),
        (np.ma.masked_array(ones), "a masked array"),
    ):
        with refused(TypeError, begins=f"FlatBuffer.from_arrays: arrays['b'] is {said}"):
            FlatBuffer.from_arrays({"w": ones, "b": bad}, dtype="float32")
    for name in (1, None, b"w", ("w",)):
        for call in (lambda name: FlatBuffer({name: (3,)}), lambda name: FlatBuffer.from_arrays({name: ones})):
            with refused(TypeError, "FlatBuffer", f"names are strings, got {name!r}"):
                call(name)
    for dtype in ("int32", "complex64", bool, object, "f4,f4", np.longdouble):
        for make in (lambda dtype: FlatBuffer(w, dtype), FlatBuffer(w).zeros_like):
            with refused(TypeError, "FlatBuffer: dtype is", "float32, float64, float16, bfloat16"):
                make(dtype)
    for dtype in ("single-precision", "float 32", 7, [], {}):
        with refused(TypeError, begins="FlatBuffer: dtype"):
            FlatBuffer(w, dtype)


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (2.5,), 3, "34", None, (True, "2"), (2**62, 4)], ids=repr)
def test_bad_shapes_are_refused(shape):
    with pytest.raises((TypeError, ValueError), match=r"^FlatBuffer.*'w'.*shape"):
        FlatBuffer({"w": shape})


def test_shapes_of_numpy_integers():
    assert FlatBuffer({"w": [np.int64(2), np.uint8(3)]}).shapes == {"w": (2, 3)}


NO_ARRAYS = [np.ones((2, 3)), np.ones(()), 5, None, "wb", [[1.0, 2.0]]]


@pytest.mark.parametrize("arrays", NO_ARRAYS, ids=lambda x: f"{type(x).__name__}-{np.ndim(x)}d")
def test_what_holds_no_arrays_is_refused(arrays):
    with pytest.raises(TypeError, match=r"^FlatBuffer.from_arrays: arrays"):
        FlatBuffer.from_arrays(arrays)


def test_none_in_the_place_of_gradients_that_are_gone_is_refused():
    params = FlatBuffer({"w": (64,)})
    opt, grads = fastopt.SGD(params), params.zeros_like()
    for _ in range(3):
        opt.step(grads)
    del grads
    with refused(TypeError, "grads is a NoneType"):
        opt.step(None)


# --- steps -----------------------------------------------------------------------------------------------------------


def test_padding_stays_zero_when_the_norm_is_nan():
    params = FlatBuffer.from_arrays({"a": np.ones(3), "b": np.ones(3)})
    grads = params.zeros_like()
    grads["a"][0] = np.nan
    opt = fastopt.SGD(params, momentum=0.9)
    opt.step(grads, max_norm=1.0)  # without skip_nonfinite all parameters become NaN, as in torch
    assert np.isnan(params["b"]).all()
    assert not padding(params).any()


def test_scalars_that_end_before_the_steps_that_are_tried_are_no_error():
    rule = dataclasses.replace(RULES["sgd"], name="ends", scalars=lambda t, options: 1 / (t < 500))
    assert not keeps_zeros(rule, {"lr": 1.0})


def test_padding_stays_zero_where_a_rule_moves_zeros(monkeypatch):
    rule = dataclasses.replace(RULES["sgd"], name="flat_sign", step=lambda p, g, h: (p - math.copysign(h.lr, g),))
    monkeypatch.setattr(fastopt.SGD, "select_rule", lambda self, options: rule)
    params = FlatBuffer({"a": (3,), "b": (3,)})
    opt = fastopt.SGD(params)
    for lr in (0.0, 0.5, 0.5):  # with lr 0 the rule leaves zeros alone
        opt.param_groups[0]["lr"] = lr
        opt.step(params.zeros_like())
    assert not padding(params).any()
    assert params["b"].tolist() == [-1.0] * 3


WITH_EPS = [case for case in RULE_CASES if "eps" in build(case, [np.ones(1)]).defaults]


@pytest.mark.parametrize("case", WITH_EPS, ids=lambda case: case.rule)
def test_padding_stays_zero_without_eps(case):
    params = FlatBuffer.from_arrays({"a": np.ones((3, 1)), "b": np.ones((2, 2))})
    opt, alone = build(case, params), build(case, [array.copy() for array in params.values()])
    rng = np.random.default_rng(0)
    for t in range(8):
        for group in opt.param_groups + alone.param_groups:
            group["eps"] = 0.0 if t else 1e-3
        grads = FlatBuffer.from_arrays({name: rng.standard_normal(array.shape) for name, array in params.items()})
        opt.step(grads)
        alone.step(list(grads.values()))
        assert not padding(params).any()
    for mine, its in zip(params.values(), alone.param_groups[0]["params"].values(), strict=True):
        assert mine.tobytes() == its.tobytes()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_rule_of_the_library_keeps_zeros_while_eps_is_above_zero(case):
    opt = build(case, [np.ones(1)])
    options = dict(opt.param_groups[0])
    assert keeps_zeros(opt.select_rule(options), options)
