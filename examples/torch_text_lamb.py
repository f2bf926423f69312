"""A small transformer learns the source code of Python's library with LAMB, a large batch and clipping, under DDP.

torchrun --standalone --nproc-per-node 2 examples/torch_text_lamb.py

Norms of layers and of gradients are those of the whole, wherever parameters are cut: the run is the same with any
number of processes, but for the rounding of the averages that DDP forms.
"""

import os
import pathlib

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from fastopt.torch import LAMB, ShardedOptimizer

BATCH, CONTEXT, WIDTH, STEPS = 256, 32, 64, 50


class Transformer(torch.nn.Module):
    """From bytes to the logits of the next ones."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = torch.nn.Embedding(256, WIDTH), torch.nn.Embedding(CONTEXT, WIDTH)
        layer = torch.nn.TransformerEncoderLayer(
            WIDTH, nhead=2, dim_feedforward=4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(WIDTH, 256)
        self.register_buffer("mask", torch.nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of shape (sequences, places, 256)."""
        return self.head(self.layers(self.tokens(x) + self.places.weight, mask=self.mask, is_causal=True))


def main() -> None:
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    rank, world = dist.get_rank(), dist.get_world_size()

    files = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    text = torch.frombuffer(bytearray(b"\0".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(Transformer().to(device))
    no_decay = [p for p in model.parameters() if p.ndim < 2]  # biases and norms; LAMB does not adapt these
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}, {"params": no_decay, "weight_decay": 0.0}]
    optimizer = ShardedOptimizer(groups, LAMB, lr=0.03, weight_decay=0.01, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=STEPS, cycle_momentum=False)
    batches = torch.Generator().manual_seed(1)  # all processes draw the same batch, and each takes its part
    for step in range(STEPS):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=batches)[rank::world]
        rows = text[starts[:, None] + torch.arange(CONTEXT + 1)].long().to(device)
        optimizer.zero_grad()
        loss = cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        dist.all_reduce(mean := loss.detach() / world)
        if rank == 0 and (step == 0 or step % 10 == 9):
            print(f"step {step + 1}: {mean.item():.6f} nats per byte, norm {optimizer.last_info.grad_norm:.3f}")
    total = sum(p.detach().double().sum().item() for p in model.parameters())  # the same on all processes
    print(f"process {rank}: parameters {total!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
