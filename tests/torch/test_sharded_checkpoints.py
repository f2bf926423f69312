"""ShardedOptimizer: checkpoints that go to any number of processes, and those that are refused.

T40 and T41 (codes with scales, remainders in the place of masters) speak of storage that no optimizer here has.
"""

from pathlib import Path

import pytest
from processes import on_processes

pytest.importorskip("torch")


def test_checkpoints_reshard_and_go_to_optimizers_that_are_not_sharded():
    """Saved on 2, loaded on 3, 1 and by the class; saved by the class, loaded on 2; also asynchronously, by name.

    States are equal by name and element (T33), as float32 beside 16-bit parameters (T39). What is saved asynchronously
    is of the moment of the call (T44). Options and keys of the user in param groups come back, too (T45). torch's
    helpers, called before the first step, change nothing (T38). A process reads its own pieces only (T34), has the same
    keys as all others (T32), and needs nobody for ``state_dict`` (T35).
    """
    body = """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    FOLDER = tempfile.mkdtemp()
    COPIES_PIECES = hasattr(dcp.staging, "DefaultStager")  # torch 2.7 does not

    class Counting(dcp.FileSystemReader):
        def read_data(self, plan, planner):
            tensors = [item for item in plan.items if item.type.name == "TENSOR"]
            self.elements = sum(item.lengths.numel() for item in tensors)
            return super().read_data(plan, planner)

    def made(rank, dtype, kind=None):
        params = parameters(dtype, seed=1)
        params[4].data = params[4].data.t()
        extra = dict(lr=0.05, ema_decay=0.5, master_weights=True)
        if kind:
            return params, front.AdamW(params, **extra)
        return params, ShardedOptimizer(params, front.AdamW, bucket_cap_mb=0.1, **extra)

    def whole(opt, rank):
        full = opt.full_state_dict()
        box = [full]
        dist.broadcast_object_list(box, 0)
        return box[0]["state"]

    def equal(a, b):
        assert a.keys() == b.keys()
        for i in a:
            assert a[i].keys() == b[i].keys()
            for name in a[i]:
                same(a[i][name], b[i][name])

    def run(rank, world):
        for dtype in (torch.float32, torch.bfloat16):
            path = FOLDER + "/" + str(dtype)
            params, opt = made(rank, dtype)
            _, alone = made(rank, dtype, "alone")
            alone.init_state()
            if world == 2:  # first
                for t in range(3):
                    give(params, t)
                    opt.step()
                opt.param_groups[0].update(lr=0.25, initial_lr=0.5, mine="kept")
                if rank:
                    opt.state_dict()
                saved = opt.state_dict()
                keys = {i: list(state) for i, state in saved["state"].items()}
                assert list(keys) == list(range(len(params)))
                everyone = [None] * world
                dist.all_gather_object(everyone, (keys, saved["param_groups"]))
                assert everyone[0] == everyone[1]
                dcp.save(saved, checkpoint_id=path + "/2")
                own_group = dist.new_group()  # its collectives are called by another thread
                asynchronously = dict(checkpoint_id=path + "/async", process_group=own_group)
                expected = whole(opt, rank)
                if COPIES_PIECES:
                    later = dcp.async_save(opt.state_dict(), **asynchronously)
                else:
                    error = refusal(lambda: dcp.async_save(opt.state_dict(), **asynchronously))
                    assert "into one of the same elements" in error, error
                give(params, 9)
                opt.step()
                if COPIES_PIECES:
                    later.result()
                torch.save(saved, f"{path}/{rank}.pt")
                torch.save(expected, f"{path}/expected{rank}.pt")
                opt.load_state_dict(torch.load(f"{path}/{rank}.pt"))
                equal(whole(opt, rank), expected)
            expected = torch.load(f"{path}/expected0.pt")
            for source in ("2", "async") if COPIES_PIECES else ("2",):
                _, opt = made(rank, dtype)
                opt.param_groups[0].update(initial_lr=0.1, mine="")  # torch loads keys that there are
                saved = opt.state_dict()
                reader = Counting(f"{path}/{source}")
                dcp.load(saved, storage_reader=reader)
                states = [x for state in saved["state"].values() for x in state.values()]
                assert reader.elements == sum(getattr(x, "local", x).numel() for x in states)
                opt.load_state_dict(saved)
                equal(whole(opt, rank), expected)
                group = opt.param_groups[0]
                assert (group["lr"], group["initial_lr"], group["mine"]) == (0.25, 0.5, "kept")
            saved = alone.state_dict()
            dcp.load(saved, checkpoint_id=path + "/2")
            alone.load_state_dict(saved)
            equal(alone.full_state_dict()["state"], expected)
            _, opt = made(rank, dtype)
            opt.load_state_dict(alone.state_dict())
            equal(whole(opt, rank), expected)
            dcp.save(alone.state_dict(), checkpoint_id=f"{path}/alone{world}")
            _, opt = made(rank, dtype)
            saved = opt.state_dict()
            dcp.load(saved, checkpoint_id=f"{path}/alone{world}")
            opt.load_state_dict(saved)
            equal(whole(opt, rank), expected)
            if world != 2:
                error = refusal(lambda: opt.load_state_dict(torch.load(f"{path}/0.pt")))
                assert "another process, number of processes" in error or "refused" in error, error

    def names(rank, world):
        net = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 100))
        before = [p.detach().clone() for p in net.parameters()]
        for kind, how in ((front.SGD, dict(weight_decay=0.1)), (front.AdamW, dict(fully_decoupled=True))):
            opt = ShardedOptimizer(net.parameters(), kind, lr=0.05, **how)
            get_optimizer_state_dict(net, opt)
            for p, q in zip(net.parameters(), before):
                same(p, q)
        opt = ShardedOptimizer(net.parameters(), front.AdamW, lr=0.05)
        give(list(net.parameters()), 0)
        opt.step()
        expected = whole(opt, rank)
        saved = get_optimizer_state_dict(net, opt)
        assert sorted(saved["state"]) == ["0.bias", "0.weight", "1.bias", "1.weight"]
        dcp.save(saved, checkpoint_id=FOLDER + "/names")
        other = ShardedOptimizer(net.parameters(), front.AdamW, lr=0.1)
        saved = get_optimizer_state_dict(net, other)
        dcp.load(saved, checkpoint_id=FOLDER + "/names")
        set_optimizer_state_dict(net, other, saved)
        equal(whole(other, rank), expected)
        assert other.param_groups[0]["lr"] == 0.05

    inner = run

    def run(rank, world):
        inner(rank, world)
        names(rank, world)
    """
    on_processes(body, 2, 3, 1)


def test_a_resumed_training_has_the_bits_of_one_that_was_not_interrupted():
    """On other numbers of processes, all of which hold the same parameters right after loading (T27).

    Where only weights are loaded, masters follow them (T28, T36).
    """
    body = """
    import torch.distributed.checkpoint as dcp

    FOLDER = tempfile.mkdtemp()

    def net(seed):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 100)).bfloat16()

    def made(seed):
        model = net(seed)
        how = dict(lr=0.05, master_weights=True, max_grad_norm=1.0, ema_decay=0.5)
        return model, ShardedOptimizer(model.parameters(), front.LAMB, bucket_cap_mb=0.05, **how)

    def step(model, opt, t):
        give(list(model.parameters()), t)
        opt.step()

    def everywhere(model, expected):
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, model.state_dict())
        for found in everyone:
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                same(found[name], value)

    def run(rank, world):
        if world == 2:
            model, opt = made(rank)
            for t in range(2):
                step(model, opt, t)
            dcp.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, checkpoint_id=FOLDER + "/saved")
            torch.save(model.state_dict(), f"{FOLDER}/then{rank}")
            step(model, opt, 2)
            torch.save(model.state_dict(), f"{FOLDER}/after{rank}")
        model, opt = made(10 + rank)
        saved = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        dcp.load(saved, checkpoint_id=FOLDER + "/saved")
        opt.load_state_dict(saved["optimizer"])
        model.load_state_dict(saved["model"])
        everywhere(model, torch.load(FOLDER + "/then0"))
        step(model, opt, 2)
        everywhere(model, torch.load(FOLDER + "/after0"))

        alone = net(5)
        model.load_state_dict(alone.state_dict())
        everywhere(model, alone.state_dict())
        opt.param_groups[0]["lr"] = 0.0  # the step only rounds masters
        step(model, opt, 3)
        everywhere(model, alone.state_dict())
    """
    on_processes(body, 2, 3, 1)


def test_what_one_process_refuses_to_load_is_loaded_on_none():
    """One that fails in reading must not leave the others waiting (T43), or loading alone what it has not got (T42)."""
    body = """
    def run(rank, world):
        params = parameters()
        opt = ShardedOptimizer(params, front.AdamW, lr=0.05)
        give(params, 0)
        opt.step()
        before = opt.state_dict()

        def changed(**entries):
            saved = opt.state_dict()
            if rank:
                saved["state"][3].update(entries)
            return saved

        lacks = changed()
        lacks["state"][3].pop("exp_avg" if rank else "nothing", None)
        fewer = changed()
        fewer["state"] = {} if rank else fewer["state"]
        other = changed()
        other["param_groups"][0]["lr"] += rank
        failing = opt.register_load_state_dict_pre_hook(lambda *_: 1 / 0 if rank else None)
        for loaded, texts in (
            (changed(), ("process 1 of the group refused: ZeroDivisionError", "ZeroDivisionError")),
            (lacks, ("process 1 of the group refused: KeyError", "lacks 'exp_avg'")),
            (changed(exp_avg=torch.zeros(3)), ("refused: ValueError", "exp_avg of parameter 3 has shape (3,)")),
            (changed(step=torch.tensor(7.0)), ("state of parameter 3",) * 2),
            (fewer, ("state of parameter 0",) * 2),
            (other, ("lr of group 0 is 0.05 on process 0 of the group, and lr of group 0 is 1.05 on process 1",) * 2),
            ({} if rank else opt.state_dict(), ("refused: KeyError", "param_groups")),
        ):
            assert texts[rank] in (error := refusal(lambda: opt.load_state_dict(loaded))), error
            failing.remove()
            now = opt.state_dict()
            assert now["param_groups"] == before["param_groups"]
            for i, state in before["state"].items():
                for name, value in state.items():
                    same(*(getattr(x, "local", x) for x in (now["state"][i][name], value)))
        opt.load_state_dict({**opt.state_dict(), "state": {}})
        own, one = parameters(), parameters()
        opt, alone = ShardedOptimizer(own, front.AdamW), front.AdamW(one)
        opt.load_state_dict({**before, "state": {}})
        alone.load_state_dict({**before, "state": {}})
        saved = opt.state_dict()["state"]
        assert {i: list(state) for i, state in saved.items()} == {i: list(s) for i, s in before["state"].items()}
        give(own, 1), give(one, 1)
        opt.step(), alone.step()
        for p, q in zip(own, one):
            same(p, q)
        same_states(opt, alone, rank)
    """
    on_processes(body, 2)


@pytest.mark.full
def test_language_model_trained_with_lamb_goes_on_from_two_processes_on_one():
    """A small transformer on text: 60 steps on 2 processes, saved at 30 and resumed on 1, which takes the same batches.

    Halves of a batch are added up in the same order, so that losses are within a rounding of float32 in each sum of a
    step; 30 steps of LAMB make 1e-5 of it.
    """
    body = f"""
    sys.path.insert(0, {str(Path(__file__).parents[2])!r})
    import numpy as np
    import torch.distributed.checkpoint as dcp
    from bench.training import text_data, text_model

    STEPS, SAVED, FOLDER = 60, 30, tempfile.mkdtemp()
    TEXT = text_data.load().train

    def train(model, opt, scheduler, step, rank, world):
        opt.zero_grad()
        batch = text_data.random_windows(TEXT, np.random.default_rng(step), 16, 32)
        losses = []
        for half in np.split(batch, 2)[rank :: world]:
            loss = text_model.loss_of(model, torch.from_numpy(half)) * (world / 2)
            losses.append(loss.detach())
            loss.backward()
        opt.step()
        scheduler.step()
        total = torch.stack(losses).sum() / world
        dist.all_reduce(total)
        return total.item()

    def run(rank, world):
        model = text_model.Transformer(64, 2, 32, seed=rank)
        how = dict(lr=0.01, weight_decay=0.01, max_grad_norm=1.0, reduce_gradients=True, bucket_cap_mb=0.1)
        opt = ShardedOptimizer(model.parameters(), front.LAMB, **how)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, STEPS)
        path = FOLDER + "/saved"

        def saved():
            return {{"model": model.state_dict(), "optimizer": opt.state_dict(), "schedule": scheduler.state_dict()}}

        if world == 2:
            losses = []
            for step in range(STEPS):
                if step == SAVED:
                    dcp.save(saved(), checkpoint_id=path)
                losses.append(train(model, opt, scheduler, step, rank, world))
            assert losses[-1] < 0.7 * losses[0], losses
            torch.save(losses, FOLDER + f"/losses{{rank}}")
            return
        loaded = saved()
        dcp.load(loaded, checkpoint_id=path)
        model.load_state_dict(loaded["model"])
        opt.load_state_dict(loaded["optimizer"])
        scheduler.load_state_dict(loaded["schedule"])
        resumed = [train(model, opt, scheduler, step, rank, world) for step in range(SAVED, STEPS)]
        expected = torch.load(FOLDER + "/losses0")[SAVED:]
        np.testing.assert_allclose(resumed, expected, rtol=1e-5)
    """
    on_processes(body, 2, 1)
