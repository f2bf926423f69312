"""What tests of fastopt.torch's step share."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
import fastopt.torch as front  # noqa: E402 - needs torch

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
}
IN_TORCH = [name for name in CLASSES if name not in ("Lion", "LARS")]
SCALERS = {"torch": torch.amp.GradScaler, "fastopt": front.GradScaler}


def train(params, opt, steps, first=0):
    for t in range(first, first + steps):
        set_gradients(params, t)
        opt.step()


def assert_same(p, q, a, b):
    """Parameters and states have the same bits; but a float64 number of a GPU's step may differ in its last one."""
    for x, y in zip(p, q, strict=True):
        assert torch.equal(x.cpu(), y.cpu())
        assert (x in a.state) == (y in b.state)
        assert set(a.state[x]) == set(b.state[y])
        for key, value in b.state[y].items():
            other, value = a.state[x][key].cpu(), value.cpu()
            assert other.dtype == value.dtype, key
            if x.is_cuda and value.dtype == torch.float64 and not value.ndim:  # made of a power
                torch.testing.assert_close(other, value, rtol=1e-15, atol=0)
            else:
                assert torch.equal(other, value), key


def both(make):
    """The same made with fastopt.torch and with torch.optim."""
    return make(front), make(torch.optim)


def assert_close(a, b, **tolerance):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
}


every_class = pytest.mark.parametrize("name", CLASSES)


def make(name, *, dtype=torch.float32, home=front, seed=0, **options):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((5, 7), (3,), (), (0, 2))]
    return params, getattr(home, name)(params, **CLASSES[name], **options)
