"""Optimizers of arrays on a GPU, against the same ones on the CPU, bit for bit.

Without a GPU launches go to Numba's simulator (cuda_stand_in.py); `pytest -m gpu` runs the same tests on a real one.
"""

import math

import numpy as np
import pytest
from cases import CASES, Case
from compare import build
from cuda_problem import FEW, ONE_PER_RULE, SIMULATED, assert_same, moved, problem

import fastopt


def run_both(gpu, case, params, grads, **options):
    """The same steps on the GPU and on the CPU, with the same outcome."""
    on_gpu = moved(gpu, params)
    opt_gpu, opt = build(case, on_gpu), build(case, params)
    for gradient in grads:
        assert opt_gpu.step(moved(gpu, gradient), **options) == opt.step(gradient, **options)
    assert_same(gpu, on_gpu, params, opt_gpu, opt)


@pytest.mark.parametrize("case", ONE_PER_RULE if SIMULATED else CASES, ids=lambda case: case.id)
def test_every_optimizer_has_the_bits_of_the_cpu(gpu, case):
    run_both(gpu, case, *problem())


@pytest.mark.parametrize(("p", "g"), [("float64", "float64"), ("bfloat16", "bfloat16"), ("float32", "float16")])
@pytest.mark.parametrize("name", ["Adam", "LARS"])
def test_every_dtype_has_the_bits_of_the_cpu(gpu, name, p, g):
    case = next(c for c in CASES if c.optimizer == name)
    run_both(gpu, case, *problem(p, g, shapes=FEW, steps=2), max_norm=0.7)


@pytest.mark.parametrize("case", ONE_PER_RULE[:: 5 if SIMULATED else 1], ids=lambda case: case.id)
def test_clipping_unscaling_and_skipping_are_decided_on_the_device(gpu, case):
    params, grads = problem(shapes=FEW, steps=4)
    grads[0]["w"][2, 2] = math.inf  # the first step is skipped
    grads[2]["b"][0] = -math.inf
    run_both(gpu, case, params, grads, max_norm=0.5, grad_scale=8.0, skip_nonfinite=True)


def test_a_flat_buffer_is_one_run(gpu):
    params, (gradient, *_) = problem()
    flat = fastopt.FlatBuffer.from_arrays(params)
    grads = fastopt.FlatBuffer.from_arrays(gradient)
    flat_gpu, grads_gpu = (fastopt.FlatBuffer.from_arrays(moved(gpu, x)) for x in (params, gradient))
    assert (flat_gpu.device, flat_gpu.offsets) == ("cuda:0", flat.offsets)
    opt, opt_gpu = fastopt.AdamW(flat), fastopt.AdamW(flat_gpu)
    for _ in range(2):
        opt.step(grads, zero_grads=True)
        opt_gpu.step(grads_gpu, zero_grads=True)
    assert_same(gpu, flat_gpu, flat, opt_gpu, opt)
    assert gpu.get(flat_gpu.data).tobytes() == flat.data.tobytes()  # the padding, too
    assert not gpu.get(grads_gpu.data).any()


@pytest.mark.parametrize(
    ("make", "first", "options"),
    [(fastopt.SGD, np.nan, {"max_norm": 1.0}), (lambda flat: fastopt.Adam(flat, eps=0.0), 1.0, {})],
    ids=["a norm that is NaN", "no eps"],
)
def test_the_padding_of_a_flat_buffer_stays_zero(gpu, make, first, options):
    ones = {"w": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    flat = fastopt.FlatBuffer.from_arrays(moved(gpu, ones))
    grads = fastopt.FlatBuffer.from_arrays(moved(gpu, ones | {"w": np.full(3, first, np.float32)}))
    make(flat).step(grads, **options)
    assert np.isnan(gpu.get(flat["b"])).all() == np.isnan(first)
    assert gpu.get(flat.data)[3:32].tolist() == [0.0] * 29


def test_groups_late_gradients_and_frozen_parameters(gpu):
    params, grads = problem(shapes=FEW, steps=4)
    on_gpu = moved(gpu, params)
    opt_gpu, opt = (
        fastopt.Adam([{"params": {"w": p["w"]}, "lr": 0.1}, {"params": {"b": p["b"]}, "maximize": True}])
        for p in (on_gpu, params)
    )
    for t, gradient in enumerate(grads):
        late = {"b": None} if t < 2 else {}
        opt_gpu.step(moved(gpu, gradient) | late)
        opt.step(gradient | late)
    assert opt.state["b"]["step"] == 2
    assert_same(gpu, on_gpu, params, opt_gpu, opt)


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.5, "skip_nonfinite": True}], ids=["host", "device"])
@pytest.mark.parametrize(("name", "p"), [("AdamW", "float32"), ("NAdam", "float64"), ("LARS", "bfloat16")])
def test_averages_have_the_bits_of_the_cpu(gpu, name, p, options):
    """Whether the host knows the weights or, where the device decides on skipping, only the device."""
    params, grads = problem(p, shapes=FEW, steps=5)
    grads[1]["w"][2, 2] = math.inf
    run_both(gpu, Case(name, "", {"lr": 0.1, "ema_decay": 0.25, "ema_warmup": True}), params, grads, **options)


def test_a_loss_scale_on_the_device_is_read_when_the_step_runs(gpu):
    params, grads = problem(shapes=FEW, steps=2)
    on_gpu, scale = moved(gpu, params), gpu.put(np.array([4.0], np.float32))
    opt_gpu, opt = fastopt.SGD(on_gpu, lr=0.1), fastopt.SGD(params, lr=0.1)
    for gradient in grads:
        opt_gpu.step(moved(gpu, gradient), grad_scale=scale)
        opt.step(gradient, grad_scale=4.0)
    assert_same(gpu, on_gpu, params, opt_gpu, opt)


@pytest.mark.parametrize("zero_grads", [False, True])
def test_a_skipped_step_only_zeroes_gradients_and_only_where_asked_to(gpu, zero_grads):
    params, (gradient,) = problem(shapes=FEW, steps=1)
    gradient["b"][1] = np.nan
    on_gpu, grads = moved(gpu, params), moved(gpu, gradient)
    opt = fastopt.Adam(on_gpu)
    info = opt.step(grads, skip_nonfinite=True, zero_grads=zero_grads)
    assert info.skipped
    assert opt.state["w"]["step"] == 0
    for name, array in params.items():
        assert gpu.get(on_gpu[name]).tobytes() == array.tobytes()
        assert gpu.get(grads[name]).tobytes() == (np.zeros_like(array) if zero_grads else gradient[name]).tobytes()


def test_a_step_without_any_gradient(gpu):
    w = gpu.put(np.ones(3, np.float32))
    opt = fastopt.Adam([w])
    assert opt.step([None]) == (False, None)
    assert opt.step([None], max_norm=1.0, skip_nonfinite=True) == (False, 0.0)
    assert opt.state["0"]["step"] == 0
    opt.step([gpu.put(np.ones(3, np.float32))])
    assert opt.state["0"]["step"] == 1


def test_strided_gradients_are_copied(gpu):
    params, (gradient,) = problem(shapes=FEW, steps=1)
    on_gpu = moved(gpu, params)
    opt, opt_gpu = fastopt.SGD(params), fastopt.SGD(on_gpu)
    opt.step(gradient)
    opt_gpu.step({"w": gpu.put(np.ascontiguousarray(gradient["w"].T)).T, "b": gpu.put(gradient["b"])})
    assert_same(gpu, on_gpu, params, opt_gpu, opt)


def test_checkpoints_move_between_cpu_and_gpu(gpu, tmp_path):
    params, grads = problem(shapes=FEW, steps=3)
    on_gpu = moved(gpu, params)
    opt_gpu, opt = fastopt.NAdam(on_gpu), fastopt.NAdam(params)
    opt_gpu.step(moved(gpu, grads[0]), skip_nonfinite=True)
    fastopt.save(tmp_path / "a.safetensors", on_gpu, opt_gpu)
    fastopt.load(tmp_path / "a.safetensors", params, opt)
    assert_same(gpu, on_gpu, params, opt_gpu, opt)
    opt.step(grads[1])
    opt_gpu.load_state_dict(opt.state_dict())
    fastopt.save(tmp_path / "b.safetensors", params)
    fastopt.load(tmp_path / "b.safetensors", on_gpu)
    opt.step(grads[2])
    opt_gpu.step(moved(gpu, grads[2]))
    assert_same(gpu, on_gpu, params, opt_gpu, opt)
    again = fastopt.NAdam({name: array.copy() for name, array in params.items()})
    again.load_state_dict(opt_gpu.state_dict())  # arrays on the GPU into a host's
    assert again.state["w"]["exp_avg"].tobytes() == opt.state["w"]["exp_avg"].tobytes()


def test_buffers_move(gpu):
    flat = fastopt.FlatBuffer.from_arrays({"w": np.arange(6.0).reshape(2, 3)})
    there = fastopt.FlatBuffer.from_arrays({"w": gpu.put(flat["w"])})
    assert there.copy().device == "cuda:0"
    assert there.to("cpu")["w"].tolist() == flat["w"].tolist()
    assert flat.to("cuda:0").device == "cuda:0"
    there["w"] = np.ones((2, 3))
    assert gpu.get(there["w"]).tolist() == [[1.0] * 3] * 2
