"""fastopt.torch on a GPU: GradScaler and skipped steps, decided on the device; CUDA graphs. See torch_stand_in.py."""

import copy

import pytest
from cuda_problem import SIMULATED
from torch_compare import assert_same, unchanged
from torch_problem import (
    CLASSES,
    SCALERS,
    check_overflow,
    front,
    params_of,
    scaled_step,
    set_gradients,
    step_of_loss,
    torch,
    train,
)

every_scaler = pytest.mark.parametrize("scaler", SCALERS.values(), ids=SCALERS)


def make(name="AdamW", **options):
    w = params_of(((5, 7), (3,)))
    return w, getattr(front, name)(w, lr=0.1, **options)


# --- GradScaler ------------------------------------------------------------------------------------------------------


@every_scaler
@pytest.mark.parametrize("name", list(CLASSES)[:: 6 if SIMULATED else 1])
@pytest.mark.parametrize("bad", [0, 2], ids=["first step", "third step"])
def test_an_overflow_is_found_on_the_device_and_changes_nothing(gpus, name, scaler, bad):
    (w, opt), (v, plain) = make(name, max_grad_norm=10.0), make(name, max_grad_norm=10.0)
    check_overflow((gpus.put(w), opt), (v, plain), scaler(gpus.type, init_scale=1024.0), bad, read_state=False)
    assert gpus.downloads() == 0, "the step waits"
    assert_same(w, v, opt, plain)
    assert opt.last_info.grad_norm == plain.last_info.grad_norm


@every_scaler
@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam"])
def test_state_appears_with_the_first_step_that_is_taken(gpus, name, scaler):
    options = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
    (w, opt), (v, plain) = make(name, **options), make(name, **options)
    gpus.put(w)
    scale = scaler(gpus.type, init_scale=1024.0)
    for t in range(3):
        scaled_step(scale, w, opt, t, torch.nan if t < 2 else None)
        if t == 0:
            assert opt.last_info.skipped
            assert not opt.state
            assert opt.state_dict()["state"] == {}
    assert not opt.last_info.skipped
    step_of_loss(v, plain, 2)
    assert_same(w, v, opt, plain)


@every_scaler
@pytest.mark.parametrize("extra", [{"zero_grads": True}, {"flatten": True}, {"master_weights": True}], ids=str)
def test_with_further_arguments(gpus, scaler, extra):
    w, (v, plain) = gpus.put(make()[0]), make(**extra)
    opt = front.AdamW(w, lr=0.1, **extra)
    scales = [scaler(device, init_scale=1024.0) for device in (gpus.type, "cpu")]
    for t in range(3):
        for scale, *run in zip(scales, (w, v), (opt, plain), strict=True):
            scaled_step(scale, *run, t, torch.nan if t == 1 else None)
        for x, y in zip(w, v, strict=True):
            torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=0, atol=0, equal_nan=True)
    assert_same(w, v, opt, plain)


# --- who counts ------------------------------------------------------------------------------------------------------


def skipping(gpus, name="AdamW"):
    """An optimizer whose device counts, after two steps of which one was skipped."""
    w, opt = make(name)
    gpus.put(w)
    opt.skip_nonfinite = True
    set_gradients(w, 0, torch.inf)
    opt.step()
    train(w, opt, 1, first=1)
    return w, opt


def counts(w, opt):
    return [opt.state[p]["step"].item() for p in w]


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "ASGD"])
def test_steps_that_the_device_counts_are_fetched_when_the_state_is_read(stand_ins, name):
    (w, opt), device = skipping(stand_ins, name), stand_ins.runtime()
    assert device.downloads == 0
    assert opt.state[w[0]]["step"].item() == 1
    assert device.downloads == 1
    assert opt.state[w[1]]["step"].item() == 1
    assert device.downloads == 1, "known by now"
    train(w, opt, 1, first=2)
    assert {k: s["step"].item() for k, s in opt.state_dict()["state"].items()} == {0: 2, 1: 2}
    train(w, opt, 1, first=3)
    assert dict(opt.state[w[0]])["step"].item() == 3
    train(w, opt, 1, first=4)
    assert counts(*copy.deepcopy((w, opt))) == [4, 4]


def test_what_somebody_writes_to_counts_of_the_device_holds(gpus):
    w, opt = skipping(gpus)
    opt.state[w[0]]["step"].fill_(6.0)
    train(w, opt, 1, first=2)
    assert counts(w, opt) == [7, 2]
    kept = opt.state[w[1]]["step"]
    train(w, opt, 1, first=3)
    kept.fill_(9.0)  # without reading before
    train(w, opt, 1, first=4)
    assert counts(w, opt) == [9, 10]


def test_a_change_of_entries_keeps_what_the_device_counted(gpus):
    w, opt = skipping(gpus)
    entry = opt.state[w[0]]
    train(w, opt, 1, first=2)
    entry["exp_avg"] = torch.zeros_like(w[0])
    train(w, opt, 1, first=3)
    assert counts(w, opt) == [3, 3]


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def both_of(gpus, name="AdamW"):
    """An optimizer that can be captured, with its parameters on the GPU, and the same on the CPU."""
    (w, opt), (v, plain) = make(name, capturable=True), make(name)
    return gpus.put(w), opt, v, plain


def captured(gpus, w, opt, v, plain):
    """A step of both optimizers, and one that is captured."""
    train(w, opt, 1)
    train(v, plain, 1)
    with gpus.capture() as replay:
        opt.step()
    return replay


@pytest.mark.parametrize("name", CLASSES)
def test_a_captured_step_replayed_is_as_many_steps(gpus, name):
    w, opt, v, plain = both = both_of(gpus, name)
    replay = captured(gpus, *both)
    for _ in range(2):
        replay()
        plain.step()
    for o in (opt, plain):
        o.param_groups[0]["lr"] = 0.03
    opt.upload_options()
    assert gpus.downloads() == 0
    assert_same(w, v, opt, plain)  # reads the counts, which replays then change again
    replay()
    plain.step()
    assert_same(w, v, opt, plain)
    w[1].grad = v[1].grad = None  # another pattern: the host has to know the counts
    opt.step()
    plain.step()
    assert_same(w, v, opt, plain)


def test_gradients_of_a_capture_may_be_new(stand_ins):
    """What torch recommends: set them to None, so that backward makes them in the graph's own memory."""
    w, opt, v, plain = both_of(stand_ins)
    train(w, opt, 1)
    graphs, order = [], (1, 0, 0, 1)
    for t in (1, 2):
        with stand_ins.capture() as replay:
            train(w, opt, 1, first=t)
        graphs.append((replay, [p.grad for p in w]))  # which the graph reads
    train(w, opt, 1, first=3)
    for k in order:
        graphs[k][0]()
    opt.step()  # the host uploaded the addresses of its gradients, the replays others
    for t in (0, 3, *(k + 1 for k in order), 3):
        train(v, plain, 1, first=t)
    assert_same(w, v, opt, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_graph_reads_an_lr_on_the_device(gpus, dtype):
    w, opt, v, plain = both = both_of(gpus)

    def set_lr(value):
        (opt.param_groups[0]["lr"],) = gpus.put([torch.tensor(value, dtype=dtype)])
        plain.param_groups[0]["lr"] = value

    set_lr(0.5)
    replay = captured(gpus, *both)
    for rate in (0.25, 0.125):
        opt.param_groups[0]["lr"].fill_(rate)
        plain.param_groups[0]["lr"] = rate
        replay()
        plain.step()
    assert_same(w, v, opt, plain)
    set_lr(1.0)
    opt.step()
    plain.step()
    assert_same(w, v, opt, plain)


def test_an_lr_on_another_device_is_refused(gpus):
    w, opt = make(capturable=True)
    gpus.put(w[:1])
    (lr,) = gpus.put([torch.tensor(0.5)])
    opt.param_groups[0]["lr"] = lr
    set_gradients(w, 0)
    with unchanged(w), pytest.raises(ValueError, match=r"lr on .* must be on the one device of all parameters"):
        opt.step()


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("capturable", [False, True])
def test_captures_that_are_refused(gpus, capturable):
    w, opt = make(capturable=capturable)
    gpus.put(w)
    set_gradients(w, 0)
    if not capturable:
        opt.step()
    with unchanged(w), gpus.capture(), pytest.raises(RuntimeError, match="capturable=True"):
        opt.step()
    opt.step()
    assert opt.state[w[0]]["step"].item() == 2 - capturable


def test_groups_of_a_graph_are_alike(gpus):
    w = gpus.put(make()[0])
    opt = front.AdamW([{"params": w[:1], "capturable": True}, {"params": w[1:]}])
    set_gradients(w, 0)
    with unchanged(w), pytest.raises(ValueError, match="capturable=True must be set for all param groups or for none"):
        opt.step()


def test_upload_options_needs_a_capturable_step(gpus):
    for capturable, device in ((True, 0), (False, 0), (True, None)):
        w, opt = make(capturable=capturable)
        if device is not None:
            gpus.put(w)
        if (capturable, device) != (True, 0):
            set_gradients(w, 0)
            opt.step()
        with pytest.raises(RuntimeError, match=r"AdamW.upload_options: no step was taken yet with capturable=True"):
            opt.upload_options()


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "LARS"])
def test_capturable_where_torch_has_no_such_argument(name):
    w, opt = make(name, capturable=True)
    assert opt.param_groups[0]["capturable"] is True
    opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    assert opt.param_groups[1]["capturable"] is True
    assert "capturable" not in make(name)[1].param_groups[0]
    train(w, opt, 1)
    with pytest.raises(TypeError, match=f"{name}: capturable must be True or False"):
        make(name, capturable=1)
