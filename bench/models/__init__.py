"""Shapes of the parameters of real models; ``python -m bench.models.derive`` writes the files."""

from __future__ import annotations

import json
from pathlib import Path

Shape = tuple[int, ...]

MODELS = (
    "resnet50",
    "mobilenet-v3-large",
    "efficientnet-b0",
    "vit-b16",
    "bert-base",
    "bert-large",
    "gpt2",
    "gpt2-xl",
    "llama3-8b-shard",
)


def shapes(name: str) -> dict[str, Shape]:
    """Shape of each trainable array of a model, by name, in the order of the forward pass."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; models are {', '.join(MODELS)}")
    model = json.loads((Path(__file__).parent / f"{name}.json").read_text())
    return {array: tuple(shape) for array, shape in model["shapes"].items()}
