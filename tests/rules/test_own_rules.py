"""Rules of one's own through ``@fastopt.rule``, beside NumPy in float64, and the refusal of what cannot be one."""

import copy
import inspect
import math
import pickle
from typing import NamedTuple

import numpy as np
import pytest
from fastopt.kernels.registry import RULES

import fastopt


class Carry(NamedTuple):
    power: float


def scalars(t, options, carry):
    beta, power = options["betas"][0], carry.power * options["betas"][0]
    return {"beta": beta, "unbias": 1.0 / (1.0 - power)}, Carry(power)


def terms(p, g, m, h):
    m = h.beta * m + h.weight * g
    return m, p - m


def ratio(sums, h):
    bottom = sums[1] + abs(sums[2]) + 0.5 * h.weight
    return math.sqrt(sums[0] / bottom) if sums[0] > 0.0 else 2


OPTIONS = {"lr": 0.125, "betas": (0.75, 0.5), "weight": 0.5, "start": 0.25, "decay": False}
SUMS = {"terms": terms, "products": (("p", "p"), (0, 0), (1, "g")), "ratio": ratio}
RANGES = {"betas": ("[0, 1)", "[0, 1)"), "weight": "(0, 1]"}
CARRIED = {"scalars": scalars, "carry": lambda options: Carry(1.0), "initial": {"m": "start"}}


@fastopt.rule(("m",), OPTIONS, ranges=RANGES, **CARRIED, **SUMS)
def outside(p, g, m, h):
    """Steps of three sums."""
    m = h.beta * m + h.weight * g
    p = p - h.lr * p if h.decay else p
    return p - h.lr * h.ratio * h.unbias * m, m


Outside = fastopt.optimizer(outside)
SHAPES = {"w": (5, 7), "b": (3,), "s": (), "none": (0, 2), "long": (20_001,)}
STEPS, CLIP = 4, 2.0


def problem(shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [{k: np.asarray(rng.standard_normal(s)) for k, s in shapes.items()} for _ in range(1 + STEPS)]


def by_numpy(shapes=SHAPES):
    p, *gradients = problem(shapes)
    m, power = {k: np.full_like(x, 0.25) for k, x in p.items()}, 1.0
    for raw in gradients:
        power *= 0.75
        factor = min(1.0, CLIP / (math.sqrt(sum(np.vdot(g, g) for g in raw.values())) + 1e-6))
        for k, x in p.items():
            g = factor * raw[k]
            m[k] = 0.75 * m[k] + 0.5 * g
            r = ratio((np.vdot(x, x), np.vdot(m[k], m[k]), np.vdot(x - m[k], g)), outside.Scalars(*[0.5] * 7))
            p[k] = 0.875 * x - 0.125 * r / (1.0 - power) * m[k]
    return p, m, power


def run_numpy(gpu=None, flat=False, shapes=SHAPES, **options):
    arrays = [fastopt.FlatBuffer.from_arrays(x) if flat else x for x in problem(shapes)]
    p, *gradients = [{k: gpu.put(a) for k, a in x.items()} for x in arrays] if gpu else arrays
    opt = Outside(p, decay=True, max_grad_norm=CLIP, **options)
    for g in gradients:
        opt.step(g)
    get = gpu.get if gpu else np.array
    return {k: get(p[k]) for k in p}, {k: get(opt.state[k]["m"]) for k in p}, opt.state["w"]["power"]


def torch_problem():
    torch = pytest.importorskip("torch")
    import fastopt.torch

    p, *gradients = ({k: torch.from_numpy(a) for k, a in x.items()} for x in problem())
    return fastopt.torch.optimizer(outside), {k: torch.nn.Parameter(x) for k, x in p.items()}, gradients


def step_torch(opt, gradients):
    for grads in gradients:
        for p, g in zip(opt.param_groups[0]["params"], grads.values(), strict=True):
            p.grad = g.to(p.dtype, copy=True)
        opt.step()


def run_torch(flat):
    cls, params, gradients = torch_problem()
    opt = cls(params.values(), decay=True, max_grad_norm=CLIP, flatten=flat)
    step_torch(opt, gradients)
    shown = {k: opt.state[p]["m"].numpy() for k, p in params.items()}
    return {k: p.detach().numpy() for k, p in params.items()}, shown, opt.state[params["w"]]["power"].item()


def assert_same(got, wanted):
    for k in wanted[0]:  # sums in another order, of 20,001 products at most
        np.testing.assert_allclose((got[0][k], got[1][k]), (wanted[0][k], wanted[1][k]), rtol=1e-11, atol=1e-12)
    assert got[2] == wanted[2]


@pytest.mark.parametrize("run", [run_numpy, run_torch], ids=["numpy", "torch"])
def test_three_sums_a_state_and_a_ratio_are_numpys(run, always_threaded):
    for flat, threads in ((False, 1), (True, 1), (False, 2), (True, 2)):
        fastopt.set_num_threads(threads)
        assert_same(run(flat=flat), by_numpy())


@pytest.mark.parametrize("capturable", [False, True])
def test_a_gpu_has_them_too_and_forms_the_scalars_itself(stand_in, monkeypatch, capturable):
    monkeypatch.setitem(RULES, outside.name, outside)  # where the simulator looks for kernels
    assert_same(run_numpy(stand_in, shapes=(few := {"w": (5, 7), "s": ()}), capturable=capturable), by_numpy(few))
    brief = fastopt.rule((), {"lr": 0.5}, scalars=lambda t, o: {"a": o["lr"] / t}, name="brief")(
        lambda p, g, h: (p - h.a * g,)
    )
    assert not hasattr(outside.scalars, "__wrapped__")
    assert not hasattr(brief.scalars, "__wrapped__")  # of a lambda, too
    host = fastopt.rule((), {"lr": 0.5}, scalars=lambda t, o: dict(zip(["a"], [t], strict=True)), name="host")
    p, g = stand_in.put(np.ones(3)), stand_in.put(np.ones(3))
    with pytest.raises(TypeError, match="the scalars of rule 'host' compiled: write them as a function in a file"):
        fastopt.optimizer(host(lambda p, g, h: (p - h.lr * g,)))([p], capturable=True).step([g])


def test_checkpoints_copies_and_pickles_go_on_with_the_same_bits(tmp_path):
    p, *gradients = problem()
    opt = Outside(p)
    opt.step(gradients[0])
    fastopt.save(tmp_path / "file", p, opt)
    q, *_ = problem()
    fastopt.load(tmp_path / "file", q, other := Outside(q))
    assert opt.step(gradients[1]) == other.step(gradients[1])
    assert all(np.array_equal(p[k], q[k]) and np.array_equal(opt.state[k]["m"], other.state[k]["m"]) for k in p)

    cls, params, gradients = torch_problem()
    opt = cls(params.values())
    opt.init_state()
    step_torch(opt, gradients[:1])
    others = [copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), cls(copy.deepcopy([*params.values()]))]
    others[2].load_state_dict(opt.state_dict())
    step_torch(opt, gradients[1:])
    for other in others:
        assert type(other) is cls
        step_torch(other, gradients[1:])
        for x, y in zip(other.param_groups[0]["params"], params.values(), strict=True):
            assert x.equal(y)
            assert other.state[x]["m"].equal(opt.state[y]["m"])


def test_masters_are_stepped_where_parameters_have_16_bits():
    cls, params, gradients = torch_problem()
    low = [p.detach().bfloat16() for p in params.values()]
    opt, wide = cls(low, master_weights=True), cls([p.float() for p in low])
    step_torch(opt, gradients)
    step_torch(wide, [{k: g.bfloat16() for k, g in grads.items()} for grads in gradients])
    for p, q in zip(low, wide.param_groups[0]["params"], strict=True):
        assert opt.state[p]["master_param"].equal(q)
        assert p.equal(q.bfloat16())


def test_classes_name_what_they_take_and_check_it():
    cls, params, _ = torch_problem()
    for made, arrays, lion in ((Outside, [np.ones(3)], fastopt.Lion), (cls, [*params.values()], fastopt.torch.Lion)):
        parameters, known = inspect.signature(made).parameters, [*inspect.signature(lion).parameters]
        assert [*parameters] == ["params", *OPTIONS, *known[known.index("maximize") :]]
        assert {k: parameters[k].default for k in OPTIONS} == OPTIONS
        assert [*inspect.signature(made.__init__).parameters] == ["self", *parameters]
        assert "Steps of three sums." in made.__doc__
        for name, wrong in {"weight": 0.0, "betas": (0.5, 1.0), "lr": -1.0, "decay": 1, "start": math.inf}.items():
            with pytest.raises((TypeError, ValueError), match=rf"outside: {name}\S* must be"):
                made(arrays, **{name: wrong})


ONE = {"ratio": lambda sums, h: 1.0}
REFUSED = [
    ({"state": ("step",)}, "'step' cannot be the name of a state: it is taken"),
    ({"state": ("m", "n")}, r"it must take \(p, g, m, n, h\), but it takes \(p, g, m, h\)"),
    ({"options": {"lr": 0.1, "kind": "x"}}, "the option kind is 'x', which is no number: scalars must"),
    ({"options": {"rate": 0.1}}, "it cannot be computed: AttributeError: .*'lr'"),
    ({"scalars": lambda t, o: o["lr"]}, "scalars must return a dict of numbers, got 0.1"),
    ({"carry": lambda o: {"a": 1.0}}, "carry must return a NamedTuple"),
    (ONE | {"products": ("pp", "gg")}, "products must be pairs"),
    (ONE | {"products": ((0, 0),), "terms": lambda p, g, m, h: (h.ratio,)}, "terms cannot be computed: .*'ratio'"),
    ({"step": lambda p, g, m, h: (p - 0.5 * g, m)}, "the literal 0.5, which would promote"),
    ({"step": lambda p, g, m, h: p}, r"must return a tuple \(p, m\), got"),
    ({"ranges": {"lr": "0 to 1"}}, r'ranges: a range is an interval such as "\[0, 1\)"'),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_a_rule_is_refused_where_it_is_defined(changes, message):
    arguments = {"state": ("m",), "options": {"lr": 0.1}, "name": "plain"} | changes
    step = arguments.pop("step", lambda p, g, m, h: (p - h.lr * g, m))
    with pytest.raises((TypeError, ValueError), match=f"Rule 'plain': .*{message}"):
        fastopt.rule(**arguments)(step)
