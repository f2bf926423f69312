"""What the tests of bad input have in common."""

import contextlib
import importlib.metadata
import importlib.util
import sys

import numpy as np
import pytest

import fastopt

KINDS = (kind for kind in vars(fastopt).values() if isinstance(kind, type) and issubclass(kind, fastopt.Optimizer))
CLASSES = [kind for kind in KINDS if kind is not fastopt.Optimizer]


def short(value):
    """A test id."""
    return getattr(value, "__name__", None) or repr(value)[:40]


def gradients(**replaced):
    rng = np.random.default_rng(2)
    arrays = {"w": rng.standard_normal((3, 2)), "b": rng.standard_normal(3)}
    return {name: array.astype(np.float32) for name, array in arrays.items()} | replaced


def trained(cls=fastopt.AdamW, **options):
    """An optimizer of float32 arrays that took a step, so that neither its states nor its counts are zero."""
    rng = np.random.default_rng(1)
    params = {"w": rng.standard_normal((3, 2)).astype(np.float32), "b": np.ones(3, np.float32)}
    opt = cls(params, **{"lr": 0.1} | options)
    opt.step(gradients())
    return opt


def fingerprint(opt):
    """Options, bytes and counts of an optimizer: everything it has."""
    options = [[(k, v) for k, v in group.items() if k != "params"] for group in opt.param_groups]
    params = [{name: array.tobytes() for name, array in group["params"].items()} for group in opt.param_groups]
    state = {
        name: {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in entry.items()}
        for name, entry in opt.state.items()
    }
    return repr(options), params, state


class Untouchable:
    """The user's own: whoever reads, compares, copies or shows it fails."""

    __hash__ = None

    def __getattribute__(self, name):
        raise AssertionError(name)

    __eq__ = __bool__ = __len__ = __iter__ = __array__ = __repr__ = lambda self, *args: self.touched


def hide(monkeypatch, *packages):
    """Let packages and modules not be found."""
    find, version = importlib.util.find_spec, importlib.metadata.version

    def version_of(package):
        if package in packages:
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in packages else find(name, *a))
    monkeypatch.setattr(importlib.metadata, "version", version_of)
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)


BAD = TypeError, ValueError


@contextlib.contextmanager
def refused(error, *words, opt=None, begins=""):
    """The block raises ``error`` itself, no subclass, with all of these words, and leaves ``opt`` as it was."""
    before = fingerprint(opt) if opt else None
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert caught.type in (error if isinstance(error, tuple) else (error,)), message
    assert message.startswith(begins), message
    assert [word for word in words if word not in message] == [], message
    assert opt is None or fingerprint(opt) == before
