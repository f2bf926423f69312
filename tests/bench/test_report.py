"""``python -m bench report``: from a suite to files, and from a file to a page."""

from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from bench_records import plausible

from bench import page, report, startup, step
from bench.__main__ import main
from bench.case import Bar, Case
from bench.measure import Effort
from bench.results import Record

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def suite(monkeypatch):
    """A suite of one small case."""
    bars = (Bar("fastopt", 1e9),)
    case = Case("small", "Adam", {"lr": 1e-3}, {"w": (50,)}, ("fastopt", "numpy", "stream"), bars=bars, family="rules")
    monkeypatch.setattr(report, "SUITE", {"small": case})
    monkeypatch.setattr(report, "QUICK", ("small",))
    monkeypatch.setattr(report, "QUICK_EFFORT", Effort(rounds=2))
    monkeypatch.setattr(startup, "PROGRAMS", {"fastopt": startup.PROGRAMS["fastopt"]})


@pytest.mark.usefixtures("suite")
def test_a_report_is_measured_and_written(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path / "new"), "--threads", "1"]) == 0
    assert str(tmp_path / "new" / "report.html") in capsys.readouterr().out
    record = Record.read(tmp_path / "new" / "report.json")
    assert record.suite == "quick"
    assert [result.name for result in record.results] == ["small", "startup-import", "startup-first-step"]
    assert set(record["small"].timings) == {"fastopt", "numpy", "stream"}
    assert [verdict.reached for verdict in record["small"].verdicts] == [True]
    assert record.machine["threads"] == 1
    html = (tmp_path / "new" / "report.html").read_text()
    assert "small" in html


def test_a_page_of_a_file_measures_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measured", None)
    plausible().write(tmp_path / "run.json")
    assert main(["report", "--from", str(tmp_path / "run.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000
    assert len(list((tmp_path / "out").glob("*.png"))) == 3


def test_the_figures_of_the_readme_are_those_of_the_file():
    record = Record.read(ROOT / "bench" / "results" / "cpu.json")
    text = (ROOT / "README.md").read_text()
    _, rest = text.split(report.BEGIN)
    block, _ = rest.split(report.END)
    assert block == page.readme_block(record)


def test_the_readme_keeps_what_is_around_the_figures(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    report.update_readme(file, "new\n")
    assert file.read_text() == f"before\n{report.BEGIN}new\n{report.END}after\n"


def test_a_full_run_has_every_case_and_a_quick_one_no_contender_that_compiles_for_a_minute():
    assert {case.name for case in report.cases(full=True)} == set(step.SUITE)
    quick = report.cases(full=False)
    assert not {name for case in quick for name in case.contenders} & set(report.SLOW)
    bars = {verdict for case in report.cases(full=True) for verdict in case.bars}
    assert {verdict for case in quick for verdict in case.bars} == bars  # every bar is in the quick one, too
