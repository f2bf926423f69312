"""The training benchmark: gradients, learning, determinism, refusals, figures; small settings."""

from unittest.mock import Mock

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")

from bench_train import assert_picture, command
from refusal import CLASSES

import fastopt
from bench import train
from bench.training import digits, figures, mlp, steps, sweep

pytestmark = pytest.mark.full
SMALL = ["--hidden", "16", "--epochs", "1"]


def short_run(seed=0, epochs=3, recipe=train.NAMES["adamw"], batch_size=64):
    model = mlp.MLP((64, 32, 10), seed)
    schedule = fastopt.schedules.constant(recipe.lr)
    history = mlp.History(recipe.name, recipe.lr)
    optimizer = recipe.build(model.params)
    data = digits.load(seed)
    for _ in mlp.fit(model, data, optimizer, schedule, history, batch_size=batch_size, epochs=epochs, seed=seed):
        pass
    return model, history


@pytest.mark.parametrize("widths", [(5, 3), (5, 7, 3), (5, 7, 6, 3)], ids=str)
def test_gradients_equal_central_differences(widths):
    rng = np.random.default_rng(1)
    x, labels = rng.standard_normal((11, 5)), rng.integers(0, 3, 11)
    model, step = mlp.MLP(widths, 2, np.float64), 1e-6
    for name in model.params.names:
        model.params[name][...] += 0.1 * rng.standard_normal(model.params[name].shape)  # no bias stays 0
    model.backward(x, labels)

    def loss(values, i, change):
        kept, values[i] = values[i], values[i] + change
        found, values[i] = model.evaluate(x, labels)[0], kept
        return found

    for name, values in model.params.items():
        slopes = np.zeros(values.shape)
        for i in np.ndindex(values.shape):
            slopes[i] = (loss(values, i, step) - loss(values, i, -step)) / (2 * step)
        # The rounding of the loss, about 1e-16, is divided by 2 step; the difference itself is off by order step^2.
        np.testing.assert_allclose(model.grads[name], slopes, rtol=0, atol=2e-9)


def test_digits_are_split_by_the_seed_and_standardised():
    data, again, other = digits.load(3), digits.load(3), digits.load(4)
    assert (len(data.train_y), len(data.test_y)) == (digits.TRAIN, 1797 - digits.TRAIN)
    assert all(np.array_equal(a, b) for a, b in zip(data, again, strict=True))
    assert not np.array_equal(data.train_y, other.train_y)
    exact = digits.load(3, np.float64)
    np.testing.assert_allclose(exact.train_x.mean(axis=0), 0, atol=1e-12)
    spread = exact.train_x.std(axis=0)
    np.testing.assert_allclose(spread, (spread > 0).astype(float), atol=1e-12)  # 0: a pixel that never changes
    assert np.count_nonzero(spread) > 55


def test_a_short_run_learns_the_digits():
    _, history = short_run()
    assert history.accuracies[-1] > 0.9
    assert history.losses[-1] < history.losses[0]
    assert history.samples == 3 * digits.TRAIN
    assert 0 < history.share < 1
    assert history.rate > 0


def test_the_seed_determines_the_run():
    (model, history), (again, same), (_, other) = short_run(5), short_run(5), short_run(6)
    np.testing.assert_array_equal(model.params.data, again.params.data)
    assert (history.losses, history.accuracies) == (same.losses, same.accuracies)
    assert history.losses != other.losses


@pytest.mark.parametrize("name", train.SCHEDULES)
def test_schedules_start_within_the_learning_rate_and_stay_there(name):
    schedule = train.SCHEDULES[name](0.5, 100)
    rates = [schedule(k) for k in range(100)]
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert max(rates) > 0.4
    assert train.SCHEDULES[name](0.5, 1)(0) >= 0


@pytest.fixture
def small(monkeypatch):
    """A model whose steps take no time."""
    monkeypatch.setattr(steps, "LARGE", {"w": (30, 7), "b": (7,)})


@pytest.mark.usefixtures("small")
def test_every_optimizer_runs_beside_eager_numpy_and_the_figures_are_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command("--optimizer", "ALL", *SMALL, "--out", "new/folder") == 0
    printed = capsys.readouterr().out
    assert "not measured" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    for recipe in train.RECIPES:
        (row,) = (line.split() for line in printed.splitlines() if line.split()[:1] == [recipe.name])
        assert len(row) == 10
        assert all(float(number) > 0 for number in (*row[1:3], *row[4:7], row[9]))
    for name in ("loss", "accuracy", "bowl"):
        assert f"new/folder/{name}.png\n" in printed
        assert_picture(tmp_path / "new" / "folder" / f"{name}.png")


@pytest.mark.parametrize("recipe", [train.NAMES[name] for name in ("sgd", "adamw", "rprop")], ids=lambda r: r.name)
def test_a_rule_that_differs_from_the_eager_one_is_not_timed(recipe, monkeypatch):
    monkeypatch.setattr(mlp.Recipe, "build", lambda self, params: self.make(params, lr=1.01 * self.lr, **self.options))
    with pytest.raises(steps.WrongAnswer, match=f"{recipe.name} of fastopt and of NumPy differ"):
        steps.compare(recipe, {"w": (30, 7), "b": (7,)})


def test_a_wrong_answer_is_one_line_and_the_exit_status(tmp_path, capsys, monkeypatch):
    wrong = steps.WrongAnswer("AdamW of fastopt and of NumPy differ")
    monkeypatch.setattr(steps, "compare", Mock(side_effect=wrong))
    assert command(*SMALL, "--out", tmp_path) == 1
    assert capsys.readouterr().err == f"bench train: WRONG: {wrong}\n"


def test_threads_are_set_back():
    before = fastopt.get_num_threads()
    with train.one_thread():
        assert fastopt.get_num_threads() == 1
    assert fastopt.get_num_threads() == before


@pytest.mark.usefixtures("small")
def test_a_run_that_diverges_at_once_is_said_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "bowl", lambda folder: folder / "bowl.png")  # it was drawn above
    assert command("--optimizer", "sgd", "--lr", "1e30", *SMALL, "--out", tmp_path) == 0
    assert "diverged" in capsys.readouterr().out
    assert_picture(tmp_path / "loss.png")


def test_recipes_and_bowl_show_every_optimizer_of_the_library():
    for recipes in (train.RECIPES, figures.BOWL):
        assert {recipe.make for recipe in recipes} == set(CLASSES)


@pytest.mark.parametrize("recipe", figures.BOWL, ids=lambda recipe: recipe.name)
def test_every_path_runs_down_the_bowl(recipe):
    path = figures.descend(recipe)
    assert path.shape == (figures.BOWL_STEPS + 1, 2)
    np.testing.assert_array_equal(path[0], figures.START)
    assert path[-1, 0] ** 2 / 20 + path[-1, 1] ** 2 < 0.2  # from 6.45


def test_sweep_scales_the_learning_rate_and_warms_it_up():
    recipe, schedule = sweep.scaled(mlp.Recipe("SGD", fastopt.SGD, 0.1), 512, epochs=15)
    assert recipe.lr == pytest.approx(1.6)  # 0.1 * 512 / 32
    rates = [schedule(k) for k in range(45)]  # 3 steps per epoch, 15 of warm-up
    np.testing.assert_allclose(rates[15:], [1.6 * (1 - k / 30) ** 2 for k in range(30)])
    assert rates[0] > 0
    np.testing.assert_allclose(np.diff(rates[:16]), rates[1] - rates[0])


def test_sweep_is_measured_drawn_and_said(tmp_path):
    runs = []
    cells = sweep.measure(2, 0, (64, 16, 10), batch_sizes=(512, 1536), seeds=2, report=runs.append)
    assert [(cell.name, cell.batch_size) for cell in cells] == [(r.name, b) for b in (512, 1536) for r in sweep.RECIPES]
    assert len(runs) == 12
    assert all(len(cell.accuracies) == 2 and 0 <= cell.mean <= 1 for cell in cells)
    assert_picture(figures.sweep(cells, tmp_path))
    names = sorted((-cell.mean, cell.name) for cell in cells[3:])
    small, large = sweep.verdict(cells).splitlines()
    assert small.startswith("Batch of 512: ")
    assert large.startswith(f"Batch of 1536: {names[0][1]} {-names[0][0]:.1%}, ")
