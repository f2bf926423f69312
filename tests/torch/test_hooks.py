"""fastopt.torch calls hooks and tells profilers, as torch's wrapper of a step does; and it sees changes of options."""

import copy
import importlib

import pytest
from torch_compare import assert_close, unchanged
from torch_problem import TORCH, both, front, params_of, torch, train

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
        train(params, opt, 5)
    finally:
        for handle in removable:
            handle.remove()
    assert seen == [(when, True, 1) for when in ("all before", "before", "after", "all after")] * 5
    opt.step()
    assert len(seen) == 20


@pytest.mark.parametrize("kind", [front.AdamW, torch.optim.AdamW])
def test_a_profiler_sees_the_step(kind):
    train(params := params_of(), opt := kind(params, lr=0.1), 1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert f"Optimizer.step#{kind.__name__}.step" in {event.key for event in profile.key_averages()}


def exchange_options(group, maximize_first=True):
    """The same objects in the same order, under other names."""
    names = ["maximize", "nesterov"][:: 1 if maximize_first else -1]
    for name in names:
        del group[name]
    group.update(zip(names, (True, False), strict=True))


@pytest.mark.parametrize(
    ("name", "options", "changes"),
    [
        ("Adam", {"lr": 0.1}, {5: lambda group: group.update(lr=0.5)}),
        ("Adam", {"lr": torch.tensor(0.1, dtype=torch.float64)}, {5: lambda group: group["lr"].fill_(0.5)}),
        ("Adam", {"betas": [0.9, 0.99]}, {5: lambda group: group["betas"].__setitem__(0, 0.5)}),
        ("Adam", {"lr": 0.1}, {5: lambda group: group.update(maximize=True)}),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, {3: exchange_options, 4: lambda group: exchange_options(group, False)}),
    ],
)
def test_a_change_of_options_is_seen_in_the_next_step(name, options, changes):
    def run(home):
        params = params_of(dtype=torch.float64)
        opt = getattr(home, name)(params)
        opt.param_groups[0].update(copy.deepcopy(options))
        for t in range(8):
            changes.get(t, lambda group: None)(opt.param_groups[0])
            train(params, opt, 1, first=t)
        return params

    assert_close(*both(run), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("where", ["parameter", "state", "the last byte"])
def test_a_gradient_where_the_step_writes_is_refused_at_every_step(where):
    params = [torch.nn.Parameter(torch.ones(1000)), torch.nn.Parameter(torch.ones(1000))]
    opt = front.AdamW(params, lr=0.1)
    train(params, opt, 5)
    assert (opt.state.watch.derived().only.serving.probe is not None) == (TORCH >= (2, 9))
    if where == "the last byte":
        memory = torch.ones(1999)
        params[0].data, params[1].grad = memory[:1000], memory[999:]
    else:
        params[1].grad = params[0].detach() if where == "parameter" else opt.state[params[0]]["exp_avg"].view(-1)
    with unchanged(params):
        for _ in range(3):
            with pytest.raises(ValueError, match="the gradient of parameter 1 of group 0 shares memory with a param"):
                opt.step()
    before = params[1].detach().clone()
    train(params, opt, 1, first=6)
    assert not torch.equal(params[1], before)
