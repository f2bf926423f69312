"""Pictures for docs/scale.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from ..page import words
from ..page.charts import LIGHT, ROW, SECONDS, data, decades
from ..page.page import SHARP, VEGA_LITE
from .model import NETWORKS, RANKS, Training
from .tables import OURS, TITLES, Step

BLUE, ORANGE, GREEN, GREY, PURPLE, PALE = "#0072b2", "#d55e00", "#009e73", "#7a818c", "#7a5fd0", "#f3c9a8"
BUCKETS = ("buckets of 25 MiB", "8 buckets")
WIDE = 230  # pixels of one of three charts side by side


def write(steps: Sequence[Step], training: Training, folder: Path) -> list[Path]:
    """Draw all of them, and say which."""
    pictures = {"scale-step.png": measured(steps), "scale-gather.png": gathers(training),
                "scale-hidden.png": hidden(training), "scale-memory.png": memory(training)}  # fmt: skip
    for name, chart in pictures.items():
        spec = {**chart.to_dict(), "padding": 12}
        png = vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, config=LIGHT, scale=SHARP)
        (folder / name).write_bytes(png)
    return [folder / name for name in pictures]


def _heading(text: str) -> alt.TitleParams:
    return alt.TitleParams(text, anchor="start", frame="bounds", fontSize=15, offset=10)


def measured(steps: Sequence[Step]) -> Any:
    """Bars with quartiles, and a mark where the model says."""
    return alt.vconcat(
        *(
            alt.hconcat(*(_bars(group, k == 0) for k, group in enumerate(_by_processes(steps, table)))).properties(
                title=_heading(TITLES[table].partition(" (")[0])
            )
            for table in TITLES
        ),
        spacing=24,
    )


def _by_processes(steps: Sequence[Step], table: str) -> list[list[Step]]:
    chosen = [s for s in steps if s.table == table]
    return [[s for s in chosen if s.processes == n] for n in dict.fromkeys(s.processes for s in chosen)]


def _bars(steps: Sequence[Step], named: bool) -> Any:
    rows: list[dict[str, Any]] = []
    for s in steps:
        low, high = (1e3 * x for x in s.timing.quartiles)
        median, model = 1e3 * s.timing.median, 1e3 * s.predicted
        row = {"who": s.contender, "ms": median, "low": low, "high": high, "model": model}
        rows.append({**row, "label": words.digits(median), "ours": OURS in s.contender})
    most = max(max(row["high"], row["model"]) for row in rows)
    for row in rows:  # numbers keep clear of the mark
        row["end"] = row["high"] if row["model"] - row["high"] > most / 4 else max(row["high"], row["model"])
    y = alt.Y(
        *("who:N",), sort=[s.contender for s in steps], title=None,
        axis=alt.Axis(labels=named, ticks=False, domain=False, labelLimit=320, labelPadding=6),
    )  # fmt: skip
    scale = alt.Scale(domain=[0, 1.25 * most], nice=False)
    x = alt.X("ms:Q", scale=scale, title="ms (line: quartiles; mark: the model)", axis=alt.Axis(tickCount=4))
    base = alt.Chart(data(rows)).encode(y=y)
    bars = base.mark_bar(height=14).encode(
        x=x, color=alt.condition("datum.ours", alt.value(BLUE), alt.value("#b9c0c9"))
    )
    quartiles = base.mark_rule(strokeWidth=1.5).encode(x=alt.X("low:Q"), x2="high:Q")
    model = base.mark_tick(thickness=3, size=18, color=ORANGE).encode(x=alt.X("model:Q"))
    numbers = base.mark_text(align="left", dx=6, fontSize=11).encode(x=alt.X("end:Q"), text="label:N")
    title = f"{steps[0].processes} process" + "es" * (steps[0].processes > 1)
    return alt.layer(bars, quartiles, model, numbers).properties(
        width=WIDE, height=ROW * len(rows), title=alt.TitleParams(title, anchor="start", fontSize=12)
    )


def _ranks() -> alt.X:
    axis = alt.Axis(values=list(RANKS[::3]), format=",d")
    return alt.X("ranks:Q", title="ranks", scale=alt.Scale(type="log", base=2, nice=False), axis=axis)


def _grid(title: str, rows: list[dict[str, Any]], chart: Any) -> Any:
    """A column for each network, a row for each size of buckets."""
    small: dict[str, Any] = {"labelFontSize": 12, "labelColor": "#1c2128", "title": None}
    grid = chart.properties(width=WIDE, height=170).facet(
        data=data(rows),
        row=alt.Row("bucket:N", sort=list(BUCKETS), header=alt.Header(**small)),
        column=alt.Column("network:N", sort=[n.name for n in NETWORKS], header=alt.Header(**small)),
    )
    return grid.properties(title=_heading(title))


def _colours(colours: dict[str, str]) -> alt.Color:
    legend = alt.Legend(title=None, orient="top", labelLimit=320)
    return alt.Color("what:N", scale=alt.Scale(domain=list(colours), range=list(colours.values())), legend=legend)


def _sizes(training: Training) -> dict[str, float]:
    return dict(zip(BUCKETS, (training.bucket, training.nbytes / 8), strict=True))


def gathers(training: Training) -> Any:
    """Seconds of gathering all parameters by each way, and of the update."""
    colours = {"update": GREY, "gather by a ring": ORANGE, "directly": PURPLE, "on two levels": GREEN}
    rows = []
    for bucket, size in _sizes(training).items():
        for network in NETWORKS:
            for ranks in RANKS:
                ways = (network.ring, network.direct, network.two_level)
                count = training.nbytes / size
                seconds = [training.update(ranks), *(count * way(ranks, size) for way in ways)]
                where = {"bucket": bucket, "network": network.name, "ranks": ranks}
                rows += [{**where, "what": w, "s": s} for w, s in zip(colours, seconds, strict=True)]
    low, high = min(row["s"] for row in rows), max(row["s"] for row in rows)
    axis = alt.Axis(values=[x for x in decades(low, high) if low <= x <= high], labelExpr=SECONDS)
    y = alt.Y("s:Q", title=None, scale=alt.Scale(type="log", domain=[low, high], nice=False), axis=axis)
    chart = alt.Chart().mark_line(strokeWidth=2.2).encode(x=_ranks(), y=y, color=_colours(colours))
    return _grid("Predicted: the update of 8 B parameters, and the gather of their 16 GB", rows, chart)


def hidden(training: Training) -> Any:
    """What a step takes after backward, and what backward hides."""
    colours = {"reduction, behind backward": PALE, "reduction, left after it": ORANGE,
               "update, and gather behind it": GREY, "gather, left after it": BLUE}  # fmt: skip
    keys = dict(zip(colours, ("hidden reduction", "reduction", "update", "gather"), strict=True))
    rows = []
    for bucket, size in _sizes(training).items():
        for network in NETWORKS:
            for ranks in RANKS:
                times = training.times(network, ranks, size)
                where = {"bucket": bucket, "network": network.name, "ranks": f"{ranks:,}"}
                rows += [{**where, "what": w, "s": times[key], "order": k} for k, (w, key) in enumerate(keys.items())]
    axis = alt.Axis(labelAngle=0, values=[f"{r:,}" for r in RANKS[::3]])
    x = alt.X("ranks:N", sort=[f"{r:,}" for r in RANKS], title="ranks", axis=axis)
    y = alt.Y("s:Q", title="seconds", axis=alt.Axis(tickCount=5))
    chart = alt.Chart().mark_bar().encode(x=x, y=y, color=_colours(colours), order="order:Q")
    seconds = words.seconds(training.backward)
    title = f"Predicted: where communication hides behind the update, and behind backward (of {seconds})"
    return _grid(title, rows, chart).resolve_scale(y="independent")


def memory(training: Training) -> Any:
    """Bytes per rank by the way of sharding."""
    colours = {"DDP": GREY, "DDP + ShardedOptimizer": BLUE, "FSDP2": GREEN}
    rows = [
        {"ranks": ranks, "what": what, "GB": value / 1e9}
        for ranks in RANKS
        for what, value in training.memory_per_rank(ranks).items()
    ]
    y = alt.Y("GB:Q", title="GB a rank", scale=alt.Scale(zero=True))
    chart = (
        alt.Chart(data(rows)).mark_line(strokeWidth=2.2, point=True).encode(x=_ranks(), y=y, color=_colours(colours))
    )
    title = _heading("Parameters, gradients, masters and states of 8 B parameters")
    return chart.properties(width=420, height=200, title=title)
