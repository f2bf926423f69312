"""What tests of fastopt.torch's step share."""

import pytest

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


def both(make):
    """The same made with fastopt.torch and with torch.optim."""
    return make(front), make(torch.optim)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


every_class = pytest.mark.parametrize("name", CLASSES)
every_torch_class = pytest.mark.parametrize("name", IN_TORCH)


def make(name, *, dtype=torch.float32, home=front, seed=0, **options):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 7), (3,), (), (0, 2))]
    return params, getattr(home, name)(params, **CLASSES[name], **options)


def step_of_loss(params, opt, t):
    opt.zero_grad()
    loss_of(params, t).backward()
    opt.step()
