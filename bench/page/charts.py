"""Charts of the families of results, for the page and for the pictures alike: Vega-Lite, written with Altair."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import altair as alt

from ..results import Result
from . import words
from .palette import COLOURS, Palette
from .words import STREAM

Row = dict[str, Any]
Drawing = alt.LayerChart | alt.FacetChart

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"


def theme(text: str, faint: str) -> dict[str, Any]:
    """Vega-Lite's configuration for a background.

    Args:
        text: Colour of words and of the quartiles' lines.
        faint: Colour of the grid.
    """
    words_of = {"labelColor": text, "titleColor": text, "labelFontSize": 11, "titleFontSize": 12}
    return {
        "font": FONT,
        "axis": {**words_of, "titleFontWeight": "normal", "gridColor": faint, "domainColor": text, "tickColor": text},
        "legend": {**words_of, "labelFontSize": 12, "labelLimit": 220},
        "title": {"color": text},
        "text": {"color": text},
        "rule": {"color": text},
        "view": {"stroke": None},
    }


LIGHT = {**theme("#1c2128", "#e3e6ea"), "background": "white"}
DARK = {**theme("#d7dce2", "#343b45"), "background": None}

ROW = 22  # pixels of a bar or of a line of dots
HEIGHT = 300  # pixels of a chart with lines
TOOLTIP = ("case", "contender", "time", "quartiles", "speed", "rounds")
LIMIT = f"datum.label === '{STREAM}' ? 'stream (limit)' : datum.label"
BOLD_OURS = {
    "condition": {"test": f"indexof(datum.label, '{words.OURS}') === 0", "value": "bold"},
    "value": "normal",
}


@dataclass(frozen=True)
class Figure:
    """One or more charts under one heading.

    Attributes:
        name: For links and files.
        title: Heading.
        help: How to read it, in a sentence.
        charts: Side by side on a wide screen, one below another on a narrow one.
        notes: What is not shown, and why.
    """

    name: str
    title: str
    help: str
    charts: list[Drawing]
    notes: list[str] = field(default_factory=list)


def row(result: Result, contender: str, **more: Any) -> Row:
    """What every mark knows: the numbers of the tooltip, and whether the samples lie far apart."""
    timing = result.timings[contender]
    low, high = timing.quartiles
    gigabytes = words.speed(result, contender)
    return {
        "case": result.name,
        "contender": contender,
        "time": words.seconds(timing.median),
        "quartiles": f"{words.seconds(low)} to {words.seconds(high)}",
        "speed": f"{words.digits(gigabytes)} GB/s" if gigabytes else "–",
        "rounds": len(timing.samples),
        "spread": timing.is_spread,
        **more,
    }


def data(rows: Sequence[Row]) -> alt.InlineData:
    """Rows inside the chart's specification."""
    return alt.InlineData(values=list(rows))


def tooltips(*first: str) -> list[alt.Tooltip]:
    """Exact numbers on hovering."""
    return [alt.Tooltip(field=name, type="nominal") for name in (*first, *TOOLTIP)]


def styles(palette: Palette, names: Iterable[str]) -> dict[str, Any]:
    """Scales of colour and symbol for the contenders that a chart has."""
    there = set(names)
    shown = [name for name in palette.names if name in there]
    legend = alt.Legend(title=None, orient="top", symbolSize=90, labelExpr=LIMIT)
    ranges = {
        "color": [palette[name].colour for name in shown],
        "shape": [palette[name].shape for name in shown],
    }
    ranges["fill"] = ranges["color"]
    return {
        channel: {
            "field": "contender",
            "type": "nominal",
            "scale": alt.Scale(domain=shown, range=values),
            "legend": legend,
        }
        for channel, values in ranges.items()
    }


def decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, and 2 and 5 times those where there are few."""
    factors = (1,) if high / low > 300 else (1, 2, 5)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]


def log_axis(values: Sequence[float], label: str) -> dict[str, Any]:
    """Scale and axis for positive values."""
    low, high = min(values), max(values)
    margin = max((high / low) ** 0.04, 1.05)
    low, high = low / margin, high * margin
    ticks = decades(low, high)
    if sum(low <= tick <= high for tick in ticks) < 2:  # two ticks tell the scale
        low = max(tick for tick in ticks if tick <= low)
        high = min(tick for tick in ticks if tick >= high)
    return {
        "scale": alt.Scale(type="log", domain=[low, high], nice=False),
        "axis": alt.Axis(values=ticks, labelExpr=label),
    }


SECONDS = (
    "datum.value >= 1 ? format(datum.value, '~g') + ' s' : "
    "datum.value >= 9.99e-4 ? format(datum.value * 1e3, '~g') + ' ms' : format(datum.value * 1e6, '~g') + ' µs'"
)
PLAIN = "format(datum.value, ',.4~g')"
COUNT = "datum.value < 1e3 ? format(datum.value, 'd') : format(datum.value, '.2~s')"


def lines(rows: Sequence[Row], palette: Palette, x: tuple[str, Any], y: tuple[str, Any], *extra: alt.Chart) -> Drawing:
    """Lines with a symbol and the quartiles of each result; hollow symbols have a large spread.

    Args:
        rows: With "x", "y", "low" and "high".
        palette: Styles.
        x, y: Title, and scale and axis of each.
        extra: Layers behind the lines.
    """
    style = styles(palette, (row["contender"] for row in rows))
    across = alt.X(field="x", type="quantitative", title=x[0], **x[1])
    up = alt.Y(field="y", type="quantitative", title=y[0], **y[1])
    ours_on_top = sorted(rows, key=lambda row: words.is_ours(row["contender"]))
    base = alt.Chart(data(ours_on_top)).encode(x=across)
    line = base.mark_line().encode(
        y=up,
        color=alt.Color(**style["color"]),
        strokeDash=alt.condition(f"datum.contender === '{STREAM}'", alt.value([5, 4]), alt.value([1, 0])),
        strokeWidth=alt.condition(f"indexof(datum.contender, '{words.OURS}') === 0", alt.value(3), alt.value(1.7)),
    )
    errors = base.mark_rule(strokeWidth=1.2).encode(
        y=alt.Y(field="low", type="quantitative"),
        y2=alt.Y2(field="high"),
        color=alt.Color(**style["color"]),
    )
    points = base.mark_point(size=55, strokeWidth=1.5, opacity=1).encode(
        y=up,
        color=alt.Color(**style["color"]),
        fill=alt.Fill(**style["fill"]),
        fillOpacity=alt.condition("datum.spread", alt.value(0), alt.value(1)),
        shape=alt.Shape(**style["shape"]),
        tooltip=tooltips(),
    )
    return alt.layer(*extra, line, errors, points).properties(width="container", height=HEIGHT)


def bars(
    rows: Sequence[Row], palette: Palette, title: str, axis: str, most: float, gutter: float, unit: float | None
) -> Drawing:
    """Bars from zero with quartiles, the exact number beside each; a pale one has a large spread.

    Args:
        rows: With "value", "low", "high" and "label", in the order from top to bottom.
        palette: Styles.
        title: Of the chart.
        axis: Of the horizontal axis.
        most: Largest value of all charts side by side, which share one scale.
        gutter: Pixels for the names of contenders, so that the charts' zeros are below each other.
        unit: Where to draw a line, or None.
    """
    style = styles(palette, (row["contender"] for row in rows))
    names = [row["contender"] for row in rows]
    y = alt.Y(
        field="contender",
        type="nominal",
        sort=names,
        title=None,
        axis=alt.Axis(
            labelFontWeight=BOLD_OURS, domain=False, ticks=False, labelLimit=150, labelPadding=6, minExtent=gutter
        ),
    )
    scale = alt.Scale(domain=[0, most * 1.28], nice=False)  # room for the numbers beside the longest bar
    x = alt.X(field="value", type="quantitative", title=axis, scale=scale, axis=alt.Axis(tickCount=4, format=",.4~g"))
    ends = [{**row, "end": max(row["high"], unit or 0.0)} for row in rows]  # numbers keep clear of the line
    base = alt.Chart(data(ends)).encode(y=y)
    layers = [
        base.mark_bar(height=14, cornerRadiusEnd=2).encode(
            x=x,
            color=alt.Color(**{**style["color"], "legend": None}),
            opacity=alt.condition("datum.spread", alt.value(0.55), alt.value(1)),
            tooltip=tooltips("label"),
        ),
        base.mark_rule(strokeWidth=1.5).encode(x=alt.X(field="low", type="quantitative"), x2=alt.X2(field="high")),
        base.mark_text(align="left", dx=6, fontSize=11).encode(
            x=alt.X(field="end", type="quantitative"), text=alt.Text(field="label", type="nominal")
        ),
    ]
    if unit is not None:
        limit = alt.Chart(data([{"x": unit}])).mark_rule(strokeDash=[3, 3])
        layers.insert(1, limit.encode(x=alt.X(field="x", type="quantitative")))
    heading = alt.TitleParams(title, anchor="start", frame="bounds", fontSize=13, offset=6)
    return alt.layer(*layers).properties(width="container", height=ROW * len(rows), title=heading)


def dots(rows: Sequence[Row], palette: Palette, axis: str) -> Drawing:
    """A line for each label with a dot for each contender, from zero to the stream's speed and beyond.

    Args:
        rows: With "label", "value", "low", "high", in the order from top to bottom.
        palette: Styles.
        axis: Title of the horizontal axis.
    """
    style = styles(palette, (row["contender"] for row in rows))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    most = max(1.0, *(row["high"] for row in rows))
    y = alt.Y(
        field="label",
        type="nominal",
        sort=labels,
        title=None,
        axis=alt.Axis(grid=True, domain=False, ticks=False, labelLimit=150, labelPadding=6),
    )
    scale = alt.Scale(domain=[0, most * 1.16], nice=False)
    ticks = [tick / 5 for tick in range(int(most * 5) + 1)]
    x = alt.X(field="value", type="quantitative", title=axis, scale=scale, axis=alt.Axis(values=ticks, format=".1f"))
    base = alt.Chart(data(rows)).encode(y=y)
    best = alt.Chart(data(_numbers(rows, most * 1.03))).encode(y=y)
    limit = alt.Chart(data([{"x": 1}])).mark_rule(strokeDash=[5, 4], strokeWidth=1.5, color=COLOURS[STREAM])
    layers = [
        limit.encode(x=alt.X(field="x", type="quantitative")),
        base.mark_rule(strokeWidth=2).encode(
            x=alt.X(field="low", type="quantitative"),
            x2=alt.X2(field="high"),
            color=alt.Color(**style["color"]),
        ),
        base.mark_point(size=75, strokeWidth=1.5, opacity=1).encode(
            x=x,
            color=alt.Color(**style["color"]),
            fill=alt.Fill(**style["fill"]),
            fillOpacity=alt.condition("datum.spread", alt.value(0), alt.value(1)),
            shape=alt.Shape(**style["shape"]),
            tooltip=tooltips("label"),
        ),
        best.mark_text(align="left", fontSize=11, fontWeight="bold").encode(
            x=alt.X(field="x", type="quantitative"), text=alt.Text(field="text", type="nominal")
        ),
    ]
    return alt.layer(*layers).properties(width="container", height=ROW * len(labels))


def _numbers(rows: Sequence[Row], x: float) -> list[Row]:
    """The fraction of the first of ours on each line."""
    first: dict[str, Row] = {}
    for found in rows:
        if words.is_ours(found["contender"]):
            first.setdefault(found["label"], found)
    return [{"label": label, "x": x, "text": f"{found['value']:.2f}"} for label, found in first.items()]


def whole(counts: Sequence[int]) -> dict[str, Any]:
    """Axis of whole numbers, linear."""
    return {
        "scale": alt.Scale(domain=[0, max(counts)], nice=False),
        "axis": alt.Axis(values=[0, *counts], format="d", labelOverlap="greedy"),
    }


def from_zero() -> dict[str, Any]:
    """Linear axis from zero."""
    return {"scale": alt.Scale(zero=True), "axis": alt.Axis(format=",.4~g", tickCount=6)}


def ideal(counts: Sequence[int]) -> alt.Chart:
    """The line on which twice as many threads are twice as fast."""
    ends = data([{"x": 0, "y": 0}, {"x": max(counts), "y": max(counts)}])
    line: alt.Chart = alt.Chart(ends).mark_line(strokeDash=[2, 3], strokeWidth=1.5, color=COLOURS[STREAM])
    return line.encode(x=alt.X(field="x", type="quantitative"), y=alt.Y(field="y", type="quantitative"))
