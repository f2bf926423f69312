"""Learning-rate schedules against torch.optim.lr_scheduler over whole runs, at their edges, and refused."""

import copy
import math
import pickle

import numpy as np
import pytest

from fastopt import schedules
from fastopt.schedules import constant, cosine, exponential, inverse_sqrt, one_cycle, polynomial, step, warmup

ONE_OF_EACH = [
    *(constant(0.1), step(0.1, 30, 0.5), exponential(0.1, 0.97), polynomial(0.1, 100, 2.0, 0.01)),
    *(cosine(0.1, 100, 0.01), inverse_sqrt(0.1, 50.0), one_cycle(0.1, 100), warmup(cosine(0.1, 90), 10)),
]


def torch_run(make, n):
    """Learning rates that torch uses in n steps; ``make`` builds the scheduler from (torch's module, optimizer)."""
    torch = pytest.importorskip("torch")
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3, momentum=0.9)
    scheduler = make(torch.optim.lr_scheduler, opt)
    lrs = [opt.param_groups[0]["lr"]]
    for _ in range(n - 1):
        opt.step()
        scheduler.step()
        lrs.append(opt.param_groups[0]["lr"])
    return lrs


AGAINST_TORCH = {
    "constant": (constant(0.3), lambda s, o: s.LambdaLR(o, lambda k: 1.0), 50),
    "step": (step(0.3, 7, 0.5), lambda s, o: s.StepLR(o, 7, 0.5), 100),
    "step default": (step(0.3, 7), lambda s, o: s.StepLR(o, 7), 100),
    "exponential": (exponential(0.3, 0.95), lambda s, o: s.ExponentialLR(o, 0.95), 200),
    "growing": (exponential(0.3, 1.05), lambda s, o: s.ExponentialLR(o, 1.05), 200),
    "linear": (polynomial(0.3, 40), lambda s, o: s.PolynomialLR(o, 40), 60),
    "polynomial": (polynomial(0.3, 40, 2.5), lambda s, o: s.PolynomialLR(o, 40, 2.5), 60),
    "cosine": (cosine(0.3, 50), lambda s, o: s.CosineAnnealingLR(o, 50), 51),
    "cosine end": (cosine(0.3, 50, 0.02), lambda s, o: s.CosineAnnealingLR(o, 50, 0.02), 51),
    "one_cycle": (one_cycle(0.3, 97), lambda s, o: s.OneCycleLR(o, 0.3, 97), 97),
    "one_cycle linear": (one_cycle(0.3, 97, 0.25, "linear", 10.0, 100.0),
        lambda s, o: s.OneCycleLR(o, 0.3, 97, None, None, 0.25, "linear", div_factor=10.0, final_div_factor=100.0), 97),
    "one_cycle falls at once": (one_cycle(0.3, 9, 0.0), lambda s, o: s.OneCycleLR(o, 0.3, 9, pct_start=0.0), 9),
    "one_cycle rises only": (one_cycle(0.3, 9, 1.0), lambda s, o: s.OneCycleLR(o, 0.3, 9, pct_start=1.0), 9),
    "one_cycle of one step": (one_cycle(0.3, 1), lambda s, o: s.OneCycleLR(o, 0.3, 1), 1),
    "warmup constant": (warmup(constant(0.3), 8, 0.1), lambda s, o: s.LinearLR(o, 0.1, total_iters=8), 30),
    "warmup cosine": (warmup(cosine(0.3, 50, 0.01), 10, 0.2),
        lambda s, o: s.SequentialLR(o, [s.LinearLR(o, 0.2, total_iters=10), s.CosineAnnealingLR(o, 50, 0.01)], [10]),
        60),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # SequentialLR's own use of a deprecated argument
@pytest.mark.parametrize("name", AGAINST_TORCH)
def test_whole_runs_agree_with_torch(name):
    schedule, make, n = AGAINST_TORCH[name]
    # Torch multiplies up from step to step; 200 such roundings stay below 1e-13.
    np.testing.assert_allclose([schedule(k) for k in range(n)], torch_run(make, n), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("warm", [1, 7, 4000])
def test_inverse_sqrt_after_warmup_is_vaswani_and_t5(warm):
    d = 512
    vaswani = warmup(inverse_sqrt((d * warm) ** -0.5, warm), warm)
    t5 = warmup(inverse_sqrt(warm**-0.5, warm), warm, start=1.0)
    for n in range(1, 5 * warm, max(1, warm // 50)):
        assert vaswani(n) == pytest.approx(d**-0.5 * min(n**-0.5, n * warm**-1.5), rel=1e-14)
        assert t5(n) == pytest.approx(1 / math.sqrt(max(n, warm)), rel=1e-14)


@pytest.mark.parametrize("end", [0.0, 1e-5, 0.03, 0.5])
@pytest.mark.parametrize("make", [polynomial, cosine])
def test_first_and_last_values_are_exact_and_the_last_stays(make, end):
    lr = make(0.1, total=70, end=end)
    assert lr(0) == 0.1
    assert lr(70) == lr(71) == lr(10**9) == end
    run = [lr(k) for k in range(71)]
    assert run == sorted(run, reverse=end < 0.1)


def test_one_cycle_peak_and_end():
    lr = one_cycle(0.1, 21, pct_start=1 / 3)  # the rise ends on step 6
    assert lr(6) == max(lr(k) for k in range(30)) == 0.1
    assert lr(20) == lr(21) == lr(10**9) == pytest.approx(0.1 / 25 / 1e4, rel=1e-15)
    assert one_cycle(0.1, 10, pct_start=0.1)(0) == 0.1  # a rise of no length, where torch divides by zero


@pytest.mark.parametrize("inner", ONE_OF_EACH, ids=repr)
def test_warmup_stands_in_front_of_any_schedule(inner):
    lr = warmup(inner, 5, start=0.5)
    assert lr(0) == 0.5 * inner(0)
    ramp = np.linspace(0.5, 1.0, 6) * inner(0)
    np.testing.assert_allclose([lr(k) for k in range(6)], ramp, rtol=1e-15)
    assert [lr(5 + k) for k in range(200)] == [inner(k) for k in range(200)]
    assert [warmup(inner, 0)(k) for k in range(9)] == [inner(k) for k in range(9)]


def test_warmup_of_a_plain_function():
    assert [warmup(lambda k: 1.0 / (1 + k), 2)(k) for k in range(4)] == [0.0, 0.5, 1.0, 0.5]


@pytest.mark.parametrize("schedule", ONE_OF_EACH, ids=repr)
def test_pickle_copy_repr_and_equality(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule == copy.deepcopy(schedule)
    assert hash(again) == hash(schedule)
    assert eval(repr(schedule), vars(schedules)) == schedule
    assert [again(k) for k in range(150)] == [schedule(k) for k in range(150)]
    with pytest.raises(AttributeError):
        schedule.steps = 3


@pytest.mark.parametrize("schedule", ONE_OF_EACH, ids=repr)
def test_values_are_floats_in_any_order_of_calls(schedule):
    forwards = [schedule(k) for k in range(300)]
    assert [schedule(k) for k in reversed(range(300))] == forwards[::-1]
    assert all(type(lr) is float and lr >= 0 for lr in forwards)
    assert schedule(np.int64(17)) == forwards[17]


def test_numpy_numbers_become_python_numbers():
    lr = cosine(np.float32(0.5), np.int64(10), 0)
    assert repr(lr) == "cosine(lr=0.5, total=10, end=0.0)"
    assert type(lr(3)) is float


NAN, INF = math.nan, math.inf
BEYOND = "the learning rate after 10000 steps is beyond the range of float64"
REFUSED = [
    (lambda: constant(NAN), ValueError, "constant: lr must be in [0, inf), got nan."),
    (lambda: constant(INF), ValueError, "constant: lr must be in [0, inf), got inf."),
    (lambda: constant(-0.1), ValueError, "constant: lr must be in [0, inf), got -0.1."),
    (lambda: constant(10**400), ValueError, f"constant: lr must be in [0, inf), got {10**400}."),
    (lambda: constant("0.1"), TypeError, "constant: lr must be a number in [0, inf), got '0.1'."),
    (lambda: constant(None), TypeError, "constant: lr must be a number in [0, inf), got None."),
    (lambda: step(0.1, 0), ValueError, "step: step_size must be at least 1, got 0."),
    (lambda: step(0.1, 2.5), TypeError, "step: step_size must be a whole number, got 2.5."),
    (lambda: step(0.1, 3, NAN), ValueError, "step: gamma must be in (0, inf), got nan."),
    (lambda: exponential(0.1, 0.0), ValueError, "exponential: gamma must be in (0, inf), got 0.0."),
    (lambda: polynomial(0.1, 10, 0.0), ValueError, "polynomial: power must be in (0, inf), got 0.0."),
    (lambda: polynomial(0.1, 10, end=NAN), ValueError, "polynomial: end must be in [0, inf), got nan."),
    (lambda: cosine(0.1, 1e3), TypeError, "cosine: total must be a whole number, got 1000.0."),
    (lambda: cosine(0.1, -1), ValueError, "cosine: total must be at least 1, got -1."),
    (lambda: cosine(NAN, 10), ValueError, "cosine: lr must be in [0, inf), got nan."),
    (lambda: inverse_sqrt(0.1, 0), ValueError, "inverse_sqrt: timescale must be in (0, inf), got 0."),
    (lambda: one_cycle(NAN, 10), ValueError, "one_cycle: max_lr must be in [0, inf), got nan."),
    (lambda: one_cycle(0.1, 10, 1.5), ValueError, "one_cycle: pct_start must be in [0, 1], got 1.5."),
    (lambda: one_cycle(0.1, 9, 0.3, "s"), ValueError, "one_cycle: anneal_strategy must be 'cos' or 'linear', got 's'."),
    (lambda: one_cycle(0.1, 10, div_factor=0), ValueError, "one_cycle: div_factor must be in (0, inf), got 0."),
    (lambda: warmup(0.1, 10), TypeError, "warmup: schedule must be a schedule or a function of k, got 0.1."),
    (lambda: warmup(constant(0.1), -1), ValueError, "warmup: steps must be at least 0, got -1."),
    (lambda: warmup(constant(0.1), 5, NAN), ValueError, "warmup: start must be in [0, 1], got nan."),
    (lambda: warmup(constant(0.1), 5, 1.1), ValueError, "warmup: start must be in [0, 1], got 1.1."),
    (lambda: cosine(0.1, 10)(-1), ValueError, "cosine: k must be at least 0, got -1."),
    (lambda: cosine(0.1, 10)(NAN), TypeError, "cosine: k must be a whole number, got nan."),
    (lambda: exponential(0.1, 2.0)(10**4), ValueError, f"{exponential(0.1, 2.0)}: {BEYOND}."),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED, ids=[message[:70] for _, _, message in REFUSED])
def test_refusals_name_function_argument_and_range(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
