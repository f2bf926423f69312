"""The figure of ``bench train --task text``: that the curves are one, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .text import ratio

if TYPE_CHECKING:
    from .text import Settings
    from .text_race import Agreement, Run

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"  # told apart by the colour-blind (Okabe and Ito)
NONE = 1e-8
"""Where gaps of zero are drawn: a logarithmic axis has no place for them."""


def draw(runs: Mapping[str, Run], same: Agreement, settings: Settings, folder: Path) -> Path:
    """Write text.png: loss curves and their difference on the left, time of a step on the right."""
    names = list(runs)
    figure = Figure(figsize=(12, 7), dpi=110, layout="constrained")
    panels: Any = figure.subplots(2, 2, width_ratios=(1.15, 1), height_ratios=(1.15, 1))
    _curves(panels[0, 0], runs, names)
    _gaps(panels[1, 0], same, names)
    _whole(panels[0, 1], runs, names)
    _step(panels[1, 1], runs, names)
    s = settings.shape
    figure.suptitle(
        f"{settings.optimizer} on a transformer of width {s.width}, {s.layers} layers, on the sources of Python: "
        f"{s.steps} steps of {s.batch_size} × {s.context} bytes, threads: {settings.threads}"
    )
    path = folder / "text.png"
    figure.savefig(path)
    return path


def _curves(panel: Axes, runs: Mapping[str, Run], names: list[str]) -> None:
    styles: list[dict[str, Any]] = [dict(color=ORANGE, linewidth=4, alpha=0.55), dict(color=BLUE, linewidth=1.2)]
    for name, style in zip((names[1], names[0]), styles, strict=True):  # the thin line over the thick one
        losses = runs[name].losses
        label = f"{name}: {runs[name].validation:.4f} on held-out files at the end"
        panel.plot(range(1, len(losses) + 1), losses, label=label, **style)
    panel.set(title="Training loss of every step, one run on top of the other", ylabel="nats per byte")
    panel.legend(frameon=False)
    panel.grid(alpha=0.25)


def _gaps(panel: Axes, same: Agreement, names: list[str]) -> None:
    ours, torchs, again = names
    steps = np.arange(1, len(same.gaps) + 1)
    panel.plot(steps, same.allowed, color="black", linewidth=1, linestyle="--", label="largest that rounding explains")
    panel.plot(steps, np.maximum(same.own, NONE), "o", color=GREY, markersize=6, label=f"{again} and {torchs}")
    panel.plot(steps, np.maximum(same.gaps, NONE), "o", color=BLUE, markersize=2.5, label=f"{ours} and {torchs}")
    panel.set_yscale("log")
    panel.set_ylim(NONE / 3, 300 * same.allowed.max())  # room for the legend
    panel.set(title="Difference of the losses", xlabel="step", ylabel=f"nats per byte ({NONE:g}: none)")
    panel.legend(frameon=False, fontsize=9, loc="upper left")
    panel.grid(alpha=0.25)


def _whole(panel: Axes, runs: Mapping[str, Run], names: list[str]) -> None:
    labels = []
    for y, name in enumerate(names):
        step, total = (1e3 * float(np.median(runs[name].timed(part))) for part in ("step", "total"))
        # Medians of parts need not add up to that of the whole: the optimizer's is drawn at its end.
        panel.barh(y, total - step, color=GREY, label="forward, backward and the rest" if y == 0 else None)
        panel.barh(y, step, left=total - step, color=BLUE, label="optimizer" if y == 0 else None)
        _whisker(panel, y, runs[name].timed("total"))
        labels.append(f"{name}\n{total:.1f} ms\noptimizer {step / total:.1%}")
    _label(panel, labels, f"A whole training step: {_ratio(runs, names, 'total')}")
    panel.set_ylim(len(names) + 0.1, -0.6)  # from the top; room for the legend
    panel.legend(frameon=False, ncols=2, loc="lower left")


def _step(panel: Axes, runs: Mapping[str, Run], names: list[str]) -> None:
    labels = []
    for y, name in enumerate(names):
        step = 1e3 * float(np.median(runs[name].timed("step")))
        panel.barh(y, step, color=BLUE)
        _whisker(panel, y, runs[name].timed("step"))
        labels.append(f"{name}\n{step:.2f} ms")
    _label(panel, labels, f"The optimizer's step alone: {_ratio(runs, names, 'step')}")
    panel.set_ylim(len(names) - 0.4, -0.6)


def _ratio(runs: Mapping[str, Run], names: list[str], part: str) -> str:
    r = ratio(runs, names, part)
    low, high = r.likely
    return f"{r.value:.3f} of {names[1]}\n95% interval {low:.3f} to {high:.3f}; bars: medians, lines: quartiles"


def _whisker(panel: Axes, y: int, seconds: NDArray[np.float64]) -> None:
    low, middle, high = 1e3 * np.quantile(seconds, (0.25, 0.5, 0.75))
    panel.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="black", capsize=4, linewidth=1)


def _label(panel: Axes, labels: list[str], title: str) -> None:
    panel.set_yticks(range(len(labels)), labels)
    panel.set_title(title, fontsize=11)
    panel.set(xlabel="milliseconds", xlim=(0, None))
    panel.grid(alpha=0.25, axis="x")
    panel.set_axisbelow(True)
