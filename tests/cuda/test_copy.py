"""16-bit copies of float32 parameters on a GPU: written by the launch that steps the parameters."""

import math

import numpy as np
import pytest
from cases import CASES
from compare import DTYPES, bits, build, every_kind, rounded
from cuda_problem import FEW, ONE_PER_RULE, SHAPES, assert_same, moved, problem
from fastopt.kernels.dtypes import COPIES

import fastopt
from fastopt.engine.plan import Copy

every_dtype = pytest.mark.parametrize("dtype", COPIES)
UNTOUCHED = 0xA5A5


def give_copies(gpu, opt, dtype):
    """Memory for copies of all parameters, every second of which begins where no vector could be stored."""
    found = {}
    for k, parameter in enumerate(opt._parameters):
        found[parameter.name] = memory = gpu.put(np.full(parameter.size + 32, UNTOUCHED, np.uint16))
        parameter.copy = Copy(dtype, memory.data.ptr + 2 * (16 + k % 2))
    return found


def assert_copies(gpu, found, params, dtype):
    for k, (name, memory) in enumerate(found.items()):
        values, memory = params[name].reshape(-1), gpu.get(memory)
        start = 16 + k % 2
        copy = memory[start : start + values.size].copy()
        memory[start : start + values.size] = UNTOUCHED
        assert (memory == UNTOUCHED).all()
        assert (bits(copy.view(DTYPES[dtype])) == bits(rounded(values, dtype))).all()


def run(gpu, case, dtype, params, grads, **options):
    on_gpu = moved(gpu, params)
    opt_gpu, opt = build(case, on_gpu), build(case, params)
    found = give_copies(gpu, opt_gpu, dtype)
    for gradient in grads:
        opt_gpu.step(moved(gpu, gradient), **options)
        opt.step(gradient, **options)
    assert_same(gpu, on_gpu, params, opt_gpu, opt)
    return found


@every_dtype
@pytest.mark.parametrize("case", ONE_PER_RULE, ids=lambda case: case.id)
def test_copies_of_every_rule(gpu, case, dtype):
    # Gradients of 16 bits need a kernel of their own, and are read as everywhere.
    params, grads = problem("float32", dtype if case in ONE_PER_RULE[::5] else None, shapes=SHAPES, steps=2)
    grads[-1]["w"][2, 2:5] = math.inf, -math.inf, math.nan
    assert_copies(gpu, run(gpu, case, dtype, params, grads), params, dtype)


@every_dtype
def test_rounding(gpu, dtype):
    """Ties, subnormal and huge numbers, and what lies beside them."""
    values = every_kind(97)
    params = {"w": values[np.isfinite(values)]}
    case = next(c for c in CASES if c.optimizer == "SGD" and not c.hyper.get("weight_decay"))
    found = run(gpu, case, dtype, params, [{"w": np.zeros_like(params["w"])}])
    assert_copies(gpu, found, params, dtype)


@every_dtype
def test_a_skipped_step_writes_no_copy(gpu, dtype):
    params, (gradient,) = problem(shapes=FEW, steps=1)
    gradient["b"][1] = np.nan
    case = next(c for c in CASES if c.optimizer == "Adam")
    found = run(gpu, case, dtype, params, [gradient], skip_nonfinite=True, zero_grads=True)
    assert all((gpu.get(memory) == UNTOUCHED).all() for memory in found.values())


def test_it_is_one_launch(stand_in):
    params, grads = problem(shapes=FEW, steps=2)
    on_gpu = moved(stand_in, params)
    opt = fastopt.AdamW(on_gpu)
    found = give_copies(stand_in, opt, "bfloat16")
    for gradient in grads:
        opt.step(moved(stand_in, gradient))
    assert len(stand_in.device().launches) == 2
    assert_copies(stand_in, found, {name: stand_in.get(array) for name, array in on_gpu.items()}, "bfloat16")
