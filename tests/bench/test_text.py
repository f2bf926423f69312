"""The language model of ``bench train --task text``: its text, its causality, and that a wrong optimizer is noticed."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("psutil")
pytest.importorskip("rich")

from bench_train import assert_picture, command  # noqa: E402

import fastopt  # noqa: E402
from bench.training import text, text_data, text_model, text_race  # noqa: E402

pytestmark = pytest.mark.full
SMALL = ["--task", "text", "--width", "32", "--layers", "1", "--context", "16", "--batch-size", "4", "--steps", "8"]
SHAPE = text_race.Shape(width=32, layers=1, context=16, batch_size=4, steps=8, seed=0)


@pytest.fixture(scope="module")
def sources():
    return text_data.load()


@pytest.fixture
def settings(tmp_path):
    return text.Settings("AdamW", 1e-2, None, 1, SHAPE, tmp_path, None)


def race(settings, sources, **replaced):
    """The runs of all contenders, some of them replaced."""
    with text.threads(settings.threads):
        *_, runs = text_race.race(text.contenders(settings) | replaced, sources, settings.shape)
    return runs


def agreement(runs):
    return text_race.agreement(*(run.losses for run in runs.values()))


# --- text ----------------------------------------------------------------------------------------------------------


def test_text_is_the_same_each_time_and_split_by_files(sources):
    again = text_data.load()
    assert all(np.array_equal(a, b) for a, b in zip(sources, again, strict=True))
    assert not set(sources.train_files) & set(sources.validation_files)
    assert len(sources.validation_files) == (len(sources.train_files) + len(sources.validation_files)) // 10
    assert "argparse.py" in sources.train_files + sources.validation_files
    assert len(sources.train) > 5 * len(sources.validation) > 100_000


def test_no_sources_are_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(text_data.sysconfig, "get_path", lambda name: str(tmp_path))
    assert command(*SMALL, "--out", tmp_path) == 2
    error = f"bench train: the sources of Python's standard library are not in {tmp_path}.\n"
    assert capsys.readouterr().err == error


# --- model ---------------------------------------------------------------------------------------------------------


def test_model_does_not_see_later_bytes():
    model = text_model.Transformer(64, 2, 16, seed=0)
    first = torch.arange(32).view(2, 16)
    second = first.clone()
    second[:, 9] += 100
    with torch.no_grad():
        a, b = model(first), model(second)
    assert torch.equal(a[:, :9], b[:, :9])
    assert not torch.isclose(a[:, 9:], b[:, 9:]).all(dim=2).any()


# --- race ----------------------------------------------------------------------------------------------------------


def test_a_short_run_learns_and_both_curves_are_one(settings, sources):
    settings = dataclasses.replace(settings, shape=dataclasses.replace(SHAPE, steps=60, batch_size=16))
    runs = race(settings, sources)
    ours, theirs, again = runs.values()
    assert ours.losses[0] == theirs.losses[0] == again.losses[0]
    assert text.final_loss(ours) < ours.losses[0] - 1.5
    assert ours.validation == pytest.approx(theirs.validation, abs=1e-3)
    assert ours.validation < 4.5
    assert agreement(runs).first_wrong is None
    assert len(ours.timed("total")) == 60 - text_race.WARM
    np.testing.assert_allclose(ours.timed("rest") + ours.timed("step"), ours.timed("total"))
    assert (ours.timed("rest") > 0).all()


@pytest.mark.parametrize("name", text.RECIPES)
def test_every_optimizer_agrees_with_torch(name, settings, sources):
    lr, _ = text.RECIPES[name]
    runs = race(dataclasses.replace(settings, optimizer=name, lr=lr), sources)
    assert list(runs)[1] == ("torch fused" if name in text.FUSED else "torch foreach")
    assert agreement(runs).first_wrong is None
    assert runs[text.OURS].losses != runs[text.OURS].losses[:1] * 8


def test_clipping_in_the_step_is_torchs(settings, sources):
    free, clipped = race(settings, sources), race(dataclasses.replace(settings, clip=0.1), sources)
    assert agreement(clipped).first_wrong is None
    assert clipped[text.OURS].losses != free[text.OURS].losses


WRONG = {"lr": 1.01e-2}, {"eps": 1e-6}, {"betas": (0.9, 0.9985)}, {"weight_decay": 0.02}, {"amsgrad": True}


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_optimizer_is_noticed(wrong, settings, sources):
    planted = text_race.Contender(lambda params: fastopt.torch.AdamW(params, **{"lr": 1e-2} | wrong))
    settings = dataclasses.replace(settings, shape=dataclasses.replace(SHAPE, steps=30))
    same = agreement(race(settings, sources, **{text.OURS: planted}))
    assert same.first_wrong is not None
    assert text.curves_line(same, ["ours", "theirs", "again"]).startswith("WRONG: the loss of ours differs")


def test_agreement_knows_divergence():
    nan = math.nan
    for *losses, first_wrong in (
        ([5, nan], [5, nan], [5, nan], None),
        ([5, nan], [5, 5], [5, 5], 2),
        ([5, 5], [5, nan], [5, nan], 2),
        ([5, 5.1], [5, 5], [5, 5.02], None),  # torch's two are as far apart
        ([5.1, 5], [5, 5], [5, 5.02], 1),  # before they were
    ):
        assert text_race.agreement(*losses).first_wrong == first_wrong


def test_ratio_compares_medians_and_says_when_it_is_noise():
    def run(*steps):
        return text_race.Run([], list(steps), [s + 1 for s in steps])

    runs = {"ours": run(*[0.5] * 20), "theirs": run(*[1.0] * 20)}
    assert text.ratio(runs, list(runs), "step") == (0.5, (0.5, 0.5), (0.5, 0.5))
    assert text.speed_line(runs, list(runs), "total").startswith("whole training step: ours is faster: 0.750 of the ")
    slow = {"ours": runs["theirs"], "theirs": runs["ours"]}
    assert text.speed_line(slow, list(slow), "step").startswith("optimizer's step alone: ours is SLOWER: 2.000 of ")
    noisy = {"ours": run(*range(1, 41)), "theirs": run(*reversed(range(1, 41)))}
    assert ": no difference beyond the noise: " in text.speed_line(noisy, list(noisy), "step")


# --- command -------------------------------------------------------------------------------------------------------


def test_command_prints_a_table_and_writes_figure_and_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads(), fastopt.get_num_threads()
    assert command(*SMALL, "--clip", "1", "--threads", "1", "--json", "deep/samples.json", "--out", "figures") == 0
    assert (torch.get_num_threads(), fastopt.get_num_threads()) == before
    printed = capsys.readouterr().out
    for part in ("bytes of", "torch fused", "same loss curve: ", "whole training step: ", "figures/text.png\n"):
        assert part in printed
    assert_picture(tmp_path / "figures" / "text.png", 600)
    record = json.loads((tmp_path / "deep" / "samples.json").read_text())
    assert (record["task"], record["settings"]["clip"], record["settings"]["steps"]) == ("text", 1.0, 8)
    assert list(record["runs"]) == ["fastopt.torch", "torch fused", "torch default"]
    for run in record["runs"].values():
        assert len(run["losses"]) == len(run["step_seconds"]) == len(run["total_seconds"]) == 8
    assert record["machine"]["torch"] == torch.__version__


def test_command_fails_if_the_curves_differ(tmp_path, capsys, monkeypatch):
    class Wrong(fastopt.torch.AdamW):
        def step(self, closure=None):
            for group in self.param_groups:
                group["eps"] = 1e-5
            return super().step(closure)

    monkeypatch.setattr(fastopt.torch, "AdamW", Wrong)
    assert command(*SMALL, "--out", tmp_path) == 1
    assert "WRONG: the loss of fastopt.torch differs from that of torch fused by" in capsys.readouterr().out


def test_without_torch_the_command_to_install_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert command(*SMALL, "--out", tmp_path) == 2
    error = 'bench train: needs torch, which is not installed; pip install -e ".[train,torch]" brings it.\n'
    assert capsys.readouterr().err == error


def test_recipes_are_all_that_both_have_and_fused_is_all_that_torch_has():
    both = {name for name in fastopt.torch.__all__ if hasattr(torch.optim, name)}
    assert set(text.RECIPES) == both
    for name in text.RECIPES:
        parameter = torch.nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        try:
            getattr(torch.optim, name)([parameter], lr=0.1, fused=True).step()
            fused = True
        except (RuntimeError, TypeError):
            fused = False
        assert fused == (name in text.FUSED)
