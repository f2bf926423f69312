"""One training run with several optimizers, which take turns step by step: what disturbs one disturbs all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from .text_data import Text, random_windows, spread_windows
from .text_model import Transformer, loss_of

VALIDATION = 64
"""Windows that the loss of the held-out files is taken over."""
WARM = 5
"""First steps that are not counted in times: states are allocated, threads start, kernels are loaded."""
FLOOR, FACTOR = 2e-5, 10.0


@dataclass(frozen=True)
class Shape:
    """Size and length of a run."""

    width: int
    layers: int
    context: int
    batch_size: int
    steps: int
    seed: int


class Contender(NamedTuple):
    """An optimizer, and what else belongs to its step: clipping, where that is not part of the optimizer."""

    make: Callable[[Any], torch.optim.Optimizer]
    clip: float | None = None


@dataclass
class Run:
    """What one optimizer did.

    Attributes:
        losses: Training loss before each step, nats per byte.
        step_seconds: Time of each optimizer step, clipping included.
        total_seconds: Time of each whole training step: zero_grad, forward, backward, optimizer and schedule.
        validation: Loss of the held-out windows at the end.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    total_seconds: list[float] = field(default_factory=list)
    validation: float = math.nan

    def timed(self, part: str) -> NDArray[np.float64]:
        """Seconds of "step", "rest" or "total" of every step that counts."""
        step, total = np.array(self.step_seconds), np.array(self.total_seconds)
        seconds: NDArray[np.float64] = {"step": step, "total": total, "rest": total - step}[part]
        return seconds[min(WARM, len(seconds) // 2) :]


def race(contenders: Mapping[str, Contender], text: Text, shape: Shape) -> Iterator[dict[str, Run]]:
    """Train a copy of one model with each contender, on the same batches; yield what is known after every round.

    Who goes first is drawn anew in each round, so that nobody always finds the caches as the same other left them.
    """
    model = Transformer(shape.width, shape.layers, shape.context, shape.seed)
    models = {name: copy.deepcopy(model) for name in contenders}
    optimizers = {name: contenders[name].make(models[name].parameters()) for name in contenders}
    schedules = {
        name: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: rate(k, shape.steps))
        for name, optimizer in optimizers.items()
    }
    runs = {name: Run() for name in contenders}
    batches, order = np.random.default_rng(shape.seed), np.random.default_rng(shape.seed + 1)
    names = list(contenders)
    for _ in range(shape.steps):
        batch = torch.from_numpy(random_windows(text.train, batches, shape.batch_size, shape.context))
        for name in (names[k] for k in order.permutation(len(names))):
            _train(models[name], optimizers[name], schedules[name], contenders[name].clip, batch, runs[name])
        yield runs
    held_out = torch.from_numpy(spread_windows(text.validation, VALIDATION, shape.context))
    with torch.no_grad():
        for name in names:
            runs[name].validation = loss_of(models[name], held_out).item()


def rate(k: int, steps: int) -> float:
    """Factor on the learning rate of step k: linear warm-up over a tenth of the steps, then a cosine down to 0.1."""
    warmup = max(steps // 10, 1)
    if k < warmup:
        return (k + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min((k - warmup) / max(steps - warmup, 1), 1.0))


def _train(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LambdaLR,
    clip: float | None,
    batch: torch.Tensor,
    run: Run,
) -> None:
    begin = perf_counter()
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    before = perf_counter()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    after = perf_counter()
    schedule.step()
    end = perf_counter()
    run.losses.append(loss.item())
    run.step_seconds.append(after - before)
    run.total_seconds.append(end - begin)


class Agreement(NamedTuple):
    """Whether two loss curves are one.

    Attributes:
        gaps: Absolute difference of the losses before each step.
        own: The same between torch's two implementations.
        allowed: Largest difference that is still rounding.
    """

    gaps: NDArray[np.float64]
    own: NDArray[np.float64]
    allowed: NDArray[np.float64]

    @property
    def first_wrong(self) -> int | None:
        """The first step whose loss is off, from 1."""
        wrong = np.flatnonzero(~(self.gaps <= self.allowed))  # nan is wrong, too
        return int(wrong[0]) + 1 if wrong.size else None


def agreement(ours: Sequence[float], torchs: Sequence[float], again: Sequence[float]) -> Agreement:
    """Compare our losses with torch's, by the measure of torch's losses with another of its implementations.

    Formulas that are equal on paper round differently, and training multiplies the difference, by how much depends on
    model and learning rate. So torch itself says how far two right curves part: we may be FACTOR times as far off as
    its two were at any step so far, and FLOOR (about 40 units in the last place of the first loss) where these agree
    by chance or do the same operations. A wrong formula shows in the first steps, where this allows next to nothing.
    """
    a, b, c = np.array(ours), np.array(torchs), np.array(again)
    own = _gaps(c, b)
    return Agreement(_gaps(a, b), own, FLOOR + FACTOR * np.maximum.accumulate(np.nan_to_num(own, posinf=0.0)))


def _gaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        both = ~np.isfinite(a) & ~np.isfinite(b)  # a run that diverges must do so in both
        gaps: NDArray[np.float64] = np.where(both, 0.0, np.abs(a - b))
    return gaps
