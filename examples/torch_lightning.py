"""Lightning: fastopt's optimizer and a schedule from configure_optimizers, clipping inside the step, a resumed run."""

import tempfile
from typing import Any

import lightning
import torch

from fastopt.torch import AdamW


class Regression(lightning.LightningModule):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """Return the loss of a batch; Lightning calls backward, clips and steps."""
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.layers(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule."""
        # Trainer(gradient_clip_val=1.0) works too, but not in mixed precision, and reads the gradients once more.
        optimizer = AdamW(self.parameters(), lr=2e-2, max_grad_norm=1.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(epochs: int, folder: str) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(256, 8)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=32, shuffle=True
    )
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(12, folder)
        first.fit(Regression(), data)
        first.save_checkpoint(f"{folder}/half.ckpt")  # the optimizer's and the schedule's state, too
        second = trainer(25, folder)
        second.fit(Regression(), data, ckpt_path=f"{folder}/half.ckpt")
    print(f"loss {second.callback_metrics['loss']:.4f}")


if __name__ == "__main__":
    main()
