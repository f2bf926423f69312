"""How a step reaches a GPU: launches, uploads, graphs, refusals. Counted on the stand-in, which needs no GPU."""

import numpy as np
import pytest
from cuda_problem import FEW, assert_same, moved, problem
from refusal import refused

import fastopt
from fastopt.engine.cuda import device as cuda

F32 = np.float32


def model(gpu, arrays=20):
    shapes = {f"p{k}": (2, k + 1) if k % 2 else (k + 1,) for k in range(arrays)}
    params, (grads,) = problem(shapes=shapes, steps=1)
    return moved(gpu, params), moved(gpu, grads)


def test_a_step_is_one_launch_whatever_the_number_of_arrays_and_groups(stand_in):
    params, grads = model(stand_in)
    names = list(params)
    groups = [{"params": {n: params[n] for n in names[k::3]}, "lr": 0.1 * (k + 1)} for k in range(3)]
    opt, device = fastopt.AdamW(groups), stand_in.device()
    for _ in range(3):
        device.launches.clear()
        opt.step(grads)
        assert device.launches == ["fastopt_cuda_adamw_float32_float32"]
    assert device.downloads == 0


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"skip_nonfinite": True}, {"max_norm": 1.0, "grad_scale": 2.0}])
def test_what_must_be_known_first_is_one_more_launch_and_no_wait(stand_in, options):
    params, grads = model(stand_in, 3)
    norm = np.sqrt(sum((stand_in.get(g).astype(float) ** 2).sum() for g in grads.values()))
    opt, device = fastopt.AdamW(params), stand_in.device()
    info = opt.step(grads, **options)
    assert device.launches == ["fastopt_cuda_prologue_adamw", "fastopt_cuda_adamw_float32_float32"]
    assert device.downloads == 0
    assert info.grad_norm == pytest.approx(norm / options.get("grad_scale", 1))
    assert not info.skipped
    assert device.downloads == 1


def test_lars_is_two_launches(stand_in):
    params, grads = model(stand_in, 3)
    fastopt.LARS(params, lr=0.1).step(grads)
    dtypes = "float32_float32"
    assert stand_in.device().launches == [f"fastopt_cuda_terms_lars_{dtypes}", f"fastopt_cuda_lars_{dtypes}"]


def test_only_what_changed_is_uploaded(stand_in):
    params, grads = model(stand_in)
    opt, device = fastopt.SGD(params, lr=0.1, momentum=0.9), stand_in.device()

    def uploads(grads, lr):
        opt.param_groups[0]["lr"] = lr
        device.uploads.clear()
        opt.step(grads)
        return device.uploads

    uploads(grads, 0.1)
    assert uploads(grads, 0.1) == []  # not even lr moved
    assert len(uploads(grads, 0.2)) == 1
    copies = {name: stand_in.put(stand_in.get(g)) for name, g in grads.items()}
    assert uploads(copies, 0.2) == [8 * len(grads)]  # the gradients' new addresses


def test_several_dtypes_are_a_launch_each(stand_in):
    arrays = {"a": np.ones(5, F32), "b": np.ones(5), "c": np.ones(4, F32)}
    params, grads = (moved(stand_in, arrays) for _ in range(2))
    fastopt.SGD(params, lr=0.5).step(grads)
    assert sorted(stand_in.device().launches) == [f"fastopt_cuda_sgd_{x}_{x}" for x in ("float32", "float64")]
    assert [stand_in.get(p)[0] for p in params.values()] == [0.5] * 3


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


DECIDED = {"max_norm": 0.5, "skip_nonfinite": True}


@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", {}), ("Adam", DECIDED), ("NAdam", DECIDED), ("ASGD", {}), ("RAdam", {}), ("SGD", {}), ("LARS", DECIDED)],
    ids=str,
)
def test_a_captured_step_replayed_is_as_many_steps(gpu, name, options):
    arrays, (gradient,) = problem(shapes=FEW, steps=1)
    params, grads = moved(gpu, arrays), moved(gpu, gradient)
    cls = getattr(fastopt, name)
    opt, wanted = cls(params, lr=0.1, capturable=True), cls(arrays, lr=0.1)
    opt.step(grads, **options)
    wanted.step(gradient, **options)
    with gpu.capture() as replay:
        info = opt.step(grads, **options)
    for t in range(4):
        if t == 2:
            for each in (opt, wanted):
                each.param_groups[0]["lr"] = 0.03
            opt.upload_options()
        replay()
        expected = wanted.step(gradient, **options)
    assert (info.skipped, info.grad_norm) == (expected.skipped, expected.grad_norm)
    assert wanted.state["w"]["step"] == 5
    assert_same(gpu, params, arrays, opt, wanted)


def test_a_graph_reads_the_loss_scale_and_skips(stand_in):
    w, g = (stand_in.put(np.full(4, x, F32)) for x in (1.0, 8.0))
    scale = stand_in.put(np.array([4.0], F32))
    opt, device = fastopt.SGD([w], lr=0.5, capturable=True), stand_in.device()
    opt.step([g], grad_scale=scale, skip_nonfinite=True)
    with stand_in.capture() as replay:
        info = opt.step([g], grad_scale=scale, skip_nonfinite=True)
    assert stand_in.get(w).tolist() == [0.0] * 4
    device.assign(scale, 8.0)
    replay()
    assert stand_in.get(w).tolist() == [-0.5] * 4
    assert (info.skipped, info.grad_norm) == (False, 2.0)
    device.assign(g, np.inf)
    replay()
    assert stand_in.get(w).tolist() == [-0.5] * 4
    assert opt.state["0"]["step"] == 2


def test_a_group_that_is_added_after_replays_does_not_lose_their_steps(stand_in):
    w, g, further = (stand_in.put(np.ones(4, F32)) for _ in range(3))
    opt = fastopt.Adam([w], capturable=True)
    opt.step([g])
    with stand_in.capture() as replay:
        opt.step([g])
    assert opt.state["0"]["step"] == 1
    for _ in range(3):
        replay()
    opt.add_param_group({"params": {"further": further}})
    assert opt.state["0"]["step"] == 4


@pytest.mark.parametrize(("capturable", "said"), [(False, "capturable=True"), (True, "before capturing")])
def test_captures_that_are_refused(gpu, capturable, said):
    params, grads = model(gpu, 2)
    opt = fastopt.SGD(params, lr=0.1, capturable=capturable)
    if not capturable:
        opt.step(grads)
    before = {name: gpu.get(p).tobytes() for name, p in params.items()}
    with gpu.capture(), refused(RuntimeError, said):
        opt.step(grads)
    assert {name: gpu.get(p).tobytes() for name, p in params.items()} == before
    assert opt.state["p0"]["step"] == (not capturable)
    opt.step(grads)


def test_upload_options_needs_a_step_before(stand_in):
    params, _ = model(stand_in, 2)
    for opt in (fastopt.SGD(params, lr=0.1, capturable=True), fastopt.SGD([np.ones(2)])):
        with refused(RuntimeError, "upload_options", "no step was taken yet with capturable=True"):
            opt.upload_options()


# --- refusals --------------------------------------------------------------------------------------------------------


def test_capturable_on_the_host_is_refused():
    opt = fastopt.Adam([np.ones(2)])
    opt.param_groups[0]["capturable"] = True
    for call in (lambda: fastopt.Adam([np.ones(2)], capturable=True), lambda: opt.step([np.ones(2)])):
        with refused(ValueError, "capturable=True", "host memory"):
            call()


def test_memories_do_not_mix(stand_in):
    here, there, other = np.ones(3, F32), stand_in.put(np.ones(3, F32)), stand_in.put(np.ones(3, F32), device=1)
    opt, host = fastopt.SGD({"a": there}), fastopt.SGD({"a": here})
    for call, *words in (
        (lambda: fastopt.SGD([there, here]), "params[1]", "numpy.ndarray in host memory", "cuda:0", "cupy.asarray"),
        (lambda: fastopt.SGD([here, there]), "params[1]", "on a GPU", "host memory"),
        (lambda: fastopt.SGD({"a": there, "b": other}), "params['b']", "cuda:1", "cuda:0", "one device"),
        (lambda: opt.step({"a": here}), "grads['a']", "host memory"),
        (lambda: opt.step({"a": other}), "grads['a']", "cuda:1"),
        (lambda: opt.add_param_group({"params": {"b": other}}), "params of group 1['b']", "cuda:1"),
        (lambda: host.step({"a": there}), "grads['a']", "GPU"),
    ):
        with refused(ValueError, *words):
            call()
    with refused(TypeError, "grads['a']", "list"):
        opt.step({"a": [1.0, 2.0, 3.0]})
    assert stand_in.get(there).tolist() == here.tolist() == [1.0] * 3


def test_wrong_arrays_are_refused(stand_in):
    put, w = stand_in.put, stand_in.put(np.ones((2, 3), F32))
    opt, g = fastopt.SGD([w]), stand_in.put(np.ones((2, 3), F32))
    for call, error, *words in (
        (lambda: fastopt.SGD([w.T]), ValueError, "strides", "cupy.ascontiguousarray"),
        (lambda: fastopt.SGD([put(np.ones(3, np.int64))]), TypeError, "int64", "float32"),
        (lambda: fastopt.SGD([w, w[:1]]), ValueError, "share memory"),
        (lambda: opt.step([put(np.ones((3, 2), F32))]), ValueError, "shape (3, 2)", "shape (2, 3)"),
        (lambda: opt.step([put(np.ones((2, 3)))]), TypeError, "float64", "float32"),
        (lambda: opt.step([w]), ValueError, "shares memory with a parameter"),
        (lambda: opt.step([g], grad_scale=put(np.ones(1))), TypeError, "grad_scale", "float64"),
    ):
        with refused(error, *words):
            call()
    assert stand_in.get(w).tolist() == [[1.0] * 3] * 2


def test_too_little_memory_for_the_state_leaves_nothing_half_built(stand_in):
    a, b = stand_in.put(np.ones(1000, F32)), stand_in.put(np.ones(10_000, F32))
    device = stand_in.device()
    opt = fastopt.Adam([a])
    device.room = 50_000  # of the 80 kB that follow
    with refused(MemoryError, "Adam", "exp_avg", "GiB", "cuda:0", "free"):
        opt.add_param_group({"params": [b]})
    assert len(opt.param_groups) == 1
    device.room = 2**30
    opt.add_param_group({"params": [b]})
    opt.step([stand_in.put(np.ones(1000, F32)), None])


def test_without_cupy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    cuda.cupy.cache_clear()
    with refused(ImportError, 'pip install cupy-cuda12x "numba-cuda[cu12]"'):
        fastopt.FlatBuffer({"w": (3,)}, device="cuda")
    cuda.cupy.cache_clear()


def test_a_gpu_that_is_not_there_is_refused(stand_in):
    with refused(ValueError, "cuda:7", "cuda:0, cuda:1"):
        fastopt.FlatBuffer({"w": (3,)}, device="cuda:7")


def test_without_a_driver_the_error_says_so():
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        with refused(RuntimeError, "device is 'cuda'", "driver", "fastopt info"):
            fastopt.FlatBuffer({"w": (3,)}, device="cuda")


@pytest.mark.parametrize("device", ["gpu", "cuda:-1", "cuda:x", 0, None])
def test_unknown_devices_are_refused(device):
    with refused(ValueError, "device", '"cuda"'):
        fastopt.FlatBuffer({"w": (3,)}, device=device)
