"""fastopt.torch on a real GPU: what test_cuda*.py, which stand one in, cannot show."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import fastopt.torch as front  # noqa: E402 - needs torch

pytestmark = pytest.mark.gpu

CLASSES = {
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "Adagrad": {"lr_decay": 0.1},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {"t0": 1.0, "lambd": 0.1},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Lion": {},
    "LARS": {"lr": 0.1},
}
IN_TORCH = [name for name in CLASSES if name not in ("Lion", "LARS")]
SHAPES = ((300, 70), (33,), (), (0, 2), (1 << 20,), (8, 3, 5, 5))
every_class = pytest.mark.parametrize("name", CLASSES)


def params_of(device="cuda", dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in SHAPES]


def set_gradients(params, t, scale=1.0):
    torch.manual_seed(1000 + t)
    for p in params:
        p.grad = (torch.randn(p.shape) * scale).to(p.device, p.dtype)


def make(name, device="cuda", home=front, dtype=torch.float32, **options):
    params = params_of(device, dtype)
    return params, getattr(home, name)(params, **CLASSES[name], **options)


def train(params, opt, steps, first=0):
    for t in range(first, first + steps):
        set_gradients(params, t)
        opt.step()


def assert_same_bits(ours, theirs):
    for p, q in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(p.cpu(), q.cpu())
        for key, value in theirs[1].state[q].items():
            found = ours[1].state[p][key].cpu()
            if value.dtype == torch.float64:  # powers that the GPU took may differ in their last bit
                torch.testing.assert_close(found, value.cpu(), rtol=1e-15, atol=0)
            else:
                assert torch.equal(found, value.cpu()), key


@pytest.fixture
def busy():
    """Keeps a stream busy for some milliseconds."""
    source, to = (torch.zeros(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))

    def run():
        for _ in range(20):
            to.copy_(source)

    torch.cuda.synchronize()
    return run


@pytest.fixture
def no_waits():
    """torch raises where it would wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()

    def forbid():
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")

    yield forbid
    torch.cuda.set_sync_debug_mode(before)


# --- numbers ---------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extra", [{}, {"flatten": True}], ids=str)
def test_bits_of_the_cpu(name, dtype, extra):
    there, here = make(name, dtype=dtype, **extra), make(name, "cpu", dtype=dtype, **extra)
    train(*there, 4)
    train(*here, 4)
    assert there[1].state[there[0][0]].get("exp_avg", there[0][0]).is_cuda
    assert_same_bits(there, here)


@pytest.mark.parametrize("name", IN_TORCH)
def test_close_to_foreach_of_torch(name):
    ours, theirs = make(name), make(name, home=torch.optim, foreach=True)
    train(*ours, 5)
    train(*theirs, 5)
    for p, q in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("extra", [{"max_grad_norm": 0.5}, {"zero_grads": True, "max_grad_norm": 0.5}], ids=str)
def test_norms_have_the_bits_of_the_cpu(extra):
    there, here = make("AdamW", **extra), make("AdamW", "cpu", **extra)
    train(*there, 3)
    train(*here, 3)
    assert there[1].last_info == here[1].last_info
    assert_same_bits(there, here)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masters_have_the_bits_of_the_cpu(dtype):
    there, here = (make("AdamW", d, dtype=dtype, master_weights=True) for d in ("cuda", "cpu"))
    train(*there, 4)
    train(*here, 4)
    assert_same_bits(there, here)


def test_channels_last():
    torch.manual_seed(0)
    start, runs = torch.randn(8, 4, 5, 5), []
    for layout in (torch.contiguous_format, torch.channels_last):
        w = torch.nn.Parameter(start.cuda().contiguous(memory_format=layout))
        opt = front.AdamW([w], lr=0.1)
        for t in range(4):
            torch.manual_seed(t)
            w.grad = torch.randn(8, 4, 5, 5).cuda().contiguous(memory_format=layout if t % 2 else torch.channels_last)
            opt.step()
        assert opt.state[w]["exp_avg"].stride() == w.stride()
        runs.append(w)
    assert torch.equal(*runs)


# --- streams and waits -----------------------------------------------------------------------------------------------


def test_a_step_goes_on_torchs_current_stream(busy):
    there, here = make("AdamW"), make("AdamW", "cpu")
    train(*there, 3)
    train(*here, 3)
    set_gradients(here[0], 3)
    set_gradients(there[0], 3)
    new = [p.grad for p in there[0]]
    for p in there[0]:
        p.grad = torch.full_like(p, torch.nan)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        busy()
        for p, g in zip(there[0], new, strict=True):
            p.grad.copy_(g)
        there[1].step()
        assert not stream.query()
    here[1].step()
    stream.synchronize()
    assert_same_bits(there, here)


@every_class
@pytest.mark.parametrize(
    "extra", [{}, {"max_grad_norm": 1.0}, {"zero_grads": True}, {"flatten": True}, {"capturable": True}], ids=str
)
def test_a_step_waits_for_nothing(busy, no_waits, name, extra):
    params, opt = make(name, **extra)
    train(params, opt, 3)
    torch.cuda.synchronize()
    no_waits()
    busy()
    for _ in range(3):
        opt.step()
    assert not torch.cuda.current_stream().query()
    torch.cuda.set_sync_debug_mode("default")
    assert opt.last_info.skipped is False
    if "step" in opt.state[params[0]]:
        assert opt.state[params[0]]["step"].item() == 6


# --- GradScaler ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, front.GradScaler], ids=["torch", "fastopt"])
@pytest.mark.parametrize("bad", [0, 3])
def test_grad_scaler(no_waits, scaler, bad):
    there, here = make("AdamW", max_grad_norm=10.0), make("AdamW", "cpu", max_grad_norm=10.0)
    scale = scaler("cuda", init_scale=1024.0)
    scale.scale(torch.ones((), device="cuda"))
    for t in range(6):
        set_gradients(there[0], t, scale.get_scale())
        if t == bad:
            there[0][1].grad[3] = torch.inf
        else:
            set_gradients(here[0], t)
            here[1].step()
        if t == 5:
            no_waits()
        scale.step(there[1])
        scale.update()
        torch.cuda.set_sync_debug_mode("default")
        if t == bad:
            assert there[1].last_info.skipped
            assert scale.get_scale() == 512.0
            assert bool(there[1].state) == (bad > 0)
    assert_same_bits(there, here)


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


@every_class
def test_a_captured_step_replayed_is_as_many_steps(name):
    there, here = make(name, capturable=True), make(name, "cpu")
    set_gradients(there[0], 0)
    set_gradients(here[0], 0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        there[1].step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there[1].step()
    for t in range(4):
        if t == 2:
            for opt in (there[1], here[1]):
                opt.param_groups[0]["lr"] *= 0.5
            there[1].upload_options()
        graph.replay()
    for t in range(5):
        if t == 3:
            here[1].param_groups[0]["lr"] = there[1].param_groups[0]["lr"]
        elif t == 0:
            here[1].param_groups[0]["lr"] = 2 * there[1].param_groups[0]["lr"]
        here[1].step()
    assert_same_bits(there, here)


def test_a_whole_step_of_training_in_a_graph():
    def run(home, captured, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)).cuda()
        opt = home.AdamW(model.parameters(), lr=1e-2, capturable=True, **options)
        x = torch.randn(32, 64, device="cuda")

        def step():
            opt.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
            opt.step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            opt.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(x).square().mean().backward()
                opt.step()
        for _ in range(5):
            graph.replay() if captured else step()
        return [p.detach().clone() for p in model.parameters()]

    theirs = run(torch.optim, True)
    for captured in (False, True):
        for p, q in zip(run(front, captured, max_grad_norm=float("inf")), theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_graph_reads_a_tensor_lr(no_waits):
    there, here = make("AdamW", capturable=True), make("AdamW", "cpu")
    lr = torch.tensor(0.5, device="cuda")
    there[1].param_groups[0]["lr"], here[1].param_groups[0]["lr"] = lr, 0.5
    train(*there, 1)
    train(*here, 1)
    no_waits()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        there[1].step()
    for rate in (0.25, 0.125):
        lr.fill_(rate)
        graph.replay()
        here[1].param_groups[0]["lr"] = rate
        here[1].step()
    torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(there, here)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("capturable", [False, True])
def test_captures_that_are_refused(capturable):
    params, opt = make("AdamW", capturable=capturable)
    set_gradients(params, 0)
    if not capturable:
        opt.step()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        opt.step()
    opt.step()


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [{}, {"max_grad_norm": 0.5}], ids=str)
def test_parameters_on_cpu_and_gpu(extra):
    mixed, here = params_of("cpu"), params_of("cpu")
    mixed[2:] = [torch.nn.Parameter(p.detach().cuda()) for p in mixed[2:]]
    a, b = (front.AdamW(p, lr=0.1, **extra) for p in (mixed, here))
    train(mixed, a, 4)
    train(here, b, 4)
    for p, q in zip(mixed, here, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-6, atol=1e-7)
    if extra:
        assert a.last_info.grad_norm == pytest.approx(b.last_info.grad_norm, rel=1e-9)
    assert a.state[mixed[-1]]["exp_avg"].is_cuda


@every_class
def test_checkpoints_move(name):
    through = make(name, "cpu")
    train(*through, 4)
    run = make(name, "cpu")
    for first, device in ((0, "cuda"), (2, "cpu")):
        train(*run, 2, first=first)
        following = make(name, device)
        with torch.no_grad():
            for p, q in zip(following[0], run[0], strict=True):
                p.copy_(q)
        following[1].load_state_dict(run[1].state_dict())
        run = following
    assert_same_bits(run, through)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "ASGD"])
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_checkpoints_go_to_torch_and_come_back(name, options):
    ours, theirs = make(name, **options), make(name, home=torch.optim, **options)
    train(*theirs, 3)
    ours[1].load_state_dict(theirs[1].state_dict())
    with torch.no_grad():
        for p, q in zip(ours[0], theirs[0], strict=True):
            p.copy_(q)
    train(*ours, 2, first=3)
    train(*theirs, 2, first=3)
    theirs[1].load_state_dict(ours[1].state_dict())
    with torch.no_grad():
        for p, q in zip(ours[0], theirs[0], strict=True):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
            q.copy_(p)
    train(*ours, 2, first=5)
    train(*theirs, 2, first=5)
    for p, q in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


def test_a_model_that_moves_after_the_optimizer_was_made():
    params, opt = make("AdamW", "cpu")
    here = make("AdamW", "cpu")
    train(params, opt, 2)
    for p in params:
        p.data = p.data.cuda()
    train(params, opt, 2, first=2)
    train(*here, 4)
    assert_same_bits((params, opt), here)


def test_training_with_autograd_and_autocast():
    def run(home, scaler, **options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)).cuda()
        opt, scale = home.AdamW(model.parameters(), lr=1e-2, **options), scaler("cuda", init_scale=64.0)
        for _ in range(20):
            opt.zero_grad()
            x = torch.randn(32, 64, device="cuda")
            with torch.autocast("cuda", dtype=torch.float16):
                loss = model(x).float().square().mean()
            scale.scale(loss).backward()
            scale.step(opt)
            scale.update()
        return [p.detach() for p in model.parameters()]

    theirs = run(torch.optim, torch.amp.GradScaler)
    for ours in (
        run(front, torch.amp.GradScaler),
        run(front, front.GradScaler),
        run(front, front.GradScaler, flatten=True),
    ):
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
