"""The suite can fail: optimizers with one mistake each, put before the comparisons that the other tests use.

Every mistake is one that some implementation made, or that is easily made. The wrong rules are compiled by Numba, so
this file also tests rules of one's own.
"""

import dataclasses
import math

import numba
import numpy as np
import pytest
from cases import CASES, Case
from compare import PARAMETER, assert_close, assert_same_bits, build, case_problem, check_steps, snapshot
from fastopt.kernels.registry import RULES

import fastopt

every_dtype = pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.full)])

# --- wrong steps -----------------------------------------------------------------------------------------------------


@numba.njit(error_model="numpy")
def adamw(p, g, m, v, h):
    """Adam's moments, and its step."""
    m = h.beta1 * m + h.one_minus_beta1 * g
    v = h.beta2 * v + h.one_minus_beta2 * (g * g)
    return h.step_size * m / (math.sqrt(v) * h.unbias_root + h.eps), m, v


def adamw_without_decay(p, g, m, v, h):
    u, m, v = adamw(p, g, m, v, h)
    return p - u, m, v


def adamw_with_eps_before_the_correction(p, g, m, v, h):
    _, m, v = adamw(p, g, m, v, h)
    return h.decay * p - h.step_size * m / ((math.sqrt(v) + h.eps) * h.unbias_root), m, v


def adamw_with_eps_inside_the_root(p, g, m, v, h):
    _, m, v = adamw(p, g, m, v, h)
    return h.decay * p - h.step_size * m / math.sqrt(v * h.unbias_root * h.unbias_root + h.eps), m, v


def amsgradw_that_forgets_the_maximum(p, g, m, v, v_max, h):
    _, m, v = adamw(p, g, m, v, h)
    larger = v_max if v_max > v else v
    return h.decay * p - h.step_size * m / (math.sqrt(larger) * h.unbias_root + h.eps), m, v, v_max


def amsgradw_without_the_maximum(p, g, m, v, v_max, h):
    u, m, v = adamw(p, g, m, v, h)
    return h.decay * p - u, m, v, v


def lion_with_the_new_momentum(p, g, m, h):
    m = h.beta2 * m + h.one_minus_beta2 * g
    u = h.one if m > h.zero else (-h.one if m < h.zero else m)
    return p - h.lr * (u + h.weight_decay * p), m


# --- wrong scalars ---------------------------------------------------------------------------------------------------


ADAMW, MOMENTUM, SGD = (RULES[name].scalars for name in ("adamw", "momentum", "sgd"))


def lr_twice(t, o):
    h = ADAMW(t, o)
    return h._replace(step_size=h.step_size * o["lr"])


def difference_in_float32(t, o):
    return ADAMW(t, o)._replace(one_minus_beta2=float(np.float32(1) - np.float32(o["betas"][1])))


# What is wrong, the rule, and what replaces its part.
MISTAKES = {
    "dropped decay": ("adamw", {"step": adamw_without_decay}),
    "coupled decay": ("adamw", {"scalars": RULES["adam"].scalars}),
    "eps before the correction": ("adamw", {"step": adamw_with_eps_before_the_correction}),
    "eps inside the root": ("adamw", {"step": adamw_with_eps_inside_the_root}),
    "swapped betas": ("adamw", {"scalars": lambda t, o: ADAMW(t, {**o, "betas": o["betas"][::-1]})}),
    "no bias correction": ("adamw", {"scalars": lambda t, o: ADAMW(t, o)._replace(step_size=o["lr"], unbias_root=1.0)}),
    "steps counted from zero": ("adamw", {"scalars": lambda t, o: ADAMW(t + 1, o)}),
    "lr twice": ("adamw", {"scalars": lr_twice}),
    "1 - beta formed in float32": ("adamw", {"scalars": difference_in_float32}),
    "lr twice in SGD": ("sgd", {"scalars": lambda t, o: SGD(t, o)._replace(lr=o["lr"] ** 2)}),
    "first gradient damped": ("momentum", {"scalars": lambda t, o: MOMENTUM(t + 1, o)}),
    "Nesterov where there is none": ("momentum", {"scalars": lambda t, o: MOMENTUM(t, o)._replace(nesterov=1.0)}),
    "maximum not stored": ("amsgradw", {"step": amsgradw_that_forgets_the_maximum}),
    "maximum not taken": ("amsgradw", {"step": amsgradw_without_the_maximum}),
    "Lion steps with the new momentum": ("lion", {"step": lion_with_the_new_momentum}),
    "no trust ratio": ("lars", {"ratio": lambda sums, h: h.ratio}),
    "no decay in the ratio": ("lars", {"ratio": lambda sums, h: h.trust_coefficient * math.sqrt(sums[0] / sums[1])}),
}

# An averaging that forgets slowly, so that digits lost in 1 - beta2 show; fast, so that the maximum matters.
TELLING = Case("AdamW", "adamw", {"lr": 0.01, "betas": (0.8, 0.999), "eps": 0.01, "weight_decay": 0.1})
MAXIMUM = Case("AdamW", "amsgradw", {**TELLING.hyper, "betas": (0.8, 0.9), "amsgrad": True})
CASE = {case.rule: case for case in (*CASES, TELLING, MAXIMUM)}  # of several the last


def build_with(**changes):
    """Builds the optimizer of a case with another rule, which no library has."""

    def build_changed(case, params):
        rule = dataclasses.replace(RULES[case.rule], name=f"changed {case.rule}", **changes)

        class Changed(getattr(fastopt, case.optimizer)):
            def select_rule(self, options):
                return rule

        return Changed(params, **case.hyper)

    return build_changed


@every_dtype
@pytest.mark.parametrize("rule", sorted({rule for rule, _ in MISTAKES.values()}))
def test_the_rule_itself_passes(rule, dtype):
    """As compiled by Numba under another name: it is the mistake, not the change, that the next test finds."""
    check_steps(CASE[rule], dtype, build=build_with())


@every_dtype
@pytest.mark.parametrize(("rule", "changes"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_found(rule, changes, dtype):
    with pytest.raises(AssertionError, match="in eps of its operands: off by"):
        check_steps(CASE[rule], dtype, build=build_with(**changes))


# --- wrong loops -----------------------------------------------------------------------------------------------------


def build_that_restores(pick, what):
    """Builds an optimizer that leaves some elements as they were: of the parameters, or of their states."""

    class Skips(fastopt.AdamW):
        def step(self, grads, **options):
            before = {n: self._picked(n).copy() for n in self.state}
            info = super().step(grads, **options)
            for name, kept in before.items():
                self._picked(name)[...] = kept
            return info

        def _picked(self, name):
            array = self.param_groups[0]["params"][name] if what == PARAMETER else self.state[name][what]
            return pick(array.reshape(-1))

    return lambda case, params: Skips(params, **case.hyper)


@every_dtype
@pytest.mark.parametrize("what", [PARAMETER, "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize(
    "pick",
    [
        pytest.param(lambda a: a[a.size - a.size % 4 :], id="tail"),
        pytest.param(lambda a: a[a.size // 8 * 8 - 1 : a.size // 8 * 8], id="last of the vectors"),
        pytest.param(lambda a: a[:1], id="first element"),
    ],
)
def test_a_skipped_element_is_found(pick, what, dtype):
    with pytest.raises(AssertionError, match="in eps of its operands: off by"):
        check_steps(TELLING, dtype, build=build_that_restores(pick, what))


# --- the comparisons themselves --------------------------------------------------------------------------------------


def two_snapshots():
    params, (grads,) = case_problem(TELLING, "float32", 1)
    opt = build(TELLING, params)
    opt.step(grads)
    return snapshot(params, opt), snapshot(params, opt)


@pytest.mark.parametrize("key", [PARAMETER, "exp_avg", "exp_avg_sq"])
def test_one_wrong_bit_is_found(key):
    got, want = two_snapshots()
    assert_same_bits(got, want, "equal")
    array = got["long"][key]
    array[3, 77] = np.nextafter(array[3, 77], np.float32(np.inf))
    with pytest.raises(AssertionError, match="differs in 1 of 1028 elements, first in 848"):
        assert_same_bits(got, want, "one bit")


def test_the_sign_of_zero_is_a_bit():
    got, want = two_snapshots()
    got["scale"]["exp_avg"], want["scale"]["exp_avg"] = np.float32(0.0), np.float32(-0.0)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_bits(got, want, "sign")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1.0])
def test_one_wrong_element_is_found(value):
    got, want = two_snapshots()
    assert_close(got, want, rtol=1e-5, atol=1e-6, where="equal")
    got["long"][PARAMETER][3, 77] += value
    with pytest.raises(AssertionError, match="element 848"):
        assert_close(got, want, rtol=1e-5, atol=1e-6, where="one element")


def test_a_missing_state_and_a_wrong_step_are_found():
    got, want = two_snapshots()
    del got["bias"]["exp_avg"]
    got["weight"]["step"] = 2
    with pytest.raises(AssertionError, match="step of weight"):
        assert_same_bits(got, want, "step")
    got["weight"]["step"] = 1
    with pytest.raises(AssertionError, match="the states of bias"):
        assert_close(got, want, rtol=1.0, atol=1.0, where="state")
