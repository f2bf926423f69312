"""A rule of one's own: momentum whose step is as long as the parameter is, times lr, for each tensor."""

import math

import torch

import fastopt.torch


def terms(p, g, m, h):
    return (h.momentum * m + g,)


def ratio(sums, h):
    return math.sqrt(sums[0] / sums[1]) if sums[0] > 0.0 and sums[1] > 0.0 else 1.0


@fastopt.rule(
    ("m",),
    {"lr": 1e-2, "momentum": 0.9},
    terms=terms,
    products=(("p", "p"), (0, 0)),
    ratio=ratio,
    ranges={"momentum": "[0, 1)"},
)
def normed(p, g, m, h):
    m = h.momentum * m + g
    return p - h.lr * h.ratio * m, m


def main() -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = fastopt.torch.optimizer(normed)(model.parameters(), lr=2e-2, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
    x = torch.randn(256, 8)
    y = x.sum(dim=1, keepdim=True)
    for _ in range(200):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
