"""LARS may keep the norms of the weights from the update that wrote them, if nobody else writes."""

import numpy as np
import pytest

import fastopt

SHAPES = {"small": (2, 3), "odd": (33, 65), "large": (5, 20_011), "tiny": (1, 1), "bias": (7,)}


def problem(keep):
    rng = np.random.default_rng(0)
    params = fastopt.FlatBuffer.from_arrays({k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()})
    grads = params.zeros_like()
    for name in grads:
        grads[name] = rng.standard_normal(SHAPES[name])
    return params, grads, fastopt.LARS(params, lr=0.5, weight_decay=0.01, keep_weight_norms=keep)


def run(keep, *changes, max_norm=None):
    """The bytes of the parameters after a step, and after a change and another step for each change."""
    params, grads, opt = problem(keep)
    opt.step(grads, max_norm=max_norm)
    for change in changes:
        change(params, opt)
        opt.step(grads, max_norm=max_norm)
    return params.data.tobytes()


def nothing(params, opt):
    pass


def write(params, opt):
    params["large"][:] *= 3


def write_and_tell(params, opt):
    write(params, opt)
    opt.weights_written()


def write_and_load(params, opt):
    write(params, opt)
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("change", [nothing, write_and_tell, write_and_load])
def test_kept_norms_give_the_same_bits(change, max_norm):
    kept, taken_anew = (run(keep, *[change] * 3, max_norm=max_norm) for keep in (True, False))
    assert kept == taken_anew


def test_a_write_must_be_told():
    assert run(True, write) != run(False, write)  # else nothing is kept, and the rest shows nothing
