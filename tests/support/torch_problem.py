"""What tests of fastopt.torch's step share."""

import copy
import io
import pickle

import pytest
from torch_compare import copy_into, unchanged

torch = pytest.importorskip("torch")
import fastopt.torch as front  # noqa: E402 - needs torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

SHAPES = ((5, 7), (3,), (), (0, 2), (1,))


def params_of(shapes=SHAPES, *, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def gradients(params, t):
    torch.manual_seed(1000 + t)
    return [torch.randn(p.shape).to(p.dtype) for p in params]


def set_gradients(params, t, scale=1.0):
    for p, g in zip(params, gradients(params, t), strict=True):
        p.grad = (g * scale).to(p.device)


CLASSES = {
    "SGD": {"momentum": 0.9, "dampening": 0.5},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.5},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {"t0": 1.0, "lambd": 0.1},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Lion": {},
    "LARS": {"lr": 0.1},
    "LAMB": {"weight_decay": 0.1},
}
IN_TORCH = [name for name in CLASSES if name not in ("Lion", "LARS", "LAMB")]
SCALERS = {"torch": torch.amp.GradScaler, "fastopt": front.GradScaler}


def train(params, opt, steps=3, first=0):
    for t in range(first, first + steps):
        set_gradients(params, t)
        opt.step()
    return params


def loss_of(params, t):
    torch.manual_seed(t)
    return sum((p * torch.randn(p.shape).to(p.device)).square().sum() for p in params)


def saved_and_loaded(state):
    """What a file makes of a state dict."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_checkpoint(first, second):
    """The second run takes over from the first, and both go on as the same."""
    train(*first, 4)
    copy_into(second[0], first[0])
    second[1].load_state_dict(first[1].state_dict())
    train(*first, 4, first=4)
    train(*second, 4, first=4)
    for p, q in zip(first[0], second[0], strict=True):
        torch.testing.assert_close(p.cpu(), q.cpu(), rtol=1e-12, atol=1e-12)
        ours, theirs = ({key: x.cpu() for key, x in opt.state[x].items()} for x, (_, opt) in ((p, first), (q, second)))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, check_dtype=False)
    assert first[1].state_dict()["param_groups"] == second[1].state_dict()["param_groups"]


def both(make):
    """The same made with fastopt.torch and with torch.optim."""
    return make(front), make(torch.optim)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


def check_layout(layout, gradient, put=lambda tensors: tensors):
    """A parameter of this layout is stepped as one that is contiguous, with gradients of whatever layout."""
    torch.manual_seed(0)
    start = layout(torch.randn(4, 3, 2, 5))
    w, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.contiguous().clone())
    put([w])
    a, b = front.AdamW([w], lr=0.1), front.AdamW([plain], lr=0.1)
    for _ in range(3):
        g = torch.randn(8, 3, 2, 10)[::2, :, :, 1::2]
        if gradient == "expanded":
            g = g[:1].expand(4, 3, 2, 5)
        elif gradient != "sliced":
            g = LAYOUTS[gradient](g.contiguous())
        w.grad, plain.grad = g.to(w.device), g.clone(memory_format=torch.contiguous_format)
        a.step()
        b.step()
        assert torch.equal(w.grad.cpu(), plain.grad)
        assert torch.equal(w.cpu(), plain)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(a.state[w][key].cpu(), b.state[plain][key])
        assert a.state[w][key].stride() == w.stride() == start.stride()


every_class = pytest.mark.parametrize("name", CLASSES)
every_torch_class = pytest.mark.parametrize("name", IN_TORCH)
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
every_copy = pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)


def make(name, *, dtype=torch.float32, home=front, seed=0, **options):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 7), (3,), (), (0, 2))]
    return params, getattr(home, name)(params, **CLASSES[name], **options)


def step_of_loss(params, opt, t, max_norm=None):
    """A step with the gradients of a loss; the norm that torch clips them by, if it is asked to."""
    opt.zero_grad()
    loss_of(params, t).backward()
    norm = max_norm and torch.nn.utils.clip_grad_norm_(params, max_norm)
    opt.step()
    return norm


def scaled_step(scaler, params, opt, t, bad=None):
    """The same with a GradScaler; `bad` overwrites an element of the last gradient. The gradients before the step."""
    opt.zero_grad()
    scaler.scale(loss_of(params, t)).backward()
    if bad is not None:
        params[-1].grad[-1] = bad
    gradients = [p.grad.clone() for p in params]
    scaler.step(opt)
    scaler.update()
    return gradients


def check_overflow(ours, plain, scaler, bad, *, read_state=True):
    """Of four steps, step `bad` overflows and changes nothing; the others are the plain ones."""
    for t in range(4):
        if t != bad:
            scaled_step(scaler, *ours, t)
            step_of_loss(*plain, t)
            continue
        with unchanged(ours[0], ours[1] if read_state else None):
            scaled_step(scaler, *ours, t, torch.inf)
        assert scaler.get_scale() == 512.0
        assert not read_state or ours[1].last_info.skipped
