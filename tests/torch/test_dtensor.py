"""Steps of DTensors (FSDP2, HSDP, tensor parallel) against those of whole tensors on one process.

Replicas and plain tensors among parts count once, with any mesh, in one norm. Not tested: parts on the CPU with a mesh
of GPUs, whose sums need a GPU; tied weights, which ``parameters()`` yields once.
"""

import pytest
from processes import on_processes
from torch_problem import CLASSES, TORCH

# Before, fully_shard over gloo adds gradients up instead of averaging, and a partial DTensor cannot be made.
pytestmark = pytest.mark.skipif(TORCH < (2, 9), reason="needs torch 2.9")

PLACED = f"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    CLASSES = {CLASSES!r}
    R, S0, S1 = Replicate(), Shard(0), Shard(1)
    WHOLE = torch.arange(12.0).view(4, 3)

    import fastopt

    @fastopt.rule(("m",), {{"lr": 0.5}}, terms=lambda p, g, m, h: (m + g, p - g), products=((0, 0), ("p", 1), (1, "g")),
                  ratio=lambda sums, h: sums[0] / (1.0 + sums[0] + abs(sums[1]) + abs(sums[2])))
    def outside(p, g, m, h):
        return p - h.lr * h.ratio * (m + g), m + g

    def make(name, params, **options):
        kind = front.optimizer(outside) if name == "outside" else getattr(front, name)
        return kind(params, **{{"lr": 0.1, **CLASSES.get(name, {{}}), **options}})

    def place(whole, where):  # where: nothing, or a mesh and the placements on it
        return whole.clone() if where is None else distribute_tensor(whole, *where, src_data_rank=None)

    def own(tensor):
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()

    def whole_of(tensor):
        tensor = tensor.detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    class Pair:
        # An optimizer of whole tensors, and the same of parts.
        def __init__(self, name, wheres, sizes, dtype=torch.float32, **options):
            whole = [p.detach() for p in parameters(dtype, sizes=sizes)]
            self.wheres = wheres
            self.sides = [[torch.nn.Parameter(place(w, x)) for w, x in zip(whole, side)]
                          for side in ([None] * len(whole), wheres)]
            self.opts = [make(name, [{{"params": s[:2]}}, {{"params": s[2:]}}], **options) for s in self.sides]

        def give(self, t, without=(), bad=None):
            for k, (p, q) in enumerate(zip(*self.sides)):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + k)).to(p.dtype)
                if k == bad:
                    p.grad.view(-1)[-1] = torch.inf
                q.grad = place(p.grad, self.wheres[k])
                if k in without:
                    p.grad = q.grad = None

        def step(self):
            self.opts[0].step()
            with CommDebugMode() as sent:
                self.opts[1].step()
            return sent.get_total_counts()

        def check(self, exactly):
            for p, q, where in zip(*self.sides, self.wheres):
                states = [(p, q), *((x, self.opts[1].state[q][n]) for n, x in self.opts[0].state[p].items())]
                for x, y in states:
                    # Sums of float64 in another order may move the last bit of a float32.
                    close = {{"rtol": 0, "atol": 0}} if exactly else {{"rtol": 2e-6, "atol": 2e-7}}
                    x = own(place(x.detach(), where if x.dim() else None))
                    torch.testing.assert_close(own(y), x, **close, equal_nan=True)
            both = [opt.last_info for opt in self.opts]
            norm = both[1].grad_norm
            assert both[0].skipped == both[1].skipped
            if norm is not None:
                norms = [None] * dist.get_world_size()
                dist.all_gather_object(norms, norm)
                assert type(norm) is float and norms == [norm] * len(norms), norms  # T4
                assert both[0].skipped or abs(norm / both[0].grad_norm - 1.0) < 1e-12, both
"""

BASICS = """
    def partly(p):  # a Partial parameter, of which each process holds summands
        p = torch.nn.Parameter(DTensor.from_local(torch.ones(4, 3), p.device_mesh, [Partial(), S0]))
        p.grad = DTensor.from_local(torch.ones(4, 3), p.device_mesh, [Partial(), S0])
        return p

    def run(rank, world):
        mesh = init_device_mesh("cpu", (2, 1))

        def param(*placements, grad=WHOLE):
            p = torch.nn.Parameter(place(torch.ones(4, 3), (mesh, placements)))
            p.grad = place(grad, (mesh, placements))
            return p

        # What needs sums is refused where a process holds summands.
        scaler = front.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        norms = {"max_grad_norm": {"max_grad_norm": 1.0}, "skip_nonfinite": {"skip_nonfinite": True}}
        for name in (*norms, "GradScaler", "LARS"):
            p = partly(param(S0, R))
            before = p.to_local().clone(), p.grad.to_local().clone()
            opt = make("LARS" if name == "LARS" else "SGD", [p], **norms.get(name, {}))
            text = refusal(lambda: scaler.step(opt) if name == "GradScaler" else opt.step())
            assert "NotImplementedError" in text and "Partial" in text and name in text, text
            assert torch.equal(p.to_local(), before[0]) and torch.equal(p.grad.to_local(), before[1])

        # A gradient of another placement is brought to that of its parameter.
        for first, other in ((R, Partial()), (S0, S1)):
            for zero in (False, True):
                p = param(first, R)
                p.grad = param(S1, R).grad
                if other.is_partial():
                    p.grad = DTensor.from_local(WHOLE * rank, mesh, [other, R])
                front.SGD([p], lr=0.5, zero_grads=zero).step()
                assert torch.equal(p.full_tensor(), 1 - 0.5 * WHOLE)
                assert bool(p.grad.full_tensor().any()) is not zero

        # T8: a gradient that is divided otherwise than its parameter is refused before anything is written.
        p = param(S0, R)
        uneven = torch.ones(3 - 2 * rank, 3)
        p.grad = DTensor.from_local(uneven, mesh, [S0, R], run_check=False, shape=(4, 3), stride=(3, 1))
        text = refusal(make("LARS", [param(S0, R), p]).step)
        assert "parameter 1 of group 0" in text and "(2, 3)" in text and str(tuple(uneven.shape)) in text, text

        # T5: gradients that are there on one process, on the other, nowhere, of one array on each.
        both = {"max_grad_norm": 1.0, "skip_nonfinite": True}
        for name, options in (("SGD", both), ("LARS", both), ("LAMB", {}), ("outside", {})):
            parts = [param(S0, R), param(R, R), param(S1, R)]
            opt, grads, counts = make(name, parts, **options), [p.grad for p in parts], []
            for t in range(4):
                before = [p.to_local().clone() for p in parts]
                for k, p in enumerate(parts):
                    p.grad = grads[k] if t == rank or (t == 3 and k == 2 * rank) else None
                with CommDebugMode() as sent:
                    opt.step()
                counts.append(sent.get_total_counts())
                for p, old in zip(parts, before):
                    assert torch.equal(p.to_local(), old) == (p.grad is None), (name, t)
                if t > 1 and options:  # t < 2: a replica counts where it has a gradient
                    norms = [torch.cat([x.flatten() for x in (WHOLE[:2], WHOLE[:, 2:])]).norm().item(), 0.0]
                    assert abs(opt.last_info.grad_norm - norms[t == 2]) < 1e-5, (opt.last_info, norms)
            assert counts == [1] * 4, counts
            if options:  # what only one process has stops all
                p = parts[2 * rank]
                p.grad = p.grad * torch.inf if rank else None
                opt.step()
                assert opt.last_info.skipped

        # All skip or none: the second process has the NaN.
        bad = torch.where(WHOLE == 10.0, torch.nan, WHOLE)
        p = param(S0, R, grad=bad)
        opt, scaler = make("SGD", [p], skip_nonfinite=True), front.GradScaler("cpu", init_scale=1.0)
        scaler.scale(torch.ones(()))
        for step in (opt.step, lambda: scaler.step(opt)):
            step()
            assert opt.last_info.skipped and torch.equal(p.to_local(), torch.ones(2, 3))
        scaler.update()
        assert scaler.get_scale() == 0.5

        # T38, T5: a first step with lr 0 in which one process has no gradient, or zeros, is the same one everywhere.
        for kind, empty in (("LARS", False), ("AdamW", False), ("LARS", True), ("AdamW", True)):
            p = param(S0, R, grad=torch.where(WHOLE < 6.0, 0.0, WHOLE))
            if empty and not rank:
                p.grad = None
            opt = make(kind, [p], lr=0.0, max_grad_norm=1.0)
            opt.step()
            assert opt.last_info.grad_norm > 1.0
            assert kind == "LARS" or (empty and not rank) or opt.state[p]["step"] == 1.0
            opt = make(kind, [p], lr=0.0, max_grad_norm=1.0)
            p.grad = None if empty and not rank else torch.zeros_like(p)
            opt.step()  # which asks for states, on all
            assert opt.state[p].get("step", 0.0) == 0.0 and opt.state[p].keys(), (kind, empty)
"""


def test_what_a_process_holds_is_stepped_refused_or_skipped_together():
    on_processes(PLACED + BASICS, 2)


MODEL = """
    import torch.distributed.checkpoint.state_dict as dcp
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))

    def train(model, opt, t):
        opt.zero_grad()
        model(torch.randn(6, 5, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        opt.step()

    def same_weights(a, b):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(whole_of(p), whole_of(q), rtol=1e-4, atol=1e-5)

    def run(rank, world):
        grid = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        line = init_device_mesh("cpu", (world,))
        for mesh, policy in ((line, {}), (grid, {}), (line, {"offload_policy": CPUOffloadPolicy(pin_memory=False)})):
            alone, model = net(), net()
            fully_shard(model, mesh=mesh, **policy)
            opts = [front.LAMB(m.parameters(), lr=0.05, max_grad_norm=0.1, ema_decay=0.5) for m in (alone, model)]
            for t in range(4):
                train(alone, opts[0], t), train(model, opts[1], t)
            assert abs(opts[0].last_info.grad_norm / opts[1].last_info.grad_norm - 1) < 1e-4  # products of parts
            same_weights(alone, model)
            with opts[1].swap_ema():
                for p, q in zip(alone.parameters(), model.parameters(), strict=True):
                    torch.testing.assert_close(opts[0].state[p]["ema"], q.full_tensor(), rtol=1e-4, atol=1e-5)
            for q in model.parameters():
                state = opts[1].state[q]["exp_avg"]
                assert isinstance(state, DTensor) and state.placements == q.placements

        # Checkpoints both ways, from and to torch's; the last layer leaves parts without elements.
        for full in (False, True):
            options = dcp.StateDictOptions(full_state_dict=full)
            for first, second in ((front, front), (torch.optim, front), (front, torch.optim)):
                models = [fully_shard(net(), mesh=line) for _ in range(2)]
                a, b = (home.AdamW(m.parameters(), lr=0.05) for home, m in zip((first, second), models))
                for t in range(3):
                    train(models[0], a, t)
                dcp.set_model_state_dict(models[1], dcp.get_model_state_dict(models[0]))
                saved = dcp.get_optimizer_state_dict(models[0], a, options=options)
                keys = [None] * world
                dist.all_gather_object(keys, sorted((k, tuple(sorted(v))) for k, v in saved["state"].items()))
                assert all(k == keys[0] for k in keys) or full
                dcp.set_optimizer_state_dict(models[1], b, saved, options=options)
                for m, opt in zip(models, (a, b)):
                    train(m, opt, 3)
                for (p, q) in zip(*(m.parameters() for m in models), strict=True):
                    assert a.state[p].keys() >= {"step", "exp_avg", "exp_avg_sq"} == b.state[q].keys(), b.state[q]
                    torch.testing.assert_close(whole_of(p), whole_of(q), rtol=1e-6, atol=1e-7)
                    assert float(b.state[q]["step"]) == 4.0

        # T38: what makes states for a checkpoint is no step; keys agree on all processes, as after init_state.
        plain, made = (fully_shard(net(), mesh=line) for _ in range(2))
        opts = [front.LAMB(m.parameters(), lr=0.05, ema_decay=0.9) for m in (plain, made)]
        saved = dcp.get_optimizer_state_dict(made, opts[1])
        opts[0].init_state()
        again = dcp.get_optimizer_state_dict(plain, opts[0])
        names = [None] * world
        told = [sorted((k, tuple(v), float(v["step"])) for k, v in s["state"].items()) for s in (saved, again)]
        dist.all_gather_object(names, told)
        assert all(x == names[0] for x in names) and told[0] == told[1] and len(told[0]) == 4, names
        assert told[0][0][2] == 0.0
        for t in range(2):
            [train(m, opt, t) for m, opt in zip((plain, made), opts)]
        assert all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(plain.parameters(), made.parameters()))
"""
MATRIX = """
    SHAPES = [(6, 5), (3,), (1, 4), (5, 8), (), (200, 300)]  # (1, 4) has elements on one process only
    EXACT = sorted(set(CLASSES) - {"LARS", "LAMB"})

    def run(rank, world):
        line = init_device_mesh("cpu", (4,))
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        tp = grid["tp"]
        layouts = {  # placements, and how many sets of processes have sums of their own
            "fsdp": ([(line, [S0])] * 4 + [(line, [R]), (line, [S1])], 1),
            "hsdp": ([(grid, [R, S0])] * 4 + [(grid, [R, R]), (grid, [R, S1])], 1),
            "tensor parallel": ([(tp, [S0]), (tp, [R]), None, (tp, [S1]), None, (tp, [S0])], 1),
            "two dimensions": ([(grid, [S0, S0]), (grid, [S0, S0]), (grid, [S0, S1]), (grid, [S0, S1]), (grid, [R, R]),
                                (grid, [S1, S0])], 1),
            "several meshes": ([(line, [S0]), (tp, [S0]), (grid, [R, S0]), (grid, [S0, S1]), None, (line, [R])], 2),
        }
        line_of_two = Pair("AdamW", [(line, [S0])] * 6, [(1, 4)] * 6, max_grad_norm=1.0)  # all of it on the first
        for t in range(3):
            line_of_two.give(t)
            assert line_of_two.step() == 1
        line_of_two.check(False)

        for layout, (wheres, sets) in layouts.items():
            for name in EXACT if layout in ("fsdp", "several meshes") else ("AdamW", "SGD"):
                pair = Pair(name, wheres, SHAPES, **({"ema_decay": 0.5} if layout == "fsdp" else {}))
                for t in range(3):
                    pair.give(t, without=(2,) * (t == 1))
                    assert pair.step() == 0, (layout, name)
                pair.check(True)
            for name, dtype, options, sent in (
                ("AdamW", torch.float32, {"max_grad_norm": 1.0, "skip_nonfinite": True}, 1),
                ("SGD", torch.bfloat16, {"max_grad_norm": 1.0, "master_weights": True, "ema_decay": 0.5}, 1),
                ("LARS", torch.float32, {"weight_decay": 0.1}, 1),
                ("LARS", torch.float32, {"weight_decay": 0.1, "max_grad_norm": 1.0, "adapt": True}, 1),
                ("LAMB", torch.float32, {"skip_nonfinite": True, "adapt": True}, 1),
                ("LAMB", torch.float32, {"max_grad_norm": 1.0, "ema_decay": 0.5}, 2),  # u is of clipped gradients
                ("LAMB", torch.bfloat16, {"max_grad_norm": float("inf"), "master_weights": True}, 1),
                ("outside", torch.float32, {"max_grad_norm": 1.0}, 2),
            ):
                pair = Pair(name, wheres, SHAPES, dtype, **options)
                for t in range(3):
                    pair.give(t, without=(3, 5) * (t == 1))
                    assert pair.step() == sent * sets, (layout, name, options)
                    pair.check(False)
                if "skip_nonfinite" in options:
                    pair.give(3, bad=5)  # the last element, which one process has
                    pair.step()
                    assert pair.opts[1].last_info.skipped
                    pair.check(False)
                    pair.give(4)
                    pair.step()
                    pair.check(False)
"""


@pytest.mark.full
@pytest.mark.parametrize("body", [MATRIX, MODEL], ids=["every placement", "models and checkpoints"])
def test_on_four_processes_all_is_as_on_one(body):
    on_processes(PLACED + body, 4)
