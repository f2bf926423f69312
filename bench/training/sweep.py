"""``python -m bench train --sweep``: large batches, trained by the rule of the LARS paper.

You, Gitman and Ginsburg, Large Batch Training of Convolutional Networks, 2017, arXiv:1708.03888: with the batch size
the learning rate grows in proportion, is warmed up linearly for a few epochs, and then decays polynomially with power
2, over a fixed number of epochs. A batch of everything therefore gets one step per epoch, and a learning rate 48 times
that of a batch of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import fastopt
from fastopt import schedules

from .digits import TRAIN, load
from .mlp import MLP, History, Recipe, fit

BASE = 32
BATCH_SIZES = (32, 64, 128, 256, 512, 768, TRAIN)  # all divide TRAIN, so no step sees a smaller batch
WARMUP_EPOCHS, POWER = 5, 2.0
SEEDS = 5

# One learning rate per optimizer, for a batch of 32. Of a grid of factors of 2, the smallest whose mean accuracy at
# batch sizes 32, 64 and 128 under this very rule is within one standard error of the best, on 256 images held out of
# the training images, 10 seeds. Larger batches and the test images took no part. (The best itself was 2 to 8 times
# larger, near divergence under a rule that multiplies it by up to 48.) Weight decay is the paper's, for all three.
RECIPES = (
    Recipe("SGD with momentum", fastopt.SGD, 0.02, {"momentum": 0.9, "weight_decay": 5e-4}),
    Recipe("LARS", fastopt.LARS, 0.4, {"momentum": 0.9, "weight_decay": 5e-4}),
    Recipe("Adam", fastopt.Adam, 0.001, {"weight_decay": 5e-4}),
)


@dataclass(frozen=True)
class Cell:
    """Test accuracies, 0 to 1, of one optimizer at one batch size, one per seed."""

    name: str
    batch_size: int
    lr: float
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return float(np.mean(self.accuracies))

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return float(np.std(self.accuracies))


def scaled(recipe: Recipe, batch_size: int, epochs: int) -> tuple[Recipe, Callable[[int], float]]:
    """Return the recipe with the learning rate for this batch size, and its schedule."""
    recipe = replace(recipe, lr=recipe.lr * batch_size / BASE)
    per_epoch = TRAIN // batch_size
    warmup = min(WARMUP_EPOCHS, epochs // 2) * per_epoch
    decay = schedules.polynomial(recipe.lr, epochs * per_epoch - warmup, power=POWER)
    # Not from 0, which would waste the first step: of a batch of everything there are only as many as epochs.
    return recipe, schedules.warmup(decay, warmup, start=1 / warmup) if warmup else decay


def measure(
    epochs: int,
    seed: int,
    widths: Sequence[int],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    seeds: int = SEEDS,
    report: Callable[[History], Any] = lambda history: None,
) -> list[Cell]:
    """Train every recipe at every batch size from the same splits and weights, seeds seed, seed + 1, ...

    Calls report after each run.
    """
    cells = []
    for batch_size in batch_sizes:
        for base in RECIPES:
            recipe, schedule = scaled(base, batch_size, epochs)
            accuracies = []
            for s in range(seed, seed + seeds):
                model = MLP(widths, s)
                history = History(recipe.name, recipe.lr)
                optimizer = recipe.build(model.params)
                for _ in fit(
                    model, load(s), optimizer, schedule, history, batch_size=batch_size, epochs=epochs, seed=s
                ):
                    pass
                accuracies.append(history.accuracies[-1])
                report(history)
            cells.append(Cell(recipe.name, batch_size, recipe.lr, tuple(accuracies)))
    return cells


def run(epochs: int, seed: int, widths: Sequence[int], out: Path) -> None:
    """Measure, print the table and what it says, write the figure."""
    from rich.console import Console
    from rich.table import Table

    from ..train import progress_bar, show_paths, status
    from . import figures

    with progress_bar() as progress:
        task = progress.add_task("sweep", total=len(BATCH_SIZES) * len(RECIPES) * SEEDS, status="")

        def report(history: History) -> None:
            progress.update(task, advance=1, status=status(history))

        cells = measure(epochs, seed, widths, report=report)

    table = Table(
        title=f"Test accuracy in %, mean and standard deviation over {SEEDS} seeds,\n"
        f"after {epochs} epochs, {min(WARMUP_EPOCHS, epochs // 2)} of them warm-up"
    )
    table.add_column("batch size", justify="right")
    for recipe in RECIPES:
        table.add_column(f"{recipe.name}\nlr {recipe.lr:g} per {BASE}", justify="right")
    for batch_size in BATCH_SIZES:
        row = [cell for cell in cells if cell.batch_size == batch_size]
        best = max(cell.mean for cell in row)
        texts = [f"{100 * cell.mean:.1f} ± {100 * cell.spread:.1f}" for cell in row]
        bold = [f"[bold]{text}[/bold]" if cell.mean == best else text for cell, text in zip(row, texts, strict=True)]
        table.add_row(str(batch_size), *bold)
    console = Console()
    console.print(table)
    console.print(verdict(cells), highlight=False)
    show_paths([figures.sweep(cells, out)])


def verdict(cells: Sequence[Cell]) -> str:
    """Say how the optimizers rank at the smallest and at the largest batch size, a line each."""
    sizes = [cell.batch_size for cell in cells]
    lines = []
    for size in (min(sizes), max(sizes)):
        ranked = sorted((cell for cell in cells if cell.batch_size == size), key=lambda cell: -cell.mean)
        lines.append(f"Batch of {size}: " + ", ".join(f"{cell.name} {cell.mean:.1%}" for cell in ranked) + ".")
    return "\n".join(lines)
