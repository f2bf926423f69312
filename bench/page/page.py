"""Puts the page together, and draws the same charts as pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert

from ..results import Record
from . import charts, summary, tables, words
from .charts import Figure
from .figures import figures
from .losses import compare
from .palette import Palette
from .words import measured

HERE = Path(__file__).parent
VEGA_LITE = alt.SCHEMA_VERSION.rpartition(".")[0]
"""Altair writes for this version, so the page and the pictures run this one."""

PICTURES = {
    "models": ("bench-models.png", "A step of AdamW on the shapes of real models"),
    "sizes": ("bench-bandwidth.png", "A step of Adam on one float32 array: higher is faster"),
    "arrays": ("bench-arrays.png", "A step of Adam on the same elements in ever more arrays: lower is faster"),
}
"""File and title by the figure's name."""
WIDTH = 640  # pixels of a picture's axes
COLUMNS = 2
SHARP = 2  # pixels of the picture to a pixel of the chart


def write_page(record: Record, path: Path) -> None:
    """Write one HTML file that holds everything: charts, scripts, tables."""
    shown = measured(record)
    drawn = figures(shown, Palette(shown))
    comparison = compare(shown)
    specs = {f"{figure.name}-{k}": chart.to_dict() for figure in drawn for k, chart in enumerate(figure.charts)}
    for figure in drawn:
        for k in range(len(figure.charts)):
            specs[f"{figure.name}-{k}"]["description"] = f"{figure.title}. {figure.help}"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page = environment.get_template("template.html").render(
        style=(HERE / "style.css").read_text(),
        script=(HERE / "page.js").read_text(),
        bundle=_script(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)),
        data=_json({"specs": specs, "light": charts.LIGHT, "dark": charts.DARK}),
        title=summary.title(shown),
        summary=summary.sentences(shown, comparison),
        figures=drawn,
        comparison=comparison,
        tables=tables.Tables(shown),
        machine=tables.machine(shown),
        words=words,
        verdict_text=tables.verdict_text,
    )
    path.write_text(page, encoding="utf-8")


def write_pictures(record: Record, folder: Path) -> list[Path]:
    """Draw the pictures of the README that the record has data for, and say which."""
    shown = measured(record)
    written = []
    for figure in figures(shown, Palette(shown)):
        if figure.name in PICTURES and figure.charts:
            file, title = PICTURES[figure.name]
            path = folder / file
            path.write_bytes(_picture(figure, title))
            written.append(path)
    return written


def _picture(figure: Figure, title: str) -> bytes:
    made: Any = figure.charts[0].properties(width=WIDTH)
    if len(figure.charts) > 1:
        each = [chart.properties(width=WIDTH / COLUMNS - 60) for chart in figure.charts]
        made = alt.concat(*each, columns=COLUMNS)
    heading = alt.TitleParams(title, anchor="start", frame="bounds", fontSize=15, offset=12)
    spec = {**made.properties(title=heading).to_dict(), "padding": 12}
    png: bytes = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, config=charts.LIGHT, scale=SHARP)
    return png


def _json(value: object) -> str:
    """JSON that cannot end the script element that holds it: what was measured is somebody else's text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _script(text: str) -> str:
    """The same for a script, where these characters are only found in strings."""
    return text.replace("</script", "<\\/script")
