"""How often plans are built, and how the work of an optimizer grows with its arrays and groups."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastopt.kernels.layout import CHUNK, GRADIENT
from work import work

import fastopt
from fastopt.engine.host import HostPlan
from fastopt.engine.plan import Plan
from fastopt.engine.table import add_up

PATTERNS = ((0, 1, 2), (1,), (0, 2), (1,), (2,))
OPTIMIZERS: dict[str, Callable[[Any], fastopt.Optimizer]] = {
    "Adam": lambda params: fastopt.Adam(params, lr=0.1),
    "NAdam": lambda params: fastopt.NAdam(params, lr=0.1),
    "LARS": lambda params: fastopt.LARS(params, lr=0.1, keep_weight_norms=True),
}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that were made."""
    plans: list[Plan] = []
    make = Plan.__init__
    monkeypatch.setattr(Plan, "__init__", lambda self, *args: (plans.append(self), make(self, *args))[1])
    return plans


def alternate(opt: fastopt.Optimizer, rounds: int) -> bytes:
    """Steps in which the arrays that have a gradient change; the bytes of all that there is afterwards."""
    for _ in range(rounds):
        for pattern in PATTERNS:
            opt.step([np.full((4, 4), k + 1.0) if k in pattern else None for k in range(3)])
    arrays = [*opt.param_groups[0]["params"].values()]
    for state in opt.state.values():
        arrays += [np.asarray(value) for value in state.values()]
    return b"".join(array.tobytes() for array in arrays)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_alternating_patterns_of_gradients_have_the_bits_of_plans_made_anew(name, built, monkeypatch):
    start = [np.full((4, 4), k + 1.0) for k in range(3)]
    few = alternate(OPTIMIZERS[name]([w.copy() for w in start]), 4)
    assert len(built) <= 6  # one for each pattern, and anew where arrays came differently far
    monkeypatch.setattr(HostPlan, "kept", 1)
    assert alternate(OPTIMIZERS[name]([w.copy() for w in start]), 4) == few


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True, "max_grad_norm": 1.0}], ids=["", "counts on the GPU"])
def test_alternating_patterns_on_a_gpu_are_planned_once(stand_in, built, options):
    arrays = [np.full(4, k + 1.0, np.float32) for k in range(2)]
    on_gpu = [stand_in.put(w) for w in arrays]
    opt, wanted = (fastopt.NAdam(params, lr=0.1, ema_decay=0.9, **options) for params in (on_gpu, arrays))
    for n in range(12):
        grads = [np.full(4, n - 3.0, np.float32) if k == n % 2 or n % 3 == 2 else None for k in range(2)]
        wanted.step(grads)
        opt.step([g if g is None else stand_in.put(g) for g in grads])
    assert len(built) == 6
    for name, w, array in zip(opt.state, on_gpu, arrays, strict=True):
        for key in ("step", "mu_product", "ema_step"):
            assert opt.state[name][key] == wanted.state[name][key]
        assert np.array_equal(stand_in.get(w), array)


def test_gradients_that_take_turns_are_planned_once_and_not_read_again(built, monkeypatch):
    arrays, turns = [np.ones(4), np.ones(4)], [[np.ones(4), None], [None, np.ones(4)], [np.ones(4), np.ones(4)]]
    opt = fastopt.AdamW(arrays)
    for n in range(24):
        opt.step(turns[n % 3])
        if n == 14:
            monkeypatch.setattr("fastopt.inputs.GradientReader.read", None)
    assert len(built) <= 6
    assert np.array_equal(arrays[0], arrays[1])


def test_alternating_patterns_of_tensors_do_not_make_plans_anew(built: list[Plan]) -> None:
    torch = pytest.importorskip("torch")
    import fastopt.torch

    params = [torch.ones(4), torch.ones(4)]
    opt = fastopt.torch.AdamW(params)
    for n in range(20):
        params[n % 2].grad, params[1 - n % 2].grad = torch.ones(4), None
        opt.step()
    assert len(built) <= 4


def make(arrays: int, groups: int) -> fastopt.Optimizer:
    return fastopt.SGD(
        [{"params": {f"{g}.{k}": np.ones(2) for k in range(arrays)}} for g in range(groups)], lr=0.1, momentum=0.9
    )


def first_step(opt: fastopt.Optimizer) -> None:
    opt.step({name: np.ones(2) for group in opt.param_groups for name in group["params"]})


def scheduled_step(opt: fastopt.Optimizer) -> None:
    for group in opt.param_groups:
        group["lr"] *= 0.5
    first_step(opt)


@pytest.mark.parametrize("what", ["make", "first step", "schedule", "state_dict", "load"])
@pytest.mark.parametrize("grows", ["arrays", "groups"])
def test_work_grows_linearly(what: str, grows: str) -> None:
    def of(n: int) -> int:
        sizes = (n, 1) if grows == "arrays" else (1, n)
        opt = make(*sizes)
        actions: dict[str, Callable[[], Any]] = {
            "make": lambda: make(*sizes),
            "first step": lambda: first_step(opt),
            "schedule": lambda: scheduled_step(opt),
            "state_dict": opt.state_dict,
            "load": lambda: opt.load_state_dict(opt.state_dict()),
        }
        return work(actions[what])

    of(2)  # what is imported or found late
    small, middle, large = of(10), of(30), of(50)
    assert large - middle <= 1.05 * (middle - small)


def test_sums_that_are_added_up_elsewhere_have_the_order_of_the_kernels(built: list[Plan]) -> None:
    """Of chunks into parameters and of parameters into the norm, as processes add up (torch/sharded): bit for bit."""
    rng = np.random.default_rng(0)
    for chunks in (1, 3, 31, 32, 33, 70):
        grads = [rng.standard_normal(CHUNK * chunks - 5).astype(np.float32), *rng.standard_normal((chunks, 3))]
        opt = fastopt.SGD([np.zeros_like(g) for g in grads])
        opt.step(grads, max_norm=1.0)
        plan = built[-1]
        assert isinstance(plan, HostPlan)
        table: Any = plan._table(norms=True)
        counts = np.bincount(table.chunks[:, 0])
        assert counts.tolist() == [chunks, *[1] * chunks]
        squares = add_up(table.partials[:, [GRADIENT]], counts)
        np.testing.assert_array_equal(squares, table.segments["sums"][:, [GRADIENT]], strict=True)
        assert add_up(squares, np.array([len(squares)])) == table.total
