"""Parameter shapes of real models, derived from their published architecture."""

from __future__ import annotations

Shape = tuple[int, ...]


def resnet50(classes: int = 1000) -> dict[str, Shape]:
    """ResNet-50 (He et al. 2015, arXiv:1512.03385, Table 1): 161 arrays, 25,557,032 parameters."""
    shapes: dict[str, Shape] = {}

    def convolution(name: str, inputs: int, outputs: int, size: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)
        shapes[f"{name}.norm.weight"] = (outputs,)
        shapes[f"{name}.norm.bias"] = (outputs,)

    convolution("stem", 3, 64, 7)
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            convolution(f"{name}.reduce", inputs, width, 1)
            convolution(f"{name}.conv", width, width, 3)
            convolution(f"{name}.expand", width, 4 * width, 1)
            if block == 0:
                convolution(f"{name}.shortcut", inputs, 4 * width, 1)
            inputs = 4 * width
    shapes["classifier.weight"] = (classes, inputs)
    shapes["classifier.bias"] = (classes,)
    return shapes
