"""BERT-large's parameter shapes; ResNet-50's are in shapes.py."""

from __future__ import annotations

from ..shapes import Shape


def bert_large(
    hidden: int = 1024,
    layers: int = 24,
    intermediate: int = 4096,
    vocabulary: int = 30522,
    positions: int = 512,
    types: int = 2,
) -> dict[str, Shape]:
    """BERT-large (Devlin et al. 2018, arXiv:1810.04805) with pooler, without a head: 391 arrays, 335,141,888
    parameters.

    The embeddings of tokens are not shared with anything, because there is no head.
    """
    shapes: dict[str, Shape] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        shapes[f"{name}.bias"] = (outputs,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (hidden,)

    for name, rows in (("word", vocabulary), ("position", positions), ("type", types)):
        shapes[f"embeddings.{name}"] = (rows, hidden)
    norm("embeddings.norm")
    for layer in range(layers):
        for name in ("query", "key", "value", "output"):
            linear(f"layer{layer}.{name}", hidden, hidden)
        norm(f"layer{layer}.attention_norm")
        linear(f"layer{layer}.up", hidden, intermediate)
        linear(f"layer{layer}.down", intermediate, hidden)
        norm(f"layer{layer}.norm")
    linear("pooler", hidden, hidden)
    return shapes
