"""Models of images, as published for ImageNet's 1000 classes."""

from __future__ import annotations

from .layers import Layers, Model


def resnet(stem: int, widths: list[int], blocks: list[int], classes: int) -> Layers:
    """Residual blocks with a bottleneck; the first of each stage has a convolution in its shortcut."""
    layers = Layers()
    layers.convolution_norm("stem", 3, stem, 7)
    inputs = stem
    for stage, (width, repeats) in enumerate(zip(widths, blocks, strict=True), start=1):
        for block in range(repeats):
            name = f"stage{stage}.{block}"
            layers.convolution_norm(f"{name}.reduce", inputs, width, 1)
            layers.convolution_norm(f"{name}.conv", width, width, 3)
            layers.convolution_norm(f"{name}.expand", width, 4 * width, 1)
            if block == 0:
                layers.convolution_norm(f"{name}.shortcut", inputs, 4 * width, 1)
            inputs = 4 * width
    layers.linear("classifier", inputs, classes)
    return layers


def inverted_residual(
    layers: Layers, name: str, inputs: int, expanded: int, outputs: int, kernel: int, squeezed: int
) -> None:
    """A block that widens, filters each channel alone and narrows; ``squeezed`` 0 is without squeeze and excitation."""
    if expanded != inputs:
        layers.convolution_norm(f"{name}.expand", inputs, expanded, 1)
    layers.convolution_norm(f"{name}.depthwise", 1, expanded, kernel)
    if squeezed:
        layers.convolution(f"{name}.squeeze", expanded, squeezed, 1, bias=True)
        layers.convolution(f"{name}.excite", squeezed, expanded, 1, bias=True)
    layers.convolution_norm(f"{name}.project", expanded, outputs, 1)


def multiple_of_8(channels: int) -> int:
    """The nearest multiple of 8 that is not more than a tenth below, as MobileNet's code rounds."""
    nearest = (channels + 4) // 8 * 8
    return nearest if 10 * nearest >= 9 * channels else nearest + 8


def mobilenet_v3(
    stem: int, blocks: list[tuple[int, int, int, bool]], last: int, classifier: int, classes: int
) -> Layers:
    """Each of ``blocks`` is kernel, expansion, outputs, and whether it has squeeze and excitation."""
    layers = Layers()
    layers.convolution_norm("stem", 3, stem, 3)
    inputs = stem
    for i, (kernel, expanded, outputs, squeeze) in enumerate(blocks):
        squeezed = multiple_of_8(expanded // 4) if squeeze else 0
        inverted_residual(layers, f"block{i}", inputs, expanded, outputs, kernel, squeezed)
        inputs = outputs
    layers.convolution_norm("last", inputs, last, 1)
    layers.linear("classifier.hidden", last, classifier)
    layers.linear("classifier.output", classifier, classes)
    return layers


def efficientnet(stem: int, stages: list[tuple[int, int, int, int]], last: int, classes: int) -> Layers:
    """Each of ``stages`` is expansion, kernel, outputs and blocks; a block squeezes to a quarter of its inputs."""
    layers = Layers()
    layers.convolution_norm("stem", 3, stem, 3)
    inputs = stem
    for stage, (expansion, kernel, outputs, blocks) in enumerate(stages, start=1):
        for block in range(blocks):
            name = f"stage{stage}.{block}"
            inverted_residual(layers, name, inputs, expansion * inputs, outputs, kernel, inputs // 4)
            inputs = outputs
    layers.convolution_norm("last", inputs, last, 1)
    layers.linear("classifier", last, classes)
    return layers


def vit(
    image_size: int,
    patch_size: int,
    num_channels: int,
    hidden_size: int,
    num_hidden_layers: int,
    intermediate_size: int,
    num_labels: int,
) -> Layers:
    """Query, key and value are three matrices as in the authors' code; torchvision and timm have them in one."""
    layers = Layers()
    layers.convolution("patches", num_channels, hidden_size, patch_size, bias=True)
    layers["class"] = (1, 1, hidden_size)
    layers["positions"] = (1, (image_size // patch_size) ** 2 + 1, hidden_size)
    for layer in range(num_hidden_layers):
        layers.norm(f"layer{layer}.attention_norm", hidden_size)
        for name in ("query", "key", "value", "output"):
            layers.linear(f"layer{layer}.{name}", hidden_size, hidden_size)
        layers.norm(f"layer{layer}.norm", hidden_size)
        layers.linear(f"layer{layer}.up", hidden_size, intermediate_size)
        layers.linear(f"layer{layer}.down", intermediate_size, hidden_size)
    layers.norm("norm", hidden_size)
    layers.linear("classifier", hidden_size, num_labels)
    return layers


MODELS = {
    "resnet50": Model(
        "He et al. 2015, arXiv:1512.03385, Table 1, 50-layer",
        resnet,
        {"stem": 64, "widths": [64, 128, 256, 512], "blocks": [3, 4, 6, 3], "classes": 1000},
    ),
    "mobilenet-v3-large": Model(
        "Howard et al. 2019, arXiv:1905.02244, Table 1",
        mobilenet_v3,
        {
            "stem": 16,
            "blocks": [
                (3, 16, 16, False),
                (3, 64, 24, False),
                (3, 72, 24, False),
                (5, 72, 40, True),
                (5, 120, 40, True),
                (5, 120, 40, True),
                (3, 240, 80, False),
                (3, 200, 80, False),
                (3, 184, 80, False),
                (3, 184, 80, False),
                (3, 480, 112, True),
                (3, 672, 112, True),
                (5, 672, 160, True),
                (5, 960, 160, True),
                (5, 960, 160, True),
            ],
            "last": 960,
            "classifier": 1280,
            "classes": 1000,
        },
    ),
    "efficientnet-b0": Model(
        "Tan and Le 2019, arXiv:1905.11946, Table 1; se0.25 in the authors' efficientnet_builder.py",
        efficientnet,
        {
            "stem": 32,
            "stages": [
                (1, 3, 16, 1),
                (6, 3, 24, 2),
                (6, 5, 40, 2),
                (6, 3, 80, 3),
                (6, 5, 112, 3),
                (6, 5, 192, 4),
                (6, 3, 320, 1),
            ],
            "last": 1280,
            "classes": 1000,
        },
    ),
    "vit-b16": Model(
        "Dosovitskiy et al. 2020, arXiv:2010.11929, Table 1; config.json of google/vit-base-patch16-224",
        vit,
        {
            "image_size": 224,
            "patch_size": 16,
            "num_channels": 3,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "intermediate_size": 3072,
            "num_labels": 1000,
        },
    ),
}
