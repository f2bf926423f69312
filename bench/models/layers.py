"""What the architectures are built from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import Shape


class Model(NamedTuple):
    """A model and where its numbers were published.

    Attributes:
        source: Paper with its table, and the model repository's config.json where that is what was read.
        architecture: Function of ``config`` that returns the shapes.
        config: The published numbers on which shapes depend, by their published names where they have some.
    """

    source: str
    architecture: Callable[..., Mapping[str, Shape]]
    config: Mapping[str, Any]


class Layers(dict[str, Shape]):
    """Shapes of trainable arrays by name, in the order in which layers are added."""

    def linear(self, name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        """A matrix, rows are outputs."""
        self[f"{name}.weight"] = (outputs, inputs)
        if bias:
            self[f"{name}.bias"] = (outputs,)

    def convolution(self, name: str, inputs: int, outputs: int, size: int, bias: bool = False) -> None:
        """A square convolution; ``inputs`` are those of one group."""
        self[f"{name}.weight"] = (outputs, inputs, size, size)
        if bias:
            self[f"{name}.bias"] = (outputs,)

    def norm(self, name: str, width: int) -> None:
        """Scale and shift of a batch norm or layer norm; running statistics are not trained."""
        self[f"{name}.weight"] = self[f"{name}.bias"] = (width,)

    def convolution_norm(self, name: str, inputs: int, outputs: int, size: int) -> None:
        """A convolution, and the batch norm that makes its bias superfluous."""
        self.convolution(name, inputs, outputs, size)
        self.norm(f"{name}.norm", outputs)
