"""Data parallel training in two processes: python examples/torch_ddp.py"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastopt.torch import AdamW


def train(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=5e-2)
    torch.manual_seed(1 + rank)
    x = torch.randn(256, 8)
    y = x.sum(dim=1, keepdim=True)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    print(f"process {rank}: loss {loss.item():.4f}")
    dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # Spawned processes of torch 2.13 now and then abort while they end, with any optimizer; forked ones do not.
        mp.start_processes(train, (f"{folder}/store",), nprocs=2, start_method="fork")


if __name__ == "__main__":
    main()
