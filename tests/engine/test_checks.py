"""Parameters, gradients and saved states that do not fit are refused with one clear error, and nothing is written."""

import collections

import numpy as np
import pytest
from refusal import BAD, gradients, refused, trained

import fastopt

F32 = np.float32

# --- parameters ------------------------------------------------------------------------------------------------------

BASE = np.ones(8, F32)
BAD_PARAMETERS = {
    "strided": (np.ones(8, F32)[::2], ValueError, ("['x'] has strides (8,) for shape (4,)", "C-contiguous")),
    "transposed": (np.ones((2, 3), F32).T, ValueError, ("['x'] has strides (4, 12)", "C-contiguous")),
    "channels-last": (np.ones((2, 4, 4, 3), F32).transpose(0, 3, 1, 2), ValueError, ("['x'] has strides", "C-contig")),
    "reversed": (np.ones(3, F32)[::-1], ValueError, ("['x'] has strides (-4,)",)),
    "broadcast": (np.broadcast_to(F32(1), 3), ValueError, ("['x'] has strides (0,)",)),
    "read-only": (np.frombuffer(bytes(8), F32), ValueError, ("['x'] is read-only", "writable")),
    "misaligned": (np.frombuffer(bytearray(9), np.uint8)[1:].view(F32), ValueError, ("['x'] is not aligned",)),
    "byte-swapped": (np.ones(3, ">f4"), TypeError, ("['x'] has the byte order of another machine", "float32")),
    "integers": (np.ones(3, int), TypeError, ("['x'] is int64", "float32, float64, float16, bfloat16")),
    "complex": (np.ones(3, complex), TypeError, ("['x'] is complex128", "float32")),
    "booleans": (np.ones(3, bool), TypeError, ("['x'] is bool", "float32")),
    "objects": (np.ones(3, object), TypeError, ("['x'] is object", "float32")),
    "longdouble": (np.ones(3, np.longdouble), TypeError, ("['x'] is", "float32")),
    "structured": (np.ones(3, [("a", F32)]), TypeError, ("['x'] is", "float32")),
    "masked": (np.ma.masked_array([1.0, 2.0], [True, False]), TypeError, ("['x'] is a masked array", ".data")),
    "list": ([1.0, 2.0], TypeError, ("['x'] is a list", "numpy.ndarray")),
    "None": (None, TypeError, ("['x'] is a NoneType", "numpy.ndarray")),
    "scalar": (F32(1), TypeError, ("['x'] is a numpy.float32", "numpy.ndarray")),
    "string": ("weights", TypeError, ("['x'] is a str", "numpy.ndarray")),
}
BAD_LISTS = {
    "no list": ([], ValueError, ("is empty", "at least one parameter")),
    "no mapping": ({}, ValueError, ("is empty",)),
    "no buffer": (fastopt.FlatBuffer({}), ValueError, ("is empty",)),
    "bare array": (BASE, TypeError, ("is a single array", "[array]")),
    "bare 0-d array": (np.ones(()), TypeError, ("is a single array",)),
    "string": ("weights", TypeError, ()),
    "number": (3, TypeError, ("is 3", "sequence of arrays")),
    "None": (None, TypeError, ("is None", "sequence of arrays")),
    "number as name": ({1: np.ones(3, F32)}, TypeError, ("names are strings, got 1",)),
    "same array twice": ({"x": BASE, "y": BASE}, ValueError, ("'x' and 'y' are the same array",)),
    "overlapping": ({"x": BASE[:5], "y": BASE[4:]}, ValueError, ("'x' and 'y' share memory",)),
    "one inside": ({"x": BASE[2:3], "y": BASE}, ValueError, ("'y' and 'x' share memory",)),
    "other shape": ({"x": BASE, "y": BASE.reshape(2, 4)}, ValueError, ("'x' and 'y' share memory",)),
    "other dtype": ({"x": BASE, "y": BASE.view(np.float16)[15:]}, ValueError, ("'x' and 'y' share memory",)),
}
BAD_LISTS |= {name: ({"x": array}, *rest) for name, (array, *rest) in BAD_PARAMETERS.items()}


@pytest.mark.parametrize("params", BAD_LISTS)
def test_bad_parameters_are_refused(params):
    bad, error, words = BAD_LISTS[params]
    with refused(error, "AdamW: param", *words):
        fastopt.AdamW(bad)
    opt = trained()
    with refused(error, "AdamW: param", *words, opt=opt):
        opt.add_param_group({"params": bad, "lr": 0.5})
    assert len(opt.param_groups) == 1
    opt.step(gradients())


def test_torch_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with refused(TypeError, "SGD: params[0] is a torch.", "numpy.ndarray", "fastopt.torch"):
        fastopt.SGD([torch.ones(3)])
    opt = trained()
    with refused(TypeError, "AdamW.step: grads['b'] is a torch.Tensor", "numpy.ndarray", opt=opt):
        opt.step(gradients(b=torch.ones(3)))


def test_what_one_group_has_another_cannot_have():
    opt = trained()
    w, moment = opt.param_groups[0]["params"]["w"], opt.state["w"]["exp_avg"]
    for name, again, words in (
        ("x", w, "'w' and 'x' are the same array"),
        ("w", w, "the name 'w' is taken"),
        ("x", w.reshape(-1)[:2], "'w' and 'x' share memory"),
        ("x", moment, ""),  # a state, which is written at the same time
    ):
        with refused(ValueError, "AdamW", words, opt=opt):
            opt.add_param_group({"params": {name: again}})
    for name, again, words in (("y", w, "the same array"), ("x", w.copy(), "'x' is taken")):
        with refused(ValueError, "SGD", words):
            fastopt.SGD([{"params": {"x": w}}, {"params": {name: again}}])


class Foreign:
    """An array of another library, of which NumPy can make one."""

    def __init__(self, device=(1, 0)):
        self.__dlpack_device__ = lambda: device

    def __array__(self, dtype=None, copy=None):
        return np.ones(3, F32)


def test_arrays_of_other_libraries_are_refused_with_the_cure():
    opt = fastopt.SGD([np.ones(3, F32), np.ones((), F32)])
    with refused(TypeError, "SGD.step: grads[0] is a ", "Foreign; needed is a numpy.ndarray. Pass numpy.asarray of it"):
        opt.step([Foreign(), None])
    for odd in (None, 2, (1,), ("cuda", 0), (1, 2, 3)):
        with refused(TypeError, "__dlpack_device__() of a Foreign must return two integers", f"got {odd!r}"):
            opt.step([Foreign(odd), None])
    for _ in range(3):
        opt.step([None, F32(1)])
    with refused(TypeError, "SGD.step: grads[1] is a NumPy scalar, which zero_grads=True cannot zero"):
        opt.step([None, F32(1)], zero_grads=True)
    assert opt.state["1"]["step"] == 3


@pytest.mark.parametrize("group", [{}, {"lr": 0.1}, [np.ones(3)], None, "params"], ids=repr)
def test_what_is_no_group_is_refused(group):
    opt = trained()
    with refused(TypeError, "AdamW.add_param_group: group must be a dict", "params", opt=opt):
        opt.add_param_group(group)
    with refused(TypeError, "AdamW: params[1]", "params"):
        fastopt.AdamW([{"params": [np.ones(3)]}, group])


# --- gradients -------------------------------------------------------------------------------------------------------

BAD_GRADIENTS = {
    "short": (gradients(b=np.ones(2, F32)), ValueError, ("grads['b'] has shape (2,)", "has shape (3,)")),
    "transposed": (gradients(w=np.ones((2, 3), F32)), ValueError, ("grads['w'] has shape (2, 3)", "(3, 2)")),
    "flattened": (gradients(w=np.ones(6, F32)), ValueError, ("grads['w'] has shape (6,)", "(3, 2)")),
    "0-d": (gradients(b=np.ones((), F32)), ValueError, ("grads['b'] has shape ()", "(3,)")),
    "float64": (gradients(b=np.ones(3)), TypeError, ("grads['b'] is float64, but the parameter is float32",)),
    "integers": (gradients(b=np.ones(3, np.int32)), TypeError, ("grads['b'] is int32", "float32")),
    "byte-swapped": (gradients(b=np.ones(3, ">f4")), TypeError, ("grads['b'] has the byte order", "float32")),
    "masked": (gradients(b=np.ma.masked_array(np.ones(3, F32))), TypeError, ("grads['b'] is a masked array",)),
    "list": (gradients(b=[1.0, 1.0, 1.0]), TypeError, ("grads['b'] is a list", "numpy.ndarray")),
    "scalar": (gradients(b=1.0), TypeError, ("grads['b'] is a float", "numpy.ndarray")),
    "name missing": ({"w": gradients()["w"]}, ValueError, ("grads lacks 'b'", "None")),
    "default": (collections.defaultdict(lambda: None, w=np.ones((3, 2), F32)), ValueError, ("grads lacks 'b'",)),
    "name unknown": (gradients(x=None), ValueError, ("grads has names that no parameter has", "'x'")),
    "too few": ([np.ones((3, 2), F32)], ValueError, ("grads", "got 1 for 2")),
    "too many": ([None, None, None], ValueError, ("grads", "got 3 for 2")),
    "none": (None, TypeError, ("grads is a NoneType", "sequence of arrays")),
    "bare array": (np.ones((2, 3), F32), TypeError, ("grads is a single array", "sequence of arrays")),
    "string": ("wb", TypeError, ("grads is a str", "sequence of arrays")),
    "other buffer": (fastopt.FlatBuffer({"w": (3, 2)}), ValueError, ("grads lacks 'b'",)),
    "wide buffer": (fastopt.FlatBuffer({"w": (3, 2), "b": (3,)}, "float64"), TypeError, ("grads['w'] is float64",)),
}


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("grads", BAD_GRADIENTS)
def test_bad_gradients_are_refused(grads, zero_grads):
    bad, error, words = BAD_GRADIENTS[grads]
    opt = trained()
    with refused(error, "AdamW.step: ", *words, opt=opt):
        opt.step(bad, zero_grads=zero_grads, max_norm=1.0)


def test_gradients_that_a_step_would_overwrite_are_refused():
    opt = trained()
    params, state = opt.param_groups[0]["params"], opt.state
    for own in (params["b"], params["w"], state["b"]["exp_avg"], state["w"]["exp_avg_sq"]):
        overlapping = own.reshape(-1)[-3:]
        assert np.shares_memory(overlapping, own)
        with refused(ValueError, "AdamW.step: grads['b'] shares memory with a parameter or a state", opt=opt):
            opt.step(gradients(b=overlapping))
    flat = fastopt.FlatBuffer.from_arrays({"w": np.ones(3, F32)})
    with refused(ValueError, "SGD.step: grads['w'] shares memory"):
        fastopt.SGD(flat).step(flat)


def test_gradients_that_cannot_be_zeroed_are_refused():
    opt = trained()
    read_only, shared = np.ones(3, F32), np.ones(6, F32)
    read_only.flags.writeable = False
    for bad in (read_only, np.ones(6, F32)[::2], np.broadcast_to(F32(1), 3)):
        with refused(ValueError, "AdamW.step: grads['b'] is read-only or strided", "zero_grads=True", opt=opt):
            opt.step(gradients(b=bad), zero_grads=True)
        assert (bad == 1).all()
    with refused(ValueError, "AdamW.step: grads['w'] and ['b'] share memory", "zero_grads=True", opt=opt):
        opt.step({"w": shared.reshape(3, 2), "b": shared[3:]}, zero_grads=True)
    again = gradients()
    for _ in range(3):
        opt.step(again, zero_grads=True)
    again["w"].flags.writeable = False  # of gradients that are known already
    with refused(ValueError, "AdamW.step: grads['w'] is read-only", opt=opt):
        opt.step(again, zero_grads=True)


# --- saved states ----------------------------------------------------------------------------------------------------

BAD_STATES = {
    "version": (lambda d: d.update(version=2), "version 2 is not 1"),
    "optimizer": (lambda d: d.update(optimizer="Adam"), "of 'Adam', not of 'AdamW'"),
    "key missing": (lambda d: d.pop("optimizer"), "needed is what state_dict() returns"),
    "groups missing": (lambda d: d["param_groups"].clear(), "the state has 0 param groups, the optimizer 1"),
    "groups None": (lambda d: d.update(param_groups=None), ""),
    "groups of groups": (lambda d: d.update(param_groups=[None]), ""),
    "names other": (lambda d: d["param_groups"][0].update(param_names=["w", "c"]), "['w', 'c'] in the state"),
    "names turned": (lambda d: d["param_groups"][0]["param_names"].reverse(), "['b', 'w'] in the state"),
    "names many": (lambda d: d["param_groups"][0].update(param_names=list("abcdefg")), "'d', 'e', ... 7 in all]"),
    "names missing": (lambda d: d["param_groups"][0].pop("param_names"), "param_names"),
    "indices missing": (lambda d: d["param_groups"][0].pop("params"), "params"),
    "indices too many": (lambda d: d["param_groups"][0]["params"].append(2), ""),
    "no state": (lambda d: d.update(state={}), "there is no state for parameter 'w'"),
    "states None": (lambda d: d.update(state=None), ""),
    "last state missing": (lambda d: d["state"].pop(1), "there is no state for parameter 'b'"),
    "last state None": (lambda d: d["state"].update({1: None}), "'b'"),
    "array missing": (lambda d: d["state"][1].pop("exp_avg"), "parameter 'b' has the states ['exp_avg_sq']"),
    "array too many": (lambda d: d["state"][1].update(sum=np.ones(3, F32)), "'b' has the states"),
    "array a list": (lambda d: d["state"][1].update(exp_avg=[0.0, 0.0, 0.0]), "'b'"),
    "array a word": (lambda d: d["state"][1].update(exp_avg="zeros"), "'b'"),
    "shape": (lambda d: d["state"][1].update(exp_avg=np.ones(4, F32)), "(4,); needed is float32 of shape (3,)"),
    "dtype": (lambda d: d["state"][1].update(exp_avg=np.ones(3)), "exp_avg of parameter 'b' is float64"),
    "byte order": (lambda d: d["state"][1].update(exp_avg=np.ones(3, ">f4")), "byte order"),
    "step below 0": (
        lambda d: d["state"][1].update(step=-1),
        "step of parameter 'b' must be an integer in [0, 2^53], got",
    ),
    "step a float": (lambda d: d["state"][1].update(step=1.0), "'b' must be an integer in [0, 2^53], got 1.0"),
    "step a bool": (lambda d: d["state"][1].update(step=True), "'b' must be an integer in [0, 2^53], got True"),
    "step missing": (lambda d: d["state"][1].pop("step"), "'b' must be an integer in [0, 2^53], got None"),
    "host scalar": (lambda d: d["state"][1].update(mu_product=0.5), "'b' has the carried numbers ['mu_product']"),
    "option unknown": (lambda d: d["param_groups"][0].update(momentum=0.9), "no option 'momentum'"),
    "option bad": (lambda d: d["param_groups"][0].update(lr=float("nan")), "lr must be in [0, inf), got nan"),
    "step too far": (lambda d: d["state"][1].update(step=2**53 + 1), "must be an integer in [0, 2^53]"),
    "host scalar infinite": (lambda d: d["state"][1].update(mu_product=float("inf")), "must be an array or a number"),
}


@pytest.mark.parametrize("change", BAD_STATES)
def test_bad_state_dicts_are_refused(change):
    opt, other = trained(), trained(lr=0.5)
    other.step(gradients())
    saved = other.state_dict()
    apply, words = BAD_STATES[change]
    apply(saved)
    with refused(BAD, words, begins="AdamW", opt=opt):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("saved", [None, {}, [], "state"], ids=repr)
def test_what_is_no_state_dict_is_refused(saved):
    opt = trained()
    with refused(TypeError, "AdamW.load_state_dict: needed is what state_dict() returns", opt=opt):
        opt.load_state_dict(saved)


def test_a_missing_host_scalar_is_refused():
    opt = trained(fastopt.NAdam)
    saved = opt.state_dict()
    del saved["state"][1]["mu_product"]
    with refused(ValueError, "NAdam.load_state_dict: parameter 'b' has the carried numbers []", "mu_product", opt=opt):
        opt.load_state_dict(saved)
