"""``python -m bench scale``: the model by hand, checks of answers, a run on two processes."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("altair")
pytest.importorskip("psutil")
pytest.importorskip("torch")

from bench_train import assert_picture
from processes import on_processes

from bench.__main__ import main
from bench.scale import command, tables
from bench.scale.contenders import TRAIN, UPDATE, layers
from bench.scale.model import FLOAT, NETWORKS, PLANS, Link, Machine, Network, Plan, Training, line, pipeline

ROOT = Path(__file__).parents[2]
NETWORK = Network("by hand", inside=Link(0.1, 0.01, 100.0), between=Link(1.0, 0.5, 80.0))


def test_gathers_on_stated_networks_take_what_they_take_by_hand():
    assert NETWORK.ring(8, 800.0) == pytest.approx(7 * (0.1 + 0.01 + 1.0))
    assert NETWORK.ring(32, 3200.0) == pytest.approx(31 * (1.0 + 0.5 + 100 / 80))  # one flow in each node's link
    assert NETWORK.direct(8, 800.0) == pytest.approx(0.1 + 7 * 1.0)
    assert NETWORK.direct(32, 3200.0) == pytest.approx(1.0 + 24 * 8 * 100 / 80)  # eight flows
    assert NETWORK.direct(32, 32.0) == pytest.approx(1.0 + 24 * 0.5)  # small messages cost what each costs
    assert NETWORK.two_level(32, 3200.0) == pytest.approx(3 * (1.0 + 0.5 + 100 / 10) + 7 * (0.1 + 0.01 + 400 / 100))
    assert NETWORK.two_level(8, 800.0) == pytest.approx(NETWORK.ring(8, 800.0))
    assert NETWORK.gather(32, 3200.0) == pytest.approx(NETWORK.two_level(32, 3200.0))


def test_buckets_hide_the_shorter_of_update_and_wire():
    assert pipeline(8.0, 4.0, 4) == pytest.approx(2 + 4 * 2 - 2 + 1)  # update, update, ..., then the last bucket's wire
    assert pipeline(4.0, 8.0, 4) == pytest.approx(1 + 4 * 2)
    assert pipeline(4.0, 8.0, 1) == 12.0


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_all_of_the_wire_is_told_as_hidden_or_not(network):
    training = Training()
    times = training.times(network, 64, training.nbytes / 8)
    whole = 8 * network.gather(64, training.nbytes / 8)
    assert times["gather"] + times["hidden gather"] == pytest.approx(whole)
    assert times["reduction"] + times["hidden reduction"] == pytest.approx(whole)
    assert times["hidden gather"] <= times["update"] == pytest.approx(28 * 8.03e9 / 64 / 2.7e12)


def test_a_step_of_this_machine_takes_what_it_takes_by_hand():
    found = {"kernel alone": (2800, [0.1]), "fresh memory": (100, [1.0]), "backward alone": (1, [3.0]),
             "exchange of 0": (0, [0.5]), "exchange of 10": (10, [1.5])}  # fmt: skip
    found = {name: {"moved": moved, "samples": samples} for name, (moved, samples) in found.items()}
    two = Machine.calibrated(2, 2, found)
    assert (two.kernel, two.fresh, two.backward) == (28000.0, 0.01, 3.0)
    assert (two.latency, two.per_byte) == pytest.approx((0.5, 0.1))
    update, gather = 1000 / 2 * 28 / 28000, 0.5 + 2000 * 0.1
    assert two.step(Plan(1), 4000) == pytest.approx(update + gather)
    assert Machine.calibrated(2, 4, found).step(Plan(1), 4000) == pytest.approx(gather)  # beside the update
    assert two.step(Plan(0, sharded=False), 4000) == pytest.approx(2 * update)
    train = Plan(2, backward=True, fresh=1.0, passes=7.0)
    assert two.step(train, 4000) == pytest.approx(3 + 40 + 1 + update + 2 * gather)


def test_lines_through_times_begin_at_zero_or_above():
    assert line([0, 10, 20], [2.0, 7.0, 12.0]) == pytest.approx((2.0, 0.5))
    start, slope = line([10, 20], [1.0, 3.0])
    assert start == 0.0
    assert 0.1 < slope < 0.15


def test_sizes_are_those_of_bert_and_every_contender_has_a_plan():
    sizes = [sum(math.prod(shape) for layer in layers(n) for shape in layer) for n in (50_400_000, 2_000_000)]
    assert sizes == [4 * (12 * 1024**2 + 13 * 1024), pytest.approx(2_000_000, rel=0.03)]
    assert {*UPDATE, *TRAIN} == {*PLANS}


@pytest.mark.full
def test_wrong_answers_are_found_before_anything_is_timed():
    body = f"""
    sys.path.insert(0, {str(ROOT)!r})
    from bench.scale import contenders
    from bench.scale.measure import checked
    from fastopt.torch.sharded import wire

    def run(rank, world):
        problem = contenders.Problem(3000, 0.75 + 0.5 * rank)
        def wrong(make):
            return refusal(lambda: checked(make, problem)).startswith("WrongAnswer: after 3 steps parameters are ")
        # Own gradients instead of averaged ones; the sum of both; slices that do not travel.
        assert wrong(lambda p: contenders.Train(p, lambda model: model, contenders._fused))
        problem.gradients = [4 / 3 * g if rank == 0 else 4 / 5 * g for g in problem.gradients]
        checked(contenders.UPDATE["ShardedOptimizer"], problem)
        problem.gradients = [2 * g for g in problem.gradients]
        assert wrong(contenders.UPDATE["ShardedOptimizer"])
        problem.gradients = [g / 2 for g in problem.gradients]
        wire._send = wire._receive = lambda flat, group: []
        assert wrong(contenders.UPDATE["ShardedOptimizer"])
    """
    on_processes(body, 2)


@pytest.mark.full
def test_a_small_run_counts_what_the_formula_says_and_writes_everything(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(["scale", "--size", "1M", "--rounds", "1", "--processes", "2", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    record = json.loads((out / "scale.json").read_text())
    steps = list(tables.steps(record))
    assert [s.contender for s in steps] == [*UPDATE, *TRAIN]
    for s in steps:
        # Messages have heads, slices paddings; gloo reduces and scatters by an all-reduce, which sends twice as much.
        expected = s.expected * (1.5 if s.contender.startswith("FSDP2") else 1)
        assert s.wire == pytest.approx(expected, rel=0.05, abs=20_000)
        shared = 1 if "fused" in s.contender and "FSDP2" not in s.contender else 2
        assert s.states == pytest.approx(2 * record["nbytes"] / shared, rel=0.03)
        assert min(s.timing.median, s.predicted) > 0
        assert s.peak > s.states
    pictures = [out / f"scale-{name}.png" for name in ("step", "gather", "hidden", "memory")]
    for path in pictures:
        assert_picture(path)
        assert str(path) in printed
    docs = tmp_path / "docs"
    (tmp_path / "bench" / "results").mkdir(parents=True)
    docs.mkdir()
    (docs / "scale.md").write_text((ROOT / "docs" / "scale.md").read_text())
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert main(["scale", "--from", str(out / "scale.json"), "--docs", "--out", str(out)]) == 0
    page = (docs / "scale.md").read_text()
    assert page.count("bench: begin") == page.count("bench: end") == 2
    assert tables.verdict(record) in page
    assert page.count("| 2 | FSDP2 + fused AdamW | ") == 1
    assert f"{record['nbytes'] / FLOAT / 1e6:.1f} M parameters" in page
    assert json.loads((tmp_path / "bench" / "results" / "scale.json").read_text()) == record
    assert {path.name for path in docs.glob("*.png")} == {path.name for path in pictures}


@pytest.mark.full
def test_a_process_that_dies_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "elements", lambda text: 10**18)  # the first array is refused by the allocator
    monkeypatch.setattr(command, "HELD", 0)
    assert main(["scale", "--processes", "1", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("bench scale: one of 1 processes failed: RuntimeError: ")
