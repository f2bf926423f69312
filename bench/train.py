"""``python -m bench train``: train a NumPy network on handwritten digits, or a language model in PyTorch on text."""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import fastopt
from fastopt import schedules

from .case import Shapes
from .cli import Refusal, number, one_of, refuse, writable
from .training import steps, text
from .training.digits import CLASSES, PIXELS, TRAIN, load
from .training.mlp import MLP, History, Recipe, fit

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

# The learning rates are the best of a grid of factors of about 3, by accuracy on 256 images held out of the training
# images (batch size 64, 20 epochs, cosine). The test images took no part.
RECIPES = (
    Recipe("SGD", fastopt.SGD, 0.3),
    Recipe("Momentum", fastopt.SGD, 0.03, {"momentum": 0.9}),
    Recipe("Nesterov", fastopt.SGD, 0.03, {"momentum": 0.9, "nesterov": True}),
    Recipe("Adagrad", fastopt.Adagrad, 0.03),
    Recipe("RMSprop", fastopt.RMSprop, 0.001),
    Recipe("Adam", fastopt.Adam, 0.003),
    Recipe(
        "AdamW", fastopt.AdamW, 0.003, note="Adam, but for weight decay of 0.01,\nwhich hardly shows in so short a run"
    ),
    Recipe("Adadelta", fastopt.Adadelta, 1.0),
    Recipe("Adamax", fastopt.Adamax, 0.01),
    Recipe("NAdam", fastopt.NAdam, 0.003),
    Recipe("RAdam", fastopt.RAdam, 0.01),
    # The noise of small batches drives its step sizes up, so they are bounded; lr, their start, follows no schedule.
    Recipe(
        "Rprop",
        fastopt.Rprop,
        0.001,
        {"step_sizes": (1e-6, 1e-2)},
        "made for whole batches:\nthe noise of mini-batches stalls it",
    ),
    Recipe("ASGD", fastopt.ASGD, 0.3),
    Recipe("Lion", fastopt.Lion, 0.0003),
    Recipe("LARS", fastopt.LARS, 1.0, {"weight_decay": 5e-4}),
    Recipe("LAMB", fastopt.LAMB, 0.003),
)
NAMES = {recipe.name.lower(): recipe for recipe in RECIPES}

SCHEDULES: dict[str, Callable[[float, int], Callable[[int], float]]] = {  # of the learning rate and the number of steps
    "constant": lambda lr, total: schedules.constant(lr),
    "cosine": lambda lr, total: schedules.cosine(lr, total),
    "exponential": lambda lr, total: schedules.exponential(lr, 0.01 ** (1 / total)),  # ends at a hundredth
    "inverse_sqrt": lambda lr, total: schedules.inverse_sqrt(lr, max(total / 10, 1)),
    "one_cycle": lambda lr, total: schedules.one_cycle(lr, total),
    "polynomial": lambda lr, total: schedules.polynomial(lr, total, power=2.0),
    "step": lambda lr, total: schedules.step(lr, max(total // 3, 1)),
}

EPOCHS, SWEEP_EPOCHS = 20, 60
HIDDEN = "256,128"

NEEDS = {"digits": ("matplotlib", "rich", "sklearn"), "text": ("matplotlib", "psutil", "rich", "torch")}
EXTRAS = {"digits": "train", "text": "train,torch"}


@dataclass(frozen=True)
class Settings:
    """The command line, checked."""

    recipes: tuple[Recipe, ...]
    batch_size: int
    epochs: int
    schedule: str
    seed: int
    widths: tuple[int, ...]
    out: Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command ``train``; its arguments stay text here and are checked by `run`, with one line if bad."""
    parser = subparsers.add_parser(
        "train",
        help="train a network on handwritten digits, or a language model on text",
        description=f"Digits: train a NumPy multilayer perceptron on {TRAIN} of scikit-learn's handwritten digits, "
        "test it on the rest. Text: train a small transformer in PyTorch on the sources of Python's standard library "
        "with fastopt.torch and with torch.optim, in turns: are the losses the same, and who is faster. Both print a "
        "table and write figures (PNG).",
        epilog=f"Optimizers: {', '.join(recipe.name for recipe in RECIPES)} (Momentum and Nesterov are SGD with "
        f"momentum 0.9); for text {', '.join(text.RECIPES)}. Schedules: {', '.join(SCHEDULES)}.",
    )
    parser.add_argument("--task", metavar="NAME", default="digits", help="digits or text (default: %(default)s)")
    parser.add_argument("--optimizer", metavar="NAME", help="see below; for digits also all (default: AdamW)")
    parser.add_argument("--lr", metavar="X", help="largest learning rate (default: one that suits the optimizer)")
    parser.add_argument(
        "--batch-size",
        metavar="N",
        help=f"images per step, 1 to {TRAIN}, or sequences (default: 64, for text {text.DEFAULTS['batch_size']})",
    )
    parser.add_argument("--seed", metavar="N", default="0", help="of split, weights and order (default: %(default)s)")
    parser.add_argument("--out", metavar="DIR", default="bench/out", help="folder of figures (default: %(default)s)")
    group = parser.add_argument_group("only with --task digits")
    own = [
        group.add_argument("--epochs", metavar="N", help=f"default: {EPOCHS}, with --sweep {SWEEP_EPOCHS}"),
        group.add_argument("--schedule", metavar="NAME", help="of the learning rate, see below (default: cosine)"),
        group.add_argument("--hidden", metavar="N,N", help=f"hidden widths (default: {HIDDEN})"),
        group.add_argument(
            "--sweep",
            action="store_true",
            help="large batches: SGD with momentum, LARS and Adam with batch sizes from 32 to the whole set, the "
            "learning rate in proportion, warm-up, polynomial decay (arXiv:1708.03888)",
        ),
    ]
    belongs = {"digits": tuple(action.dest for action in own), "text": text.add_options(parser)}
    parser.set_defaults(func=run, belongs=belongs)


def run(args: argparse.Namespace) -> int:
    """Do what the command line says; return the exit status, 2 for bad input."""
    try:
        one_of("task", args.task, NEEDS)
        for task, options in args.belongs.items():
            for option in options if task != args.task else ():
                if getattr(args, option) not in (None, False):
                    raise Refusal(f"--{option} belongs to --task {task}, not to {args.task}.")
        missing = [package for package in NEEDS[args.task] if not _installed(package)]
        if missing:
            command = f'pip install -e ".[{EXTRAS[args.task]}]"'
            raise Refusal(f"needs {missing[0]}, which is not installed; {command} brings it.")
        if args.task == "text":
            return text.run(text.check(args))
        settings = check(args)
    except Refusal as refusal:
        return refuse("train", refusal)
    with one_thread():
        if args.sweep:
            from .training import sweep

            sweep.run(settings.epochs, settings.seed, settings.widths, settings.out)
        else:
            try:
                train(settings)
            except steps.WrongAnswer as error:
                print(f"bench train: WRONG: {error}", file=sys.stderr)
                return 1
    return 0


def _installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return False
    return True


@contextmanager
def one_thread() -> Iterator[None]:
    """Run matrix products and optimizer on one thread each: a network this small is no faster on two.

    And the two would disturb each other: threads of OpenBLAS spin for a while after a product, so that an optimizer
    with as many threads as cores waits for them. Measured on two cores, 50,000 parameters: 4 ms per step, not 0.04.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    threads = fastopt.get_num_threads()
    fastopt.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        fastopt.set_num_threads(threads)


def train(settings: Settings) -> None:
    """Train each optimizer in turn, show progress, then the table and the figures."""
    from rich.console import Console

    from .training import figures

    data = load(settings.seed)
    network = {name: array.shape for name, array in MLP(settings.widths, settings.seed).params.items()}
    histories: list[History] = []
    times: list[list[steps.Times]] = []
    with progress_bar() as progress:
        for recipe in settings.recipes:
            model = MLP(settings.widths, settings.seed)
            total = settings.epochs * math.ceil(TRAIN / settings.batch_size)
            schedule = SCHEDULES[settings.schedule](recipe.lr, total)
            history = History(recipe.name, recipe.lr, recipe.note)
            task = progress.add_task(recipe.name, total=settings.epochs, status="")
            for _ in fit(
                model,
                data,
                recipe.build(model.params),
                schedule,
                history,
                batch_size=settings.batch_size,
                epochs=settings.epochs,
                seed=settings.seed,
            ):
                progress.update(task, advance=1, status=status(history))
            histories.append(history)
            progress.update(task, status=f"{status(history)}, timing its step")
            usual = NAMES[recipe.name.lower()]  # with whatever lr a step takes as long
            times.append([steps.compare(usual, arrays) for arrays in (network, steps.LARGE)])

    console = Console()
    console.print(table(settings, histories, times))
    console.print("\n".join(notes(network, histories)), highlight=False)
    show_paths([*figures.curves(histories, settings.out), figures.bowl(settings.out)])


def table(settings: Settings, histories: Sequence[History], times: Sequence[Sequence[steps.Times]]) -> Table:
    """What came of the training, and how long a step takes beside NumPy, on the network and on the larger model."""
    from rich import box
    from rich.table import Table

    result = Table(
        title=f"{TRAIN} digits, batch size {settings.batch_size}, {settings.epochs} epochs, {settings.schedule} "
        f"schedule, seed {settings.seed}",
        box=box.SIMPLE_HEAD,
        padding=0,  # 80 columns are enough
    )
    result.add_column("\n\noptimizer", no_wrap=True)
    for heading in ("\n\nlr", "\ntrain\nloss", "\ntest\nacc."):
        result.add_column(heading, justify="right", no_wrap=True, min_width=6)
    for arrays, unit in ("network:", "µs"), ("large:", "ms"):
        result.add_column(f"{arrays}\nfastopt\n{unit}", justify="right", no_wrap=True, min_width=10)
        result.add_column(f"\nNumPy\n{unit}", justify="right", no_wrap=True, min_width=6)
        result.add_column("\n\nratio", justify="right", no_wrap=True)
    for h, pair in zip(histories, times, strict=True):
        loss = f"{h.losses[-1]:.4f}" if math.isfinite(h.losses[-1]) else "diverged"
        cells = [h.name, f"{h.lr:g}", loss, f"{h.accuracies[-1]:.1%}"]
        for factor, t in zip((1e6, 1e3), pair, strict=True):
            cells += [f"{factor * t.fastopt:.1f}", f"{factor * t.numpy:.1f}", f"{t.numpy / t.fastopt:.1f}"]
        result.add_row(*cells)
    return result


def notes(network: Shapes, histories: Sequence[History]) -> list[str]:
    """What the table's columns are, and what its rows leave open."""

    def words(arrays: Shapes) -> str:
        return f"{sum(map(math.prod, arrays.values())):,} parameters in {len(arrays)} arrays"

    said = [
        "Times of one step, fastopt's and the same rule written eagerly in NumPy: answers compared, then medians of "
        "samples in turns, one thread each. ratio: NumPy's over fastopt's.",
        f"network: the one trained here, {words(network)}; large: {steps.MODEL}, {words(steps.LARGE)}.",
    ]
    return said + [f"{h.name}: {' '.join(h.note.split())}." for h in histories if h.note]


def status(h: History) -> str:
    """One line of numbers for the progress bar."""
    return f"loss {h.losses[-1]:.4f}  test {h.accuracies[-1]:6.1%}  {h.rate:7,.0f}/s  optimizer {h.share:3.0%}"


def progress_bar() -> Progress:
    """Bar, epochs and a status line per run, on stderr; none where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    text = TextColumn("{task.description:9}"), TextColumn("{task.fields[status]}")
    columns = text[0], BarColumn(12), MofNCompleteColumn(), text[1]
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def show_paths(paths: Iterable[Path]) -> None:
    """Print where the figures are, from the current folder."""
    for path in paths:
        print(os.path.relpath(path))


def check(args: argparse.Namespace) -> Settings:
    """Return the settings of the command line, or raise Refusal. Makes the output folder."""
    if args.sweep:
        for option in ("optimizer", "lr", "batch_size", "schedule"):
            if getattr(args, option) is not None:
                raise Refusal(f"--sweep sets --{option.replace('_', '-')} itself; leave one of the two out.")
    name = (args.optimizer or "AdamW").lower()
    if name != "all" and name not in NAMES:
        known = ", ".join(recipe.name for recipe in RECIPES)
        raise Refusal(f"--optimizer must be all or one of {known}, got {args.optimizer!r}.")
    recipes = RECIPES if name == "all" else (NAMES[name],)
    if args.lr is not None:
        if name == "all":
            raise Refusal("--lr belongs to one optimizer; --optimizer all uses the one that suits each.")
        lr = number(float, "--lr", args.lr)
        if not 0 < lr < math.inf:  # nan is refused too
            raise Refusal(f"--lr must be in (0, inf), got {args.lr}.")
        recipes = (replace(recipes[0], lr=lr),)
    batch_size = number(int, "--batch-size", 64 if args.batch_size is None else args.batch_size)
    if not 1 <= batch_size <= TRAIN:
        raise Refusal(f"--batch-size must be in [1, {TRAIN}], the number of training images, got {batch_size}.")
    default = SWEEP_EPOCHS if args.sweep else EPOCHS
    epochs = number(int, "--epochs", default if args.epochs is None else args.epochs)
    if epochs < 1:
        raise Refusal(f"--epochs must be at least 1, got {epochs}.")
    schedule = "cosine" if args.schedule is None else args.schedule
    if schedule not in SCHEDULES:
        raise Refusal(f"--schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}.")
    seed = number(int, "--seed", args.seed)
    if seed < 0:
        raise Refusal(f"--seed must be at least 0, got {seed}.")
    listed = HIDDEN if args.hidden is None else args.hidden
    hidden = tuple(number(int, "--hidden", width) for width in listed.split(",")) if listed else ()
    if any(width < 1 for width in hidden):
        raise Refusal(f"--hidden must list widths of at least 1, got {listed!r}.")
    return Settings(recipes, batch_size, epochs, schedule, seed, (PIXELS, *hidden, CLASSES), writable(Path(args.out)))
