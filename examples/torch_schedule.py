"""A schedule of torch, param groups, and a checkpoint that torch.optim could load as well."""

import io

import torch

from fastopt.torch import AdamW


def main() -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    biases = [p for p in model.parameters() if p.ndim < 2]
    weights = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": weights}, {"params": biases, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-2, total_steps=100)
    x = torch.randn(256, 8)
    y = x.sum(dim=1, keepdim=True)
    for step in range(100):
        if step == 50:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
