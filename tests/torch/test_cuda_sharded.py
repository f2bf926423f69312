"""ShardedOptimizer on GPUs: sums over processes are taken there, with the bits of one process on the CPU.

torch's tensors on the CPU stand for those on GPUs (torch_stand_in.py), gloo stands for NCCL, and kernels are as Numba
compiles them (cuda_compiled.py).
"""

import pathlib

import pytest
from processes import on_processes

pytest.importorskip("torch")
pytest.importorskip("cupy")
pytest.importorskip("numba_cuda")

ON_GPUS = f"""
    sys.path.insert(0, {str(pathlib.Path(__file__).parents[1] / "support")!r})
    import cuda_compiled, pytest, torch_stand_in
    from fastopt.torch import _devices
    from fastopt.torch.sharded import sums

    GPU, HOST = torch_stand_in.TorchGpus(pytest.MonkeyPatch()).runtime(), _devices.HOST
    SIZES = [(3,), (20, 30), (), (40_000,), (7, 5), (0, 2), (2, 3, 11_000), (16_384,), (17,)]
    for name in ("prologue_adamw", "prologue_lamb"):
        cuda_compiled.kernel_of("fastopt_cuda_" + name)  # here, lest every process compile it
    for name in ("adamw", "lars", "lamb", "terms_lars", "terms_lamb"):
        cuda_compiled.kernel_of("fastopt_cuda_" + name + "_float32_float32")

    def there(device):
        "From here on all tensors are taken for tensors on this device."
        _devices.device_of = sums.device_of = lambda tensor: device

    class Event:
        "Of a GPU that is never done."
        done, waits = False, 0

        def __init__(self, stream):
            pass

        def synchronize(self):
            Event.waits += 1

    GPU.event = Event
"""


@pytest.mark.full
def test_sums_over_processes_have_the_bits_of_one_on_the_cpu_and_nothing_is_waited_for(shared):
    body = """
    def trained(device, make, kind, options, scales, rank):
        there(device)
        params = parameters(seed=rank, sizes=SIZES)
        groups = [dict(params=params[:5], maximize=kind is not front.LARS), dict(params=params[5:], lr=0.01)]
        opt, scaler = make(groups, kind, lr=0.05, **options), front.GradScaler("cpu", init_scale=8.0, enabled=scales)
        infos, launches = [], []
        GPU.downloads = Event.waits = 0
        for t in range(3):
            give(params, t, scale=8.0 if scales else 1.0)
            if t == 1 and scales:
                params[6].grad[1, 2, -1] = float("nan")  # on one process's slice
            elif t == 1:
                params[4].grad = params[8].grad = None
            GPU.launches.clear()
            scaler.scale(torch.ones(()))
            scaler.step(opt)
            scaler.update()
            infos.append(opt.last_info)
            launches.append([sum(what in name for name in GPU.launches) for what in ("prologue", "terms")])
        assert GPU.downloads == 0 and Event.waits == 0, (kind, GPU.downloads, Event.waits)
        return opt, params, list(map(tuple, infos)), launches

    def check_bits(rank, *case):
        opt, own, infos, launches = trained(
            GPU, lambda groups, kind, **o: ShardedOptimizer(groups, kind, bucket_cap_mb=0.1, **o), *case, rank
        )
        alone, one, expected, _ = trained(HOST, lambda groups, kind, **o: kind(groups, **o), *case, rank=0)
        assert repr(infos) == repr(expected), (case, infos, expected)  # a skipped step has a norm of NaN
        for p, q in zip(own, one):
            same(p, q)
            assert q.grad is None or torch.equal(p.grad.nan_to_num(7), q.grad.nan_to_num(7))
        there(GPU)
        same_states(opt, alone, rank)
        kind = case[0]
        assert launches == [[2 * (kind is not front.LARS), 2 * (kind is not front.AdamW)]] * 3, launches

    def check_stages(rank):
        "Buckets travel while the next ones are updated; what processes pass is compared late."
        params = parameters(seed=rank, sizes=SIZES)
        opt = ShardedOptimizer(params, front.AdamW, max_grad_norm=1.0, bucket_cap_mb=0.1)
        begun, begin = [], opt._gathering.begin
        opt._gathering.begin = lambda number: begun.append(len(GPU.launches)) or begin(number)
        give(params, 0)
        Event.waits = 0
        for t in range(sums.LATE):
            GPU.launches.clear(), begun.clear()
            opt.step()
        updates = [k for k, name in enumerate(GPU.launches) if "prologue" not in name]
        assert len(updates) > 1 and begun == [k + 1 for k in updates] + [len(GPU.launches)], (begun, GPU.launches)
        assert Event.waits == 0
        opt.param_groups[0]["lr"] = 0.5 + rank
        for t in range(sums.LATE):
            opt.step()
        assert Event.waits == sums.LATE  # for sums of so many steps ago
        said = refusal(opt.step)
        assert said.startswith("ValueError: ShardedOptimizer(AdamW): in a step before this one: all processes"), said
        assert "lr of group 0 is 0.5 on process 0" in said and "is 1.5 on process 1" in said, said
        opt.param_groups[0]["lr"] = 0.5
        for t in range(sums.LATE + 1):
            opt.step()

    def run(rank, world):
        check_bits(rank, front.AdamW, dict(max_grad_norm=1.0), False)
        check_bits(rank, front.AdamW, dict(), True)
        check_bits(rank, front.LARS, dict(weight_decay=0.1, momentum=0.9), False)
        check_bits(rank, front.LAMB, dict(weight_decay=0.1, max_grad_norm=1.0), False)
        if world == 2:
            check_stages(rank)
    """
    on_processes(ON_GPUS + body, 1, 2, 3, NUMBA_ENABLE_CUDASIM="0", FASTOPT_TEST_IR=str(shared))
