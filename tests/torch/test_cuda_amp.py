"""fastopt.torch on a GPU: GradScaler and skipped steps, decided on the device; CUDA graphs. See torch_stand_in.py."""

import copy

import pytest
from cuda_problem import SIMULATED
from torch_compare import assert_same, unchanged
from torch_problem import CLASSES, SCALERS, front, loss_of, set_gradients, step_of_loss, torch, train

every_scaler = pytest.mark.parametrize("scaler", SCALERS.values(), ids=SCALERS)
SHAPES = ((5, 7), (3,))


def make(name="AdamW", **options):
    torch.manual_seed(0)
    w = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    return w, getattr(front, name)(w, lr=0.1, **options)


# --- GradScaler ------------------------------------------------------------------------------------------------------


@every_scaler
@pytest.mark.parametrize("name", list(CLASSES)[:: 6 if SIMULATED else 1])
@pytest.mark.parametrize("bad", [0, 2], ids=["first step", "third step"])
def test_an_overflow_is_found_on_the_device_and_changes_nothing(gpus, name, scaler, bad):
    (w, opt), (v, plain) = make(name, max_grad_norm=10.0), make(name, max_grad_norm=10.0)
    gpus.put(w)
    scale = scaler(gpus.type, init_scale=1024.0)
    for t in range(4):
        opt.zero_grad()
        scale.scale(loss_of(w, t)).backward()
        if t == bad:
            w[1].grad[1] = torch.inf
            before = [p.detach().clone() for p in w]
        scale.step(opt)
        scale.update()
        assert gpus.downloads() == 0, "the step waits"
        if t == bad:
            assert scale.get_scale() == 512.0
            assert all(torch.equal(p, q) for p, q in zip(w, before, strict=True))
            continue
        step_of_loss(v, plain, t)
    assert_same(w, v, opt, plain)
    assert opt.last_info.grad_norm == plain.last_info.grad_norm


@every_scaler
@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam"])
def test_state_appears_with_the_first_step_that_is_taken(gpus, name, scaler):
    w, opt = make(name, **({"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}))
    gpus.put(w)
    scale = scaler(gpus.type, init_scale=1024.0)
    for t in range(3):
        opt.zero_grad()
        scale.scale(loss_of(w, t)).backward()
        if t < 2:
            w[0].grad[0, 0] = torch.nan
        scale.step(opt)
        scale.update()
        if t == 0:
            assert opt.last_info.skipped
            assert not opt.state
            assert opt.state_dict()["state"] == {}
            w[1].grad = None  # another pattern, so another plan
    assert not opt.last_info.skipped
    v, plain = make(name, **({"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}))
    loss_of(v, 2).backward()
    plain.step()
    assert_same(w, v, opt, plain)


@every_scaler
@pytest.mark.parametrize("extra", [{"zero_grads": True}, {"flatten": True}, {"master_weights": True}], ids=str)
def test_with_further_arguments(gpus, scaler, extra):
    (w, opt), (v, plain) = make(**extra), make(**extra)
    gpus.put(w)
    if "flatten" in extra:
        opt = front.AdamW(w, lr=0.1, **extra)
    scales = [scaler(device, init_scale=1024.0) for device in (gpus.type, "cpu")]
    for t in range(3):
        for p, o, s in ((w, opt, scales[0]), (v, plain, scales[1])):
            o.zero_grad()
            s.scale(loss_of(p, t)).backward()
            if t == 1:
                p[0].grad[0, 0] = torch.nan
            s.step(o)
            s.update()
        for x, y in zip(w, v, strict=True):
            torch.testing.assert_close(x.grad.cpu(), y.grad, rtol=0, atol=0, equal_nan=True)
    assert_same(w, v, opt, plain)


# --- who counts ------------------------------------------------------------------------------------------------------


def skipping(gpus, name="AdamW"):
    """An optimizer whose device counts, after two steps of which one was skipped."""
    w, opt = make(name)
    gpus.put(w)
    opt.skip_nonfinite = True
    for t in range(2):
        set_gradients(w, t)
        if t == 0:
            w[0].grad[0, 0] = torch.inf
        opt.step()
    return w, opt


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "ASGD"])
def test_steps_that_the_device_counts_are_fetched_when_the_state_is_read(stand_ins, name):
    (w, opt), device = skipping(stand_ins, name), stand_ins.runtime()
    assert device.downloads == 0
    assert opt.state[w[0]]["step"].item() == 1
    read = device.downloads
    assert read == 1
    assert opt.state[w[1]]["step"].item() == 1
    assert device.downloads == read, "known by now"
    train(w, opt, 1, first=2)
    assert {k: s["step"].item() for k, s in opt.state_dict()["state"].items()} == {0: 2, 1: 2}
    train(w, opt, 1, first=3)
    assert dict(opt.state[w[0]])["step"].item() == 3
    train(w, opt, 1, first=4)
    again = copy.deepcopy((w, opt))
    assert again[1].state[again[0][0]]["step"].item() == 4


def test_what_somebody_writes_to_counts_of_the_device_holds(gpus):
    w, opt = skipping(gpus)
    opt.state[w[0]]["step"].fill_(6.0)
    train(w, opt, 1, first=2)
    assert [opt.state[p]["step"].item() for p in w] == [7, 2]
    set_gradients(w, 3)
    kept = opt.state[w[1]]["step"]
    opt.step()
    kept.fill_(9.0)  # without reading before
    train(w, opt, 1, first=4)
    assert [opt.state[p]["step"].item() for p in w] == [9, 10]


def test_a_change_of_entries_keeps_what_the_device_counted(gpus):
    w, opt = skipping(gpus)
    entry = opt.state[w[0]]
    train(w, opt, 1, first=2)
    entry["exp_avg"] = torch.zeros_like(w[0])
    train(w, opt, 1, first=3)
    assert [opt.state[p]["step"].item() for p in w] == [3, 3]


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def captured(gpus, w, opt, v, plain):
    """A step of both optimizers, and one that is captured."""
    for p in (w, v):
        set_gradients(p, 0)
    opt.step()
    plain.step()
    with gpus.capture() as replay:
        opt.step()
    return replay


@pytest.mark.parametrize("name", CLASSES)
def test_a_captured_step_replayed_is_as_many_steps(gpus, name):
    (w, opt), (v, plain) = make(name, capturable=True), make(name)
    gpus.put(w)
    replay = captured(gpus, w, opt, v, plain)
    replay()
    replay()
    for o in (opt, plain):
        o.param_groups[0]["lr"] = 0.03
    for _ in range(2):
        plain.param_groups[0]["lr"] = 0.1
        plain.step()
    plain.param_groups[0]["lr"] = 0.03
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
    (w, opt), (v, plain) = make(capturable=True), make()
    stand_ins.put(w)

    def step(optimizer, params, t):
        set_gradients(params, t)
        optimizer.step()
        return [p.grad for p in params]

    step(opt, w, 0)
    graphs = []
    for t in (1, 2):
        with stand_ins.capture() as replay:
            graphs.append((replay, step(opt, w, t)))
    kept = step(opt, w, 3)
    order = (1, 0, 0, 1)
    for k in order:
        graphs[k][0]()
    for p, gradient in zip(w, kept, strict=True):  # the host uploaded their addresses, the replays others
        p.grad = gradient
    opt.step()
    for t in (0, 3, *(k + 1 for k in order), 3):
        step(plain, v, t)
    assert_same(w, v, opt, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_graph_reads_an_lr_on_the_device(gpus, dtype):
    (w, opt), (v, plain) = make(capturable=True), make()
    gpus.put(w)
    (lr,) = gpus.put([torch.tensor(0.5, dtype=dtype)])
    opt.param_groups[0]["lr"], plain.param_groups[0]["lr"] = lr, 0.5
    replay = captured(gpus, w, opt, v, plain)
    for rate in (0.25, 0.125):
        lr.fill_(rate)
        plain.param_groups[0]["lr"] = rate
        replay()
        plain.step()
    assert_same(w, v, opt, plain)
    (other,) = gpus.put([torch.tensor(1.0, dtype=dtype)])
    opt.param_groups[0]["lr"], plain.param_groups[0]["lr"] = other, 1.0
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
