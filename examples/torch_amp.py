"""Mixed precision: unscaling, the check for overflow and clipping are part of the step."""

import torch

from fastopt.torch import AdamW, GradScaler


def main() -> float:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    scaler = GradScaler("cpu")
    x = torch.randn(256, 8)
    y = x.sum(dim=1, keepdim=True)
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            prediction = model(x)
        loss = torch.nn.functional.mse_loss(prediction.float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # optimizer.last_info says whether it was skipped, and the norm
        scaler.update()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.4f}")
