"""ShardedOptimizer: the bits of one process on 1 to 4 processes, checkpoints that reshard, and what is refused."""

import pytest
from fresh import python

pytest.importorskip("torch")

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
        assert torch.equal(a.detach().contiguous().view(-1).view(torch.uint8), b.detach().contiguous().view(-1).view(torch.uint8)), (a - b).abs().max()

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
                assert [w.exitcode for w in workers] == [0] * n
        print("done")
"""


def on_processes(body, *worlds):
    assert "done" in python(PROCESSES + body + f"\n    start({', '.join(map(str, worlds))})\n", timeout=300.0)


CASES = {
    "AdamW": "front.AdamW, dict(lr=0.05)",
    "AdamW clipped": "front.AdamW, dict(lr=0.05, max_grad_norm=1.0)",
    "SGD": "front.SGD, dict(lr=0.05)",
    "Lion, EMA": "front.Lion, dict(lr=0.05, ema_decay=0.5, skip_nonfinite=True)",
    "LARS": "front.LARS, dict(lr=0.05, weight_decay=0.1, momentum=0.9)",
    "LAMB clipped": "front.LAMB, dict(lr=0.05, weight_decay=0.1, max_grad_norm=1.0)",
}


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_one_optimizer_on_any_number_of_processes(case):
    body = f"""
    def run(rank, world):
        kind, options = {CASES[case]}
        for dtype, extra in ((torch.float32, {{}}), (torch.bfloat16, dict(master_weights=True))):
            for cap in (0.1, 25):
                own, one = parameters(dtype, seed=rank), parameters(dtype)
                opt = ShardedOptimizer(own, kind, bucket_cap_mb=cap, **options, **extra)
                alone = kind(one, **options, **extra)
                for t in range(3):
                    give(own, t), give(one, t)
                    opt.step(), alone.step()
                    assert opt.last_info == alone.last_info, (opt.last_info, alone.last_info)
                    for p, q in zip(own, one):
                        same(p, q)
                same_states(opt, alone, rank, world - 1)
    """
    on_processes(body, 1, 2, 3, 4)
