"""Programs on several processes of a gloo group."""

from fresh import python

PROCESSES = """
    import os, sys, tempfile, warnings
    import torch, torch.distributed as dist, torch.multiprocessing as mp
    import fastopt.torch as front
    from fastopt.torch import ShardedOptimizer

    SIZES = [(3,), (200, 300), (), (40_000,), (70, 70), (5,), (2, 3, 50_000), (16_384,), (17,)]

    def parameters(dtype=torch.float32, seed=0, sizes=SIZES):
        g = torch.Generator().manual_seed(seed)
        return [torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for s in sizes]

    def give(params, seed, scale=1.0):
        for p, q in zip(params, parameters(seed=100 + seed, sizes=[p.shape for p in params])):
            p.grad = (q.detach() * scale).to(p.dtype)

    def same(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape, (a.dtype, b.dtype, a.shape, b.shape)
        flat = [x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b)]
        assert torch.equal(*flat), (a - b).abs().max()

    def same_states(opt, alone, rank, root=0):
        full, expected = opt.full_state_dict(root), alone.full_state_dict()
        if rank == root:
            assert full["state"].keys() == expected["state"].keys()
            for i, state in expected["state"].items():
                assert full["state"][i].keys() == state.keys(), (full["state"][i].keys(), state.keys())
                for name, value in state.items():
                    same(full["state"][i][name], value)
        else:
            assert full == {}

    def refusal(action):
        try:
            action()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        raise AssertionError("not refused")

    front.SGD(parameters()), front.AdamW(parameters())  # imports much of torch

    def main(rank, world, path):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
        run(rank, world)
        dist.barrier()
        os._exit(0)

    def start(*worlds):
        context = mp.get_context("fork")
        for n in worlds:
            with tempfile.TemporaryDirectory() as folder:
                workers = [context.Process(target=main, args=(rank, n, folder + "/store")) for rank in range(n)]
                [w.start() for w in workers]
                [w.join() for w in workers]
                assert [w.exitcode for w in workers] == globals().get("EXITS", [0] * n)
        print("done")
"""


def on_processes(body, *worlds, **environment):
    code = PROCESSES + body + f"\n    start({', '.join(map(str, worlds))})\n"
    assert "done" in python(code, timeout=300.0, **environment)


TRAINING = """
    def model():
        torch.manual_seed(0)
        layers = torch.nn.Linear(40, 500), torch.nn.GELU(), torch.nn.Linear(500, 90), torch.nn.Linear(90, 1)
        return torch.nn.Sequential(*layers)

    def loss(net, t, rank, world):
        x = torch.randn(12, 40, generator=torch.Generator().manual_seed(t))
        return net(x[rank * 12 // world : (rank + 1) * 12 // world]).square().mean()

"""
