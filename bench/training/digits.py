"""Scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels that ship with the package, no download."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]

TRAIN = 1536
"""Images to train on; 261 remain for the test. 1536 = 3 * 512, so that the batch sizes of the sweep divide it."""
PIXELS, CLASSES = 64, 10


class Digits(NamedTuple):
    """Images as rows of 64 standardised pixels, labels 0 to 9."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array


def load(seed: int, dtype: DTypeLike = np.float32) -> Digits:
    """Split the digits into TRAIN images and the rest by a permutation drawn from seed, and standardise them.

    Mean and standard deviation of every pixel come from the training images only; a pixel that never changes there
    is divided by 1.
    """
    # Here, so that other benchmarks run without scikit-learn.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    train, test = order[:TRAIN], order[TRAIN:]
    mean, std = images[train].mean(axis=0), images[train].std(axis=0)
    x = ((images - mean) / np.where(std > 0, std, 1.0)).astype(dtype)
    return Digits(x[train], labels[train], x[test], labels[test])
