"""Averages of the parameters: their bits, when they begin, what moves them, and the parameters' change of places."""

import math
from typing import Any

import numpy as np
import pytest
from cases import RULE_CASES, SHAPES
from compare import DTYPES, assert_same_bits, bits, build, case_problem, snapshot
from fastopt.kernels.dtypes import COMPUTE
from isas import native_isas

import fastopt

pytestmark = pytest.mark.usefixtures("always_threaded")
F32 = np.float32


def averaged(e: Any, w: Any, weight: float) -> Any:
    """One averaging, as NumPy computes it; None is no average yet."""
    dtype = DTYPES[COMPUTE[w.dtype.name]].type
    with np.errstate(over="ignore", invalid="ignore"):
        return w.astype(dtype) if e is None else e + dtype(weight) * (w.astype(dtype) - e)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RULE_CASES, ids=lambda case: case.id)
def test_averages_have_the_bits_of_numpys_own_and_change_nothing_else(case: Any, dtype: str, backend: Any) -> None:
    """Flat or not, in 1 thread or 2, all sums before the first update or not, with every instruction set."""
    params, grads = case_problem(case, dtype, 3)
    plain = build(case, alone := {name: w.copy() for name, w in params.items()})
    runs = []
    numba = ["numba"] if case.rule == "lars" and dtype == "float32" else []
    for k, isa in enumerate([*native_isas(), native_isas()[-1], *numba]):
        backend(isa)
        own = {name: w.copy() for name, w in params.items()}
        own = fastopt.FlatBuffer.from_arrays(own) if k % 2 else own
        runs.append((own, getattr(fastopt, case.optimizer)(own, **case.hyper, ema_decay=0.875), k))
    e: dict[str, Any] = dict.fromkeys(params)
    for gradient in grads:
        plain.step(gradient)
        e = {name: averaged(e[name], w, 0.125) for name, w in alone.items()}
        for own, opt, k in runs:
            fastopt.set_num_threads(1 + k % 2)
            opt.step(fastopt.FlatBuffer.from_arrays(gradient) if k % 2 else gradient)
            opt._plan.combine_ratios = (lambda *_: None) if k == 2 else None  # type: ignore[union-attr]
            found = snapshot(own, opt)
            for name in params:
                assert np.array_equal(bits(found[name].pop("ema")), bits(e[name])), (k, name)
                found[name].pop("ema_step")
            assert_same_bits(found, snapshot(alone, plain), f"{case.id}, {k}")


def train(opt: Any, seeds: Any, **options: Any) -> None:
    for seed in seeds:
        rng = np.random.default_rng(seed)
        opt.step({p.name: rng.standard_normal(p.shape).astype(p.dtype) for p in opt._parameters}, **options)


def made(dtype: str = "float32", **options: Any) -> tuple[dict[str, Any], fastopt.NAdam]:
    rng = np.random.default_rng(0)
    params = {name: np.asarray(rng.standard_normal(shape)).astype(DTYPES[dtype]) for name, shape in SHAPES.items()}
    return params, fastopt.NAdam(params, **{"lr": 0.1, "ema_decay": 0.5} | options)  # it carries a number of its own


def test_warmup_forgets_the_beginning_sooner() -> None:
    (params, opt), e = made("float64", ema_decay=0.3, ema_warmup=True), None
    assert "ema" not in opt.state["weight"]
    for n, decay in enumerate([math.nan, 2 / 11, 3 / 12, 0.3, 0.3]):
        train(opt, [n])
        e = averaged(e, params["weight"], 1 - decay)
        assert opt.state["weight"]["ema"].tobytes() == e.tobytes()
        assert opt.state["weight"]["ema_step"] == n + 1


def test_a_decay_of_0_copies_and_a_copy_keeps_signs_and_infinities() -> None:
    w = np.array([-0.0, np.inf, -np.inf, 1e8], F32)
    opt = fastopt.SGD([w], lr=1.0, ema_decay=0.0)
    for last in (1e8, -1.0):
        opt.step([np.array([0, 0, 0, last], F32)])
        assert opt.state["0"]["ema"].tobytes() == w.tobytes()


def test_groups_have_decays_of_their_own_and_what_does_not_step_is_not_averaged() -> None:
    a, b, c, ones = (np.ones(3, F32) for _ in range(4))
    groups = [{"params": {"a": a}}, {"params": {"b": b}, "ema_decay": 0.75}, {"params": {"c": c}, "ema_decay": None}]
    opt = fastopt.SGD(groups, lr=1.0, ema_decay=0.5)
    opt.step([ones, None, ones])  # a = 0, which is copied
    assert opt.step([ones * math.nan, ones, ones], skip_nonfinite=True).skipped
    opt.step([ones, ones, ones])  # a = -1, b = 0: copied
    opt.step([None, ones, ones])  # b = -1
    assert {name: state["ema_step"] for name, state in opt.state.items() if "ema_step" in state} == {"a": 2, "b": 2}
    assert [opt.state[name]["ema"][0] for name in "ab"] == [-0.5, -0.25]
    assert "ema" not in opt.state["c"]


@pytest.mark.parametrize("decay", [0.9, None])
def test_training_resumes_with_the_same_bits(decay: float | None, tmp_path: Any) -> None:
    params, opt = made(ema_warmup=True)
    train(opt, range(3))
    fastopt.save(tmp_path / "x", params, opt)
    again, other = made(ema_decay=decay)
    fastopt.load(tmp_path / "x", again, other)
    train(opt, range(3, 6))
    train(other, range(3, 6))
    assert_same_bits(snapshot(again, other), snapshot(params, opt), "resumed")


def test_an_average_that_is_lacking_begins_as_a_copy() -> None:
    _, without = made(ema_decay=None)
    train(without, range(2))
    again, opt = made()
    train(opt, range(2))
    opt.load_state_dict(without.state_dict())  # an average of others
    for decay, averagings in ((0.5, 1), (None, None), (0.5, 1)):  # switched off, and on again
        opt.param_groups[0]["ema_decay"] = decay
        train(opt, [7])
        assert opt.state["bias"].get("ema_step") == averagings
        assert np.array_equal(opt.state["bias"].get("ema"), again["bias"]) == (averagings == 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_come_back_from_their_averages_bit_for_bit(dtype: str, tmp_path: Any) -> None:
    params, opt = made(dtype)
    train(opt, range(3))
    before, state = snapshot(params, opt), opt.state_dict()
    with pytest.raises(ZeroDivisionError), opt.swap_ema():  # noqa: PT012 - refusals inside, and then an exception
        for name, w in params.items():
            assert w.tobytes() == before[name]["ema"].astype(w.dtype).tobytes()
        calls = [lambda: train(opt, [0]), lambda: opt.load_state_dict(state), lambda: opt.swap_ema().__enter__()]
        calls += [lambda: opt.add_param_group({"params": [w]}), lambda: fastopt.save(tmp_path / "x", params, opt)]
        for refused in [*calls, opt.state_dict, opt.reset_ema]:
            with pytest.raises(RuntimeError, match="the parameters hold their averages"):
                refused()
        params["bias"][0] = 1 / 0
    assert_same_bits(snapshot(params, opt), before, "put back")


def test_averages_begin_anew_from_the_parameters_as_they_are() -> None:
    params, opt = made()
    params["bias"][:] = 3.0
    opt.reset_ema()
    assert (opt.state["bias"]["ema"] == 3.0).all()
    train(opt, [0])
    assert opt.state["bias"]["ema"].tobytes() == averaged(np.full(9, 3, F32), params["bias"], 0.5).tobytes()


@pytest.mark.parametrize("value", [1.0, math.nan, True])
def test_decays_that_cannot_be_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="NAdam: ema_decay must be"):
        made(ema_decay=value)
