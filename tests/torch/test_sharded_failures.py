"""ShardedOptimizer where one process has an overflow, is interrupted, fails in backward, dies or does not come."""

import pytest
from processes import TRAINING, on_processes

pytest.importorskip("torch")


def test_a_step_that_breaks_off_on_one_process_is_refused_or_torchs_error_from_then_on():
    """An interrupt between two buckets, a process that never arrives, and one that is killed in the middle of a step.

    The process that was interrupted refuses to go on; those that wait for it get torch's error after its timeout, and
    refuse, too. A new group and optimizer go on from the first process's parameters.
    """
    body = """
    import datetime, signal, time
    from fastopt.torch.sharded.optimizer import Sends

    EXITS = [0, -signal.SIGKILL]

    def refuses(opt):
        for action in (opt.step, opt.state_dict, opt.full_state_dict, lambda: opt.load_state_dict({})):
            assert "was broken off" in (error := refusal(action)), error
        assert "was broken off" in refusal(lambda: opt.add_param_group({"params": parameters()}))

    def main(rank, world, path):
        torch.set_num_threads(1)
        timeout = datetime.timedelta(seconds=3)
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timeout)
        begin, happens = Sends.begin, []

        def broken_off(self, number):
            if number == 2 and happens:
                happens.pop()()
            begin(self, number)

        Sends.begin = broken_off
        params = parameters()
        opt = ShardedOptimizer(params, front.AdamW, lr=0.05, bucket_cap_mb=0.1, max_grad_norm=1.0)
        assert len(opt._buckets) > 3
        give(params, 0)
        opt.step()
        if rank == 0:
            happens.append(lambda: signal.raise_signal(signal.SIGINT))
            try:
                opt.step()
            except KeyboardInterrupt:
                pass
        else:
            assert "imed out" in (error := refusal(opt.step)), error
        refuses(opt)

        group = dist.new_group(timeout=timeout)
        opt = ShardedOptimizer(params, front.AdamW, group, lr=0.05, bucket_cap_mb=0.1)
        everyone = [None, None]
        opt.step()
        dist.all_gather_object(everyone, [p.detach() for p in params], group=group)
        for p, q in zip(*everyone):
            same(p, q)
        if rank == 1:
            happens.append(lambda: os.kill(os.getpid(), signal.SIGKILL))
        start = time.monotonic()
        error = refusal(opt.step)
        assert "Connection" in error or "imed out" in error, error
        assert time.monotonic() - start < 30
        refuses(opt)
        os._exit(0)
    """
    on_processes(body, 2)


def test_overflow_on_one_process_skips_on_all_and_every_scaler_backs_off():
    """Also what cannot be: torch's scaler looks at gradients that were taken away."""
    body = """
    def run(rank, world):
        for reduces in (True, False):
            net, one = model(), model()
            opt = ShardedOptimizer(net.parameters(), front.AdamW, reduce_gradients=reduces, lr=0.05, eps=0.1)
            shown = net if reduces else torch.nn.parallel.DistributedDataParallel(net)
            alone = front.AdamW(one.parameters(), lr=0.05, eps=0.1)
            make = front.GradScaler if reduces else torch.amp.GradScaler
            scalers = make("cpu", init_scale=2.0**4), make("cpu", init_scale=2.0**4)
            for t in range(4):
                opt.zero_grad(), alone.zero_grad()
                large = 1e38 if t == 1 else 1.0  # times the scale it is infinite
                scalers[0].scale(loss(shown, t, rank, world) * (large if rank else 1.0)).backward()
                scalers[1].scale(loss(one, t, 0, 1) * large).backward()
                for scaler, o in zip(scalers, (opt, alone)):
                    scaler.step(o)
                    scaler.update()
                assert scalers[0].get_scale() == scalers[1].get_scale() == (16.0 if t == 0 else 8.0)
                assert all(state["step"] == (t if t else 1) for state in opt.state.values())
                for p, q in zip(net.parameters(), one.parameters()):
                    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        opt = ShardedOptimizer(net.parameters(), front.AdamW, reduce_gradients=True)
        before = [p.detach().clone() for p in net.parameters()]
        for unscales in (False, True):
            for make in (torch.amp.GradScaler, front.GradScaler) if unscales else (torch.amp.GradScaler,):
                scaler = make("cpu")
                with opt.no_sync():
                    scaler.scale(loss(net, 0, rank, world)).backward()  # .grad is there, but of this process only
                if unscales:
                    scaler.unscale_(opt)
                assert "GradScaler without unscale_" in (error := refusal(lambda: scaler.step(opt))), error
                opt.zero_grad()
        for p, q in zip(net.parameters(), before):
            same(p, q)
    """
    on_processes(TRAINING + body, 2)


def test_a_backward_that_failed_or_was_dropped_on_one_process_is_found_and_can_be_repeated():
    body = """
    def run(rank, world):
        net, one = model(), model()
        opt = ShardedOptimizer(net.parameters(), front.SGD, reduce_gradients=True, bucket_cap_mb=0.01, lr=0.05)
        alone = front.SGD(one.parameters(), lr=0.05)
        for t, what in enumerate(("nothing", "fails", "drops", "repeats", "nothing")):
            opt.zero_grad(), alone.zero_grad()
            before = [p.detach().clone() for p in net.parameters()]
            if what == "fails":
                handle = net[0].weight.register_hook(lambda g: 1 / 0 if rank else g)
                if rank:
                    assert "ZeroDivisionError" in refusal(loss(net, t, rank, world).backward)
                else:
                    loss(net, t, rank, world).backward()
                handle.remove()
                assert "a backward failed" in (error := refusal(opt.step)), error
            if what == "drops":
                loss(net, 9, rank, world).backward()
                if rank:
                    opt.zero_grad()
                    loss(net, 9, rank, world).backward()
                assert "zero_grad was called" in (error := refusal(opt.step)), error
            if what == "repeats":
                loss(net, 9, rank, world).backward()
            for p, q in zip(net.parameters(), before):
                same(p, q)
            opt.zero_grad()
            loss(net, t, rank, world).backward()
            loss(one, t, 0, 1).backward()
            opt.step(), alone.step()
            for p, q in zip(net.parameters(), one.parameters()):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        if rank:  # an interrupt while a bucket is handed over
            opt._reducer._buckets[0].launch = lambda: 1 / 0
            assert "ZeroDivisionError" in refusal(loss(net, 0, rank, world).backward)
            assert "was broken off" in refusal(opt.step)
    """
    on_processes(TRAINING + body, 2)


def test_16_bit_gradients_of_several_backward_passes_are_added_up_in_float32():
    """Added up in bfloat16, the small ones would leave no trace (T26)."""
    body = """
    def run(rank, world):
        torch_has_dtypes = hasattr(torch.ones(1), "grad_dtype")
        for way in ("passes", "no_sync") if torch_has_dtypes else ("passes",):
            for master in (True, False):
                p = torch.nn.Parameter(torch.zeros(20_000, dtype=torch.bfloat16))
                if way == "no_sync":
                    p.grad_dtype = torch.float32
                opt = ShardedOptimizer([p], front.SGD, lr=1.0, reduce_gradients=True, master_weights=master)
                for factor in (1.0, *[2.0**-9] * 64):
                    with opt.no_sync() if way == "no_sync" else __import__("contextlib").nullcontext():
                        (p * factor).float().sum().backward()
                opt.step()
                expected = 1.125 if torch_has_dtypes else 1.0
                assert (p == -expected).all(), p
                if master:
                    assert all((s["master_param"] == -expected).all() for s in opt.state.values())
                p.grad = torch.ones_like(p, dtype=p.grad_dtype if way == "no_sync" else None)
                opt.step()  # gradients of another dtype than before
                assert (p == -expected - 1).all()
    """
    on_processes(body, 2)


def test_a_gradient_that_is_refused_or_zero_on_one_process_makes_none_wait():
    """Sparse ones are refused also where the parameter lies elsewhere, and a first step with lr 0 is a step (T38)."""
    body = """
    def run(rank, world):
        params = [torch.nn.Parameter(torch.ones(4)) for _ in range(2)]
        opt = ShardedOptimizer(params, front.SGD, lr=0.0, max_grad_norm=1.0)
        assert [m.part.hi for m in opt._members] == ([4, 4] if rank == 0 else [0, 0])
        for p in params:
            p.grad = torch.full((4,), 2.0)
        opt.step()
        assert opt.last_info.grad_norm == 32**0.5 and not opt.last_info.skipped
        for p in params:
            p.grad = torch.ones(4).to_sparse()
        for _ in range(2):
            assert "does not support sparse gradients" in refusal(opt.step)
        for p in params:
            p.grad = torch.ones(4)
        opt.step()
    """
    on_processes(body, 2)


def test_hooks_end_with_their_optimizer():
    """Another one of the same model, sharded or not, gets the gradients."""
    body = """
    def run(rank, world):
        nets = [model(), model()]
        for kind in (ShardedOptimizer, ShardedOptimizer, None):
            if kind is None:
                opt = front.SGD(nets[0].parameters(), lr=0.05)
            else:
                opt = kind(nets[0].parameters(), front.SGD, reduce_gradients=True, lr=0.05)
            alone = front.SGD(nets[1].parameters(), lr=0.05)
            loss(nets[0], 0, 0, 1).backward(), loss(nets[1], 0, 0, 1).backward()
            opt.step(), alone.step()
            opt.zero_grad(), alone.zero_grad()
        for p, q in zip(nets[0].parameters(), nets[1].parameters()):
            same(p, q)
    """
    on_processes(TRAINING + body, 1)
