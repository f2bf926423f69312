"""A multilayer perceptron in NumPy, its parameters and gradients in fastopt.FlatBuffers, and its training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

import fastopt

from .digits import Array, Digits


class Optimizer(Protocol):
    """What the training loop needs of a fastopt optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self, grads: Any) -> object:
        """Update the parameters in place."""


class MLP:
    """Linear layers with ReLU between them, softmax cross-entropy on top.

    Args:
        widths: Inputs, hidden widths, classes, as in (64, 256, 128, 10).
        seed: Of the initial weights, normal with variance 2 / inputs (He et al. 2015, arXiv:1502.01852); biases are 0.
        dtype: float32 or float64.

    Attributes:
        params: FlatBuffer of "0.weight", shape (inputs, outputs), "0.bias", shape (outputs,), "1.weight", ...
        grads: FlatBuffer of the same layout, overwritten by `backward`.
    """

    def __init__(self, widths: Sequence[int], seed: int, dtype: DTypeLike = np.float32) -> None:
        """Draw the weights."""
        rng = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            arrays[f"{i}.weight"] = (rng.standard_normal((inputs, outputs)) * math.sqrt(2 / inputs)).astype(dtype)
            arrays[f"{i}.bias"] = np.zeros(outputs, dtype)
        self.params = fastopt.FlatBuffer.from_arrays(arrays)
        self.grads = self.params.zeros_like()
        self.layers = len(widths) - 1

    def forward(self, x: Array) -> list[Array]:
        """Return the input of every layer, then the logits, shape (rows, classes)."""
        values = [x]
        for i in range(self.layers):
            z = values[-1] @ self.params[f"{i}.weight"]
            z += self.params[f"{i}.bias"]
            values.append(z if i == self.layers - 1 else np.maximum(z, 0, out=z))
        return values

    def backward(self, x: Array, labels: Array) -> float:
        """Write the gradients of the mean cross-entropy straight into ``grads`` and return that loss."""
        *inputs, logits = self.forward(x)
        loss, delta = cross_entropy(logits, labels)
        for i in reversed(range(self.layers)):
            np.matmul(inputs[i].T, delta, out=self.grads[f"{i}.weight"])
            np.sum(delta, axis=0, out=self.grads[f"{i}.bias"])
            if i:
                delta = delta @ self.params[f"{i}.weight"].T
                delta *= inputs[i] > 0  # ReLU let through what is positive after it
        return loss

    def evaluate(self, x: Array, labels: Array) -> tuple[float, float]:
        """Return the mean cross-entropy and the accuracy, 0 to 1."""
        logits = self.forward(x)[-1]
        return cross_entropy(logits, labels)[0], float(np.mean(logits.argmax(axis=1) == labels))


def cross_entropy(logits: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean softmax cross-entropy and its gradient with respect to the logits, (softmax - one-hot) / rows."""
    rows = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)  # exp cannot overflow
    p = np.exp(shifted)
    total = p.sum(axis=1, keepdims=True)
    loss = float(np.mean(np.log(total[:, 0]) - shifted[rows, labels]))
    p /= total
    p[rows, labels] -= 1
    p /= len(labels)
    return loss, p


@dataclass(frozen=True)
class Recipe:
    """An optimizer under the name of the tables and figures, with its learning rate and options.

    ``note`` explains what the figures alone would leave open.
    """

    name: str
    make: type[Optimizer]
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def build(self, params: Any) -> Optimizer:
        """Return a new optimizer of ``params``, which are anything that fastopt takes."""
        return self.make(params, lr=self.lr, **self.options)


@dataclass
class History:
    """What one training run measured.

    Attributes:
        name: As in the table and the figures.
        lr: Largest learning rate.
        note: As in the recipe.
        losses: Mean cross-entropy of all training images after each epoch.
        accuracies: Share of test images that are recognised after each epoch, 0 to 1.
        samples: Images trained on.
        seconds: Time in forward, backward and step; the evaluation after an epoch is not timed.
        step_seconds: Part of it in the optimizer.
    """

    name: str
    lr: float
    note: str = ""
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Share of the time that was spent in the optimizer, 0 to 1."""
        return self.step_seconds / self.seconds if self.seconds else 0.0


def fit(
    model: MLP,
    data: Digits,
    optimizer: Optimizer,
    schedule: Callable[[int], float],
    history: History,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
) -> Iterator[History]:
    """Train in mini-batches drawn anew each epoch, the last may be smaller; yield ``history`` after each epoch.

    Args:
        model: Its parameters are those of ``optimizer``.
        data: Training and test images.
        optimizer: One step is taken per mini-batch, with the learning rate set from the schedule.
        schedule: Learning rate after k steps, as in fastopt.schedules.
        history: Filled and yielded.
        batch_size: Images per step.
        epochs: Passes over the training images. A loss that is not finite ends the run: it stays so.
        seed: Of the order of the images.
    """
    rng = np.random.default_rng(seed)
    count, steps = len(data.train_y), 0
    with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is reported as nan, not as warnings
        for _ in range(epochs):
            order = rng.permutation(count)
            start = perf_counter()
            for rows in (order[i : i + batch_size] for i in range(0, count, batch_size)):
                model.backward(data.train_x[rows], data.train_y[rows])
                before = perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = schedule(steps)
                optimizer.step(model.grads)
                history.step_seconds += perf_counter() - before
                steps += 1
            history.seconds += perf_counter() - start
            history.samples += count
            history.losses.append(model.evaluate(data.train_x, data.train_y)[0])
            history.accuracies.append(model.evaluate(data.test_x, data.test_y)[1])
            yield history
            if not math.isfinite(history.losses[-1]):
                return
