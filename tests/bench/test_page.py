import json
import random
import re

import bench_records
import pytest

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from bench.page import figures, readme_block, summary, tables, words, write_page, write_pictures
from bench.page.losses import compare
from bench.page.palette import COLOURS, Palette
from bench.results import Record, Timing

pytestmark = pytest.mark.full


def single(times):
    result = bench_records.result("case", "sizes", {}, random.Random(0), elements=1000, threads=1)
    result.timings = {name: Timing(samples) for name, samples in times.items()}
    return Record({}, "quick", [result])


def test_a_loss_is_told_with_its_ratio_by_rounds():
    rounds = {"fastopt": [3.0, 2.0, 6.0], "numba": [1.0, 1.0, 2.0], "stream": [0.1] * 3}
    found = compare(single(rounds))
    (loss,) = found.losses
    assert (loss.ours, loss.other, loss.rounds) == ("fastopt", "numba", 3)
    assert loss.ratio == words.Ratio(3.0, 2.5, 3.0)
    assert (found.cases, found.lost, found.close, found.variants) == (1, 1, [], [])


def test_the_stream_and_yardsticks_do_not_win():
    rounds = {"fastopt": [2.0] * 3, "fastopt plain": [1.0] * 3, "stream": [0.5] * 3, "torch fused": [1.5] * 3}
    (loss,) = compare(single(rounds)).losses
    assert (loss.ours, loss.other) == ("fastopt", "torch fused")
    without = compare(single({name: rounds[name] for name in ("fastopt", "fastopt plain", "stream")}))
    assert (without.cases, without.losses) == (0, [])


def test_what_is_within_noise_is_no_loss():
    found = compare(single({"fastopt": [1.0, 1.1, 0.8, 1.2, 1.05], "numba": [1.0] * 5}))
    assert found.losses == []
    assert [loss.other for loss in found.close] == ["numba"]


def test_a_slower_way_to_call_fastopt_is_told_apart():
    found = compare(single({"fastopt": [1.0] * 3, "fastopt arrays": [3.0] * 3, "torch fused": [2.0] * 3}))
    assert found.losses == []
    assert [(loss.ours, loss.other, loss.ratio.median) for loss in found.variants] == [
        ("fastopt arrays", "torch fused", 1.5)
    ]


def test_rounds_that_cannot_be_paired_are_compared_by_quartiles():
    (loss,) = compare(single({"fastopt": [2.0, 2.0, 4.0], "numba": [1.0, 1.0]})).losses
    assert loss.ratio == words.Ratio(2.0, 2.0, 3.0)


def test_the_summary_says_nothing_of_what_was_not_measured():
    record = words.measured(bench_records.awkward())
    text = " ".join(summary.sentences(record, compare(record)))
    assert "unknown processor" in text
    assert "real model" not in text
    assert "1 contender gave a wrong answer" in text
    assert "1 case had to be skipped" in text
    empty = Record({}, "quick")
    assert "nothing is said of who is faster" in " ".join(summary.sentences(empty, compare(empty)))


def test_the_block_of_the_readme():
    record = bench_records.plausible()
    block = readme_block(record)
    lines = block.splitlines()
    assert lines[0].startswith("Imaginary Xeon 6000, 2 cores, x86-64-v4, 25.0 GB of memory")
    assert "medians of 21 interleaved rounds" in lines[0]
    assert {line.count("|") for line in lines if line.startswith("|")} == {3, 5}  # of the stream, beside torch
    (model,) = (line for line in lines if "resnet50" in line)
    found = record["adamw-resnet50"]
    figures = [f"{found.ratio('fastopt.torch', f'torch {name}'):.2f}" for name in ("fused", "foreach", "loop")]
    assert [cell.strip() for cell in model.split("|")[2:-1]] == figures
    assert any("8 optimizers" in line and "3 of 8" in line for line in lines)
    losses = compare(words.measured(record)).losses
    assert losses
    assert sum(line.startswith("- ") for line in lines) == len(losses)


@pytest.mark.parametrize("record", [bench_records.awkward(), Record({}, "quick")], ids=["awkward", "empty"])
def test_no_cell_of_the_readme_lacks_a_figure(record):
    block = readme_block(record)
    assert "<script" not in block
    assert "not measured" not in block
    assert all(cell.strip() for line in block.splitlines() if line.startswith("|") for cell in line.split("|")[1:-1])


def test_colours_are_those_of_the_contender():
    record = single({name: [1.0] for name in ("fastopt.torch moving", "torch fused moving", "new", "newer", *COLOURS)})
    palette = Palette(record)
    assert palette["fastopt.torch moving"].colour == COLOURS["fastopt.torch"]
    assert palette["torch fused moving"].colour == COLOURS["torch fused"]
    assert palette["torch fused moving"].shape != palette["torch fused"].shape
    known = {palette[name].colour for name in COLOURS}
    assert len({*known, palette["new"].colour, palette["newer"].colour}) == len(COLOURS) + 2


def test_every_family_has_its_figure():
    record = words.measured(bench_records.plausible())
    made = {figure.name: len(figure.charts) for figure in figures.figures(record, Palette(record))}
    assert made == bench_records.CHARTS


def test_tables_tell_what_is_missing():
    found = tables.Tables(words.measured(bench_records.awkward()))
    assert found.missing == [("torch fused", "pip install torch", 1), ("torch loop", "pip install torch", 1)]
    assert [(result.name, name, why) for result, name, why in found.wrong] == [("adam", "numba", "w is off by 0.25")]
    assert [(name, cases) for name, cases, _ in found.refused] == [("stream", ["adam"]), ("numpy", ["adam-empty"])]
    assert [result.name for result in found.skipped] == ["adam-1g"]


@pytest.mark.parametrize("make", [bench_records.plausible, bench_records.awkward, lambda: Record({}, "quick")])
def test_the_page_is_one_file_of_moderate_size(tmp_path, make):
    path = tmp_path / "bench.html"
    write_page(make(), path)
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 4_000_000
    without_scripts = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r'(?:src|href)="(?!#)|url\(|@import', without_scripts) == []
    assert "<script>throw" not in page
    assert ("&lt;script&gt;throw Error(" in page) == (make is bench_records.awkward)  # escaped
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert data
    assert set(json.loads(data[1])) == {"specs", "light", "dark"}


def test_pictures_are_drawn_on_white(tmp_path):
    written = write_pictures(bench_records.plausible(), tmp_path)
    assert [path.name for path in written] == ["bench-models.png", "bench-bandwidth.png", "bench-arrays.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000 for path in written)
