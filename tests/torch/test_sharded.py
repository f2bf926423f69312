"""ShardedOptimizer: the bits of one process on any number of them, and what is torch's."""

import numpy as np
import pytest
from cases import CASES
from processes import on_processes

pytest.importorskip("torch")

import torch
from fastopt.kernels.layout import CHUNK

import fastopt.torch as front
from fastopt.torch.sharded.layout import bucketed, placed

SAME_BITS = """
    HOW = [
        (25, dict()),
        (0.05, dict(max_grad_norm=1.0, ema_decay=0.5)),
        (0.1, dict(dtype=torch.bfloat16, master_weights=True, skip_nonfinite=True, zero_grads=True)),
        (0.1, dict(dtype=torch.bfloat16, max_grad_norm=1e9)),
        (0.05, dict(dtype=torch.float16, master_weights=True, ema_decay=0.5)),
    ]

    def check(kind, options, rank, world, cap, **how):
        sizes = [(3,), (60, 300), (), (40_000,), (70, 70), (0, 3), (5,), (2, 3, 9_000)]
        dtype = how.pop("dtype", torch.float32)
        own, one = parameters(dtype, seed=rank, sizes=sizes), parameters(dtype, sizes=sizes)
        opt = ShardedOptimizer(own, kind, bucket_cap_mb=cap, **options, **how)
        alone = kind(one, **options, **how)
        for t in range(3):
            give(own, t), give(one, t)
            if t == 1:
                own[4].grad = one[4].grad = None
            if t == 1 and how.get("skip_nonfinite"):
                own[3].grad[-1] = one[3].grad[-1] = float("inf")
            opt.step(), alone.step()
            assert opt.last_info == alone.last_info, (opt.last_info, alone.last_info)
            for p, q in zip(own, one):
                same(p, q)
        same_states(opt, alone, rank, world - 1)

    def run(rank, world):
        for k, (kind, options) in enumerate(CASES):
            for j, (cap, how) in enumerate(HOW):
                if k % len(HOW) == j or ALL:
                    check(getattr(front, kind), options, rank, world, cap, **how)
"""


def test_bits_are_those_of_one_optimizer_on_any_number_of_processes():
    cases = [("AdamW", dict(lr=0.05)), ("LARS", dict(lr=0.05, weight_decay=0.1)), ("LAMB", dict(lr=0.05))]
    on_processes(SAME_BITS + f"\n    CASES, ALL = {cases}, True", 1, 2, 3, 4)


@pytest.mark.full
def test_bits_of_every_rule_and_option_are_those_of_one_optimizer():
    """Each case with one of the ways to step."""
    kinds = {
        (c.rule, c.hyper.get("nesterov"), c.hyper.get("maximize")): c for c in CASES if c.hyper.get("adapt") is None
    }
    cases = [(case.optimizer, case.hyper) for case in kinds.values() if "keep_weight_norms" not in case.hyper]
    assert {name for name, _ in cases} == {*front.optimizers.__all__} - {"optimizer"}
    on_processes(SAME_BITS + f"\n    CASES, ALL = {cases}, False", 1, 2, 3, 4)


def test_a_process_has_its_part_of_the_states_and_no_more():
    body = """
    def run(rank, world):
        params = parameters()
        opt = ShardedOptimizer(params, front.AdamW, bucket_cap_mb=0.2)
        own = sum(x.numel() for s in opt.state.values() for name, x in s.items() if name != "step")
        whole, buckets = 2 * sum(p.numel() for p in params), len(opt._buckets)
        assert buckets > 2 and own <= whole / world + 2 * buckets * 16_384, (own, whole)
        for m in opt._members:
            lo, hi = m.part
            assert lo % 16_384 == 0 and (hi % 16_384 == 0 or hi == m.param.numel())
    """
    on_processes(body, 2, 3)


def test_no_slice_is_larger_than_its_part_and_a_chunk_whatever_the_sizes():
    rng = np.random.default_rng(0)
    for processes in (1, 2, 3, 4, 7, 16):
        for _ in range(300):
            sizes = [
                int(rng.integers(0, 60_000) if rng.random() < 0.5 else 10 ** rng.uniform(0, 5.8)) for _ in range(6)
            ]
            buckets = bucketed([torch.empty(size, device="meta") for size in sizes], 1e9, processes)
            assert sorted(p.numel() for bucket in buckets for p in bucket) == sorted(sizes)
            for numels in ([p.numel() for p in bucket] for bucket in buckets):
                begins, share = placed(numels, processes)
                own = np.zeros(processes)
                for begin, size in zip(begins, numels, strict=True):
                    borders = np.clip(np.arange(processes + 1) * share - begin, 0, size)
                    assert all(border % CHUNK == 0 or border == size for border in borders)
                    own += np.diff(borders)
                assert own.sum() == sum(numels)
                assert own.max() <= sum(numels) / processes + CHUNK + 31 * len(
                    numels
                )  # arrays begin at multiples of 32


def test_non_finite_gradients_anywhere_skip_everywhere():
    body = """
    def run(rank, world):
        params = parameters()
        opt = ShardedOptimizer(params, front.AdamW, skip_nonfinite=True, zero_grads=True)
        before = [p.detach().clone() for p in params]
        give(params, 0)
        params[6].grad[1, 2, -1] = float("nan")  # on one process's slice
        opt.step()
        assert opt.last_info.skipped and all(not s["step"] for s in opt.state.values())
        for p, q in zip(params, before):
            same(p, q)
            assert not p.grad.any()
    """
    on_processes(body, 2)


def test_what_is_torchs_works():
    """Param groups (T31), schedulers, closures, hooks, both scalers, zeroing, averages."""
    body = """
    def run(rank, world):
        for scaler_class in (None, torch.amp.GradScaler, front.GradScaler):
            own, one = parameters(seed=rank), parameters()
            groups = [[{"params": x[:3], "lr": 0.1}, {"params": x[3:7], "mine": "kept"}] for x in (own, one)]
            opt = ShardedOptimizer(groups[0], front.AdamW, lr=0.05, bucket_cap_mb=0.1, ema_decay=0.5)
            alone = front.AdamW(groups[1], lr=0.05, ema_decay=0.5)
            assert [g["lr"] for g in opt.param_groups] == [0.1, 0.05] and opt.param_groups[1]["mine"] == "kept"
            assert opt.param_groups[0]["params"][0] is own[0]
            both = (opt, own), (alone, one)
            schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o, _ in both]
            scalers = [scaler_class and scaler_class("cpu", init_scale=8.0) for _ in both]
            calls, dicts = [], []
            opt.register_step_post_hook(lambda *_: calls.append(1))
            opt.register_state_dict_pre_hook(lambda o: dicts.append("save"))
            opt.register_state_dict_post_hook(lambda o, saved: {**saved, "mine": 1})
            opt.register_load_state_dict_pre_hook(lambda o, loaded: dicts.append(loaded.pop("mine")))
            opt.register_load_state_dict_post_hook(lambda o: dicts.append("loaded"))
            for t in range(4):
                if t == 2:
                    for o, params in both:
                        o.add_param_group({"params": params[7:], "lr": 0.2})
                for (o, params), scheduler, scaler in zip(both, schedulers, scalers):
                    o.zero_grad()
                    give(params if t > 1 else params[:7], t, 8.0 if scaler else 1.0)
                    if scaler:
                        scaler.scale(torch.ones(()))
                        if t == 1:
                            params[3].grad[-1] = float("inf")
                        scaler.step(o)
                        scaler.update()
                    else:
                        assert o.step(lambda: 2.5) == 2.5
                    scheduler.step()
                for p, q in zip(own[:None if t > 1 else 7], one):
                    same(p, q)
                    assert p.grad is q.grad is None or torch.equal(p.grad.nan_to_num(), q.grad.nan_to_num())
            assert len(calls) == 4
            opt.load_state_dict(opt.state_dict())
            assert dicts == ["save", 1, "loaded"]
            same_states(opt, alone, rank)
            kept = [p.detach().clone() for p in own]
            with opt.swap_ema(), alone.swap_ema():
                for p, q, k in zip(own, one, kept):
                    same(p, q)
                    assert not torch.equal(p, k)
                assert "averages" in refusal(opt.step) and "averages" in refusal(opt.state_dict)
            for p, k in zip(own, kept):
                same(p, k)
            for attribute, value in (("max_grad_norm", 0.5), ("skip_nonfinite", True), ("zero_grads", True)):
                for o, _ in both:
                    setattr(o, attribute, value)
                assert getattr(opt, attribute) == value and f"{attribute}: {value}" in repr(opt)
            for o, params in both:
                give(params, 9)
                o.step()
            assert opt.last_info == alone.last_info and opt.last_info.grad_norm
            for p, q in zip(own, one):
                same(p, q)
                assert not p.grad.any()
    """
    on_processes(body, 2)


def test_gradients_may_lie_otherwise_and_parameters_be_frozen_or_unfrozen():
    body = """
    def run(rank, world):
        own, one = (parameters(torch.bfloat16, sizes=[(300, 200), (4,), (90, 80), (70_000,)]) for _ in range(2))
        both = []
        for params in (own, one):
            params[0].data = params[0].data.t()
            params[1].requires_grad_(False), params[3].requires_grad_(False)
            if hasattr(params[2], "grad_dtype"):
                params[2].grad_dtype = torch.float32
        how = dict(lr=0.05, master_weights=True, ema_decay=0.5)
        both = [(ShardedOptimizer(own, front.AdamW, **how), own), (front.AdamW(one, **how), one)]
        for t in range(3):
            for o, params in both:
                params[0].grad = torch.randn(200, 300, generator=torch.Generator().manual_seed(t)).bfloat16()
                second = torch.randn(80, 90, generator=torch.Generator().manual_seed(t)).t()
                params[2].grad = second if hasattr(params[2], "grad_dtype") else second.bfloat16()
                if t == 1:
                    params[1].grad = torch.ones_like(params[1])  # torch steps it though it is frozen
                if t == 2:
                    params[3].requires_grad_(True)
                    params[3].grad = torch.ones_like(params[3])
                o.step()
            for p, q in zip(own, one):
                same(p, q)
            assert [own[i] in both[0][0].state for i in (1, 3)] == [t >= 1, t == 2]
        same_states(both[0][0], both[1][0], rank)
        for o, params in both:  # frozen, but with a gradient, so that they decay
            for i in (0, 2, 3):
                params[i].requires_grad_(False)
            o.zero_grad(set_to_none=False)
            o.step()
        with both[0][0].swap_ema(), both[1][0].swap_ema():
            for p, q in zip(own, one):
                same(p, q)
        for p, q in zip(own, one):
            same(p, q)
        own[0].grad = torch.ones(200, 300, dtype=torch.bfloat16).to_sparse()
        assert "sparse" in refusal(both[0][0].step)
    """
    on_processes(body, 2)


def test_parameters_are_views_of_buckets_and_still_what_they_were():
    """Models are copied, saved, moved and initialized as before, and carry no more than their own bytes (T37)."""
    body = """
    import copy, io

    def nbytes(saved):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        return buffer.tell()

    def run(rank, world):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 100))
        plain, seen = copy.deepcopy(net), []
        net[0].weight.register_hook(lambda g: seen.append("tensor"))
        net[1].register_full_backward_hook(lambda *_: seen.append("module"))
        before = list(net.parameters())
        opt = ShardedOptimizer(net.parameters(), front.AdamW, lr=0.05)
        assert all(p is q for p, q in zip(net.parameters(), before))
        net.to("cpu"), net.float()
        copied = copy.deepcopy(net)
        for p, q in zip(net.parameters(), copied.parameters()):
            same(p, q)
            assert p.untyped_storage().nbytes() == q.untyped_storage().nbytes() == p.nbytes
        assert nbytes(net[1].bias) < nbytes(plain[1].bias) + 100
        assert nbytes(net.state_dict()) < nbytes(plain.state_dict()) + 100
        alone = front.AdamW(plain.parameters(), lr=0.05)
        x = torch.ones(5, 300)
        for model, o in ((net, opt), (plain, alone)):
            model(x).square().sum().backward()
            o.step()
            with torch.no_grad():
                torch.nn.init.zeros_(model[0].bias)
            model(x).square().sum().backward()
            o.step()
        assert seen == ["module", "tensor"] * 2
        for p, q, r in zip(net.parameters(), plain.parameters(), copied.parameters()):
            same(p, q)
            assert not torch.equal(p, r)
        with torch.device("meta"):
            empty = torch.nn.Linear(3, 4)
        for params, text in (
            (list(empty.parameters()), "parameter 0 of group 0 is on meta"),
            ([*empty.parameters(), *copied.parameters()], "needed is one device"),
        ):
            assert text in (error := refusal(lambda: ShardedOptimizer(params, front.AdamW))), error
        assert "needed is one device" in refusal(lambda: opt.add_param_group({"params": list(empty.parameters())}))
        net.half()
        assert "Move the model before the optimizer is made" in refusal(opt.step)
    """
    on_processes(body, 2)


def test_parameters_that_others_write_are_followed():
    """Masters never bring back what they were rounded to before (T36)."""
    body = """
    def run(rank, world):
        for dtype, extra in ((torch.float32, {}), (torch.bfloat16, dict(master_weights=True))):
            own, one = parameters(dtype, seed=rank), parameters(dtype)
            both = [(ShardedOptimizer(own, front.AdamW, lr=0.05, **extra), own)]
            both += [(front.AdamW(one, lr=0.05, **extra), one)]
            for t in range(4):
                for o, params in both:
                    with torch.no_grad():
                        if t == 1:
                            params[6].copy_(params[6] * 2)
                        if t == 2:
                            params[3].data = params[3].detach() + 1
                            params[1].data = params[1].detach().clone()
                        if t == 3:
                            params[1].data.fill_(3.0)
                            o.refresh()
                    give(params, t)
                    o.step()
                for p, q in zip(own, one):
                    same(p, q)
        own[1].data = own[1].double()
        assert "Move the model before" in refusal(both[0][0].step)
    """
    on_processes(body, 2)
