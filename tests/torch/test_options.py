"""fastopt.torch: constructors, options of the step, what is read of a param group and of a checkpoint, error texts."""

import copy
import inspect

import numpy as np
import pytest
from refusal import Untouchable
from torch_compare import assert_close, assert_same_bits, unchanged
from torch_problem import CLASSES, both, every_class, every_torch_class, front, params_of, torch, train

EXTRAS = {"max_grad_norm", "skip_nonfinite", "zero_grads", "master_weights", "flatten"}

# --- constructors ----------------------------------------------------------------------------------------------------


@every_class
def test_constructors_name_all_they_take(name):
    cls = getattr(front, name)
    parameters = inspect.signature(cls.__init__).parameters
    assert not {p.kind for p in parameters.values()} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    assert set(parameters) >= EXTRAS | {"lr", "maximize", "capturable"}
    assert [*cls.__signature__.parameters] == [*parameters][1:]
    source = inspect.getsource(cls.__init__)  # which tools read
    assert all(f"{p}: " in source for p in parameters if p != "self")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("AdamW", {"max_norm": 1.0}, "AdamW: there is no option 'max_norm'.* Did you mean 'max_grad_norm'"),
        ("AdamW", {"learning_rate": 1.0}, "'learning_rate'; options are lr, betas.*Did you mean 'lr'"),
        ("Adam", {"beta1": 0.9}, "'beta1'; .*Did you mean 'betas'"),
        ("SGD", {"momentun": 0.9}, "'momentun'; .*Did you mean 'momentum'"),
        ("SGD", {"lr": lambda t: 0.1}, r"SGD: lr must be a number .*LambdaLR"),
        ("Lion", {"lr": "0.1"}, "Lion: lr must be a number .*'0.1'"),
        ("LARS", {}, r"^LARS\.__init__\(\) missing 1 required positional argument: 'lr'"),
    ],
)
def test_a_wrong_argument_is_named_and_the_one_that_is_meant(name, given, message):
    with pytest.raises(TypeError, match=message):
        getattr(front, name)(params_of(), **given)


def test_a_class_that_there_is_not_is_an_error_that_names_those_there_are():
    with pytest.raises(ImportError, match="has no 'Adan'; it has ASGD, LAMB, LARS, SGD"):
        from fastopt.torch import Adan  # noqa: F401
    with pytest.raises(AttributeError, match="has no 'Muon'; it has ASGD, LAMB, LARS"):
        front.Muon  # noqa: B018
    assert not hasattr(front, "Adafactor")
    assert {"TensorOptimizer", "GradScaler", "ShardedOptimizer", "optimizer", *CLASSES} == {
        *front.__all__
    }  # the tests' table has all


# --- options of the step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        ("max_grad_norm", np.float32(0.5), [-1.0, float("nan"), "1", True]),
        ("skip_nonfinite", np.bool_(True), [1, None]),
        ("zero_grads", True, [0, "yes"]),
    ],
)
def test_options_of_the_step_are_attributes(name, value, wrong):
    p, q = params_of(), params_of()
    a, b = front.AdamW(p, lr=0.1, **{name: value}), front.AdamW(q, lr=0.1)
    setattr(b, name, value)
    for bad in wrong:
        with pytest.raises((TypeError, ValueError), match=f"AdamW: {name}"):
            setattr(b, name, bad)
    for opt in (a, b, copy.deepcopy(b)):
        assert getattr(opt, name) == value
        assert f"\n{name}: {value}\n" in repr(opt)
        assert name not in opt.state_dict()["param_groups"][0]
    assert_same_bits(train(p, a), train(q, b))
    assert_same_bits([x.grad for x in p], [x.grad for x in q])
    assert a.last_info == b.last_info


@pytest.mark.parametrize("name", sorted(EXTRAS))
def test_what_is_the_whole_optimizers_is_refused_in_a_param_group(name):
    def group():
        return {"params": params_of(((2,),)), name: 1.0 if name == "max_grad_norm" else True}

    def refused(number=0):
        return pytest.raises(ValueError, match=f"SGD.*group {number}.*: {name} is an option of the whole optimizer")

    with refused():
        front.SGD([group()])
    opt = front.SGD(w := params_of())
    with refused(1):
        opt.add_param_group(group())
    saved = opt.state_dict()
    saved["param_groups"][0][name] = 1
    with refused():
        opt.load_state_dict(saved)
    train(w, opt)
    opt.param_groups[0][name] = 1
    with refused():
        opt.step()
    same = group()  # as ZeroRedundancyOptimizer makes them: in the constructor and in every group
    train(same["params"], opt := front.SGD([same], **{name: same[name]}))
    opt.param_groups[0][name] = 7
    with refused():
        opt.step()


# --- param groups ----------------------------------------------------------------------------------------------------


@every_torch_class
def test_keys_of_the_users_own_are_not_looked_at(name):
    def run(home):
        p = params_of()
        opt = getattr(home, name)([{"params": p, "mask": torch.ones(3), "own": Untouchable()}])
        for t in range(4):
            nested = {"a": torch.ones(2), "b": [None, np.ones(2)]}
            opt.param_groups[0].update(fresh=np.arange(3), nested=nested)
            opt.param_groups[0]["lr"] *= 0.5 if t == 2 else 1.0
            train(p, opt, 1, first=t)
        return p

    assert_close(*both(run))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_numbers_of_numpy_and_tensors_are_numbers(kind, later):
    given = {"lr": kind(0.25), "eps": kind(0.5), "weight_decay": np.int64(1), "amsgrad": np.bool_(True)}
    given["betas"] = (kind(0.5), kind(0.75))
    exact = {"lr": 0.25, "eps": 0.5, "weight_decay": 1.0, "amsgrad": True, "betas": (0.5, 0.75)}
    p, q = params_of(), params_of()
    a = front.AdamW(p, **({} if later else given))
    if later:
        a.param_groups[0].update(given, betas=list(given["betas"]))
    assert_same_bits(train(p, a), train(q, front.AdamW(q, **exact)))


@pytest.mark.parametrize("options", [{}, {"maximize": True, "foreach": False, "lr": 0.5}], ids=str)
@every_torch_class
def test_the_state_dict_after_a_step_has_the_form_of_torchs(name, options):
    def saved(home):
        p = params_of()
        train(p, opt := getattr(home, name)(p, **options), 1)
        return opt.state_dict()

    ours, theirs = both(saved)
    assert ours["param_groups"] == theirs["param_groups"]
    shapes = [{k: {n: v.shape for n, v in s.items()} for k, s in d["state"].items()} for d in (ours, theirs)]
    assert shapes[0] == shapes[1]


# --- switches, and checkpoints of other classes ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "needed"),
    [("AdamW", {"lr": 0.0}, "an initial lr > 0, got 0"), ("Adam", {}, "decoupled_weight_decay=True")],
)
def test_what_fully_decoupled_decay_needs(name, options, needed):
    with pytest.raises(ValueError, match=f"{name}: group 0: fully_decoupled=True needs {needed}"):
        train(p := params_of(), getattr(front, name)(p, fully_decoupled=True, **options))


def test_switches_stay_where_a_checkpoint_of_torch_knows_none():
    opt = front.AdamW(p := params_of(), eps_hat=True)
    train(q := params_of(), theirs := torch.optim.AdamW(q))
    opt.load_state_dict(theirs.state_dict())
    assert opt.param_groups[0]["eps_hat"] is True
    train(p, opt, 1)
    assert opt.state[p[0]]["step"] == 4


@pytest.mark.parametrize("home", [front, torch.optim])
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("Adam", "SGD", "lacks momentum, dampening.*options amsgrad, betas,"),
        ("SGD", "Adam", "lacks betas, eps"),
        ("SGD", "LARS", "lacks trust_coefficient, eps"),
        ("AdamW", "Lion", "parameter 0 has exp_avg_sq, which is of another class"),
        ("Adam", "Adamax", "parameter 0 has exp_avg_sq, which is of another class"),
    ],
)
def test_a_state_dict_of_another_class_is_refused_while_loading(home, source, target, message):
    train(p := params_of(), other := getattr(home, source)(p, lr=0.1))
    train(q := params_of(), opt := getattr(front, target)(q, lr=0.1))
    with unchanged(q, opt), pytest.raises(ValueError, match=f"{target}.load_state_dict: .*{message}"):
        opt.load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("name", "bad"), [("adapt", "no"), ("decay_1d", 1), ("eps", -1.0), ("trust_coefficient", -1.0), ("nesterov", "x")]
)
def test_options_of_classes_that_torch_does_not_have_are_in_their_ranges(name, bad):
    with pytest.raises((TypeError, ValueError), match=f"LARS: {name} must be"):
        front.LARS(params_of(), lr=0.1, **{name: bad})
    opt = front.LARS(w := params_of(), lr=0.1)
    opt.param_groups[0][name] = bad
    with unchanged(w), pytest.raises((TypeError, ValueError), match=f"LARS: group 0: {name} must be"):
        train(w, opt, 1)


def test_an_option_of_the_step_that_a_group_repeats_is_compared_again_when_it_changes():
    w = params_of([(2,)])
    opt = front.SGD([{"params": w, "max_grad_norm": 1.0}], lr=1.0, max_grad_norm=1.0)
    train(w, opt, 1)
    opt.max_grad_norm = None
    with pytest.raises(ValueError, match="max_grad_norm"):
        opt.step()


def test_a_step_that_only_makes_states_tells_the_norm_that_was_asked_for():
    w = torch.nn.Parameter(torch.ones(2))
    opt = front.AdamW([w], lr=0.0, max_grad_norm=1.0)
    w.grad = torch.zeros(2)
    opt.step()
    assert opt.last_info == (False, 0.0)
