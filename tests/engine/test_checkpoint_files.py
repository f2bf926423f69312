"""Files of checkpoints: replaced at once or not at all, and refused where they are damaged or do not fit."""

import contextlib
import fcntl
import json
import math
import os
import resource
import signal
import stat
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_problem import contents, make_arrays, make_optimizer, take_steps
from compare import DTYPES

import fastopt
from fastopt import checkpoint
from fastopt.checkpoint import CheckpointError, load, save


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


@contextlib.contextmanager
def left_alone(path):
    """The block changes neither the file nor its folder."""
    before = path.read_bytes()
    yield
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before


def assert_refused(message, path, params, opt=None):
    """``load`` raises CheckpointError with one line that matches, and changes nothing."""
    before = contents(params, opt)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path, params, opt)
    assert "\n" not in str(caught.value)
    assert contents(params, opt) == before


# --- writing: the old file or the new one, never anything else -------------------------------------------------------


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "safetensors.safe_open", "fastopt.checkpoint._write"])
def test_failure_while_writing_leaves_the_old_file(saved, monkeypatch, where):
    path, fresh, opt = saved

    def write_half_then_stop(*args, **kwargs):
        if "_write" in where:
            args[0].write(path.read_bytes()[:99])
        raise KeyboardInterrupt

    monkeypatch.setattr(where, write_half_then_stop)
    for target in (path, path.with_name("new")):
        with left_alone(path), pytest.raises(KeyboardInterrupt):
            save(target, fresh, opt)


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


def test_permissions_and_owner_of_an_older_file_stay(path, monkeypatch):
    save(path, make_arrays())
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 4321, 1234)
    before = path.stat()
    save(path, make_arrays())
    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    monkeypatch.setattr(os, "fchown", Mock(side_effect=PermissionError))
    save(path, make_arrays())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600  # the rights of its group are not given to another


def test_temporary_files_of_killed_saves_are_removed(path):
    names = (".fastopt-" + "0" * 32 + ".tmp", ".fastopt-" + "1" * 32 + ".tmp", ".fastopt-" + "2" * 32 + ".x")
    stray, busy, other = map(path.with_name, names)
    for file in (stray, busy, other):
        file.write_bytes(b"half")
    with busy.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as a save does that is under way
        save(path, make_arrays())
        assert sorted(os.listdir(path.parent)) == sorted([busy.name, other.name, path.name])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.name)], ids=["pipe", "loop of links"])
def test_only_regular_files_are_replaced_and_read(path, make):
    make(path)
    for function in (save, load):
        with pytest.raises(OSError, match=r"regular file|levels of symbolic links"):
            function(path, make_arrays())
    assert os.listdir(path.parent) == [path.name]
    assert not stat.S_ISREG(path.lstat().st_mode)


def test_a_full_disk_is_an_operating_system_error(saved):
    path, fresh, opt = saved
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, limits[1]))
    try:
        with left_alone(path), pytest.raises(OSError, match="File too large"):
            save(path, fresh, opt)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_saved_while_another_thread_steps_is_of_one_moment(path):
    shapes = dict.fromkeys("abc", (100_000,))
    params, grads, fresh = (fastopt.FlatBuffer(shapes) for _ in range(3))
    grads.data[:] = 1
    opt, again = fastopt.SGD(params, lr=1.0), fastopt.SGD(fresh, lr=1.0)
    stop, saves = threading.Event(), 0

    def steps():
        while not stop.wait(0.0005):
            with contextlib.suppress(RuntimeError):  # a save is copying
                opt.step(grads)

    with ThreadPoolExecutor(1) as pool:
        stepping = pool.submit(steps)
        try:
            while saves < 30 and not stepping.done():
                with contextlib.suppress(RuntimeError):  # a step is under way
                    save(path, params, opt)
                    saves += 1
                    load(path, fresh, again)
                    assert {again.state[name]["step"] for name in shapes} == {-int(fresh.data[0])}
                    assert np.ptp(fresh.data) == 0
        finally:
            stop.set()
        stepping.result()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda opt, patch: opt.param_groups[0].update(lr=-1.0), "lr"),
        (lambda opt, patch: patch.setattr("fastopt.states.MAX_STEP", 2), "step"),
    ],
)
def test_nothing_is_saved_that_load_would_refuse(saved, monkeypatch, change, message):
    path, params, opt = saved
    load(path, params, opt)
    change(opt, monkeypatch)
    refusal = rf"save: opt could not be loaded again: .*{message}"
    with left_alone(path), pytest.raises(CheckpointError, match=refusal):
        save(path, params, opt)


@fastopt.rule(options={"kind": {"a"}}, scalars=lambda t, options: {"size": float(len(options["kind"]))})
def odd(p, g, h):
    return (p,)


NOT_STORABLE = [
    ({"w": [1.0]}, None, TypeError, r"params\['w'\] is a list"),
    ({1: np.ones(1)}, None, TypeError, "params: names are strings, got 1"),
    (np.ones(3), None, TypeError, "params is a single array; needed is a FlatBuffer, a mapping or"),
    ("w", None, TypeError, "params is 'w'; needed is a FlatBuffer, a mapping or"),
    ({"w": np.ones(3, complex)}, None, CheckpointError, r"param.w is <c16 .* cannot be stored"),
    ({"w": np.ones(3, ">f4")}, None, CheckpointError, r"param.w is >f4"),
    ({"\ud800": np.ones(3)}, None, CheckpointError, "surrogates"),
    ({}, fastopt.optimizer(odd)([np.ones(1)]), CheckpointError, r"holds {'a'}, which cannot be stored"),
    ({}, SimpleNamespace(), TypeError, r"save: opt is a types.SimpleNamespace; needed is a fastopt.Optimizer"),
]


@pytest.mark.parametrize(("params", "opt", "error", "message"), NOT_STORABLE, ids=[case[3] for case in NOT_STORABLE])
def test_what_cannot_be_stored_leaves_the_old_file(saved, params, opt, error, message):
    path, _, _ = saved
    with left_alone(path), pytest.raises(error, match=message):
        save(path, params, opt)


@pytest.mark.parametrize("function", [save, load])
def test_files_and_folders_that_are_not_there(tmp_path, function):
    with pytest.raises(FileNotFoundError, match=r"missing"):
        function(tmp_path / "missing" / "file", make_arrays())
    with pytest.raises(IsADirectoryError):
        function(tmp_path, make_arrays())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", [save, load])
def test_missing_safetensors_names_the_extra(saved, monkeypatch, function):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        function(*saved)


# --- reading: damaged files ------------------------------------------------------------------------------------------


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
    for place in range(0, len(whole), 3):
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
        del metadata["sha256"], metadata["header_sha256"]
        checkpoint._seal(metadata, tensors)
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
    ("newer", r"has format version '3' \(fastopt .*\), but only 1, 2 can", lambda m, t: m.update(format_version="3")),
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


FORGED = [  # changes of the metadata; shape of param.w, shape of state.0.momentum_buffer, message
    ({"optimizer": '{"a":' * 100_000 + "1" + "}" * 100_000}, [3], [3], INCOMPLETE),
    ({"params": "[" * 100_000 + "]" * 100_000}, [3], [3], INCOMPLETE),
    ({}, [1] * 65, [3], "holds 'w' of shape"),
    ({}, [3], [1] * 65, INCOMPLETE),
    ({}, [2**38], [3], "holds 'w' of shape"),
    ({}, [3], [2**38], UNFIT),
]


@pytest.mark.parametrize(("changes", "shape", "state_shape", "message"), FORGED)
def test_forged_files_are_refused_in_little_memory(path, changes, shape, state_shape, message):
    params = {"w": np.ones(3, np.float32)}
    opt = fastopt.SGD(params, momentum=0.9)
    save(path, params, opt)
    with safetensors.safe_open(path, framework="np") as file:
        header = {"__metadata__": file.metadata() | {"format_version": "1"} | changes}
    end = 0
    for name, dims in (("param.w", shape), ("state.0.momentum_buffer", state_shape)):
        start, end = end, end + 4 * math.prod(dims)
        header[name] = {"dtype": "F32", "shape": dims, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # without taking room on the disk
    tracemalloc.start()
    try:
        assert_refused(message, path, params, opt)
        assert tracemalloc.get_traced_memory()[1] < 20 * len(text) + 2**20
    finally:
        tracemalloc.stop()


def test_what_is_interrupted_is_loaded_all_the_same(saved, monkeypatch):
    path, fresh, opt = saved
    interrupts = [lambda _: signal.raise_signal(signal.SIGINT), lambda _: None]
    monkeypatch.setattr(opt, "load_state_dict", lambda state_dict: interrupts.pop(0)(state_dict))
    with pytest.raises(KeyboardInterrupt):
        load(path, fresh, opt)
    other = make_arrays(seed=2)
    load(path, other)
    assert contents(fresh) == contents(other)


# --- reading: sound files that do not fit ----------------------------------------------------------------------------

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
    save(path, params := make_arrays())
    assert_refused("was saved without an optimizer, but opt was given", path, params, fastopt.AdamW(params))
