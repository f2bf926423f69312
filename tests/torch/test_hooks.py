"""fastopt.torch calls hooks and tells profilers, as torch's wrapper of a step does; and it sees changes of options."""

import copy
import importlib

import pytest
from torch_problem import TORCH, front, params_of, set_gradients, torch, train

hooks = importlib.import_module("torch.optim.optimizer")


class Overridden(front.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [front.AdamW, Overridden, torch.optim.AdamW])
def test_every_hook_is_called_once_a_step(kind):
    front.AdamW(params_of())  # torch would wrap the class's step with the first optimizer
    params, seen = params_of(), []
    opt = kind(params, lr=0.1)

    def note(when):
        return lambda o, args, kwargs: seen.append((when, o is opt, len(args)))

    removable = [
        hooks.register_optimizer_step_pre_hook(note("all before")),
        hooks.register_optimizer_step_post_hook(note("all after")),
        opt.register_step_pre_hook(note("before")),
        opt.register_step_post_hook(note("after")),
    ]
    try:
        for t in range(5):
            set_gradients(params, t)
            opt.step()
    finally:
        for handle in removable:
            handle.remove()
    assert seen == [(when, True, 1) for when in ("all before", "before", "after", "all after")] * 5
    opt.step()
    assert len(seen) == 20


@pytest.mark.parametrize("kind", [front.AdamW, torch.optim.AdamW])
def test_a_profiler_sees_the_step(kind):
    params = params_of()
    opt = kind(params, lr=0.1)
    train(params, opt, 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert f"Optimizer.step#{kind.__name__}.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda group: group.update(lr=0.5), {"lr": 0.1}),
        (lambda group: group["lr"].fill_(0.5), {"lr": torch.tensor(0.1, dtype=torch.float64)}),
        (lambda group: group["betas"].__setitem__(0, 0.5), {"lr": 0.1, "betas": [0.9, 0.99]}),
        (lambda group: group.update(maximize=True), {"lr": 0.1}),
    ],
)
def test_a_change_of_options_is_seen_in_the_next_step(change, options):
    assert_changes_are_seen("Adam", options, {5: change})


def assert_changes_are_seen(name, options, changes):
    def run(kind):
        params = params_of(dtype=torch.float64)
        opt = kind(params)
        opt.param_groups[0].update(copy.deepcopy(options))
        for t in range(8):
            changes.get(t, lambda group: None)(opt.param_groups[0])
            set_gradients(params, t)
            opt.step()
        return params

    for p, q in zip(run(getattr(front, name)), run(getattr(torch.optim, name)), strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-13)


def test_options_that_change_places_with_equal_values_are_seen():
    def exchange(group, *, maximize_first):
        names = ["maximize", "nesterov"] if maximize_first else ["nesterov", "maximize"]
        for name in names:  # the same objects in the same order, under other names
            del group[name]
        group.update(zip(names, (True, False), strict=True))

    changes = {3: lambda g: exchange(g, maximize_first=True), 4: lambda g: exchange(g, maximize_first=False)}
    assert_changes_are_seen("SGD", {"lr": 0.1, "momentum": 0.9}, changes)


@pytest.mark.parametrize("where", ["parameter", "state", "the last byte"])
def test_a_gradient_where_the_step_writes_is_refused_at_every_step(where):
    params = [torch.nn.Parameter(torch.ones(1000)), torch.nn.Parameter(torch.ones(1000))]
    opt = front.AdamW(params, lr=0.1)
    train(params, opt, 5)
    assert (opt.state.watch.derived.serving.probe is not None) == (TORCH >= (2, 9))
    before = [p.detach().clone() for p in params]
    memory = {"parameter": params[0].detach(), "state": opt.state[params[0]]["exp_avg"].view(-1)}
    if where == "the last byte":
        params[1].grad = torch.cat([params[1].detach(), params[1].detach()])[:1000]
        both = torch.ones(1999)
        params[0].data, params[1].grad = both[:1000].fill_(1.0), both[999:]
        opt.param_groups[0]["lr"] = 0.1
        before[0] = params[0].detach().clone()
    else:
        params[1].grad = memory[where]
    for _ in range(3):
        with pytest.raises(ValueError, match="the gradient of parameter 1 of group 0 shares memory with a parameter"):
            opt.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    train(params, opt, 1, first=6)
    assert not torch.equal(params[1], before[1])
