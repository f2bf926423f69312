"""Every rule against the references: float32 and float64 step by step, 16-bit storage bit for bit, folded factors."""

import math

import numpy as np
import pytest
from cases import CASES, Case
from compare import (
    PARAMETER,
    assert_close,
    assert_same_bits,
    build,
    case_problem,
    check_step,
    check_steps,
    exact,
    rounded,
    snapshot,
)
from fastopt.kernels.dtypes import PAIRS
from fastopt.kernels.registry import RULES
from reference import REFERENCES, clip_coefficient, global_norm, initial_state
from refusal import CLASSES

import fastopt

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
compute_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def test_every_rule_has_a_case_and_every_optimizer_a_reference():
    assert {case.rule for case in CASES} == set(RULES)
    assert {kind.__name__ for kind in CLASSES} == set(REFERENCES) == {case.optimizer for case in CASES}


@every_case
def test_options_select_the_rule(case):
    opt = build(case, [np.zeros(1)])
    assert opt.select_rule(opt.param_groups[0]) is RULES[case.rule]


@every_case
@compute_dtype
def test_each_step_from_equal_state(case, dtype, isa):
    # Eight steps: RAdam rectifies from the sixth on, and t0 of ASGD is five.
    check_steps(case, dtype)


@every_case
@compute_dtype
def test_free_steps(case, dtype):
    """Ten steps on normal data. Tolerances as in test_beside_torch.py, in float64 the same number of its eps."""
    rtol, atol = (1e-5, 1e-6) if dtype == "float32" else (2e-14, 2e-15)
    params, gradients = case_problem(case, dtype, 10, awkward=False)
    p = exact(params)
    states = {name: initial_state(case.optimizer, p[name], **case.hyper) for name in p}
    opt = build(case, params)
    for t, grads in enumerate(gradients, 1):
        opt.step(grads)
        g = exact(grads)
        for name in p:
            p[name], states[name] = REFERENCES[case.optimizer](p[name], g[name], states[name], t, **case.hyper)
        want = {name: {PARAMETER: p[name], "step": t, **states[name]} for name in p}
        assert_close(snapshot(params, opt), want, rtol=rtol, atol=atol, where=f"{case.id}, step {t}")


@every_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_storage_is_float32_rounded_once(case, dtype, isa):
    params, gradients = case_problem(case, dtype, 8)
    wide = {name: p.astype(np.float32) for name, p in params.items()}
    opt, wide_opt = build(case, params), build(case, wide)
    for t, grads in enumerate(gradients, 1):
        opt.step(grads)
        wide_opt.step({name: g.astype(np.float32) for name, g in grads.items()})
        want = snapshot(wide, wide_opt)
        for name, p in wide.items():
            want[name][PARAMETER] = rounded(p, dtype)
            p[...] = want[name][PARAMETER]  # the next step starts from what was stored
        if isinstance(wide_opt, fastopt.LARS):
            wide_opt.weights_written()
        assert_same_bits(snapshot(params, opt), want, f"{case.id}, step {t}")


@every_case
@pytest.mark.parametrize("grad_dtype", [g for p, g in PAIRS if (p, p) != (p, g)])
def test_16_bit_gradients_are_float32_gradients(case, grad_dtype, isa):
    params, gradients = case_problem(case, "float32", 4, grad_dtype=grad_dtype)
    wide = {name: p.copy() for name, p in params.items()}
    opt, wide_opt = build(case, params), build(case, wide)
    for t, grads in enumerate(gradients, 1):
        opt.step(grads)
        wide_opt.step({name: g.astype(np.float32) for name, g in grads.items()})
        assert_same_bits(snapshot(params, opt), snapshot(wide, wide_opt), f"{case.id}, step {t}")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_names_the_options_that_its_scalars_read(rule):
    read = set()

    class Recorded(dict):
        def __getitem__(self, name):
            read.add(name)
            return super().__getitem__(name)

    for value in (0.0, 0.5):  # flags off, and on
        options = Recorded({name: value if n == 1 else (value,) * n for name, n in rule.counts.items()})
        formed = rule.scalars(3, options, rule.carry({"lr": value}))[0] if rule.carry else rule.scalars(3, options)
        assert [type(x) for x in formed] == [float] * len(rule.Scalars._fields)
    assert read <= set(rule.options)  # those of all rules among which options choose


# --- what a step folds into the gradient -----------------------------------------------------------------------------


def two_of_a_case(case, dtype, **replaced):
    """Gradients, and twice the same parameters and optimizer, the second with some options replaced."""
    params, gradients = case_problem(case, dtype, 3, seed=1)
    other = {name: p.copy() for name, p in params.items()}
    changed = Case(case.optimizer, case.rule, {**case.hyper, **replaced})
    return gradients, params, build(case, params), other, build(changed, other)


@every_case
def test_maximize_turns_the_sign_of_the_gradient(case):
    turned = not case.hyper.get("maximize", False)
    gradients, params, opt, other, other_opt = two_of_a_case(case, "float32", maximize=turned)
    for t, grads in enumerate(gradients, 1):
        opt.step(grads)
        other_opt.step({name: np.asarray(-g) for name, g in grads.items()})
        assert_same_bits(snapshot(other, other_opt), snapshot(params, opt), f"{case.id}, step {t}")


@every_case
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("grad_scale", "max_norm"),
    [
        *((3.0, None), (1.0, 0.5), (3.0, math.inf)),
        *(pytest.param(*x, marks=pytest.mark.full) for x in ((1024.0, None), (3.0, 0.5), (3.0, 1e9))),
    ],
)
def test_unscaling_and_clipping_are_one_factor(case, dtype, grad_scale, max_norm):
    gradients, params, opt, by_hand, plain = two_of_a_case(case, dtype)
    for t, grads in enumerate(gradients, 1):
        before = snapshot(params, opt)
        info = opt.step(grads, grad_scale=grad_scale, max_norm=max_norm)
        factor = 1.0 / grad_scale
        if max_norm is None:
            assert info.grad_norm is None
        else:
            norm = global_norm([g.astype(np.float64) / grad_scale for g in grads.values()])
            assert info.grad_norm == pytest.approx(norm, rel=1e-13)
            factor *= clip_coefficient(info.grad_norm, max_norm)
        assert not info.skipped
        multiplied = {name: np.asarray(g * g.dtype.type(factor)) for name, g in grads.items()}
        after = snapshot(params, opt)
        if isinstance(opt, fastopt.LARS):  # its norm is not that of the rounded gradients
            check_step(case, before, multiplied, after, t)
        else:
            plain.step(multiplied)
            assert_same_bits(after, snapshot(by_hand, plain), f"{case.id}, step {t}")


@every_case
def test_a_skipped_step_changes_nothing(case):
    gradients, params, opt, other, other_opt = two_of_a_case(case, "float32")
    for t, grads in enumerate(gradients, 1):
        before = snapshot(params, opt)
        bad, kept = ({name: g.copy() for name, g in grads.items()} for _ in range(2))
        bad["long"][-1, -1] = (np.inf, -np.inf, np.nan)[t - 1]
        info = opt.step(bad, skip_nonfinite=True, zero_grads=True)
        assert info.skipped
        assert not math.isfinite(info.grad_norm)
        assert_same_bits(snapshot(params, opt), before, f"{case.id}, skipped step")
        assert not opt.step(kept, skip_nonfinite=True, zero_grads=True).skipped
        assert not any(np.any(g) for g in (*bad.values(), *kept.values()))
        other_opt.step(grads)
        assert_same_bits(snapshot(params, opt), snapshot(other, other_opt), f"{case.id}, step {t}")
