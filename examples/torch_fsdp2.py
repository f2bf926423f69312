"""FSDP2 with LARS: parameters and gradients are split, too; norms of layers and the clipped one are those of the whole.

torchrun --standalone --nproc-per-node 2 examples/torch_fsdp2.py
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from fastopt.torch import LARS


def main() -> None:
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1)).to(device)
    mesh = dist.device_mesh.init_device_mesh(device.type, (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = LARS(model.parameters(), lr=10.0, momentum=0.9, weight_decay=1e-4, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 10.0, total_steps=100, cycle_momentum=False)
    x = torch.randn(512, 64, device=device)[rank::world]
    y = x[:, :8].sum(dim=1, keepdim=True)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()

    total = sum(p.full_tensor().detach().double().sum().item() for p in model.parameters())
    norm = optimizer.last_info.grad_norm  # before clipping; it has the same bits on all processes
    print(f"process {rank}: loss {loss.item():.4f}, norm {norm!r}, parameters {total!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
