"""The comparisons that the suite rests on: every step with the reference, and bit for bit.

test_negative_controls.py shows that they fail for optimizers that are wrong.
"""

import ml_dtypes
import numpy as np
from cases import CASES, SHAPES, problem
from reference import REFERENCES, initial_state

import fastopt

PARAMETER = "parameter"
CASE = {case.rule: case for case in CASES}  # of several the last, which has the most options
DTYPES = {n: np.dtype(n) for n in ("float32", "float64", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}

# In units of eps times the operands, see `operands`: each operation rounds by half a unit at most, and a result takes
# up to a dozen, whose errors seldom add up. Largest seen: 3.1 for parameters (LARS), 4.3 for states (Adadelta's
# acc_delta, a square of a quotient of roots).
LIMIT_PARAMETER = 4.0
LIMIT_STATE = 5.0


def build(case, params):
    """The optimizer of a case."""
    return getattr(fastopt, case.optimizer)(params, **case.hyper)


def options_of(rule):
    """The options of a rule's case."""
    return build(CASE[rule.name], [np.zeros(1)]).param_groups[0]


def rounded(values, dtype):
    """What NumPy and ml_dtypes, which share nothing with the kernels, make of numbers; too large ones are infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(DTYPES[dtype])


def every_kind(step=1):
    """Each number that keeps 10 bits of fraction, and beside it the ties and what lies just before and after them."""
    upper = np.arange(0, 2**19, step, dtype=np.uint32)[:, None] << 13
    lower = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF], np.uint32)
    return np.ascontiguousarray((upper | lower).reshape(-1)).view(np.float32)


def guarded(values, shift=0):
    """A copy that begins `shift` elements after a multiple of 16 bytes, between bytes that nobody may touch."""
    memory = np.full(values.nbytes + 208, 0xA5, np.uint8)
    start = 96 - (memory.ctypes.data + 96) % 16 + shift * values.itemsize
    array = memory[start : start + values.nbytes].view(values.dtype)
    array[...] = values
    return array


def assert_intact(array):
    """Nobody wrote around what `guarded` returned."""
    start = array.ctypes.data - array.base.ctypes.data
    assert (np.concatenate([array.base[:start], array.base[start + array.nbytes :]]) == 0xA5).all()


def case_problem(case, dtype, steps, *, seed=0, grad_dtype=None, **options):
    """Parameters and gradients for a case.

    Rprop multiplies neighbouring gradients, as torch does, and the reference does not: for it tiny ones must not be so
    tiny that the product underflows.
    """
    tiny = 1e-15 if case.optimizer == "Rprop" else 1e-30
    dtypes, rng = (DTYPES[dtype], DTYPES[grad_dtype or dtype]), np.random.default_rng(seed)
    return problem(rng, SHAPES, dtypes[0], steps, grad_dtype=dtypes[1], tiny=tiny, **options)


def snapshot(params, opt):
    """Copies of all that a step may change: of each parameter its values as PARAMETER, and states by torch's names."""
    state = opt.state
    return {
        name: {PARAMETER: p.copy()} | {k: v.copy() if isinstance(v, np.ndarray) else v for k, v in state[name].items()}
        for name, p in params.items()
    }


# --- with the reference ----------------------------------------------------------------------------------------------


def exact(values):
    """Arrays in extended precision, in which the reference's own rounding does not count; numbers as they are."""
    return {k: v.astype(np.longdouble) if isinstance(v, np.ndarray) else v for k, v in values.items()}


def operands(case, p, g, state, t):
    """How large the terms are that each result is a sum of: the result for absolute values, where none cancel.

    A bound in eps of this survives cancellation, and is not loosened by operands that the result does not have.
    """
    positive = {**case.hyper, "maximize": False}
    after, new = REFERENCES[case.optimizer](abs(p), abs(g), {k: abs(v) for k, v in state.items()}, t, **positive)
    sizes = {PARAMETER: np.maximum(abs(p), abs(abs(p) - after))} | {k: abs(v) for k, v in new.items()}
    if "ax" in sizes:  # a mean of parameters, not of gradients
        sizes["ax"] = np.maximum(sizes[PARAMETER], abs(state["ax"]))
    return sizes


def check_step(case, before, grads, after, t):
    """Compare every element after step `t` with one step of the reference from what was before.

    Returns the largest error in eps of the operands.
    """
    worst = 0.0
    for name, was in before.items():
        dtype = was[PARAMETER].dtype
        p, g = exact({"p": was[PARAMETER], "g": grads[name]}).values()
        state = {**initial_state(case.optimizer, p, **case.hyper), **exact(was)}
        state = {k: v for k, v in state.items() if k not in (PARAMETER, "step")}
        want_p, want = REFERENCES[case.optimizer](p, g, state, t, **case.hyper)
        got = after[name]
        assert got["step"] == t
        assert set(got) == {PARAMETER, "step", *want}, f"{case.id}: the states of {name} are {sorted(got)}"
        sizes = operands(case, p, g, state, t)
        for key, value in {PARAMETER: want_p, **want}.items():
            info = np.finfo(np.float64 if isinstance(got[key], float) else dtype)
            assert isinstance(got[key], float) or got[key].dtype == dtype
            error = abs(np.asarray(got[key], np.longdouble) - value)
            error = error / (float(info.eps) * np.maximum(sizes[key], float(info.smallest_normal)))
            limit = LIMIT_PARAMETER if key == PARAMETER else LIMIT_STATE
            _refuse(error, limit, got[key], value, f"{case.id}, step {t}: {key} of {name} in eps of its operands")
            worst = max(worst, float(np.max(error, initial=0.0)))
    return worst


def check_steps(case, dtype, *, steps=8, seed=0, build=build):
    """Compare each step of a run with a step of the reference from equal state; the largest error in eps."""
    params, gradients = case_problem(case, dtype, steps, seed=seed)
    opt, worst = build(case, params), 0.0
    for t, grads in enumerate(gradients, 1):
        before = snapshot(params, opt)
        opt.step(grads)
        worst = max(worst, check_step(case, before, grads, snapshot(params, opt), t))
    return worst


def assert_close(got, want, *, rtol, atol, where):
    """Compare parameters and states, no element excepted."""
    for name in want:
        assert set(got[name]) == set(want[name]), f"{where}: the states of {name} are {sorted(got[name])}"
        for key, value in want[name].items():
            a, b = np.asarray(got[name][key], np.float64), np.asarray(value, np.float64)
            _refuse(abs(a - b) / (atol + rtol * abs(b)), 1.0, a, b, f"{where}: {key} of {name} in tolerances")


def _refuse(error, limit, got, want, what):
    """Fail if an error exceeds the limit or is NaN, and name the worst element."""
    if not np.all(error <= limit):
        at = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
        error, got, want = (np.ravel(x)[at] for x in (error, got, want))
        raise AssertionError(f"{what}: off by {error:.3g}, not at most {limit}; element {at} is {got!r}, not {want!r}")


# --- bit for bit -----------------------------------------------------------------------------------------------------


def bits(array):
    """The bits of an array as integers, all NaN alike: which NaN an operation returns differs between machines."""
    array = np.array(array)
    if array.dtype.kind not in "iu":
        array[np.isnan(array)] = np.nan
    return array.view(f"u{array.dtype.itemsize}")


def padding(buffer):
    """The elements of a FlatBuffer that belong to no array."""
    inside = np.zeros(buffer.data.size, bool)
    for name, array in buffer.items():
        inside[buffer.offsets[name] : buffer.offsets[name] + array.size] = True
    return buffer.data[~inside]


def assert_same_bits(got, want, where):
    """Compare parameters, states and step counts bit for bit, signs of zeros included."""
    assert list(got) == list(want)
    for name in want:
        assert set(got[name]) == set(want[name]), f"{where}: the states of {name} are {sorted(got[name])}"
        for key, value in want[name].items():
            a, b = np.asarray(got[name][key]), np.asarray(value)
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{where}: {key} of {name}"
            if a.tobytes() == b.tobytes():
                continue
            differ = np.flatnonzero(bits(a).ravel() != bits(b).ravel())
            assert not differ.size, (
                f"{where}: {key} of {name} differs in {differ.size} of {a.size} elements, first in {differ[0]}: "
                f"{a.ravel()[differ[0]]!r}, not {b.ravel()[differ[0]]!r}"
            )
