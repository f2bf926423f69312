"""Checkpoints: exact round trips, atomic replacement, and refusal of anything damaged or unfitting."""

import builtins
import json
import math
import os
import pathlib
import stat
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import fastopt
from fastopt import checkpoint
from fastopt.checkpoint import CheckpointError, load, save

SHAPES = {"w": (3, 5), "scalar": (), "empty": (0, 4), "b": (7,)}
DTYPES = {n: np.dtype(n) for n in ("float32", "float64", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "SGD without state": {"lr": 0.1},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "Adam": {"amsgrad": True, "weight_decay": 0.1},
    "AdamW": {"betas": (0.8, 0.95)},
    "NAdam": {},
    "ASGD": {"t0": 2.0},
    "LARS": {"lr": 0.1, "keep_weight_norms": True},
}


def make_arrays(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, shape in SHAPES.items()}


def make_optimizer(name, params):
    return getattr(fastopt, name.split()[0])(params, **OPTIMIZERS[name])


def take_steps(opt, params, seeds):
    for seed in seeds:
        opt.step(make_arrays(params["w"].dtype, seed))


def contents(params, opt=None):
    """Every bit of parameters and optimizer, comparable with ==."""

    def plain(value):
        if isinstance(value, np.ndarray):
            return value.dtype.name, value.shape, value.tobytes()
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else (type(value).__name__, repr(value))

    return plain(dict(params)), opt and plain(opt.state_dict())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path):
    """A small AdamW checkpoint: its path, and fresh parameters and optimizer that it fits."""
    params = make_arrays()
    opt = make_optimizer("AdamW", params)
    take_steps(opt, params, range(100, 103))
    save(path, params, opt)
    fresh = make_arrays(seed=1)
    return path, fresh, make_optimizer("AdamW", fresh)


def assert_refused(message, path, params, opt=None):
    """``load`` raises CheckpointError with one line that matches, and changes nothing."""
    before = contents(params, opt)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, params, opt)
    assert "\n" not in str(caught.value)
    assert contents(params, opt) == before


# Round trips.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_equals_an_uninterrupted_one(path, name, dtype):
    params = fastopt.FlatBuffer.from_arrays(make_arrays(DTYPES[dtype]))
    opt = make_optimizer(name, params)
    take_steps(opt, params, range(100, 104))
    opt.param_groups[0]["lr"] = 0.1 / 3
    opt.step(make_arrays(DTYPES[dtype], 104) | {"b": None})  # its step count stays behind
    save(path, params, opt)
    saved_contents = contents(params, opt)
    take_steps(opt, params, range(105, 109))

    other = make_arrays(DTYPES[dtype], seed=1)
    resumed = make_optimizer(name, other)
    take_steps(resumed, other, range(200, 202))  # so that everything differs and must be replaced
    assert load(path, other, resumed) is None
    assert contents(other, resumed) == saved_contents
    take_steps(resumed, other, range(105, 109))
    assert contents(other, resumed) == contents(params, opt)

    save(str(path), other)
    again = params.zeros_like()
    load(str(path), again)
    assert again.data.tobytes() == params.data.tobytes()


def test_sequences_and_groups(path):
    arrays = list(make_arrays().values())
    opt = fastopt.SGD([{"params": arrays[:1], "lr": 0.5}, {"params": arrays[1:]}], momentum=0.9)
    opt.step([np.ones_like(array) for array in arrays])
    save(path, arrays, opt)
    fresh = [np.zeros_like(array) for array in arrays]
    resumed = fastopt.SGD([{"params": fresh[:1]}, {"params": fresh[1:]}], momentum=0.9)
    load(path, fresh, resumed)
    assert contents(enumerate(fresh), resumed) == contents(enumerate(arrays), opt)


def optimizer_with(**group):
    state_dict = {"version": 1, "optimizer": "SGD", "state": {}, "param_groups": [group]}
    return SimpleNamespace(state_dict=lambda: state_dict)


def test_hyperparameters_keep_value_and_type(path):
    floats = (0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.inf, -math.inf, math.nan)
    opt = optimizer_with(floats=floats, nested=((1, 2.0), [3, (4,)], ()), others=[True, None, 2**70, "a.b/ü"])
    params, loaded = {"w": np.ones(1)}, []
    save(path, params, opt)
    load(path, params, SimpleNamespace(load_state_dict=loaded.append))
    with safetensors.safe_open(path, framework="np") as file:
        json.loads(file.metadata()["optimizer"], parse_constant=pytest.fail)  # strict JSON, without Infinity or NaN
    save(path, params, optimizer_with(lr=np.float32(0.1), n=np.int64(3), on=np.bool_(True)))
    load(path, params, SimpleNamespace(load_state_dict=loaded.append))
    assert repr(loaded[0]) == repr(opt.state_dict())
    assert repr(loaded[1]["param_groups"]) == repr([{"lr": float(np.float32(0.1)), "n": 3, "on": True}])


def test_parameters_alone(path):
    arrays = {name: np.ones((2, 3), dtype) for name, dtype in DTYPES.items()} | {"": np.ones(1), "a.b\n/ü": np.zeros(0)}
    arrays["float32"].view(np.uint32)[0] = 0x7FC12345, 0xFF800000, 0x80000001  # NaN with payload, -inf, denormal
    save(path, arrays)
    fresh = {name: np.zeros_like(array) for name, array in arrays.items()}
    load(path, fresh)
    assert contents(fresh) == contents(arrays)


def test_strided_arrays_are_saved_and_loaded_by_value(path):
    base = np.arange(24.0).reshape(4, 6)
    save(path, {"t": base.T, "s": base[::2, 1::3]})
    target = np.zeros((4, 6))
    load(path, {"t": target.T, "s": np.zeros((2, 2))})
    assert np.array_equal(target, base)


def test_other_readers_see_plain_tensors(saved):
    path, fresh, opt = saved
    other = make_arrays(seed=2)
    load(path, other)  # the parameters of a checkpoint with an optimizer
    load(path, fresh, opt)
    assert contents(other) == contents(fresh)
    tensors = safetensors.numpy.load_file(path)
    assert tensors["param.w"].tobytes() == fresh["w"].tobytes()
    assert tensors["state.0.exp_avg"].tobytes() == opt.state["w"]["exp_avg"].tobytes()
    with safetensors.safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["params"]) == list(SHAPES)
        assert json.loads(file.metadata()["optimizer"])["optimizer"] == "AdamW"


def test_views_are_saved_without_the_buffer_around_them(path):
    n = 1000
    params = fastopt.FlatBuffer.from_arrays({"small": np.ones(n, np.float32), "large": np.ones(100 * n, np.float32)})
    part = {"small": params["small"]}
    save(path, part, fastopt.AdamW(part))
    assert 3 * 4 * n <= path.stat().st_size < 3 * 4 * n + 3000


# Writing: the old file or the new one, never anything else.


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "where", ["os.fsync", "os.replace", "os.chmod", "safetensors.numpy.save_file", "safetensors.safe_open"]
)
def test_failure_while_writing_leaves_the_old_file(saved, monkeypatch, where):
    path, fresh, opt = saved
    before = path.read_bytes()

    def write_half_then_stop(*args, **kwargs):
        if "save_file" in where:
            pathlib.Path(args[1]).write_bytes(before[:99])
        raise Stop

    monkeypatch.setattr(where, write_half_then_stop)
    for target in (path, path.with_name("new")):
        with pytest.raises(Stop):
            save(target, fresh, opt)
    monkeypatch.undo()
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before


def test_file_and_folder_are_synced_around_the_rename(path, monkeypatch):
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real(descriptor)

    def replace(old, new, real=os.replace):
        calls.append("rename" if os.path.dirname(old) == os.path.dirname(new) else "move")
        real(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(path, make_arrays())
    assert calls == ["file", "rename", "folder"]


def test_a_new_file_has_the_usual_permissions_and_a_link_stays_one(path):
    usual, link = path.with_name("usual"), path.with_name("latest")
    usual.touch()
    link.symlink_to(path.name)
    save(link, make_arrays())
    assert link.is_symlink()
    assert path.stat().st_mode == usual.stat().st_mode
    load(link, make_arrays())


NOT_STORABLE = [
    ({"w": [1.0]}, None, TypeError, r"params\['w'\] is a list"),
    ({1: np.ones(1)}, None, TypeError, "names of params must be strings, got 1"),
    (np.ones(3), None, TypeError, "must be a FlatBuffer, mapping or sequence, got ndarray"),
    ("w", None, TypeError, "must be a FlatBuffer, mapping or sequence, got str"),
    ({"w": np.ones(3, complex)}, None, CheckpointError, r"param.w is <c16 .* cannot be stored"),
    ({"w": np.ones(3, ">f4")}, None, CheckpointError, r"param.w is >f4"),
    ({"\ud800": np.ones(3)}, None, CheckpointError, "surrogates"),
    ({}, optimizer_with(lr=object()), CheckpointError, r"holds <object .* cannot be stored"),
]


@pytest.mark.parametrize(("params", "opt", "error", "message"), NOT_STORABLE, ids=[case[3] for case in NOT_STORABLE])
def test_what_cannot_be_stored_leaves_the_old_file(saved, params, opt, error, message):
    path, _, _ = saved
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        save(path, params, opt)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before


def test_files_and_folders_that_are_not_there(tmp_path):
    for function in (save, load):
        with pytest.raises(FileNotFoundError, match=r"missing"):
            function(tmp_path / "missing" / "file", make_arrays())
        with pytest.raises(IsADirectoryError):
            function(tmp_path, make_arrays())
    assert os.listdir(tmp_path) == []


def test_missing_safetensors_names_the_extra(saved, monkeypatch):
    def without_safetensors(name, *args, real=builtins.__import__, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_safetensors)
    for function in (save, load):
        with pytest.raises(ImportError, match=r'pip install "fastopt\[checkpoint\]"'):
            function(*saved)


# Reading: damaged files.


def test_truncated_or_extended_files_are_refused(saved):
    path, fresh, opt = saved
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1]
    for content in [*(whole[:length] for length in lengths), whole + b"\0", b"PK\x03\x04 a zip file, for example"]:
        path.write_bytes(content)
        assert_refused(r"model.safetensors is truncated, corrupted, or no safetensors file", path, fresh, opt)


def test_a_flipped_bit_anywhere_is_refused(saved):
    path, fresh, opt = saved
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place * 5 % 8
        path.write_bytes(flipped)
        before = contents(fresh, opt) if place % 50 == 0 else None
        with pytest.raises(CheckpointError, match=r"truncated|corrupted|format|no fastopt"):
            load(path, fresh, opt)
        assert before in (None, contents(fresh, opt))


def rewrite(path, change, sign):
    """Change (metadata, tensors) of a file, and make its checksum right again if ``sign``."""
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, framework="np") as file:
        metadata = file.metadata()
    change(metadata, tensors)
    if sign:
        del metadata["sha256"]
        metadata["sha256"] = checkpoint._digest(metadata, tensors)
    safetensors.numpy.save_file(tensors, path, metadata=metadata)


def swap(tensors, a, b):
    tensors[a], tensors[b] = tensors[b], tensors[a]


UNSIGNED = "is corrupted: its checksum"
INCOMPLETE = "is no complete fastopt checkpoint"
UNFIT = "does not fit opt: "
CHANGES = [
    ("other lr", UNSIGNED, lambda m, t: m.update(optimizer=m["optimizer"].replace("0.001", "0.002"))),
    ("tensor lost", UNSIGNED, lambda m, t: t.pop("state.0.exp_avg")),
    ("tensor added", UNSIGNED, lambda m, t: t.update({"state.0.extra": np.ones(1)})),
    ("tensors swapped", UNSIGNED, lambda m, t: swap(t, "state.0.exp_avg", "state.0.exp_avg_sq")),
    ("dtype", "param.b is U8, which save never", lambda m, t: t.update({"param.b": t["param.b"].view(np.uint8)})),
    ("shape", UNSIGNED, lambda m, t: t.update({"param.w": t["param.w"].reshape(5, 3)})),
    ("checksum lost", UNSIGNED, lambda m, t: m.pop("sha256")),
    ("no names", INCOMPLETE, lambda m, t: m.pop("params")),
    ("no optimizer", INCOMPLETE, lambda m, t: m.pop("optimizer")),
    ("bad JSON", INCOMPLETE, lambda m, t: m.update(params="[")),
    ("other JSON", INCOMPLETE, lambda m, t: m.update(optimizer="[]")),
    ("no tensor", INCOMPLETE, lambda m, t: t.pop("param.w")),
    ("odd index", INCOMPLETE, lambda m, t: t.update({"state.99.exp_avg": np.ones(1)})),
    ("state lost", UNFIT, lambda m, t: t.pop("state.0.exp_avg")),
    ("state added", UNFIT, lambda m, t: t.update({"state.0.extra": np.ones(1)})),
    ("state shape", UNFIT, lambda m, t: t.update({"state.0.exp_avg": np.ones(3, np.float32)})),
    ("state dtype", UNFIT, lambda m, t: t.update({"state.0.exp_avg": np.ones((3, 5))})),
    ("steps", UNFIT, lambda m, t: m.update(optimizer=m["optimizer"].replace('"step": 3', '"step": -3', 1))),
    ("newer", r"has format version '2' \(fastopt .*\); only 1 can", lambda m, t: m.update(format_version="2")),
    ("not ours", "is no fastopt checkpoint, but another safetensors file", lambda m, t: m.pop("format")),
]


@pytest.mark.parametrize(("name", "message", "change"), CHANGES, ids=[f"{case[0]}: {case[1]}" for case in CHANGES])
def test_sound_safetensors_files_with_wrong_content_are_refused(saved, name, message, change):
    path, fresh, opt = saved
    rewrite(path, change, sign=message != UNSIGNED)
    assert_refused(message, path, fresh, opt)


def test_float16_bits_that_are_called_bfloat16_are_refused(path):
    save(path, {"w": np.ones(3, np.float16)})
    rewrite(path, lambda m, t: t.update({"param.w": t["param.w"].view(DTYPES["bfloat16"])}), sign=False)
    assert_refused(UNSIGNED, path, {"w": np.ones(3, DTYPES["bfloat16"])})


# Reading: sound files that do not fit.

DO_NOT_FIT = [  # change of the parameters in place, optimizer made of them (or none), message
    (lambda p: p.pop("b"), None, "holds parameter 'b', which params does not have"),
    (lambda p: p.update(c=np.ones(2)), None, "has no parameter 'c', which params has"),
    (lambda p: p.update(w=p["w"].T.copy()), None, r"holds 'w' of shape \(3, 5\), but params has \(5, 3\)"),
    (lambda p: p.update(scalar=p["b"][:1]), None, r"holds 'scalar' of shape \(\), but params has \(1,\)"),
    (lambda p: p.update(w=np.ones((3, 5))), None, "holds 'w' as float32, but params has float64"),
    (lambda p: p.update(w=np.ones((3, 5), ">f4")), None, "holds 'w' as float32, but params has >f4"),
    (lambda p: p.update(w=p["w"].astype(DTYPES["bfloat16"])), None, "as float32, but params has bfloat16"),
    (lambda p: p["b"].setflags(write=False), None, r"params\['b'\] is read-only"),
    (len, lambda p: fastopt.Adam(p), UNFIT),
    (len, lambda p: fastopt.SGD(p), UNFIT),
    (len, lambda p: fastopt.AdamW([{"params": {"w": p.pop("w")}}, {"params": p}]), UNFIT),
    (len, lambda p: fastopt.AdamW({"w": p["w"]}), UNFIT),
    (len, lambda p: fastopt.AdamW(list(p.values())), UNFIT),
    (len, lambda p: fastopt.AdamW(dict(reversed(p.items()))), UNFIT),
    (len, lambda p: fastopt.AdamW({name: array.astype(np.float64) for name, array in p.items()}), UNFIT),
]


@pytest.mark.parametrize(("change", "make", "message"), DO_NOT_FIT)
def test_what_does_not_fit_is_refused(saved, change, make, message):
    path, fresh, _ = saved
    change(fresh)
    assert_refused(message, path, fresh, make and make(dict(fresh)))


def test_an_optimizer_is_not_made_up(path):
    params = make_arrays()
    save(path, params)
    assert_refused("was saved without an optimizer, but opt was given", path, params, fastopt.AdamW(params))
