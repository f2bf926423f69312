"""Checkpoints: exact round trips, what other readers see, and files of older builds."""

import json
import math
import pathlib
from fractions import Fraction

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from checkpoint_problem import OPTIMIZERS, SHAPES, contents, make_arrays, make_optimizer, take_steps
from compare import DTYPES
from refusal import CLASSES

import fastopt
from fastopt import checkpoint
from fastopt.checkpoint import load, save


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


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


def test_options_that_were_changed_since_the_last_step_can_be_loaded(path):
    params = make_arrays()
    opt, again = fastopt.SGD(params), fastopt.SGD(params)
    take_steps(opt, params, range(3))
    opt.param_groups[0]["momentum"] = 0.9  # needs a state that no step has made yet
    save(path, params, opt)
    load(path, params, again)
    assert contents(params, again) == contents(params, opt)


def test_options_are_stored_as_they_are_computed_with(path):
    params = {"w": np.ones(1)}
    opt, again = fastopt.ASGD(params, lr=np.float32(0.5), t0=math.inf), fastopt.ASGD(params)
    opt.param_groups[0].update(alpha=np.array(1 / 3), lambd=Fraction(1, 7), weight_decay=5e-324, maximize=np.True_)
    save(path, params, opt)
    with safetensors.safe_open(path, framework="np") as file:
        json.loads(file.metadata()["optimizer"], parse_constant=pytest.fail)  # strict JSON, without Infinity or NaN
    load(path, params, again)
    want = {"lr": 0.5, "t0": math.inf, "alpha": 1 / 3, "lambd": 1 / 7, "weight_decay": 5e-324, "maximize": True}
    assert {name: again.param_groups[0][name] for name in want} == want


def test_parameters_alone(path):
    arrays = {name: np.ones((2, 3), dtype) for name, dtype in DTYPES.items()} | {"": np.ones(1), "a.b\n/ü": np.zeros(0)}
    arrays["float32"].view(np.uint32)[0] = 0x7FC12345, 0xFF800000, 0x80000001  # NaN with payload, -inf, denormal
    save(path, arrays)
    fresh = {name: np.zeros_like(array) for name, array in arrays.items()}
    load(path, fresh)
    assert contents(fresh) == contents(arrays)


def test_strided_arrays_are_saved_and_loaded_by_value(path):
    base, target = np.arange(24.0).reshape(4, 6), np.zeros((4, 6))
    save(path, {"t": base.T, "s": base[::2, 1::3]})
    load(path, {"t": target.T, "s": np.zeros((2, 2))})
    assert np.array_equal(target, base)


def test_other_readers_see_plain_tensors(path):
    params, other = make_arrays(), make_arrays(seed=2)
    opt = make_optimizer("AdamW", params)
    take_steps(opt, params, range(100, 103))
    save(path, params, opt)
    load(path, other)  # the parameters of a checkpoint with an optimizer
    assert contents(other) == contents(params)
    tensors = safetensors.numpy.load_file(path)
    assert tensors["param.w"].tobytes() == params["w"].tobytes()
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


# Older files: each was written by a build of its time, and so was what it made of them three steps later.

OLDER = pathlib.Path(__file__).parent / "checkpoints"
GOLDEN = {  # in the files of NAdam and Adam, options are missing that were added later
    "sgd": ("SGD", {"lr": 0.5, "momentum": 0.9, "nesterov": True}),
    "adam-amsgrad": ("Adam", {"amsgrad": True, "weight_decay": 0.25}),
    "adamw-groups": ("AdamW", {"betas": (0.8, 0.95)}),
    "nadam": ("NAdam", {}),
    "asgd": ("ASGD", {"t0": 2.0}),
    "lars": ("LARS", {"lr": 1.0, "keep_weight_norms": True}),
    "rmsprop": ("RMSprop", {"centered": True, "momentum": 0.5}),
}


def stored(name, file):
    """Parameters and optimizer of a stored checkpoint."""
    file = OLDER / f"{file}.safetensors"
    dtype = safetensors.numpy.load_file(file)["param.w"].dtype
    params = {key: np.zeros(shape, dtype) for key, shape in SHAPES.items()}
    rest = {key: array for key, array in params.items() if key != "w"}
    groups = [{"params": {"w": params["w"]}}, {"params": rest}] if "groups" in name else params
    opt = getattr(fastopt, GOLDEN[name][0])(groups, **GOLDEN[name][1])
    load(file, params, opt)
    return params, opt


@pytest.mark.parametrize("name", GOLDEN)
def test_checkpoints_of_older_builds_go_on_with_the_same_bits(name):
    params, opt = stored(name, name)
    if name == "adam-amsgrad":  # a decayed gradient would be no power of two
        opt.param_groups[0]["weight_decay"] = 0.0
    for seed in range(4, 7):
        # Powers of two: their squares are exact, whatever the order in which a rule multiplies.
        rng = np.random.default_rng(seed)
        grads = {n: np.ldexp(rng.choice([-1.0, 1.0], s), rng.integers(-6, 1, s)) for n, s in SHAPES.items()}
        opt.step({n: np.asarray(g).astype(params[n].dtype) for n, g in grads.items()})
    assert contents(params, opt) == contents(*stored(name, f"{name}.later"))


def test_new_options_need_a_new_format_version():
    """Where this fails: raise ``_VERSION`` in checkpoint.py if it was released, and bring options.json up to date."""
    options = {kind.__name__: sorted(kind([np.ones(1)], lr=1.0).defaults) for kind in CLASSES}
    known = json.loads((OLDER / "options.json").read_text())
    assert known == {"version": checkpoint._VERSION, "options": options}
