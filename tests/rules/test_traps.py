"""Traps that other libraries fell into, one test each: missing gradients, precision, memory.

Those about options, layers and state are in test_traps_options.py, those about threads and forks in test_process.py.
"""

import ml_dtypes
import numpy as np
import pytest
from cases import RULE_CASES
from compare import DTYPES, assert_same_bits, build, case_problem, snapshot
from fastopt.kernels.layout import CHUNK, NORM, UPDATE
from fastopt.kernels.registry import RULES

import fastopt
from fastopt.engine import backend as _backend
from fastopt.engine.device import Layout
from fastopt.engine.table import Table

F32 = np.float32
every_rule = pytest.mark.parametrize("case", RULE_CASES, ids=lambda case: case.rule)


# --- gradients that are missing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["arrays", "flat"])
@every_rule
def test_a_parameter_whose_first_gradient_comes_late(case, flat):
    params, gradients = case_problem(case, "float32", 4)
    alone = {name: {name: params[name].copy()} for name in params}
    optimizers = {name: build(case, alone[name]) for name in params}
    own = fastopt.FlatBuffer.from_arrays(params) if flat else params
    opt = build(case, own)
    for t, grads in enumerate(gradients):
        missing = ("bias", "scale") if t < 2 else ()
        present = {name: None if name in missing else g for name, g in grads.items()}
        opt.step(fastopt.FlatBuffer.from_arrays(grads) if flat and not missing else present)
        for name in set(params) - set(missing):
            optimizers[name].step({name: grads[name]})
    want = {name: snapshot(alone[name], optimizers[name])[name] for name in params}
    assert_same_bits(snapshot(own, opt), want, "late")
    steps = {name: entry["step"] for name, entry in opt.state.items()}
    assert steps == {"weight": 4, "bias": 2, "scale": 2, "empty": 4, "long": 4}


def test_none_gradients():
    w, b = np.ones(3, F32), np.ones(2, F32)
    opt = fastopt.SGD([w, b], lr=0.5, momentum=0.5, weight_decay=0.5)
    opt.step([np.ones(3, F32), None])
    before = opt.state["1"]["momentum_buffer"].tobytes()
    assert (b == 1).all()
    assert opt.step([None, None], max_norm=1.0, skip_nonfinite=True, zero_grads=True) == (False, 0.0)
    assert opt.step([None, None]) == (False, None)
    assert [opt.state[name]["step"] for name in "01"] == [1, 0]
    assert opt.state["1"]["momentum_buffer"].tobytes() == before


def test_mixed_dtypes_in_one_optimizer():
    for case in RULE_CASES:
        problems = {dtype: case_problem(case, dtype, 2) for dtype in DTYPES}
        params = {f"{d}.{name}": p.copy() for d, (first, _) in problems.items() for name, p in first.items()}
        opt = build(case, params)
        for t in (0, 1):
            opt.step({f"{d}.{name}": g for d, (_, grads) in problems.items() for name, g in grads[t].items()})
        got = snapshot(params, opt)
        for dtype, (own, gradients) in problems.items():
            alone = build(case, own)
            for grads in gradients:
                alone.step(grads)
            want = {f"{dtype}.{name}": entry for name, entry in snapshot(own, alone).items()}
            assert_same_bits({name: got[name] for name in want}, want, f"{case.id}, {dtype}")


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_moments_rounded_through_the_parameters_dtype(dtype):
    w, g = np.ones(5, DTYPES[dtype]), np.full(5, 0.3).astype(DTYPES[dtype])
    opt = fastopt.Adam([w])
    opt.step([g])
    moment = opt.state["0"]["exp_avg"]
    assert moment.dtype == F32
    assert (moment == F32(1 - 0.9) * g.astype(F32)).all()
    assert (moment != moment.astype(DTYPES[dtype]).astype(F32)).all()


def test_bf16_weights_that_never_move():
    w = np.ones(3, ml_dtypes.bfloat16)  # neighbours: 1 - 2^-8 and 1 + 2^-7
    opt = fastopt.SGD([w], lr=1.0, momentum=1.0)
    seen = []
    for _ in range(4):
        opt.step([np.full(3, 2.0**-10, w.dtype)])  # too small alone; the momentum collects them in float32
        seen.append(float(w[0]))
    assert seen[0] == 1.0
    assert seen[2:] == [1 - 2.0**-8, 1 - 2.0**-7]
    assert opt.state["0"]["momentum_buffer"].tolist() == [2.0**-8] * 3


# --- memory that is not plain ----------------------------------------------------------------------------------------


LAYOUTS = {
    "transposed": np.asfortranarray,
    "strided": lambda plain: np.repeat(plain, 2, axis=-1)[..., ::2],
    "reversed": lambda plain: plain[::-1, :, ::-1].copy()[::-1, :, ::-1],
    "broadcast": lambda plain: np.broadcast_to(plain[0, 0, 0, 0], plain.shape),
    "channels_last": lambda plain: np.ascontiguousarray(plain.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
    "misaligned": lambda plain: np.frombuffer(b" " + plain.tobytes(), np.uint8)[1:].view(F32).reshape(plain.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_gradients_computed_as_if_flat(layout):
    plain = np.random.default_rng(3).standard_normal((2, 3, 4, 4)).astype(F32)
    if layout == "broadcast":
        plain[...] = plain[0, 0, 0, 0]
    odd = LAYOUTS[layout](plain)
    assert not (odd.flags.c_contiguous and odd.flags.aligned)
    a, b = np.ones_like(plain), np.ones_like(plain)
    for w, g in ((a, odd), (b, plain)):
        opt = fastopt.Adam([w], lr=0.1)
        for _ in range(3):
            assert opt.step([g], max_norm=1.0).grad_norm == pytest.approx(np.linalg.norm(plain), rel=1e-6)
    assert a.tobytes() == b.tobytes()
    assert (odd == plain).all()


def test_a_strided_gradient_that_changes_between_steps():
    w, g = np.zeros(3), np.ones(6)
    opt = fastopt.SGD([w], lr=1.0)
    for value in (1.0, 2.0, 4.0):
        g[:] = value
        opt.step([g[::2]])
    assert w.tolist() == [-7.0] * 3
    opt.step([w[::-1]])  # a strided view of the parameter is copied before it is written
    assert w.tolist() == [0.0] * 3


def test_gradients_are_only_read():
    w, v, g = np.ones(3, F32), np.ones(3, F32), np.ones(3, F32)
    g.flags.writeable = False
    opt = fastopt.SGD([w, v], lr=0.5)
    for _ in range(3):
        opt.step([g, g], max_norm=100.0)  # of two parameters it is one
    assert w.tolist() == v.tolist() == [-0.5] * 3


@every_rule
def test_empty_and_0_d_arrays(case):
    shapes = {"first": (0,), "w": (3, 3), "none": (0,), "b": (5,), "scalar": (), "last": (2, 0)}
    rng = np.random.default_rng(4)
    arrays = {name: np.asarray(rng.standard_normal(shape), F32) for name, shape in shapes.items()}
    flat = fastopt.FlatBuffer.from_arrays(arrays)
    grads = fastopt.FlatBuffer.from_arrays({k: np.asarray(rng.standard_normal(s), F32) for k, s in shapes.items()})
    by_array, by_buffer = build(case, arrays), build(case, flat)
    for _ in range(3):
        by_array.step(dict(grads))
        by_buffer.step(grads)
    assert_same_bits(snapshot(flat, by_buffer), snapshot(arrays, by_array), "flat")
    assert {entry["step"] for entry in by_buffer.state.values()} == {3}
    nothing = build(case, [np.zeros((0, 4), F32)])
    assert nothing.step([np.zeros((0, 4), F32)], max_norm=1.0, skip_nonfinite=True, zero_grads=True) == (False, 0.0)


def test_offsets_past_2_to_the_31():
    size = 2**31 + 17
    table = Table([size, 5, 0, size])
    assert table.elements == 2 * size + 5
    assert table.chunks.dtype == np.int64
    assert table.chunks[-1].tolist() == [3, 2**31, size]
    lengths = table.chunks[:, 2] - table.chunks[:, 1]
    assert lengths.min() > 0
    assert lengths.max() == CHUNK
    assert [int(lengths[table.chunks[:, 0] == s].sum()) for s in range(4)] == [size, 5, 0, size]
    layout = Layout.of({"a": (2**31 + 17,), "b": (2**16, 2**17), "c": (3,)})
    assert layout.offsets == (0, 2**31 + 32, 2**33 + 2**31 + 32)
    assert layout.total == 2**33 + 2**31 + 64


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_kernels_past_2_to_the_31(dtype, isa):
    backend, rule = _backend.load(isa), RULES["sgd"]
    lo, count = 2**31 + CHUNK, 201
    rng = np.random.default_rng(5)
    w, g = (rng.standard_normal(count).astype(DTYPES[dtype]) for _ in range(2))
    near = w.copy()
    fastopt.SGD([near], lr=0.1).step([g])
    scalars = np.array(rule.scalars(1, {"lr": 0.1, "weight_decay": 0.0}))
    table = Table([lo + count])  # as if w and g were the end of arrays that large: only the last chunk is run
    segment = table.segments[0]
    segment["update"], segment["scalars"] = backend.kernel("update", rule, dtype, dtype), scalars.ctypes.data
    segment["squares"] = backend.kernel("squares", dtype)
    segment["own"] = 1.0, 1.0
    segment["arrays"][:2] = [(a.ctypes.data - lo * a.itemsize) % 2**64 for a in (w, g)]
    table.record["chunks"], table.record["chunk_count"] = table.chunks[-1:].ctypes.data, 1
    backend.run(table.record_at, UPDATE, 0, 1)
    backend.run(table.record_at, NORM, 1, 1)
    assert w.tobytes() == near.tobytes()
    assert table.segments["sums"][0, 1] == pytest.approx(np.sum(g.astype(np.float64) ** 2), rel=1e-12)


def test_options_of_all_steps_and_of_one():
    always, each = (fastopt.Adam([np.ones(3)], lr=0.1) for _ in range(2))
    always.max_grad_norm, always.skip_nonfinite, always.zero_grads = 1.0, True, True
    made = fastopt.Adam([np.ones(3)], lr=0.1, max_grad_norm=1.0, skip_nonfinite=True, zero_grads=True)
    rng = np.random.default_rng(0)
    for t in range(4):
        gradient = np.full(3, np.inf) if t == 2 else 10.0 * rng.standard_normal(3)
        grads = [gradient.copy() for _ in range(3)]
        info = each.step([grads[0]], max_grad_norm=1.0, skip_nonfinite=True, zero_grads=True)
        assert always.step([grads[1]]) == made.step([grads[2]]) == info == always.last_info == each.last_info
        assert info.skipped == (t == 2)
        assert not np.any(grads)
    g = np.full(3, 10.0)
    info = always.step([g], max_grad_norm=None, skip_nonfinite=False, zero_grads=False)
    assert (info, g.tolist()) == ((False, None), [10.0] * 3)
    assert made.step([g], max_norm=None, zero_grads=False) == (False, pytest.approx(10.0 * 3**0.5))
    each.step([g])
    for opt in (always, made):
        assert opt.param_groups[0]["params"]["0"].tobytes() == each.param_groups[0]["params"]["0"].tobytes()
        assert not {"max_grad_norm", "skip_nonfinite", "zero_grads"} & opt.state_dict()["param_groups"][0].keys()
        assert "max_grad_norm=1.0, skip_nonfinite=True, zero_grads=True" in repr(opt)
    with pytest.raises(TypeError, match=r"Adam.step: max_norm is another name of max_grad_norm"):
        each.step([g], max_norm=1.0, max_grad_norm=1.0)
