"""ShardedOptimizer: reduced gradients, groups of some processes, and processes that differ."""

import pytest
from processes import TRAINING, on_processes

pytest.importorskip("torch")


def test_gradients_are_reduced_while_backward_goes_on():
    """As DDP and the class would step, with accumulation (T25) in and without no_sync and with unused parameters."""
    body = """
    def run(rank, world):
        for mode in ("plain", "no_sync", "twice", "all in no_sync", "unused"):
            nets = [model(), model()]
            how = dict(lr=0.05, momentum=0.9)
            opt = ShardedOptimizer(nets[0].parameters(), front.SGD, reduce_gradients=True, bucket_cap_mb=0.01, **how)
            ddp = torch.nn.parallel.DistributedDataParallel(nets[1])
            alone = front.SGD(nets[1].parameters(), **how)
            for t in range(4):
                opt.zero_grad(), alone.zero_grad()
                if mode == "unused":
                    if rank:
                        loss(nets[0][:1], t, rank, world).backward()
                    opt.step()
                    assert all(p.grad is None for p in nets[0].parameters())
                    whole = opt.full_state_dict().get("state", {})
                    moved = [bool(state["momentum_buffer"].any()) for state in whole.values()]
                    assert rank or moved == [world > 1] * 2 + [False] * 4, moved
                    continue
                loss(ddp, t, rank, world).backward()
                if mode == "plain":
                    loss(nets[0], t, rank, world).backward()
                else:
                    loss(ddp, 10 + t, rank, world).backward()
                    if mode == "twice":
                        loss(nets[0], t, rank, world).backward()
                        loss(nets[0], 10 + t, rank, world).backward()
                    else:
                        with opt.no_sync():
                            loss(nets[0], t, rank, world).backward()
                            if mode == "all in no_sync":
                                loss(nets[0], 10 + t, rank, world).backward()
                        if mode == "no_sync":
                            loss(nets[0], 10 + t, rank, world).backward()
                assert mode == "all in no_sync" or all(p.grad is None for p in nets[0].parameters())
                opt.step(), alone.step()
                for p, q in zip(nets[0].parameters(), nets[1].parameters()):
                    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            everyone = [None] * world
            dist.all_gather_object(everyone, [p.detach() for p in nets[0].parameters()])
            for other in everyone:
                for p, q in zip(everyone[0], other):
                    same(p, q)
    """
    on_processes(TRAINING + body, 1, 3)


def test_layers_that_are_unfrozen_later_and_a_backward_that_failed_do_no_harm():
    body = """
    def run(rank, world):
        nets = [model(), model()]
        for net in nets:
            net[0].requires_grad_(False)
        opt = ShardedOptimizer(nets[0].parameters(), front.SGD, reduce_gradients=True, bucket_cap_mb=0.01, lr=0.05)
        alone = front.SGD(nets[1].parameters(), lr=0.05)
        for t in range(4):
            if t == 2:
                for net in nets:
                    net[0].requires_grad_(True)
            if t == 3:
                handle = nets[0][0].weight.register_hook(lambda g: 1 / 0)
                assert "ZeroDivisionError" in refusal(loss(nets[0], t, rank, world).backward)
                handle.remove()
            opt.zero_grad(), alone.zero_grad()
            loss(nets[0], t, rank, world).backward()
            loss(nets[1], t, 0, 1).backward()
            opt.step(), alone.step()
            for p, q in zip(nets[0].parameters(), nets[1].parameters()):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    """
    on_processes(TRAINING + body, 2)


def test_ddp_and_clipping_give_what_one_process_gives():
    body = """
    def run(rank, world):
        nets = [model(), model()]
        nets[0] = torch.nn.parallel.DistributedDataParallel(nets[0], gradient_as_bucket_view=True)
        opt = ShardedOptimizer(nets[0].parameters(), front.LAMB, lr=0.05, max_grad_norm=0.1)
        alone = front.LAMB(nets[1].parameters(), lr=0.05, max_grad_norm=0.1)
        for t in range(4):
            opt.zero_grad(), alone.zero_grad()
            loss(nets[0], t, rank, world).backward()
            loss(nets[1], t, 0, 1).backward()
            opt.step(), alone.step()
        for p, q in zip(nets[0].parameters(), nets[1].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    """
    on_processes(TRAINING + body, 2)


def test_what_differs_between_processes_is_named():
    body = """
    def run(rank, world):
        def make(params, kind=front.AdamW, **options):
            return ShardedOptimizer(params, kind, **options)

        bad = [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]
        for params, options, text in (
            (parameters()[: 3 + rank], {}, "parameters is no more on process 0 of the group"),
            (parameters(sizes=[(3, 4) if rank else (4, 3)]), {}, "parameter 0 of group 0 is (torch.Size([4, 3])"),
            (parameters(torch.float64 if rank else torch.float32), {}, "torch.float64"),
            (parameters(), {"lr": 0.1 + rank}, "lr is 0.1 on process 0 of the group, and lr is 1.1 on process 1"),
            (parameters(), {"bucket_cap_mb": 1 + rank}, "bucket_cap_mb is 1 on process 0"),
            (bad if rank else parameters(), {}, "complex64"),
            (zip("ba" if rank else "ab", parameters(sizes=[(2,)] * 2)), {}, "parameter 0 of group 0 is ('a', torch"),
            (parameters(), {"bucket_cap_mb": "25"}, "bucket_cap_mb is '25'; needed is a number of MiB above 0"),
        ):
            assert text in (error := refusal(lambda: make(params, **options))), error
        params = parameters()
        opt = make(params, max_grad_norm=1.0)
        give(params, 0)
        before = [p.detach().clone() for p in params]
        opt.param_groups[0]["lr"] = 0.1 + rank
        error = refusal(opt.step)
        assert "lr of group 0 is 0.1 on process 0 of the group, and lr of group 0 is 1.1 on process 1" in error, error
        opt.param_groups[0]["lr"] = 0.1
        params[2].grad = None if rank else params[2].grad
        assert "gradients is" in (error := refusal(opt.step)), error
        for p, q in zip(params, before):
            same(p, q)
        give(params, 0)
        opt.step()
        error = refusal(lambda: opt.add_param_group({"params": parameters(sizes=[(3 + rank,)])}))
        assert "parameter 0 of group 1" in error and len(opt.param_groups) == 1, error
        error = refusal(lambda: opt.add_param_group({"params": parameters(), "max_grad_norm": 1.0}))
        assert "max_grad_norm" in error and len(opt.param_groups) == 1, error
        opt.add_param_group({"params": parameters(sizes=[(3,)]), "mine": object()})  # the user's, nobody compares it
        opt.step()
        whole = make(parameters()).state_dict()
        for action, text in (
            (lambda: make(parameters(), torch.optim.AdamW), "must be a class of fastopt.torch, not <class"),
            (lambda: make(parameters(), flatten=True), "flatten=True"),
            (lambda: make(parameters(), learning_rate=0.1), "Did you mean 'lr'"),
            (lambda: __import__("copy").deepcopy(opt), "Use state_dict()"),
            (lambda: __import__("pickle").dumps(opt), "Use state_dict()"),
            (lambda: opt.no_sync().__enter__(), "no_sync of DDP's model"),
            (lambda: front.AdamW(parameters()).load_state_dict(whole), "can be copied only into one of the same"),
        ):
            assert text in (error := refusal(action)), error
    """
    on_processes(body, 2)


def test_a_group_of_some_processes_has_a_sharded_optimizer_of_its_own():
    """Without process 0 (T29), or of one process, which is as none (T30)."""
    body = """
    def run(rank, world):
        group, single = dist.new_group([1, 2]), dist.new_group([0])
        if rank == 0:
            assert "in no process group" in refusal(lambda: ShardedOptimizer(parameters(), front.AdamW, group))
            nets = model(), model()
            how = dict(lr=0.05, max_grad_norm=1.0)
            opt = ShardedOptimizer(nets[0].parameters(), front.AdamW, single, reduce_gradients=True, **how)
            alone = front.AdamW(nets[1].parameters(), **how)
            scalers = front.GradScaler("cpu", init_scale=8.0), front.GradScaler("cpu", init_scale=8.0)
            for t in range(3):
                for net, o, scaler in zip(nets, (opt, alone), scalers):
                    o.zero_grad()
                    scaler.scale(loss(net, t, 0, 1)).backward()
                    scaler.step(o)
                    scaler.update()
            for p, q in zip(*(net.parameters() for net in nets)):
                same(p, q)
            return
        own, one = parameters(seed=rank - 1), parameters()
        opt = ShardedOptimizer(own, front.LAMB, group, lr=0.05, max_grad_norm=1.0)
        alone = front.LAMB(one, lr=0.05, max_grad_norm=1.0)
        for t in range(2):
            give(own, t), give(one, t)
            opt.step(), alone.step()
        for p, q in zip(own, one):
            same(p, q)
        same_states(opt, alone, rank - 1, 1)
    """
    on_processes(TRAINING + body, 3)
