"""fastopt.torch on a GPU: the bits of the CPU, launches, and what is waited for. Without a GPU: torch_stand_in.py."""

import sys

import pytest
from torch_compare import assert_same, assert_same_bits, unchanged
from torch_problem import CLASSES, LAYOUTS, check_layout, front, params_of, set_gradients, torch, train

SHAPES = ((5, 7), (3,), (), (0, 2))
MORE = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}],
    "RMSprop": [{}],
    "Adam": [{"weight_decay": 0.1}],
    "AdamW": [{"maximize": True}],
}
EVERY = [
    pytest.param(name, kw, id=f"{name}{k or ''}")
    for name in CLASSES
    for k, kw in enumerate([CLASSES[name], *MORE.get(name, ())])
]
every_class = pytest.mark.parametrize(("name", "options"), EVERY)


def run_both(gpus, name, options, *, dtype=torch.float32, shapes=SHAPES, steps=3):
    """The same steps on the GPU and on the CPU."""
    there, here = gpus.put(params_of(shapes, dtype=dtype)), params_of(shapes, dtype=dtype)
    a, b = (getattr(front, name)(p, **{"lr": 0.05} | options) for p in (there, here))
    train(there, a, steps)
    train(here, b, steps)
    assert gpus.launched()
    assert gpus.downloads() == 0
    assert a.last_info == b.last_info
    return there, here, a, b


@every_class
def test_every_class_has_the_bits_of_the_cpu(gpus, name, options):
    assert_same(*run_both(gpus, name, options))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "LARS"])
def test_every_dtype_has_the_bits_of_the_cpu(gpus, name, dtype):
    assert_same(*run_both(gpus, name, {}, dtype=dtype, shapes=SHAPES[:2], steps=2))


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LARS"])
@pytest.mark.parametrize("extra", [{"max_grad_norm": 0.5}, {"zero_grads": True}, {"flatten": True}], ids=str)
def test_further_arguments(gpus, name, extra):
    there, here, a, b = run_both(gpus, name, extra)
    assert_same(there, here, a, b)
    assert_same_bits([p.grad.cpu() for p in there], [q.grad for q in here])
    assert "zero_grads" not in extra or not any(p.grad.any() for p in there)


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_master_weights(gpus, dtype, flatten):
    options = {"master_weights": True, "flatten": flatten}
    there, here, a, b = run_both(gpus, "AdamW", options, dtype=dtype)
    assert_same(there, here, a, b)
    assert torch.equal(there[0], a.state[there[0]]["master_param"].to(dtype))


def test_flat_is_one_segment_on_a_gpu(stand_ins):
    there, _, a, _ = run_both(stand_ins, "AdamW", {"flatten": True})
    assert a.state.watch.derived().only.serving.plan._tables[False].segment_count == 1
    assert there[1].grad.data_ptr() - there[0].grad.data_ptr() == 4 * 64  # neighbours, each on a 64-byte boundary


@pytest.mark.parametrize("gradient", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("parameter", ["channels_last", "permuted"])
def test_layouts_on_a_gpu(gpus, parameter, gradient):
    check_layout(LAYOUTS[parameter], gradient, gpus.put)


def test_groups_late_gradients_and_none(gpus):
    there, here = gpus.put(params_of(SHAPES)), params_of(SHAPES)
    groups = [[{"params": p[:1], "lr": 0.1}, {"params": p[1:], "maximize": True}] for p in (there, here)]
    a, b = (front.NAdam(group, lr=0.05) for group in groups)
    for t in range(5):
        for p, opt in ((there, a), (here, b)):
            set_gradients(p, t)
            if t < 2 or t == 3:
                p[t < 2].grad = None
            opt.param_groups[1]["lr"] *= 0.5
            opt.step()
        assert [there[k] in a.state for k in range(4)] == [here[k] in b.state for k in range(4)]
    assert_same(there, here, a, b)
    assert a.state[there[1]]["step"].item() == 3


# --- what a step asks of the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"max_grad_norm": 1.0}, {"zero_grads": True}, {"flatten": True}], ids=str)
def test_a_step_waits_for_nothing(stand_ins, extra):
    p, device = stand_ins.put(params_of(SHAPES)), stand_ins.runtime()
    opt = front.AdamW(p, **extra)
    for t in range(4):
        set_gradients(p, t)
        device.launches.clear()
        opt.step()
        prologue = ["fastopt_cuda_prologue_adamw"] if "max_grad_norm" in extra else []
        assert device.launches == [*prologue, "fastopt_cuda_adamw_float32_float32"]
    assert opt.state[p[0]]["step"].item() == 4
    assert device.downloads == 0
    if "max_grad_norm" in extra:
        norm = torch.linalg.vector_norm(torch.cat([x.grad.flatten() for x in p]))
        assert opt.last_info.grad_norm == pytest.approx(norm.item(), rel=1e-6)
        assert device.downloads == 1


def test_only_what_changed_is_uploaded(stand_ins):
    p, device = stand_ins.put(params_of(SHAPES[:2])), stand_ins.runtime()
    opt = front.SGD(p, lr=0.1, momentum=0.9)
    train(p, opt, 2)
    device.uploads.clear()
    opt.step()
    assert device.uploads == []
    opt.param_groups[0]["lr"] = 0.2
    opt.step()
    assert len(device.uploads) == 1


def test_a_launch_for_each_pair_of_dtypes(stand_ins):
    p = stand_ins.put([*params_of(SHAPES[:2]), *params_of(SHAPES[:2], dtype=torch.float64)])
    train(p, front.SGD(p, lr=0.1), 1)
    assert sorted(stand_ins.runtime().launches) == [f"fastopt_cuda_sgd_{x}_{x}" for x in ("float32", "float64")]


# --- errors ----------------------------------------------------------------------------------------------------------


def test_without_cupy_the_error_names_the_extra(stand_ins, monkeypatch):
    from fastopt.engine.cuda import device

    monkeypatch.setitem(sys.modules, "cupy", None)
    device.cupy.cache_clear()
    missing = pytest.raises(ImportError, match=r'pip install cupy-cuda12x "numba-cuda\[cu12\]"')
    try:
        with missing:
            front.AdamW(stand_ins.put(params_of(SHAPES)))
        late = params_of(SHAPES)
        opt = front.AdamW(late)
        stand_ins.put(late)
        set_gradients(late, 0)
        with unchanged(late), missing:
            opt.step()
        assert not opt.state
    finally:
        device.cupy.cache_clear()


def test_other_devices_are_refused():
    w = torch.nn.Parameter(torch.ones(3, device="meta"))
    opt = front.AdamW([w, v := torch.nn.Parameter(torch.ones(2))])
    v.grad = torch.ones(2)
    opt.step()  # a parameter without gradient may be anywhere
    w.grad, before = torch.ones(3, device="meta"), v.detach().clone()
    with pytest.raises(NotImplementedError, match=r"parameter 0 of group 0 is on meta; .* CPU and on NVIDIA's GPUs"):
        opt.step()
    assert torch.equal(v, before)


def test_gradients_that_cannot_be_right_are_refused(stand_ins):
    p = stand_ins.put(params_of(SHAPES))
    opt = front.AdamW(p, lr=0.1)
    train(p, opt, 4)
    stand_ins.runtime().launches.clear()
    with unchanged(p):
        p[1].grad = p[0].detach()[0, :3]
        with pytest.raises(ValueError, match="shares memory with a parameter or a state"):
            opt.step()
        p[1].grad = torch.ones(3).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            opt.step()
    assert stand_ins.runtime().launches == []
