"""What tests of fastopt.torch compare by."""

import contextlib
import copy

import pytest

torch = pytest.importorskip("torch")


@contextlib.contextmanager
def default_dtype(dtype):
    """What torch keeps its scalars of the host in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def unchanged(params, opt=None):
    """The block leaves parameters and state as they are."""
    before, state = [p.detach().clone() for p in params], copy.deepcopy(opt and opt.state_dict()["state"])
    yield
    assert_same_bits(params, before)
    torch.testing.assert_close(opt and opt.state_dict()["state"], state, rtol=0, atol=0)


def copy_into(params, others):
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            p.copy_(q)


def assert_same_bits(p, q):
    for x, y in zip(p, q, strict=True):
        assert torch.equal(x, y)


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


def assert_close(a, b, **tolerance):
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}))
