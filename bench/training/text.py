"""``python -m bench train --task text``: a small language model, trained by fastopt.torch and torch.optim at once."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..cli import Refusal, number, writable
from ..stats import quartiles

if TYPE_CHECKING:
    from .text_data import Text
    from .text_race import Agreement, Contender, Run, Shape

OURS, DEFAULT = "fastopt.torch", "torch default"
RECIPES: dict[str, tuple[float, dict[str, Any]]] = {  # customary learning rates and options; nothing was tuned
    "AdamW": (1e-3, {}),
    "Adam": (1e-3, {}),
    "NAdam": (1e-3, {}),
    "RAdam": (1e-3, {}),
    "Adamax": (2e-3, {}),
    "RMSprop": (3e-4, {}),
    "Adagrad": (1e-2, {}),
    "Adadelta": (1.0, {}),
    "SGD": (0.1, {"momentum": 0.9}),
    "ASGD": (0.5, {}),
    "Rprop": (1e-4, {"step_sizes": (1e-6, 1e-3)}),  # made for full batches: its steps are bounded
}
FUSED = ("AdamW", "Adam", "SGD", "Adagrad")
"""What torch has fused on the CPU; the others are compared with foreach=True."""

DEFAULTS = {"batch_size": 8, "steps": 300, "width": 256, "layers": 4, "context": 128}
RESAMPLES = 2000


@dataclass(frozen=True)
class Settings:
    """The command line, checked."""

    optimizer: str
    lr: float
    clip: float | None
    threads: int
    shape: Shape
    out: Path
    json: Path | None


def add_options(parser: argparse.ArgumentParser) -> tuple[str, ...]:
    """Register the options that only this task has; return their names."""
    group = parser.add_argument_group("only with --task text")
    actions = [
        group.add_argument("--steps", metavar="N", help=f"default: {DEFAULTS['steps']}"),
        group.add_argument("--width", metavar="N", help=f"a multiple of 32 (default: {DEFAULTS['width']})"),
        group.add_argument("--layers", metavar="N", help=f"default: {DEFAULTS['layers']}"),
        group.add_argument("--context", metavar="N", help=f"bytes per sequence (default: {DEFAULTS['context']})"),
        group.add_argument("--clip", metavar="X", help="clip gradients by the global norm: fastopt inside its step"),
        group.add_argument("--threads", metavar="N", help="of torch and of fastopt (default: torch's default)"),
        group.add_argument("--json", metavar="PATH", help="write settings, machine and every sample to this file"),
    ]
    return tuple(action.dest for action in actions)


def check(args: argparse.Namespace) -> Settings:
    """Return the settings of the command line, or raise Refusal. Makes the output folder."""
    import torch

    from .text_model import HEAD
    from .text_race import Shape

    names = {name.lower(): name for name in RECIPES}
    name = names.get((args.optimizer or "AdamW").lower())
    if name is None:
        raise Refusal(f"--optimizer must be one of {', '.join(RECIPES)} with --task text, got {args.optimizer!r}.")
    sizes = {option: _count(args, option, default) for option, default in DEFAULTS.items()}
    if sizes["width"] % HEAD:
        raise Refusal(f"--width must be a multiple of {HEAD}, the width of a head, got {sizes['width']}.")
    if sizes["steps"] < 2:
        raise Refusal("--steps must be at least 2: the first one is not counted in times.")
    seed = number(int, "--seed", args.seed)
    if seed < 0:
        raise Refusal(f"--seed must be at least 0, got {seed}.")
    lr, clip = _positive(args, "lr"), _positive(args, "clip")
    return Settings(
        name,
        RECIPES[name][0] if lr is None else lr,
        clip,
        _count(args, "threads", torch.get_num_threads()),
        Shape(**sizes, seed=seed),
        writable(Path(args.out)),
        _file(args.json),
    )


def _count(args: argparse.Namespace, option: str, default: int) -> int:
    text, name = getattr(args, option), "--" + option.replace("_", "-")
    value = number(int, name, default if text is None else text)
    if value < 1:
        raise Refusal(f"{name} must be at least 1, got {value}.")
    return value


def _positive(args: argparse.Namespace, option: str) -> float | None:
    text = getattr(args, option)
    if text is None:
        return None
    value = number(float, f"--{option}", text)
    if not 0 < value < math.inf:  # nan is refused too
        raise Refusal(f"--{option} must be in (0, inf), got {text}.")
    return value


def _file(text: str | None) -> Path | None:
    if text is None:
        return None
    path = Path(text)
    if path.is_dir():
        raise Refusal(f"--json must name a file, got the folder {text!r}.")
    writable(path.parent, "the folder of --json,")
    return path


def contenders(settings: Settings) -> dict[str, Contender]:
    """fastopt's optimizer, torch's fastest of that name, and torch's default, in this order."""
    import torch

    import fastopt.torch

    from .text_race import Contender

    name, (_, options) = settings.optimizer, RECIPES[settings.optimizer]
    ours, theirs = getattr(fastopt.torch, name), getattr(torch.optim, name)
    fast = "fused" if name in FUSED else "foreach"
    options = {"lr": settings.lr, **options}
    inside = {} if settings.clip is None else {"max_grad_norm": settings.clip}
    return {
        OURS: Contender(lambda params: ours(params, **options, **inside)),
        f"torch {fast}": Contender(lambda params: theirs(params, **options, **{fast: True}), settings.clip),
        DEFAULT: Contender(lambda params: theirs(params, **options), settings.clip),
    }


def run(settings: Settings) -> int:
    """Train, print the table and what it says, write the figure; return 1 if the loss curves differ."""
    from rich.console import Console

    from ..train import show_paths
    from . import text_figure, text_race
    from .text_data import load

    try:
        text = load()
    except FileNotFoundError as error:
        raise Refusal(f"{error}.") from None
    with threads(settings.threads):
        runs = _watch(settings, text)
    names = list(runs)
    same = text_race.agreement(*(runs[name].losses for name in names))
    console = Console()
    console.print(about(settings, text), highlight=False)
    console.print(table(settings, runs))
    lines = [curves_line(same, names), *(speed_line(runs, names, part) for part in ("total", "step"))]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if settings.json is not None:
        settings.json.write_text(json.dumps(record(settings, text, runs)) + "\n")
    show_paths([text_figure.draw(runs, same, settings, settings.out)])
    return 0 if same.first_wrong is None else 1


def _watch(settings: Settings, text: Text) -> dict[str, Run]:
    from ..train import progress_bar
    from .text_race import race

    runs: dict[str, Run] = {}
    with progress_bar() as progress:
        task = progress.add_task("text", total=settings.shape.steps, status="")
        for runs in race(contenders(settings), text, settings.shape):
            progress.update(task, advance=1, status=f"loss {runs[OURS].losses[-1]:.4f}")
    return runs


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch and fastopt use as many threads."""
    import torch

    import fastopt

    before = torch.get_num_threads(), fastopt.get_num_threads()
    torch.set_num_threads(count)
    fastopt.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        fastopt.set_num_threads(before[1])


def about(settings: Settings, text: Text) -> str:
    """What was trained on what."""
    from .text_model import Transformer

    s = settings.shape
    parameters = sum(p.numel() for p in Transformer(s.width, s.layers, s.context, s.seed).parameters())
    clip = "" if settings.clip is None else f", gradients clipped to {settings.clip:g}"
    return (
        f"Python's standard library: {len(text.train):,} bytes of {len(text.train_files)} files to train on, "
        f"{len(text.validation):,} bytes of {len(text.validation_files)} files held out.\n"
        f"A transformer of {parameters:,} parameters: {s.layers} layers, width {s.width}, context {s.context}; "
        f"{s.steps} steps of {s.batch_size} sequences, {settings.optimizer}, lr {settings.lr:g}{clip}, seed {s.seed}, "
        f"threads: {settings.threads}."
    )


def table(settings: Settings, runs: Mapping[str, Run]) -> Any:
    """Losses and times of every contender."""
    from rich.box import SIMPLE
    from rich.table import Table

    size = settings.shape.batch_size * settings.shape.context
    result = Table(title="Medians of one training step; all took turns step by step", box=SIMPLE)
    headings = ("", "train\nloss", "held out", "optimizer\nms", "share", "whole step\nms", "bytes/s")
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, run in runs.items():
        step, total = (float(np.median(run.timed(part))) for part in ("step", "total"))
        losses = f"{final_loss(run):.4f}", f"{run.validation:.4f}"
        times = f"{1e3 * step:.2f}", f"{step / total:.1%}", f"{1e3 * total:.1f}", f"{size / total:,.0f}"
        result.add_row(name, *losses, *times)
    return result


def final_loss(run: Run) -> float:
    """Mean training loss of the last tenth of the steps, each on another batch."""
    return float(np.mean(run.losses[-max(len(run.losses) // 10, 1) :]))


def curves_line(same: Agreement, names: list[str]) -> str:
    """Whether ours is torch's loss curve."""
    ours, torchs, again = names
    if same.first_wrong is not None:
        k = same.first_wrong - 1
        return (
            f"WRONG: the loss of {ours} differs from that of {torchs} by {same.gaps[k]:.1e} at step {k + 1}, where "
            f"rounding explains {same.allowed[k]:.1e}."
        )
    k = int(np.argmax(same.gaps))
    return (
        f"same loss curve: {ours} and {torchs} differ by {same.gaps[k]:.1e} at most (step {k + 1}, where rounding "
        f"explains {same.allowed[k]:.1e}); {again} and {torchs} by {same.own.max():.1e}."
    )


class Ratio(NamedTuple):
    """Our time in that of torch: of the medians, where resampled rounds put it, and quartiles of single rounds."""

    value: float
    likely: tuple[float, float]
    quartiles: tuple[float, float]


def ratio(runs: Mapping[str, Run], names: list[str], part: str) -> Ratio:
    """Compare the first two contenders."""
    a, b = (runs[name].timed(part) for name in names[:2])
    rounds = np.random.default_rng(0).integers(0, len(a), (RESAMPLES, len(a)))  # drawn in pairs
    resampled = np.median(a[rounds], axis=1) / np.median(b[rounds], axis=1)
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Ratio(float(np.median(a) / np.median(b)), (float(low), float(high)), quartiles((a / b).tolist()))


def speed_line(runs: Mapping[str, Run], names: list[str], part: str) -> str:
    """Which of the two is faster, and how sure that is."""
    work = {"total": "whole training step", "step": "optimizer's step alone"}[part]
    r = ratio(runs, names, part)
    if r.likely[1] < 1:
        verdict = f"{names[0]} is faster"
    elif r.likely[0] > 1:
        verdict = f"{names[0]} is SLOWER"
    else:
        verdict = "no difference beyond the noise"
    return (
        f"{work}: {verdict}: {r.value:.3f} of the time of {names[1]} (95% interval {r.likely[0]:.3f} to "
        f"{r.likely[1]:.3f}; quartiles of single rounds {r.quartiles[0]:.3f} to {r.quartiles[1]:.3f})."
    )


def record(settings: Settings, text: Text, runs: Mapping[str, Run]) -> dict[str, Any]:
    """Everything that was measured, for a JSON file. Times include the first steps, which the table leaves out."""
    from ..machine import describe
    from .text_race import WARM

    chosen = {"optimizer": settings.optimizer, "lr": settings.lr, "clip": settings.clip, "threads": settings.threads}
    return {
        "task": "text",
        "machine": describe(settings.threads),
        "settings": {**chosen, **asdict(settings.shape), "uncounted_steps": min(WARM, settings.shape.steps // 2)},
        "data": {"train_bytes": len(text.train), "validation_bytes": len(text.validation)},
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
