"""fastopt.torch together with DDP, FSDP2, torch.compile and forks; and without torch."""

import pytest
from fresh import python
from torch_problem import TORCH, front, torch

# Before, fully_shard over gloo adds gradients up instead of averaging, and a partial DTensor cannot be made.
from_2_9 = pytest.mark.skipif(TORCH < (2, 9), reason="needs torch 2.9")


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


TWO_PROCESSES = """
    import os, sys, tempfile
    import torch, torch.distributed as dist, torch.multiprocessing as mp
    import fastopt.torch as front

    def main(rank, path):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
        run(rank)
        dist.barrier()
        os._exit(0)  # torch 2.7 now and then hangs where it destroys gloo's groups
"""
START = """
    if __name__ == "__main__":
        context = mp.get_context("fork")
        with tempfile.TemporaryDirectory() as folder:
            workers = [context.Process(target=main, args=(rank, folder + "/store")) for rank in range(2)]
            [w.start() for w in workers]
            [w.join() for w in workers]
            assert [w.exitcode for w in workers] == [0, 0]
        print("done")
"""


@pytest.mark.parametrize(
    "options", ["max_grad_norm=1.0", *(pytest.param(x, marks=pytest.mark.full) for x in ("", "flatten=True"))]
)
def test_ddp_on_two_processes(options):
    body = f"""
    def run(rank):
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
    assert "done" in python(TWO_PROCESSES + body + START)


@from_2_9
def test_fsdp2_shards():
    body = """
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.device_mesh import init_device_mesh

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        def make():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))

        alone, model = make(), make()
        fully_shard(model, mesh=mesh)
        opts = [front.AdamW(m.parameters(), lr=0.05, ema_decay=0.5) for m in (alone, model)]
        for t in range(4):
            torch.manual_seed(t)
            x = torch.randn(6, 5)
            for m, opt in zip((alone, model), opts):
                opt.zero_grad()
                m(x).square().mean().backward()
                opt.step()
        with opts[1].swap_ema():
            for p, q in zip(alone.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(opts[0].state[p]["ema"], q.full_tensor(), rtol=1e-4, atol=1e-5)
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            assert isinstance(q, DTensor)
            torch.testing.assert_close(p, q.full_tensor(), rtol=1e-4, atol=1e-5)
            state = opts[1].state[q]["exp_avg"]
            assert isinstance(state, DTensor) and state.placements == q.placements
            torch.testing.assert_close(opts[0].state[p]["exp_avg"], state.full_tensor(), rtol=1e-4, atol=1e-5)
        saved = opts[1].state_dict()
        other = front.AdamW(model.parameters(), lr=0.05)
        other.load_state_dict(saved)
        x = torch.ones(6, 5)
        for opt in (opts[0], other):
            m = alone if opt is opts[0] else model
            opt.zero_grad()
            m(x).square().mean().backward()
            opt.step()
        for p, q in zip(alone.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q.full_tensor(), rtol=1e-4, atol=1e-5)
    """
    assert "done" in python(TWO_PROCESSES + body + START)


MESH = """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.device_mesh import init_device_mesh

    WHOLE = torch.arange(12.0).view(4, 3)
    OPTIONS = {"max_grad_norm": {"max_grad_norm": 1.0}, "skip_nonfinite": {"skip_nonfinite": True}}

    def place(*placements, grad=WHOLE):
        mesh = init_device_mesh("cpu", (2, 1))
        p = torch.nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, placements))
        p.grad = distribute_tensor(grad, mesh, placements)
        return p

    import fastopt

    @fastopt.rule(("m",), {"lr": 0.5}, terms=lambda p, g, m, h: (m + g, p - g), products=((0, 0), ("p", 1), (1, "g")),
                  ratio=lambda sums, h: sums[0] / (1.0 + sums[0] + abs(sums[1]) + abs(sums[2])))
    def outside(p, g, m, h):
        return p - h.lr * h.ratio * (m + g), m + g

    def step(p, name):
        own = front.optimizer(outside)
        make = {"LARS": front.LARS, "LAMB": front.LAMB, "a rule": own}.get(name, front.SGD)
        opt = make(p if isinstance(p, list) else [p], lr=0.5, **OPTIONS.get(name, {}))
        opt.scaler = front.GradScaler("cpu", init_scale=1.0)
        opt.scaler.scale(torch.ones(()))
        opt.scaler.step(opt) if name == "GradScaler" else opt.step()
        return opt
"""


@from_2_9
def test_what_needs_whole_gradients_is_refused_where_a_process_holds_summands():
    body = """
    def run(rank):
        for name in ("max_grad_norm", "skip_nonfinite", "GradScaler", "LARS"):
            p = place(Partial(), Shard(0))
            before = p.to_local().clone(), p.grad.to_local().clone()
            try:
                step(p, name)
            except NotImplementedError as error:
                assert name in str(error) and "Partial" in str(error), error
            else:
                raise AssertionError(name)
            assert torch.equal(p.to_local(), before[0]) and torch.equal(p.grad.to_local(), before[1])
    """
    assert "done" in python(TWO_PROCESSES + MESH + body + START)


def test_gradients_of_another_placement_are_those_of_the_whole():
    body = """
    def run(rank):
        for first, other in ((Replicate(), Partial()), (Shard(0), Shard(1))):
            for zero in (False, True):
                p = place(first, Replicate())
                p.grad = place(Shard(1), Replicate()).grad
                if other.is_partial():
                    p.grad = DTensor.from_local(WHOLE * rank, p.device_mesh, [other, Replicate()])
                front.SGD([p], lr=0.5, zero_grads=zero).step()
                assert torch.equal(p.full_tensor(), 1 - 0.5 * WHOLE)
                assert bool(p.grad.full_tensor().any()) is not zero
    """
    assert "done" in python(TWO_PROCESSES + MESH + body + START)


WHOLE_STEPS = """
    def run(rank):
        for name in ("max_grad_norm", "LARS", "LAMB", "a rule", "SGD", "GradScaler"):
            for shard in (Shard(0), Shard(1)):
                whole = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(3)]
                parts = [place(shard, Replicate()), place(Replicate(), Replicate()), place(shard, Replicate())]
                for t in range(4):
                    for k, (p, q) in enumerate(zip(whole, parts)):
                        p.grad, q.grad = WHOLE + k + t, place(*q.placements, grad=WHOLE + k + t).grad
                    if t == 1:  # no gradient of an array that is in shards
                        whole[2].grad = parts[2].grad = None
                    opts = [step(p, name) for p in (whole, parts)] if not t else opts
                    [opt.step() for opt in opts if t]
                norms = [None, None]
                dist.all_gather_object(norms, opts[1].last_info.grad_norm)
                if "norm" in name:
                    assert norms[0] == norms[1] and abs(norms[0] / opts[0].last_info.grad_norm - 1) < 1e-12, norms
                for p, q in zip(whole, parts):
                    torch.testing.assert_close(p, q.full_tensor(), rtol=1e-6, atol=0)
"""
ON_ONE_RANK = """
    def run(rank):
        for name in ("max_grad_norm", "LARS", "LAMB", "a rule"):
            parts = [place(Shard(0), Replicate()), place(Replicate(), Replicate()), place(Shard(1), Replicate())]
            opt, grads, sent, calls = step(parts, name), [p.grad for p in parts], dist.all_reduce, []
            dist.all_reduce = lambda part, group: calls.append(part.numel())
            for t in range(4):  # on one process, on the other, nowhere, of one array on each
                before = [p.to_local().clone() for p in parts]
                for k, p in enumerate(parts):
                    p.grad = grads[k] if t == rank or (t == 3 and k == 2 * rank) else None
                opt.step()
                for p, old in zip(parts, before):
                    assert torch.equal(p.to_local(), old) == (p.grad is None), (name, t)
            dist.all_reduce, both = sent, [None, None]
            dist.all_gather_object(both, calls)
            assert both[0] == both[1] and len(calls) == 4, both
"""
SKIPPED = """
    def run(rank):
        bad = torch.where(WHOLE == 10.0, torch.nan, WHOLE)  # the second process has it
        for name in ("skip_nonfinite", "GradScaler"):
            opt = step(p := place(Shard(0), Replicate(), grad=bad), name)
            assert opt.last_info.skipped and torch.equal(p.to_local(), torch.ones(2, 3))
        opt.scaler.update()
        assert opt.scaler.get_scale() == 0.5
"""


@from_2_9
@pytest.mark.parametrize("body", [WHOLE_STEPS, ON_ONE_RANK, SKIPPED], ids=["whole", "nobody waits", "all skip or none"])
def test_steps_of_shards_are_those_of_the_whole(body):
    assert "done" in python(TWO_PROCESSES + MESH + body + START)


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
