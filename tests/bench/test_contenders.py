"""What the benchmark compares with computes what the case says: by the worker's own check, in processes of their own.

``PYTHONPATH=. python tests/bench/test_contenders.py NAME`` is such a process: it writes what was wrong as JSON.
``FASTOPT_ALL_CONTENDERS=1`` also compiles every optimizer of torch, which takes minutes.
"""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from fresh import program

from bench import worker
from bench.case import Case
from bench.contenders.limited import Limited
from bench.contenders.plain import Plain

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]

CLASSES = {
    "numba": ("numba_loop", "NumbaLoop", "numba"),
    "torch compile": ("torch_compile", "TorchCompile", "torch"),
    "optax": ("optax_jit", "Optax", "optax"),
    "deepspeed": ("deepspeed_cpu", "DeepSpeed", "deepspeed ninja"),
    "optimi": ("optimi_torch", "Optimi", "torch-optimi"),
    "bitsandbytes": ("bitsandbytes_cpu", "BitsAndBytes", "bitsandbytes"),
}
SHAPES = {"one": (1,), "seven": (7,), "matrix": (5, 7), "thousand": (1000,)}
LR = {"SGD": 1.0, "Adadelta": 1.0}
RATE = 3e-3

EXTRA = {
    "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "betas": (0.8, 0.95), "alpha": 0.9, "rho": 0.8, "eps": 1e-4,
}  # fmt: skip
"""Options that are no defaults: eps so large that it shows where it stands."""


def kind_of(name):
    module, kind, _ = CLASSES[name]
    return getattr(importlib.import_module(f"bench.contenders.{module}"), kind)


def cases_of(name):
    """Each optimizer that it claims, with the defaults of torch and without them."""
    kind = kind_of(name)
    for optimizer in kind.optimizers or () if not issubclass(kind, Limited) else kind.known:
        plain = {"lr": LR.get(optimizer, RATE)}
        if not issubclass(kind, Limited):
            if "FASTOPT_ALL_CONTENDERS" in os.environ or optimizer in ("SGD", "AdamW"):
                hyper = plain | ({"momentum": 0.9} if optimizer == "SGD" else {})
                yield Case(optimizer, optimizer, hyper, SHAPES, ())
            continue
        for hyper in (plain, plain | {option: EXTRA[option] for option in kind.known[optimizer] if option != "lr"}):
            case = Case(f"{optimizer} {hyper}", optimizer, hyper, SHAPES, ())
            if kind.refusal(case) is None:
                yield case
            else:
                assert (name, optimizer) == ("bitsandbytes", "SGD")  # which needs momentum


def problem_of(kind, case):
    """What the worker would say of a contender."""
    params, grads = worker.data(case)
    expected = worker.expectation(case, params, grads)
    contender = kind(case, params, grads, 2)
    try:
        worker.check(contender, case, expected)
    except worker.WrongAnswer as error:
        return str(error)
    # The gradients are again what they were, as the timed steps want them; and steps do not compile any more.
    graphs = getattr(contender, "graphs", lambda: 0)
    before = graphs()
    for _ in range(3):
        contender.step()
    return "a later step compiled" if graphs() != before else None


@pytest.mark.parametrize("name", CLASSES)
def test_each_optimizer_of_a_contender_is_the_reference(name):
    missing = kind_of(name).missing()
    if missing:
        pytest.skip(missing)
    timeout = 1800 if "FASTOPT_ALL_CONTENDERS" in os.environ else 600
    run = program(__file__, name, timeout=timeout, OMP_NUM_THREADS="2", PYTHONPATH=f"{ROOT}:{ROOT}/tests/support")
    assert run.returncode == 0, run.stderr
    problems = json.loads(run.stdout.splitlines()[-1])
    assert len(problems) >= 2
    assert not any(problems.values()), problems


# --- controls --------------------------------------------------------------------------------------------------------

ADAM = Case("x", "Adam", {"lr": RATE}, SHAPES, ())


class OtherBetas(Plain):
    def __init__(self, case, *rest):
        super().__init__(case, *rest)
        self.hyper = {**case.hyper, "betas": (0.9, 0.99)}


class OldGradients(Plain):
    def scale_gradients(self, factor):
        pass


class Still(Plain):
    def step(self):
        pass


class LastElement(Plain):
    def step(self):
        before = {name: array.flat[-1] for name, array in self.params.items()}
        super().step()
        self.params["thousand"].flat[-1] = before["thousand"]


@pytest.mark.parametrize("kind", [OtherBetas, OldGradients, Still, LastElement])
def test_a_wrong_contender_is_found(kind):
    assert problem_of(Plain, ADAM) is None
    assert "is off by" in str(problem_of(kind, ADAM))


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_missing_is_told_with_the_command(name, monkeypatch):
    kind, compiler = kind_of(name), "g++"
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda program: compiler)
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert kind.missing() == f"not installed: pip install {CLASSES[name][2]}"
    monkeypatch.setattr("importlib.util.find_spec", lambda package: object())
    assert kind.missing() is None
    compiler = None
    needed = "not installed: a C++ compiler, g++" if name in ("torch compile", "deepspeed") else None
    assert kind.missing() == needed


@pytest.mark.parametrize(
    ("name", "optimizer", "hyper", "refusal"),
    [
        ("numba", "LARS", {}, "has no LARS"),
        ("numba", "Adam", {"amsgrad": True}, "its Adam has no amsgrad as torch's"),
        ("numba", "Adam", {"amsgrad": False}, None),
        ("torch compile", "Lion", {}, "has no Lion"),
        ("optax", "Adagrad", {}, "has no Adagrad"),
        ("optax", "RMSprop", {"centered": True}, "its RMSprop has no centered as torch's"),
        ("deepspeed", "SGD", {}, "has no SGD"),
        ("deepspeed", "Adagrad", {}, "its Adagrad overwrites gradients"),
        ("optimi", "Adam", {"weight_decay": 0.1}, "its Adam has no weight_decay as torch's"),
        ("optimi", "AdamW", {"weight_decay": 0.1}, None),
        ("bitsandbytes", "SGD", {"momentum": 0.9, "nesterov": True}, "its SGD has no nesterov as torch's"),
        ("bitsandbytes", "SGD", {}, "its SGD needs momentum"),
    ],
)
def test_what_it_cannot_do_is_refused(name, optimizer, hyper, refusal):
    assert kind_of(name).refusal(Case("x", optimizer, {"lr": 1e-3, **hyper}, SHAPES, ())) == refusal


def main(name):
    kind, problems = kind_of(name), dict[str, str | None]()
    for case in cases_of(name):
        try:
            problems[case.name] = problem_of(kind, case)
        except Exception as error:
            problems[case.name] = f"{type(error).__name__}: {error}"
    print(f"\n{json.dumps(problems)}")


if __name__ == "__main__":
    main(sys.argv[1])
