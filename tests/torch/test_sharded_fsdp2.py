"""ShardedOptimizer and FSDP2: checkpoints go from one to the other."""

import pytest
from processes import TRAINING, on_processes

pytest.importorskip("torch")
pytestmark = pytest.mark.full


def test_checkpoints_go_from_fsdp2_to_a_sharded_optimizer_and_back():
    """By index between classes of fastopt, by name from torch's AdamW under FSDP2."""
    body = """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    FOLDER = tempfile.mkdtemp()

    def made(kind, lr):
        net = model()
        if kind is ShardedOptimizer:
            return net, ShardedOptimizer(net.parameters(), front.AdamW, lr=lr)
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        opt = kind(net.parameters(), lr=lr)
        if lr == 0.1:
            for t in range(2):
                opt.zero_grad()
                loss(net, t, dist.get_rank(), dist.get_world_size()).backward()
                opt.step()
        elif kind is front.AdamW:
            opt.init_state()
        return net, opt

    def run(rank, world):
        net, opt = made(front.AdamW, 0.1)
        dcp.save({"net": net, "opt": opt}, checkpoint_id=FOLDER + "/0")
        for k, kind in enumerate((ShardedOptimizer, front.AdamW)):
            other, loaded = made(kind, 0.5)
            dcp.load({"net": other, "opt": loaded}, checkpoint_id=f"{FOLDER}/{k}")
            dcp.save({"net": other, "opt": loaded}, checkpoint_id=f"{FOLDER}/{k + 1}")
            whole, expected = (o.full_state_dict().get("state", {}) for o in (loaded, opt))
            assert len(whole) == 6 or rank
            for i, state in whole.items():
                for name, value in state.items():
                    same(value, expected[i][name])
            assert loaded.param_groups[0]["lr"] == 0.1
            for p, q in zip(net.parameters(), other.parameters()):
                same(p.full_tensor(), q.full_tensor() if hasattr(q, "full_tensor") else q)

        net, theirs = made(torch.optim.AdamW, 0.1)
        dcp.save(get_optimizer_state_dict(net, theirs), checkpoint_id=FOLDER + "/torch")
        other, loaded = made(ShardedOptimizer, 0.5)
        saved = get_optimizer_state_dict(other, loaded)
        dcp.load(saved, checkpoint_id=FOLDER + "/torch")
        set_optimizer_state_dict(other, loaded, saved)
        assert loaded.param_groups[0]["lr"] == 0.1
        whole = loaded.full_state_dict().get("state")
        for i, p in enumerate(net.parameters()):
            for name in ("exp_avg", "exp_avg_sq"):
                expected = theirs.state[p][name].full_tensor()
                if whole:
                    same(whole[i][name], expected)
    """
    on_processes(TRAINING + body, 2)
