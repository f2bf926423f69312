"""fastopt.torch together with DDP, torch.compile and forks; and without torch."""

import pytest
from fresh import python
from processes import on_processes
from torch_problem import front, torch


def test_without_torch_the_error_names_the_extra():
    program = """
    import sys
    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name == "torch":
                raise ModuleNotFoundError("No module named 'torch'", name="torch")
    sys.meta_path.insert(0, Nothing())
    try:
        import fastopt.torch
    except ImportError as error:
        print(error)
    """
    assert "pip install torch" in python(program)


@pytest.mark.parametrize(
    "options", ["max_grad_norm=1.0", *(pytest.param(x, marks=pytest.mark.full) for x in ("", "flatten=True"))]
)
def test_ddp_on_two_processes(options):
    body = f"""
    def run(rank, world):
        def make():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

        torch.manual_seed(rank)
        data = torch.randn(5, 6, 4)
        everything = [torch.empty_like(data) for _ in range(2)]
        dist.all_gather(everything, data)
        alone = make()
        whole = front.AdamW(alone.parameters(), lr=0.05, {options})
        inner = make()
        opt = front.AdamW(inner.parameters(), lr=0.05, {options})
        model = torch.nn.parallel.DistributedDataParallel(inner)
        for t in range(5):
            opt.zero_grad()
            model(data[t]).square().mean().backward()
            opt.step()
            whole.zero_grad()
            alone(torch.cat([x[t] for x in everything])).square().mean().backward()
            whole.step()
        for p, q in zip(inner.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both)
    """
    on_processes(body, 2)


def test_a_compiled_step_falls_back_to_the_ordinary_one():
    torch._dynamo.reset()
    w, v = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    a, b = front.AdamW([w], lr=0.1), front.AdamW([v], lr=0.1)

    @torch.compile(backend="eager")
    def train():
        (w * torch.arange(3.0)).sum().backward()
        a.step()
        a.zero_grad()

    for _ in range(3):
        train()
        v.grad = torch.arange(3.0)
        b.step()
    assert torch.equal(w, v)


def test_a_compiled_model_trains():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    compiled = torch.compile(model, backend="aot_eager")
    opt = front.AdamW(model.parameters(), lr=0.05)
    x, losses = torch.randn(16, 4), []
    for _ in range(20):
        opt.zero_grad()
        loss = (compiled(x) - 1.0).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
