"""What tests of the training benchmarks share."""

import pytest

image = pytest.importorskip("matplotlib.image")
from bench.__main__ import main  # noqa: E402


def command(*arguments):
    """Run ``bench train``; its exit status."""
    return main(["train", *map(str, arguments)])


def assert_picture(path, side=300):
    """A PNG in colour whose pixels differ."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > side
    assert pixels[..., :3].std() > 0.02
