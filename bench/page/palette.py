"""One colour and one symbol for each contender, the same in all charts of a page."""

from __future__ import annotations

from dataclasses import dataclass

from ..results import Record
from .words import STREAM

# Hues of Okabe and Ito, which people with colour-blindness tell apart, of a lightness that stands out from white and
# from the dark page alike. Ours are the blues.
COLOURS = {
    "fastopt": "#0072b2",
    "fastopt.torch": "#2e9bd6",
    "fastopt arrays": "#7a5fd0",
    STREAM: "#7a818c",
    "torch fused": "#d55e00",
    "torch foreach": "#c98a00",
    "torch loop": "#c65a95",
    "torch compile": "#b03a48",
    "optimi": "#009e73",
    "numba": "#5b8c2a",
    "numpy": "#9a7247",
}
SPARE = ("#4c8c8c", "#8f8f20", "#94618e", "#a8574a", "#5f7fa8", "#6f8f6f")
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left")


@dataclass(frozen=True)
class Style:
    """How a contender is drawn."""

    colour: str
    shape: str


class Palette:
    """Styles of all contenders of a record.

    A name with a suffix ("torch fused moving") has the colour of the longest known name that it begins with, and a
    symbol of its own.
    """

    def __init__(self, record: Record) -> None:
        found = dict.fromkeys(name for result in record.results for name in result.timings)
        known = list(COLOURS)
        self.names = sorted(found, key=lambda name: (known.index(base) if (base := self._base(name)) else 99, name))
        self._styles: dict[str, Style] = {}
        spare = 0
        for name in self.names:
            base = self._base(name)
            if base is None:
                colour, position = SPARE[spare % len(SPARE)], len(known) + spare
                spare += 1
            else:
                colour, position = COLOURS[base], known.index(base) + (name != base) * 3
            self._styles[name] = Style(colour, SHAPES[position % len(SHAPES)])

    @staticmethod
    def _base(name: str) -> str | None:
        return max((known for known in COLOURS if name.startswith(known)), key=len, default=None)

    def __getitem__(self, name: str) -> Style:
        return self._styles[name]
