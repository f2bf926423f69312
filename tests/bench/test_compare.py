"""``python -m bench compare``, and the files that it reads."""

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("scipy")

from bench.__main__ import main
from bench.case import Bar
from bench.results import Record, Result, Timing

pytestmark = pytest.mark.full


def record(rng, **milliseconds):
    """A run of one case, with noise of two percent."""
    result = Result("adam", "rules", "Adam", "float32", 1000, 1, 2, 28_000)
    for name, middle in milliseconds.items():
        samples = 1e-3 * middle * (1 + 0.02 * rng.standard_normal(15))
        result.timings[name.replace("_", " ")] = Timing(samples.tolist(), 5)
    return Record({"processor": "A", "threads": 2}, "quick", [result])


def compared(tmp_path, capsys, before, after, *options):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, run in zip(paths, (before, after), strict=True):
        run.write(path)
    return main(["compare", *map(str, paths), *options]), capsys.readouterr().out


ONE = {"fastopt": 1.0, "stream": 1.0}
RUNS = {
    "noise": (ONE, ONE | {"fastopt": 1.01}, (), 0, "0 of 1 measurements of fastopt got slower"),
    "slower": (ONE, ONE | {"fastopt": 1.12}, (), 1, "1 of 1 measurements of fastopt got slower"),
    "faster": (ONE | {"fastopt": 1.12}, ONE, (), 0, "0 of 1 measurements of fastopt got slower"),
    "not by so much": (ONE, ONE | {"fastopt": 1.12}, ("--threshold", "0.3"), 0, "0 of 1"),
    "a busier machine": (ONE, {"fastopt": 1.5, "stream": 1.5}, (), 0, "0 of 1"),
    "without a control": ({"fastopt": 1.0}, {"fastopt": 1.5}, (), 1, "slower"),  # it is all one can see
    "another library": (ONE | {"numpy": 1.0}, ONE | {"numpy": 2.0}, (), 0, "0 of 1"),
    "another library, shown": (ONE | {"numpy": 1.0}, ONE | {"numpy": 2.0}, ("--all",), 0, "numpy"),
}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("runs", RUNS)
def test_what_got_slower_is_named_and_the_status_is_1(runs, seed, tmp_path, capsys):
    rng = np.random.default_rng(seed)
    before, after, options, expected, said = RUNS[runs]
    status, shown = compared(tmp_path, capsys, record(rng, **before), record(rng, **after), *options)
    assert status == expected
    assert said in shown
    assert ("numpy" in shown) == ("--all" in options)


def test_another_machine_is_mentioned(tmp_path, capsys):
    before, after = (record(np.random.default_rng(0), fastopt=1.0) for _ in range(2))
    after.machine["processor"] = "B"
    assert "processor differs: A, B" in compared(tmp_path, capsys, before, after)[1]


def test_a_record_comes_back_as_it_was_written(tmp_path):
    run = record(np.random.default_rng(0), fastopt=1.0, stream=1.0)
    (result,) = run.results
    result.judge((Bar("fastopt", 1.0, "stream"), Bar("fastopt", 1, unit="ms"), Bar("fastopt", 1, "torch")))
    result.problems = {"torch": "not installed: pip install torch"}
    for timing in result.timings.values():
        timing.samples = [round(sample, 9) for sample in timing.samples]
    run.write(tmp_path / "a.json")
    assert Record.read(tmp_path / "a.json") == run


def test_bars_are_judged_by_the_median_of_rounds():
    result = Result("x", "rules", "Adam", "float32", 1000, 1, 2, 28_000)
    result.timings = {"a": Timing([1.0, 2.0, 9.0]), "stream": Timing([1.0, 1.0, 3.0])}
    result.judge((Bar("a", 2.0, "stream"), Bar("a", 1.9, "stream"), Bar("a", 2e3, unit="ms"), Bar("b", 1.0)))
    speed, missed, absolute, absent = result.verdicts
    assert (speed.measured, speed.reached, speed.text) == (0.5, True, "a ≥ 0.50 of stream's speed")
    assert missed.reached is False
    assert (absolute.measured, absolute.reached) == (2000.0, True)
    assert (absent.measured, absent.reached) == (None, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "is not valid JSON: "),
        ("[]", "was not written by bench: TypeError"),
        ("{}", "was not written by bench: KeyError: 'format'"),
        ('{"format": 99}', "has format 99; this version of bench reads 1"),
        ('{"format": 1, "results": [{"timings": 3}]}', "was not written by bench: "),
        ('{"format": 1, "results": [], "machine": {}, "suite": "x", "seconds": 1}', "have no case and contender"),
    ],
)
def test_files_that_are_something_else_are_one_line_and_status_2(content, message, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    record(np.random.default_rng(0), fastopt=1.0).write(good)
    if content is not None:
        bad.write_text(content)
    assert main(["compare", str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench compare: ")
    assert message in error
    assert error.count("\n") == 1
