"""Which charts a record gives: a figure for each family of results."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable

from ..results import Record, Result
from . import charts, words
from .charts import Figure, Row, row
from .palette import Palette
from .words import STREAM, YARDSTICKS, elements, is_ours, ratio

FRONT = "fastopt.torch"
"""What a model in PyTorch would use, and other contenders are compared with."""

SPREAD = "A hollow symbol marks samples whose quartiles lie more than 10 % of the median apart."
PALE = "A pale bar marks samples whose quartiles lie more than 10 % of the median apart."


def figures(record: Record, palette: Palette) -> list[Figure]:
    """All figures that the record has data for, in the page's order."""
    makers: tuple[Callable[[Record, Palette], Figure | None], ...] = (
        models,
        sizes,
        arrays,
        threads,
        rules,
        dtypes,
        options,
        startup,
    )
    return [figure for make in makers if (figure := make(record, palette))]


def models(record: Record, palette: Palette) -> Figure | None:
    """How many times as long as ours others take on real models' shapes."""
    groups: list[tuple[str, list[Row]]] = []
    notes = []
    for result in record.family("models"):
        base = _ours(result)
        if base is None:
            notes.append(f"{result.model or result.name} is not drawn: no contender of fastopt was measured.")
            continue
        rows = []
        for name in _order(result, base):
            times = ratio(result, name, base)
            if times:
                values = {"value": times.median, "low": times.low, "high": times.high}
                rows.append(row(result, name, **values, label=f"{words.digits(times.median)} ×"))
        arrays = words.plural(result.arrays, "array")
        groups.append((f"{result.model or result.name}: {elements(result.elements)} in {arrays}", rows))
    if not groups and not notes:
        return None
    most, gutter = _most(groups), _gutter(groups)
    axis = "time ÷ fastopt's (longer is slower)"
    return Figure(
        "models",
        "Real models",
        "Each bar tells how many times as long as fastopt a step takes: longer is slower, and a bar that ends left of "
        f"the dotted line would be faster than fastopt. Black lines span the quartiles. {PALE}",
        [charts.bars(rows, palette, title, axis, most, gutter, 1.0) for title, rows in groups if rows],
        notes,
    )


def sizes(record: Record, palette: Palette) -> Figure | None:
    """GB/s against elements."""
    rows = []
    for result in record.family("sizes"):
        for name, timing in result.timings.items():
            speed = words.speed(result, name)
            if speed:
                low, high = (result.bytes / seconds / 1e9 for seconds in reversed(timing.quartiles))
                rows.append(row(result, name, x=result.elements, y=speed, low=low, high=high))
    if not rows:
        return None
    across = charts.log_axis([row["x"] for row in rows], charts.COUNT)
    across["axis"].values = sorted({row["x"] for row in rows})
    up = charts.log_axis([row[key] for row in rows for key in ("low", "high")], charts.PLAIN)
    cold = any(result.copies > 1 for result in record.family("sizes"))
    where = "go round among copies that exceed the cache together" if cold else "are in cache"
    chart = charts.lines(rows, palette, ("elements of the one array", across), ("GB/s that the rule must move", up))
    return Figure(
        "sizes",
        "Bandwidth by size",
        "Higher is faster: the bytes that the rule must read and write, divided by the median time; small arrays "
        f"{where}. The dashed line is the machine's own limit, a C loop with the same reads and writes and hardly any "
        f"arithmetic. Both axes are logarithmic. {SPREAD}",
        [chart],
    )


def arrays(record: Record, palette: Palette) -> Figure | None:
    """Time of a step against the number of arrays."""
    results = record.family("arrays")
    rows = []
    for result in results:
        for name, timing in result.timings.items():
            low, high = timing.quartiles
            if low > 0:
                rows.append(row(result, name, x=result.arrays, y=timing.median, low=low, high=high))
    if not rows:
        return None
    across = charts.log_axis([row["x"] for row in rows], charts.COUNT)
    across["axis"].values = sorted({row["x"] for row in rows})
    up = charts.log_axis([row[key] for row in rows for key in ("low", "high")], charts.SECONDS)
    chart = charts.lines(rows, palette, ("number of arrays", across), ("time of a step", up))
    total = ", ".join(dict.fromkeys(elements(result.elements) for result in results))
    return Figure(
        "arrays",
        "Many arrays",
        f"Lower is faster: the same {total} elements cut into ever more arrays, so that whatever a step does once for "
        f"each array shows. Both axes are logarithmic. {SPREAD}",
        [chart],
    )


def threads(record: Record, palette: Palette) -> Figure | None:
    """Speed against the number of threads."""
    results = sorted(record.family("threads"), key=lambda result: result.threads)
    rates: list[Row] = []
    ups: list[Row] = []
    fewest: dict[str, tuple[int, float]] = {}
    for result in results:
        for name, timing in result.timings.items():
            low, high = timing.quartiles
            speed = words.speed(result, name)
            if not speed or low <= 0:
                continue
            start, rate = fewest.setdefault(name, (result.threads, speed))
            speeds = (speed, result.bytes / high / 1e9, result.bytes / low / 1e9)
            keys = ("y", "low", "high")
            rates.append(row(result, name, x=result.threads, **dict(zip(keys, speeds, strict=True))))
            relative = (start * value / rate for value in speeds)
            ups.append(row(result, name, x=result.threads, **dict(zip(keys, relative, strict=True))))
    if not rates:
        return None
    counts = sorted({row["x"] for row in rates})
    least = min(start for start, _ in fewest.values())
    made = [charts.lines(rates, palette, ("threads", charts.whole(counts)), ("GB/s", charts.from_zero()))]
    help_text = "Gigabytes per second that the rule must move."
    notes = []
    if len(counts) > 1:
        ideal = charts.ideal(counts)
        axes = ("threads", charts.whole(counts)), ("speed, one thread's = 1", charts.from_zero())
        made.append(charts.lines(ups, palette, *axes, ideal))
        help_text = (
            "First the gigabytes per second that the rule must move, then the same relative to one thread; the dotted "
            "line would be as many times the speed as there are threads. Where the stream bends, memory is the limit."
        )
        if least > 1:
            notes.append(f"One thread was not measured: {least} threads count as {least} times one.")
    return Figure("threads", "Threads", f"{help_text} {SPREAD}", made, notes)


def rules(record: Record, palette: Palette) -> Figure | None:
    """Every optimizer's fraction of the stream's speed."""
    results = record.family("rules")
    named = Counter(result.optimizer for result in results)

    def label(result: Result) -> str:
        name = result.optimizer if named[result.optimizer] == 1 else result.name
        return f"{name} ({result.bytes / result.elements:.0f} B)" if result.elements else name

    return _fractions(
        "rules",
        "Every optimizer",
        "Each dot tells a speed as a fraction of the stream's, the dashed line, for the bytes per element that the "
        "rule must move (in brackets); farther right is faster.",
        results,
        label,
        palette,
    )


def dtypes(record: Record, palette: Palette) -> Figure | None:
    """Every dtype's fraction of the stream's speed."""
    results = record.family("dtypes")
    optimizers = {result.optimizer for result in results}

    def label(result: Result) -> str:
        return result.dtype if len(optimizers) == 1 else f"{result.optimizer} {result.dtype}"

    return _fractions(
        "dtypes",
        "Every dtype",
        "As above, by the dtype of parameters and gradients; states of 16-bit parameters are float32.",
        results,
        label,
        palette,
    )


def _fractions(
    name: str, title: str, text: str, results: list[Result], label: Callable[[Result], str], palette: Palette
) -> Figure | None:
    rows: list[tuple[float, list[Row]]] = []
    notes = []
    for result in results:
        if STREAM not in result.timings:
            notes.append(f"{result.name} is not drawn: its stream was not measured.")
            continue
        found = []
        for contender in result.timings:
            part = words.of_stream(result, contender)
            if part:
                values = {"value": part.median, "low": part.low, "high": part.high}
                found.append(row(result, contender, **values, label=label(result)))
        best = max((row["value"] for row in found if is_ours(row["contender"])), default=0.0)
        rows.append((best, found))
    flat = [row for _, found in sorted(rows, key=lambda pair: -pair[0]) for row in found]
    if not flat and not notes:
        return None
    made = [charts.dots(flat, palette, "fraction of the stream's speed")] if flat else []
    return Figure(name, title, f"{text} The number at the right is fastopt's. {SPREAD}", made, notes)


def options(record: Record, palette: Palette) -> Figure | None:
    """Times of steps with options."""
    return _times(
        "options",
        "Options of a step",
        f"Time of a step: shorter is faster. Black lines span the quartiles. {PALE}",
        record.family("options"),
        palette,
    )


def startup(record: Record, palette: Palette) -> Figure | None:
    """What a fresh process pays."""
    return _times(
        "startup",
        "Start",
        f"What a fresh process pays for the import and the first step: shorter is better. {PALE}",
        record.family("startup"),
        palette,
    )


def _times(name: str, title: str, text: str, results: list[Result], palette: Palette) -> Figure | None:
    groups = []
    longest = max((timing.quartiles[1] for result in results for timing in result.timings.values()), default=0.0)
    factor, unit = (1.0, "seconds") if longest >= 1 else (1e3, "milliseconds")
    for result in results:
        rows = []
        for contender in _order(result, _ours(result)):
            timing = result.timings[contender]
            low, high = timing.quartiles
            values = {"value": factor * timing.median, "low": factor * low, "high": factor * high}
            rows.append(row(result, contender, **values, label=words.seconds(timing.median)))
        groups.append((result.name, rows))
    if not groups:
        return None
    most, gutter = _most(groups), _gutter(groups)
    return Figure(
        name, title, text, [charts.bars(rows, palette, head, unit, most, gutter, None) for head, rows in groups]
    )


def _most(groups: list[tuple[str, list[Row]]]) -> float:
    return max((row["high"] for _, rows in groups for row in rows), default=0.0) or 1.0


def _gutter(groups: list[tuple[str, list[Row]]]) -> float:
    """Pixels that the longest name needs."""
    return min(150.0, max((6.6 * len(row["contender"]) for _, rows in groups for row in rows), default=0.0))


def _ours(result: Result) -> str | None:
    """The contender to compare with: the one for PyTorch where it was measured, else the fastest of ours."""
    ours = [name for name in result.timings if is_ours(name) and name not in YARDSTICKS]
    if FRONT in ours:
        return FRONT
    return min(ours, key=lambda name: result.timings[name].median, default=None)


def _order(result: Result, base: str | None) -> list[str]:
    """The contender to compare with first, then by time."""
    return sorted(result.timings, key=lambda name: (name != base, statistics.median(result.timings[name].samples)))
