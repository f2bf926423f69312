"""ZeRO-2: the optimizer averages the gradients itself, while backward goes on, each to the process that needs it.

torchrun --standalone --nproc-per-node 2 examples/torch_sharded.py

A step adds up the gradients of four batches; only the last backward pass sends them. The model is not wrapped in DDP.
"""

import os

import torch
import torch.distributed as dist

from fastopt.torch import AdamW, ShardedOptimizer

BATCHES = 4


def main() -> None:
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, world = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(rank)  # the optimizer gives all processes the parameters of the first one
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1)).to(device)
    optimizer = ShardedOptimizer(model.parameters(), AdamW, reduce_gradients=True, lr=5e-3)
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(device)[rank::world]
    y = x[:, :8].sum(dim=1, keepdim=True)

    def backward(k: int) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(model(x[k::BATCHES]), y[k::BATCHES]) / BATCHES
        loss.backward()
        return loss.detach()

    for _ in range(100):
        optimizer.zero_grad()  # not the model's: what has been sent is with the optimizer
        with optimizer.no_sync():
            loss = sum(backward(k) for k in range(BATCHES - 1))
        loss += backward(BATCHES - 1)
        optimizer.step()  # to clip, give the optimizer max_grad_norm=: there is no .grad outside no_sync

    total = sum(p.detach().double().sum().item() for p in model.parameters())  # the same on all processes
    print(f"process {rank}: loss {loss.item():.4f}, parameters {total!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
