"""fastopt.torch on a real GPU: what test_cuda*.py, which run on one, too, do not show."""

import pytest
from torch_compare import assert_close, assert_same, copy_into
from torch_problem import CLASSES, every_class, every_torch_class, front, set_gradients, torch, train

pytestmark = pytest.mark.gpu

SHAPES = ((300, 70), (33,), (), (0, 2), (1 << 20,), (8, 3, 5, 5))


def make(name, device="cuda", home=front, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).to(device)) for shape in SHAPES]
    return params, getattr(home, name)(params, **CLASSES[name], **options)


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


@every_torch_class
def test_close_to_foreach_of_torch(name):
    ours, theirs = make(name), make(name, home=torch.optim, foreach=True)
    train(*ours, 5)
    train(*theirs, 5)
    assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-6)


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
    assert_same(there[0], here[0], there[1], here[1])


@every_class
@pytest.mark.parametrize(
    "extra", [{}, {"max_grad_norm": 1.0}, {"zero_grads": True}, {"flatten": True}, {"capturable": True}], ids=str
)
def test_torch_sees_no_wait(busy, no_waits, name, extra):
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


@pytest.fixture
def nccl(tmp_path):
    """An NCCL group of this process alone."""
    dist = torch.distributed
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


SUMMED = {
    "AdamW": {"max_grad_norm": 0.5},
    "Lion": {"skip_nonfinite": True},
    "LARS": {},
    "LAMB": {"max_grad_norm": 0.5},
}


@pytest.mark.parametrize("name", SUMMED)
def test_sums_over_processes_are_taken_without_a_wait(nccl, busy, no_waits, name):
    params, alone = make(name, "cpu", **SUMMED[name])
    own = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    opt = front.ShardedOptimizer(own, getattr(front, name), bucket_cap_mb=1, **CLASSES[name], **SUMMED[name])
    train(own, opt, 3)
    torch.cuda.synchronize()
    no_waits()
    busy()
    for _ in range(3):
        opt.step()
    assert not torch.cuda.current_stream().query()
    torch.cuda.set_sync_debug_mode("default")
    train(params, alone, 3)
    for _ in range(3):
        alone.step()
    for p, q in zip(own, params, strict=True):
        assert torch.equal(p.cpu(), q)
    assert opt.last_info == alone.last_info


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


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
        assert_close(run(front, captured, max_grad_norm=float("inf")), theirs, rtol=1e-4, atol=1e-5)


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "NAdam", "ASGD"])
@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_checkpoints_go_to_torch_and_come_back(name, options):
    ours, theirs = make(name, **options), make(name, home=torch.optim, **options)
    train(*theirs, 3)
    ours[1].load_state_dict(theirs[1].state_dict())
    copy_into(ours[0], theirs[0])
    train(*ours, 2, first=3)
    train(*theirs, 2, first=3)
    theirs[1].load_state_dict(ours[1].state_dict())
    assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-6)
    copy_into(theirs[0], ours[0])
    train(*ours, 2, first=5)
    train(*theirs, 2, first=5)
    assert_close(ours[0], theirs[0], rtol=2e-5, atol=2e-6)


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
        assert_close(ours, theirs, rtol=1e-2, atol=1e-3)
