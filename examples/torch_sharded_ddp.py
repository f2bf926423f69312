"""ZeRO-1: DDP averages the gradients, and each process keeps and updates its part of the optimizer's states.

torchrun --standalone --nproc-per-node 2 examples/torch_sharded_ddp.py
"""

import os

import torch
import torch.distributed as dist

from fastopt.torch import AdamW, ShardedOptimizer


def main() -> None:
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1)
    model = torch.nn.Sequential(*layers).to(device)  # before the optimizer is made, which moves parameters into buckets
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = ShardedOptimizer(model.parameters(), AdamW, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    x = torch.randn(512, 64, device=device)[rank::world]
    y = x[:, :8].sum(dim=1, keepdim=True)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()

    parts = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    whole = sum(p.numel() for p in model.parameters())
    total = sum(p.detach().double().sum().item() for p in model.parameters())  # the same on all processes
    print(f"process {rank}: {parts} of {whole} elements, loss {loss.item():.4f}, parameters {total!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
