"""The figures of ``bench train``: curves, the stretched bowl, and the sweep over batch sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

import fastopt

from .digits import Array
from .mlp import History, Recipe

if TYPE_CHECKING:
    from .sweep import Cell

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#BBBBBB"  # told apart by the colour-blind (Okabe and Ito)
COLUMNS = 5  # of a figure with one panel per optimizer

START, BOWL_STEPS = (-7.0, 2.0), 30
BOWL = (  # learning rates that show how each one moves, not the fastest ones
    Recipe("SGD", fastopt.SGD, 0.95),
    Recipe("Momentum", fastopt.SGD, 0.1, {"momentum": 0.9}),
    Recipe("Nesterov", fastopt.SGD, 0.1, {"momentum": 0.9, "nesterov": True}),
    Recipe("Adagrad", fastopt.Adagrad, 1.5),
    Recipe("RMSprop", fastopt.RMSprop, 0.1),
    Recipe("Adam", fastopt.Adam, 0.3),
    Recipe("AdamW", fastopt.AdamW, 0.3, note="Adam, but for decay of 0.01"),
    Recipe("Adadelta", fastopt.Adadelta, 200.0),
    Recipe("Adamax", fastopt.Adamax, 0.5),
    Recipe("NAdam", fastopt.NAdam, 0.4),
    Recipe("RAdam", fastopt.RAdam, 1.2),
    Recipe("Rprop", fastopt.Rprop, 0.3),
    Recipe("ASGD", fastopt.ASGD, 0.7),
    Recipe("Lion", fastopt.Lion, 0.2),
    # The point is one array of one dimension, which these leave out otherwise.
    Recipe("LARS", fastopt.LARS, 15.0, {"adapt": True}),
    Recipe("LAMB", fastopt.LAMB, 0.15, {"adapt": True}),
)


def curves(histories: Sequence[History], folder: Path) -> list[Path]:
    """Write loss.png and accuracy.png: one panel per run, in which the other runs are grey."""
    losses, accuracies = [h.losses for h in histories], [h.accuracies for h in histories]
    return [
        _panels(histories, losses, "Training loss after each epoch", "{:.4f}", folder / "loss.png"),
        _panels(histories, accuracies, "Test accuracy after each epoch", "{:.1%}", folder / "accuracy.png"),
    ]


def _panels(histories: Sequence[History], curves: Sequence[Sequence[float]], title: str, last: str, path: Path) -> Path:
    figure, panels = _grid(len(curves))
    lowest, epochs = min(values[-1] for values in curves), max(len(values) for values in curves)
    for panel, history, values in zip(panels, histories, curves, strict=True):
        for theirs in curves:
            if theirs is not values:
                panel.plot(range(1, len(theirs) + 1), theirs, color=GREY, linewidth=0.8)
        panel.plot(range(1, len(values) + 1), values, "o-" if len(values) == 1 else "-", color=BLUE, linewidth=2.2)
        end = f"ends at {last.format(values[-1])}" if math.isfinite(values[-1]) else "diverges"
        panel.set_title(f"{history.name}, lr {history.lr:g}: {end}", fontsize=11)
        _annotate(panel, history.note, 0.05 if last.endswith("%}") else 0.95)  # away from the curve
        panel.grid(alpha=0.25)
        panel.set_xlim(0, epochs + 1)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if last.endswith("%}"):
            panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            # The first epochs of slow runs may start below; the differences between good ones are what is looked for.
            panel.set_ylim(min(0.9, math.floor(20 * lowest) / 20 if math.isfinite(lowest) else 0) - 0.005, 1.005)
        elif any(math.isfinite(value) for values in curves for value in values):  # nothing has no logarithm
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.supxlabel("epoch")
    figure.suptitle(title + (", every optimizer against the others (grey)" if len(curves) > 1 else ""))
    return _save(figure, path)


def bowl(folder: Path) -> Path:
    """Write bowl.png: the path of every optimizer on f = x^2 / 20 + y^2 from the same start."""
    figure, panels = _grid(len(BOWL), panel_height=1.5)
    x, y = np.meshgrid(np.linspace(-8, 8, 161), np.linspace(-3, 3, 121))
    levels = np.linspace(0.4, 3.6, 9) ** 2
    for panel, recipe in zip(panels, BOWL, strict=True):
        path = descend(recipe)
        panel.contour(x, y, x**2 / 20 + y**2, levels=levels, cmap="Blues_r", vmax=1.5 * levels[-1], linewidths=0.9)
        panel.plot(0, 0, "*", color=GREEN, markersize=15)
        panel.plot(*path.T, "-o", color="black", markersize=3, linewidth=1.2)
        panel.plot(*START, "s", color=ORANGE, markersize=7)
        panel.set(xlim=(-8, 8), ylim=(-3, 3), xticks=(-5, 0, 5), yticks=(-2, 0, 2), aspect="equal")
        f = path[-1, 0] ** 2 / 20 + path[-1, 1] ** 2
        panel.set_title(f"{recipe.name}, lr {recipe.lr:g}: f = {f:.1g}", fontsize=11)
        _annotate(panel, recipe.note)
    figure.supxlabel("x")
    figure.supylabel("y")
    figure.suptitle(
        f"Down the stretched bowl f = x²/20 + y²: {BOWL_STEPS} steps from the square to the star, and the f reached"
    )
    return _save(figure, folder / "bowl.png")


def descend(recipe: Recipe, steps: int = BOWL_STEPS) -> Array:
    """Return the path of one optimizer down the bowl, shape (steps + 1, 2)."""
    point = np.array(START)
    optimizer = recipe.build({"point": point})
    path = [point.copy()]
    for _ in range(steps):
        optimizer.step({"point": point * (0.1, 2.0)})
        path.append(point.copy())
    return np.array(path)


def sweep(cells: Sequence[Cell], folder: Path) -> Path:
    """Write sweep.png: mean test accuracy and its standard deviation against the batch size."""
    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(cell.name for cell in cells))
    batch_sizes = sorted({cell.batch_size for cell in cells})
    for i, (name, color, marker) in enumerate(zip(names, (BLUE, ORANGE, GREEN), "os^", strict=True)):
        row = [cell for cell in cells if cell.name == name]
        x = [cell.batch_size * 2 ** ((i - 1) * 0.06) for cell in row]  # side by side, to tell the bars apart
        errors = [max(1 - cell.mean, 1e-3) for cell in row]
        # On a logarithmic axis of errors a bar must end above 0.
        bars = np.array([[min(cell.spread, 0.9 * e), cell.spread] for cell, e in zip(row, errors, strict=True)]).T
        panel.errorbar(x, errors, bars, color=color, marker=marker, markersize=7, linewidth=2, capsize=3, label=name)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(batch_sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels([str(b) for b in batch_sizes])
    panel.set_yscale("log")
    panel.invert_yaxis()
    ticks = [0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 0.9]
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.set_yticklabels([f"{100 * (1 - e):g}%" for e in ticks])
    panel.grid(alpha=0.25)
    panel.set_xlabel("batch size (learning rate in proportion)")
    panel.set_ylabel("test accuracy (log scale of the error)")
    seeds = len(cells[0].accuracies)
    panel.legend(loc="lower left", frameon=False, alignment="left", title=f"mean and standard deviation, {seeds} seeds")
    largest = [cell for cell in cells if cell.batch_size == batch_sizes[-1]]
    panel.set_title(
        f"All {batch_sizes[-1]} images in one batch: " + ", ".join(f"{cell.name} {cell.mean:.1%}" for cell in largest),
        fontsize=11,
    )
    return _save(figure, folder / "sweep.png")


def _grid(count: int, panel_height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """Return a figure with count panels that share their axes, in rows of up to COLUMNS."""
    rows = math.ceil(count / COLUMNS)
    columns = math.ceil(count / rows)  # no row has many fewer than the others
    size = (3.2 * columns, panel_height * rows + 0.8) if count > 1 else (6.5, 4.2)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels: Any = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel in panels.flat[count:]:
        panel.set_visible(False)
    return figure, list(panels.flat[:count])


def _annotate(panel: Axes, note: str, y: float = 0.95) -> None:
    """Put a note at the right of a panel, at a height between 0 and 1."""
    if note:
        white = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2}
        edge: Any = "top" if y > 0.5 else "bottom"
        panel.text(
            0.98, y, note, transform=panel.transAxes, ha="right", va=edge, fontsize=9, style="italic", bbox=white
        )


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
