"""fastopt.torch: what ``state`` shows is what a step reads and writes, in memory of its own."""

import gc
import pickle

import pytest
from torch_compare import assert_close, assert_same_bits, unchanged
from torch_problem import CLASSES, both, every_class, every_copy, front, gradients, make, params_of, torch, train


@pytest.fixture(params=["C", "Python"])
def way(request, monkeypatch):
    """How gradients and states are looked at; without torch's C interface Python does it."""
    if request.param == "Python":
        monkeypatch.setattr(front._patterns._interface, "library", lambda: None)
    return request.param


MOVES = (
    lambda state, name: state.__setitem__(name, state[name].clone()),
    lambda state, name: setattr(state[name], "data", state[name].clone()),
    lambda state, name: state[name].set_(state[name].clone()),
    lambda state, name: torch.utils.swap_tensors(state[name], state[name].clone()),
    lambda state, name: state[name].share_memory_(),
)


every_extra = pytest.mark.parametrize("extra", [{}, {"flatten": True}, {"master_weights": True}], ids=str)


@every_class
def test_tensors_that_the_user_moves_are_stepped_where_they_are(name, way):
    for move in MOVES:
        assert_stepped_in_place(name, move)


def test_tensors_that_the_user_moves_are_stepped_where_they_are_on_a_gpu(gpus):
    for move in MOVES:
        assert_stepped_in_place("NAdam", move, gpus.put)


def assert_stepped_in_place(name, move, place=lambda params: None):
    (p, a), (q, b) = make(name), make(name)
    place(p)
    train(p, a, 3)
    train(q, b, 3)
    for key in a.state[p[0]]:
        move(a.state[p[0]], key)
    kept = [(key, x, x.data_ptr()) for key, x in a.state[p[0]].items()]
    for t in range(3, 6):  # the third is one that asks torch's C interface
        train(p, a, 1, first=t)
        train(q, b, 1, first=t)
        for key, x, address in kept:
            assert a.state[p[0]][key] is x, (MOVES.index(move), key)
            assert x.data_ptr() == address, (MOVES.index(move), key)
            assert torch.equal(x, b.state[q[0]][key]), (MOVES.index(move), key)
    assert_same_bits(p, q)


def test_tensors_are_made_when_somebody_reads_the_state():
    params, opt = make("AdamW")
    train(params, opt, 3)
    assert not dict.__len__(opt.state)
    assert len(opt.state) == len(params)
    assert opt.state[params[0]]["step"] == 3
    train(params, opt, 1, first=3)
    assert opt.state[params[0]]["step"] == 4


def test_copies_and_unions_of_a_state_are_plain_dicts():
    params, opt = make("AdamW")
    train(params, opt, 1)
    for state, key in ((opt.state, params[0]), (opt.state[params[0]], "exp_avg")):
        for other in (state.copy(), state | {1: 2}, {1: 2} | state):
            assert type(other) is dict
            assert other[key] is state[key]
        known = {*front._state.READS, *front._state.CHANGES, "copy", "fromkeys", "__or__", "__ror__"}
        inherited = {x for x in dir(dict) if x not in dir(object) and x not in known}
        assert inherited == {"__class_getitem__"}


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (lambda p: torch.zeros(4), ValueError, r"has shape \(4,\), but the parameter has shape \(5, 7\)"),
        (lambda p: torch.zeros(5, 7).double(), TypeError, r"is torch.float64 on cpu; needed is torch.float32 on cpu"),
        (lambda p: torch.zeros(7, 5).t(), ValueError, "does not lie in memory as its parameter does"),
        (lambda p: torch.zeros(1).expand(5, 7), ValueError, "does not lie in memory as its parameter does"),
        (lambda p: torch.zeros(5, 7, device="meta"), TypeError, "is torch.float32 on meta"),
        (lambda p: 0.5, TypeError, "is a float; needed is a tensor"),
        (lambda p: p.detach(), ValueError, "share memory; they would be updated twice"),
    ],
)
def test_a_state_that_cannot_be_stepped_in_place_is_refused(value, error, text):
    params, opt = make("AdamW")
    train(params, opt, 3)
    opt.state[params[0]]["exp_avg"] = value(params[0])
    kept = [opt.state[params[0]]["exp_avg_sq"]]
    with unchanged(params), unchanged(kept), pytest.raises(error, match=f"AdamW: .*parameter 0 of group 0.* {text}"):
        train(params, opt, 1, first=3)
    assert opt.state[params[1]]["step"] == 3


def test_swapped_parameters_are_stepped_and_not_what_they_were_swapped_with(way):
    def trained(home):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 8)
        opt = home.AdamW(model.parameters())
        for t in range(8):
            opt.zero_grad()
            if t == 4:
                model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
            model(torch.ones(2, 4)).square().mean().backward()
            opt.step()
        return list(model.parameters())

    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        torch.testing.assert_close(*both(trained))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("zero_grads", [False, True])
def test_a_gradient_without_memory_is_zero(zero_grads, place):
    p, q = (torch.nn.Parameter(torch.full((3,), 2.0)) for _ in range(2))
    a, b = front.AdamW(place([p]), zero_grads=zero_grads), torch.optim.AdamW([q])
    for x, opt in ((p, a), (q, b)):
        for _ in range(4):
            x.grad = None
            torch.sgn(x).sum().backward()
            opt.step()
    torch.testing.assert_close(p, q)
    assert a.state[p]["step"] == 4


class OwnParameter(torch.nn.Parameter):
    pass


class OwnTensor(torch.Tensor):
    pass


@every_class
def test_subclasses_without_a_dispatch_of_their_own_are_stepped(name):
    params, opt = make(name)
    own = [OwnParameter(params[0].detach().clone()), params[1].detach().clone().as_subclass(OwnTensor)]
    other = getattr(front, name)([x.requires_grad_() for x in own], **CLASSES[name])
    for t in range(3):
        for p, x, g in zip(params, own, gradients(params, t), strict=False):
            p.grad, x.grad = g, g.clone().as_subclass(type(x) if type(x) is OwnTensor else torch.Tensor)
        opt.step()
        other.step()
    for p, x in zip(params, own, strict=False):
        assert torch.equal(p, x.as_subclass(torch.Tensor))
        assert all(torch.equal(v, other.state[x][k]) for k, v in opt.state[p].items())


@every_class
def test_nothing_waits_for_the_garbage_collector(name):
    assert_freed_at_once(name, lambda params: params)


def test_nothing_waits_for_the_garbage_collector_on_a_gpu(gpus):
    assert_freed_at_once("NAdam", gpus.put)


def assert_freed_at_once(name, place):
    def alive():
        kinds = torch.Tensor, front.TensorOptimizer, front._stepper.Stepper
        return sum(issubclass(type(x), kinds) for x in gc.get_objects())

    train(*make(name), 1)  # torch imports more in the first step of a process, and keeps the frames
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for extra in ({}, {"flatten": True}, {"master_weights": True, "max_grad_norm": 1.0}):
            params, opt = make(name, dtype=torch.bfloat16, **extra)
            train(place(params), opt, 3)
            opt.load_state_dict(opt.state_dict())
            train(params, opt, 1)
            assert len(opt.state) == len(params)
            del params, opt
            assert alive() == before, extra
    finally:
        gc.enable()


# --- memory ----------------------------------------------------------------------------------------------------------


@every_extra
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tensor_has_just_its_own_bytes(dtype, extra, place, tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Conv2d(2, 2, 3) for _ in range(10)))
    model = model.to(dtype, memory_format=torch.channels_last)
    params = list(model.parameters())
    opt = front.NAdam(place(params), **extra)
    train(params, opt, 1)
    for p in params:
        tensors = [p, p.grad, *opt.state[p].values()]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors)
        assert all(x.stride() == p.stride() for x in opt.state[p].values() if x.dim())
    if extra.get("flatten"):
        pytest.importorskip("safetensors.torch").save_model(model, str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("extra", [{}, {"flatten": True}], ids=str)
def test_pickles_grow_with_what_is_in_them(extra):
    def size(count):
        params = torch.nn.ParameterList(torch.zeros(1000) for _ in range(count))
        train(params, opt := front.AdamW(params, **extra), 1)
        return len(pickle.dumps(opt)), len(pickle.dumps(params))

    assert all(large <= 4.2 * small for small, large in zip(size(50), size(200), strict=True))


class Allocated(torch.utils._python_dispatch.TorchDispatchMode):
    """Keeps all storages that operations make, so that none gets the address of another."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            if storage._cdata not in {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}:
                self.seen[storage._cdata] = storage
        return result


@every_extra
def test_loading_and_the_next_step_need_one_copy_of_the_states(extra):
    def one():
        params = params_of([(100_000,)] * 4, dtype=torch.bfloat16)
        return params, front.AdamW(params, **extra)

    (params, opt), (others, again) = one(), one()
    train(params, opt, 1)
    saved = opt.state_dict()
    size = sum(x.nbytes for state in saved["state"].values() for x in state.values())
    for p in others:
        p.grad = p.grad if extra.get("flatten") else torch.zeros_like(p)
    with Allocated() as allocated:
        again.load_state_dict(saved)
        if not extra.get("master_weights"):  # whose comparison with their parameters needs memory for one of these
            again.step()
    assert sum(storage.nbytes() for storage in allocated.seen.values()) <= 1.02 * size


@every_copy
def test_a_copy_of_a_flat_optimizer_is_flat_and_zeroes_its_gradients(how):
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    first = model, front.AdamW(model.parameters(), lr=0.1, flatten=True)

    def go(model, opt):
        for _ in range(3):
            opt.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            opt.step()

    go(*first)
    second = how(first)
    go(*first)
    go(*second)
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p.grad, q.grad)
    assert len(second[1].state.watch.derived().only.serving.plan._tables[False].sizes) == 1


# --- changes that come together --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["parameter", "parameter now", "state", "count"])
def test_what_changes_with_the_pattern_of_gradients_is_seen(way, what):
    """Beside torch's, with new memory while or just when another parameter has a gradient, and before."""

    def run(home):
        params, opt = make("AdamW", home=home)
        p, q, *_ = params
        for t in range(12):
            train(params, opt, 1, first=t)
            if t % 4 == 3:
                q.grad = None
                if what != "parameter now":
                    p.grad = torch.ones_like(p)
                    opt.step()
                if what.startswith("parameter"):
                    q.data, p.data = torch.full_like(q, 0.5), p.data.clone()
                elif what == "state":
                    opt.state[q]["exp_avg"].data = torch.full_like(q, 0.5)
                else:
                    opt.state[q]["step"].fill_(50.0)
        return params

    assert_close(*both(run))


def test_a_parameter_that_was_transposed_in_place_is_seen(way):
    def run(home):
        p = torch.nn.Parameter(torch.arange(4.0).view(2, 2))
        opt = home.SGD([p], lr=1.0)
        for t in range(6):
            p.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
            opt.step()
            if t == 3:
                p.data = p.data.t()
        return p

    assert torch.equal(*both(run))


def test_a_state_of_another_shape_is_not_spread():
    p = torch.nn.Parameter(torch.zeros(1, 3))
    opt = front.AdamW([p])
    train([p], opt, 3)
    p.grad, p.data = None, torch.zeros(5, 3)
    p.grad = torch.ones(5, 3)
    with pytest.raises(ValueError, match="shape"):
        opt.step()
    assert not p.any()


def test_an_empty_parameter_extends_nothing_that_is_flat():
    p, empty = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.empty(0))
    opt = front.AdamW([p, empty], lr=0.1, weight_decay=0.5, flatten=True)
    memory = torch.full((64,), 7.0)
    p.data = memory[:5]
    for _ in range(3):
        p.grad.fill_(1.0)
        opt.step()
    assert (memory[5:] == 7.0).all()
    assert (memory[:5] != 7.0).all()
