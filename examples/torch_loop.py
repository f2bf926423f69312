"""A plain training loop: only the import differs from torch.optim."""

import torch

from fastopt.torch import AdamW


def main() -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(256, 8)
    y = x.sum(dim=1, keepdim=True)
    for _ in range(100):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
