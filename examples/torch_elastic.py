"""A run that goes on with another number of processes: stop it, or let it crash, and start it with the same folder.

torchrun --standalone --nproc-per-node 2 examples/torch_elastic.py checkpoints --until 50
torchrun --standalone --nproc-per-node 1 examples/torch_elastic.py checkpoints --until 80

With --max-restarts 3 torchrun itself starts all processes again when one dies.

Each process saves its pieces of the optimizer's states, and torch.distributed.checkpoint gives every process of the
next run its own. A batch has the same rows however many processes share it: the loss goes on as if nothing had been.
"""

import argparse
import os
import pathlib
import shutil
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from fastopt.torch import AdamW, ShardedOptimizer

EVERY, ROWS = 20, 384


def newest(folder: pathlib.Path) -> pathlib.Path | None:
    """The last checkpoint that is complete."""
    complete = [path for path in folder.glob("step-*") if not path.suffix]
    return max(complete, key=lambda path: int(path.name.partition("-")[2]), default=None)


def save(state: dict[str, Any], path: pathlib.Path) -> None:
    """Write another folder, and give it its name when it is complete: a crash leaves the last checkpoint as it was."""
    part = path.with_suffix(".part")
    if dist.get_rank() == 0:
        shutil.rmtree(part, ignore_errors=True)  # of a run that was stopped while it wrote
    dist.barrier()
    dcp.save(state, checkpoint_id=part)  # returns when all have written
    if dist.get_rank() == 0:
        part.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--until", type=int, default=80)
    args = parser.parse_args()
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1)).to(device)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = ShardedOptimizer(model.parameters(), AdamW, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)

    def state(step: int) -> dict[str, Any]:
        return {"model": model, "optimizer": optimizer, "schedule": schedule, "step": step}

    begin, checkpoint = 0, newest(args.folder)
    if checkpoint is not None:
        loaded = state(0)
        dcp.load(loaded, checkpoint_id=checkpoint)  # calls load_state_dict of what has one
        begin = loaded["step"]
    if rank == 0:
        print(f"{world} processes begin at step {begin}")
    for step in range(begin, args.until):
        x = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(step))[rank::world].to(device)
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(ddp(x), x[:, :8].sum(dim=1, keepdim=True))
        loss.backward()
        optimizer.step()
        schedule.step()
        dist.all_reduce(mean := loss.detach() / world)
        if rank == 0 and step % 10 == 9:
            print(f"step {step + 1}: loss {mean.item():.6f}")
        if step % EVERY == EVERY - 1:
            save(state(step + 1), args.folder / f"step-{step + 1}")
    total = sum(p.detach().double().sum().item() for p in model.parameters())  # the same on all processes
    print(f"process {rank}: parameters {total!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
