"""Options and arguments out of range are refused with one clear error, and nothing is written."""

import math
from fractions import Fraction

import numpy as np
import pytest
from fresh import program
from refusal import BAD, CLASSES, Untouchable, fingerprint, gradients, refused, short, trained

import fastopt
from fastopt.engine import backend as _backend

F32 = np.float32


# --- hyperparameters -------------------------------------------------------------------------------------------------

NO_NUMBERS = (math.nan, -math.inf, -1.0, True, np.True_, "0.1", None, 0.1j, [0.7], np.array([0.7]), np.array("x"))
NO_BOOLEANS = (1, 0.0, "True", math.nan, [True])


def bad_options(cls):
    for name, default in trained(cls).defaults.items():
        if isinstance(default, bool) or name in ("adapt", "decay_1d"):
            wrong = NO_BOOLEANS
        elif isinstance(default, tuple):
            wrong = [0.9, None, "ab", (0.9,), (0.9, 0.9, 0.9)]
            wrong += [pair for bad in NO_NUMBERS for pair in ((bad, default[1]), (default[0], bad))]
        else:
            wrong = [bad for bad in (*NO_NUMBERS, *([] if name == "t0" else [math.inf])) if bad is not default]
        yield from ((name, bad) for bad in wrong)


every_class = pytest.mark.parametrize("cls", CLASSES, ids=short)


@every_class
def test_every_option_refuses_what_it_cannot_mean(cls):
    opt = trained(cls)
    group = opt.param_groups[0]
    for name, bad in bad_options(cls):
        with refused(BAD, begins=f"{cls.__name__}: {name}"):
            cls([np.ones(3)], **{"lr": 0.1} | {name: bad})
        if isinstance(bad, (int, float)) and bad == group[name]:
            continue  # 0.0 for False: whoever sets it has changed nothing
        good, group[name] = group[name], bad
        with refused(BAD, begins=f"{cls.__name__}: {name}", opt=opt):  # between steps, too
            opt.step(gradients())
        group[name] = good
    opt.step(gradients())


OUT_OF_RANGE = [
    (fastopt.Adam, {"betas": (1.0, 0.999)}, "Adam: betas[0] must be in [0, 1), got 1.0"),
    (fastopt.Lion, {"betas": (0.9, 1.0)}, "Lion: betas[1] must be in [0, 1), got 1.0"),
    (fastopt.Adadelta, {"rho": 1.0}, "Adadelta: rho must be in [0, 1), got 1.0"),
    (fastopt.RMSprop, {"alpha": 1.0}, "RMSprop: alpha must be in [0, 1), got 1.0"),
    (fastopt.SGD, {"momentum": 1.1}, "SGD: momentum must be in [0, 1], got 1.1"),
    (fastopt.Adam, {"eps": -1e-8}, "Adam: eps must be in [0, inf)"),
    (fastopt.Adamax, {"eps": 1e-50}, "Adamax: eps=1e-50 rounds to zero in float32"),
    (fastopt.Rprop, {"etas": (1.0, 1.2)}, "Rprop: etas[0] must be in (0, 1), got 1.0"),
    (fastopt.Rprop, {"etas": (0.5, 1.0)}, "Rprop: etas[1] must be in (1, inf), got 1.0"),
    (fastopt.Rprop, {"step_sizes": (2.0, 1.0)}, "Rprop: step_sizes[0] must not exceed step_sizes[1], got (2.0, 1.0)"),
    (fastopt.SGD, {"nesterov": True}, "SGD: nesterov=True needs momentum > 0 and dampening 0, got momentum=0.0"),
    (fastopt.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening=0.1"),
    (fastopt.LARS, {"nesterov": True, "momentum": 0.0}, "LARS: nesterov=True needs momentum > 0, got 0"),
    (fastopt.AdamW, {"lr": 0.0, "fully_decoupled": True}, "AdamW: fully_decoupled=True needs an initial lr > 0, got 0"),
    (fastopt.SGD, {"lr": 10**400}, "SGD: lr must be in [0, inf)"),
]


@pytest.mark.parametrize(("cls", "options", "message"), OUT_OF_RANGE, ids=short)
def test_options_out_of_range_are_refused(cls, options, message):
    with refused(ValueError, message):
        cls([np.ones(3, F32)], **{"lr": 0.1} | options)
    opt = trained(cls)
    with refused(ValueError, message.replace(": ", ": group 1: ", 1), opt=opt):
        opt.add_param_group({"params": {"x": np.ones(3, F32)}, **options})


@pytest.mark.parametrize("lr", [F32(1e-3), np.float16(1e-3), np.array(1e-3), np.array(1e-3, F32), Fraction(1, 1000), 1])
def test_numbers_of_every_kind_are_computed_with_in_float64(lr):
    w, g = np.full(3, 2.0), np.full(3, 3.0)
    fastopt.SGD([w], lr=lr).step([g])
    assert w.tolist() == [2.0 - float(lr) * 3.0] * 3


def test_options_misspelt_in_a_group_are_refused():
    opt, near = trained(fastopt.SGD), "Did you mean 'dampening'?"
    group = opt.param_groups[0]
    with refused(ValueError, "SGD: there is no option 'dampning'; options are lr, momentum", near):
        fastopt.SGD([{"params": [np.ones(3)], "dampning": 0.1}])
    with refused(ValueError, "SGD: group 1: there is no option 'dampning'", near, opt=opt):
        opt.add_param_group({"params": {"x": np.ones(3)}, "dampning": 0.1})
    group["dampning"] = 0.1
    with refused(ValueError, "SGD: there is no option 'dampning'", near, opt=opt):
        opt.step(gradients())
    del group["dampning"], group["lr"]
    with refused(ValueError, "SGD", "the option 'lr' is missing", opt=opt):
        opt.step(gradients())
    group["lr"] = 0.1
    opt.step(gradients())


@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite", "zero_grads", "master_weights", "flatten"])
def test_what_is_chosen_for_all_groups_is_refused_in_one(name):
    opt = trained()
    words = f"{name} is an option of the whole optimizer, not of a param group"
    with refused(ValueError, "AdamW: ", words):
        fastopt.AdamW([{"params": [np.ones(3)], name: 1.0}])
    with refused(ValueError, "AdamW: group 1: ", words, opt=opt):
        opt.add_param_group({"params": {"x": np.ones(3)}, name: 1.0})
    opt.param_groups[0][name] = 1.0
    with refused(ValueError, "AdamW: ", words, opt=opt):
        opt.step(gradients())


def test_other_keys_of_a_group_are_the_users():
    mine = {"mask": Untouchable(), "betas": Untouchable(), "lr_scale": Untouchable(), 3: Untouchable()}
    opt = fastopt.SGD([{"params": {"w": np.ones((3, 2), F32)}, **mine}, {"params": {"b": np.ones(3, F32)}}])
    for t in range(3):
        for group in opt.param_groups:
            group.update(lr=0.1 / (t + 1), mask=Untouchable())
            group["new"] = mine["mask"]  # in the second group only from here on
        opt.step(gradients())
        opt.load_state_dict(opt.state_dict())
    assert opt.param_groups[0]["betas"] is mine["betas"]
    assert opt.param_groups[1]["new"] is mine["mask"]
    assert "mask" not in opt.state_dict()["param_groups"][0]
    assert "lr=0.03" in repr(opt)
    assert "mask" not in repr(opt)
    del opt.param_groups[0]["mask"]
    opt.step(gradients())


def test_arguments_that_a_constructor_does_not_have_are_named_with_those_it_has():
    for name, near in {"learning_rate": "options are lr, betas, eps", "beta1": "Did you mean 'betas'?"}.items():
        with refused(TypeError, f"AdamW: there is no option {name!r}; ", near):
            fastopt.AdamW([np.ones(3)], **{name: 0.1})


@every_class
def test_a_schedule_is_no_learning_rate(cls):
    with refused(TypeError, f"{cls.__name__}: lr must be", "fastopt.schedules", 'opt.param_groups[0]["lr"] = '):
        cls([np.ones(3)], lr=fastopt.schedules.constant(0.1))
    opt = trained(cls)
    for name in opt.defaults:
        with refused(AttributeError, f'opt.param_groups[0]["{name}"] = 0.3', opt=opt):
            setattr(opt, name, 0.3)


@every_class
def test_flags_may_be_numpys(cls):
    flags = {name: np.bool_(value) for name, value in trained(cls).defaults.items() if isinstance(value, bool)}
    own, numpys = trained(cls), trained(cls, **flags, skip_nonfinite=np.False_, zero_grads=np.False_)
    numpys.step(gradients(), skip_nonfinite=np.True_)
    own.step(gradients())
    assert fingerprint(own)[1:] == fingerprint(numpys)[1:]


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (fastopt.SGD, {"lr": np.array([0.1, 0.2])}),
        (fastopt.Adam, {"betas": np.array([0.9, 0.999, 0.9])}),
        (fastopt.SGD, {"nesterov": True}),
        (fastopt.AdamW, {"fully_decoupled": True, "initial_lr": "0.1"}),
        (fastopt.AdamW, {"fully_decoupled": True, "initial_lr": 0}),
        (fastopt.Adam, {"eps": 1e-50}),
    ],
    ids=short,
)
def test_options_set_between_steps_are_checked(cls, options):
    opt = trained(cls)
    opt.param_groups[0].update(options)
    before = fingerprint(opt)
    with pytest.raises(BAD, match=rf"^{cls.__name__}: .*({'|'.join(options)})"):
        opt.step(gradients())
    assert fingerprint(opt) == before


def test_groups_that_were_not_added_are_refused():
    opt = trained()
    opt.param_groups.append({**opt.param_groups[0], "params": {"x": np.ones(3, F32)}})
    with refused(BAD, "AdamW", "add_param_group", opt=opt):
        opt.step(gradients())


# --- arguments of the step -------------------------------------------------------------------------------------------

NOT_POSITIVE = (0.0, -1.0, math.nan, math.inf, True, None, "2", np.array([2.0]), np.array([1.0, 2.0]), 1e-320, 10**400)
NOT_A_NORM = (-1.0, math.nan, -math.inf, True, "1", np.array([2.0]), np.array([1.0, 2.0]), 1j)
BAD_ARGUMENTS = [("grad_scale", bad) for bad in NOT_POSITIVE]
BAD_ARGUMENTS += [(name, bad) for name in ("max_norm", "max_grad_norm") for bad in NOT_A_NORM]
BAD_ARGUMENTS += [(name, bad) for name in ("zero_grads", "skip_nonfinite") for bad in NO_BOOLEANS]


@pytest.mark.parametrize(("name", "bad"), BAD_ARGUMENTS, ids=short)
def test_bad_arguments_of_step_are_refused(name, bad):
    opt, grads = trained(), gradients()
    with refused(BAD, begins=f"AdamW.step: {name}", opt=opt):
        opt.step(grads, **{name: bad})
    if hasattr(opt, name):
        with refused(BAD, begins=f"AdamW: {name}", opt=opt):
            setattr(opt, name, bad)
        with refused(BAD, begins=f"AdamW: {name}"):
            fastopt.AdamW([np.ones(3)], **{name: bad})
    assert all((grads[key] == grad).all() for key, grad in gradients().items())


def test_arguments_are_checked_before_gradients_are_zeroed():
    opt, grads = trained(), gradients()
    with refused(ValueError, "AdamW.step: grads['b'] has shape", opt=opt):
        opt.step(grads | {"b": np.ones(2, F32)}, zero_grads=True, skip_nonfinite=True)
    assert (grads["w"] != 0).all()


# --- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, -1, 1025, True, 2.0, "2", None, math.nan, [2], np.True_], ids=str)
def test_bad_numbers_of_threads_are_refused(threads):
    before = fastopt.get_num_threads()
    error, words = (ValueError, "[1, 1024]") if type(threads) is int else (TypeError, "integer")
    with refused(error, "set_num_threads: threads must be", words):
        fastopt.set_num_threads(threads)
    assert fastopt.get_num_threads() == before


@pytest.mark.parametrize("threads", [1, np.int64(3), 1024])
def test_numbers_of_threads(threads, monkeypatch):
    monkeypatch.setattr(_backend, "_threads", None)  # and back afterwards
    fastopt.set_num_threads(threads)
    assert fastopt.get_num_threads() == threads
    assert type(fastopt.get_num_threads()) is int


@pytest.mark.skipif(_backend.load().isa not in _backend.ISAS, reason="the library has no kernels for x86-64")
@pytest.mark.parametrize("isa", ["avx2", "x86-64-v9", "X86-64-V3"])
def test_an_unknown_instruction_set_is_refused(isa):
    done = program("-c", "import fastopt, numpy; fastopt.SGD([numpy.ones(3)])", FASTOPT_ISA=isa)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ValueError: FASTOPT_ISA: '{isa}' cannot run here; this processor runs x86-64-v2"), last
