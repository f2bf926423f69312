"""Makes the helpers of this folder importable, sorts tests into tiers, and gives them threads, kernels and GPUs."""

import functools
import importlib.util
import os
import pathlib
import random
import signal
import sys

import pytest

os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # before Numba is imported: kernels for CUDA run in its simulator
sys.path.insert(0, str(pathlib.Path(__file__).parent / "support"))  # pytest's importlib mode leaves sys.path alone
sys.path.append(str(pathlib.Path(__file__).parents[1]))  # for bench; last, for fastopt comes from where it is installed

from isas import native_isas

from fastopt import set_num_threads
from fastopt.engine import backend as _backend
from fastopt.engine import host as _host_plan

# A shell that starts pytest in the background has it ignore interrupts, which tests send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

_load = functools.cache(_backend.load)  # Numba compiles its scheduler once
collect_ignore = ["support"]  # no tests: --doctest-modules would import every file


# --- tiers -----------------------------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Hypothesis takes the same few examples in the quick tier; `-m random` draws new ones by a seed that it prints."""
    if importlib.util.find_spec("hypothesis") is None:
        return
    import hypothesis

    anew = config.option.markexpr == "random"
    hypothesis.settings.register_profile(
        "fastopt", derandomize=not anew, max_examples=500 if anew else 50, deadline=None, database=None
    )
    hypothesis.settings.load_profile("fastopt")
    if anew and getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))  # xdist hands it to its workers


def pytest_terminal_summary(terminalreporter, config):
    """The seed of the random tier, for a failure must be repeatable."""
    seed = getattr(config.option, "hypothesis_seed", None)
    if seed is not None:
        terminalreporter.line(f"repeat with: pytest -m random --hypothesis-seed={seed}")


def pytest_collection_modifyitems(items):
    """What runs on the stand-in for a GPU belongs to the full tier, what Hypothesis draws to the random one as well."""
    for item in items:
        if {"gpu", "gpus", "stand_in", "stand_ins"} & {
            *getattr(item, "fixturenames", ())
        } and not item.get_closest_marker("gpu"):
            item.add_marker("full")
        if hasattr(getattr(item, "obj", None), "hypothesis"):
            item.add_marker("random")


def _with_command(report):
    """A report of a skipped file or test that also tells how to install the package whose lack it names."""
    if report.skipped and isinstance(report.longrepr, tuple) and "could not import" in report.longrepr[2]:  # no xfail
        report.longrepr = (*report.longrepr[:2], f"{report.longrepr[2]}: pip install -e '.[test-full]'")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _with_command((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _with_command((yield))


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A folder of this run of pytest, for all its processes."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch):
    """As many threads on every machine; a test may set others, which the next one does not see."""
    monkeypatch.setattr(_backend, "_threads", None)
    set_num_threads(2)


@pytest.fixture
def backend(monkeypatch):
    """Chooses the kernels of the optimizers that the test makes from then on."""

    def choose(isa):
        chosen = _load(isa)
        for module in (_backend, _host_plan):
            monkeypatch.setattr(module, "current", lambda: chosen)

    return choose


@pytest.fixture(params=[*(pytest.param(isa, marks=pytest.mark.full) for isa in native_isas()[:-1]), native_isas()[-1]])
def isa(request, backend):
    """Runs the test once with the kernels of each instruction set."""
    backend(request.param)
    return str(request.param)


@pytest.fixture
def always_threaded(monkeypatch):
    """Start threads for few elements too, where a step would be serial."""
    monkeypatch.setattr(_host_plan, "SERIAL_BELOW", 1)


def _gpu(monkeypatch, real=False):
    pytest.importorskip("cupy")
    import gpus

    gpus.forget_devices()
    yield gpus.RealGpu() if real else gpus.StandInGpu(monkeypatch)
    gpus.forget_devices()


def _torch_gpus(monkeypatch, real=False):
    pytest.importorskip("cupy")
    import torch_stand_in

    yield from torch_stand_in.torch_gpus(monkeypatch, real=real)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request, monkeypatch):
    """A GPU: a real one where the tests marked gpu run, else the stand-in."""
    yield from _gpu(monkeypatch, request.param == "real")


@pytest.fixture
def stand_in(monkeypatch):
    """A GPU that counts what is asked of it, and that can be made to fail."""
    yield from _gpu(monkeypatch)


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def gpus(request, monkeypatch):
    """GPUs for torch's tensors: real ones where the tests marked gpu run, else the stand-in."""
    yield from _torch_gpus(monkeypatch, request.param == "real")


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.full)])
def place(request):
    """Puts torch's parameters on the CPU, or where the stand-in of a GPU finds them."""
    return request.getfixturevalue("stand_ins").put if request.param == "gpu" else lambda params: params


@pytest.fixture
def fake(stand_in, monkeypatch):
    """The GPU of the benchmark's tests, of which a sample takes no time."""
    from gpu_fake import FakeGpu

    from bench.gpu import measure

    for name, value in {"SAMPLE_SECONDS": {"device": 1e-9, "wall": 1e-9}, "HOST_STEPS": 2, "TRIALS": 1}.items():
        monkeypatch.setattr(measure, name, value)
    return FakeGpu(stand_in)


@pytest.fixture
def stand_ins(monkeypatch):
    """GPUs for torch's tensors that count what is asked of them."""
    yield from _torch_gpus(monkeypatch)
