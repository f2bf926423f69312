"""What runs the kernels where something is missing: threads, GNU OpenMP, a compiler, Numba; and whether it fits."""

import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from fastopt.kernels import layout
from fastopt.kernels.cpu import team
from fresh import python
from refusal import hide

import fastopt
from fastopt import __main__ as info
from fastopt.engine import backend as _backend
from fastopt.engine import host, library

LIMITED = """
import resource, sys
import numpy as np, fastopt
fastopt.set_num_threads(64)
w, g = np.zeros(2_000_000, np.float32), np.ones(2_000_000, np.float32)
opt = fastopt.LARS([w], lr=1.0, momentum=0.0, adapt=False)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20, resource.RLIM_INFINITY))
for _ in range(3):
    opt.step([g], max_norm=float("inf"))
assert (w == -3).all()
print("alive")
"""


@pytest.mark.parametrize("mebibytes", ["4", "100"])
def test_a_step_takes_the_threads_that_can_be_started(mebibytes):
    assert python(LIMITED, mebibytes) == "alive"


@pytest.fixture
def no_libgomp(monkeypatch):
    missing = OSError("libgomp.so.1: cannot open shared object file: No such file or directory")
    monkeypatch.setattr(library, "ctypes", Mock(CDLL=Mock(side_effect=missing)))


def row_of_kernels(monkeypatch, backend):
    for module in (_backend, host):
        monkeypatch.setattr(module, "current", lambda: backend)
    monkeypatch.setattr(info, "bandwidth", lambda: "")
    return info.facts()["kernels"]


@pytest.mark.usefixtures("no_libgomp")
def test_without_libgomp_numba_compiles_the_kernels(monkeypatch):
    with pytest.warns(UserWarning, match=r"cannot be loaded \(libgomp\.so\.1.*apt-get install libgomp1.*on first use"):
        backend = _backend.load()
    assert backend.isa == "numba"
    assert "apt-get install libgomp1" in row_of_kernels(monkeypatch, backend)
    backend.require()
    with pytest.raises(ImportError, match=r"FASTOPT_ISA=x86-64-v2: .*libgomp1"):
        _backend.load("x86-64-v2")


@pytest.mark.usefixtures("no_libgomp")
def test_without_libgomp_and_numba_no_optimizer_is_made(monkeypatch):
    hide(monkeypatch, "numba")
    backend = _backend.load()
    row = "none, for Numba is missing to compile them: the compiled library cannot be loaded (libgomp.so.1"
    assert row_of_kernels(monkeypatch, backend).startswith(row)
    with pytest.raises(ImportError, match=r'libgomp1.*install Numba: pip install "fastopt\[jit\]"'):
        fastopt.SGD([np.ones(3)], lr=0.1)


def test_a_build_without_kernels_says_so(monkeypatch):
    hide(monkeypatch, "fastopt._native", "numba", "fastopt.kernels.cpu.compile")
    backend = _backend.load()
    assert "built without a C compiler" in row_of_kernels(monkeypatch, backend)
    with pytest.raises(ImportError, match=r"built without a C compiler.*install gcc, .*install Numba"):
        backend.require()
    monkeypatch.delattr("fastopt.kernels.cpu.compile", raising=False)  # another test may have imported it
    with pytest.raises(ImportError, match=r"has no kernels .* compile the squares kernel for float16 now, install"):
        backend.kernel("squares", "float16")


@pytest.mark.parametrize(
    ("says", "threads"),
    [("3", 3), (" 3 ", 3), ("4,2", 4), ("0", None), ("²", None), ("x", None), ("-1", None), ("", None)],
)
def test_omp_num_threads_is_read_as_openmp_reads_it(says, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", says)
    assert _backend.Backend("numba", "").default_threads == (threads or len(os.sched_getaffinity(0)))


def test_without_a_compiler_a_team_is_as_large_as_threads_can_be_started(backend, always_threaded, monkeypatch):
    pytest.importorskip("numba")
    backend("numba")
    start, started = threading.Thread.start, []

    def start_one(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(team, "_pool", functools.cache(lambda: ThreadPoolExecutor(8)))
    monkeypatch.setattr(threading.Thread, "start", start_one)
    w, b = np.ones((300, 300)), np.ones(7)
    fastopt.LARS([w, b], lr=1.0, trust_coefficient=1.0, momentum=0.0).step([np.ones((300, 300)), np.ones(7)])
    assert (len(started), w.tolist(), b.tolist()) == (1, np.zeros((300, 300)).tolist(), [0.0] * 7)


def test_numba_gets_its_number_of_threads_back(backend, always_threaded):
    numba = pytest.importorskip("numba")
    backend("numba")
    numba.set_num_threads(1)
    fastopt.SGD([np.ones(40_000)], lr=0.1).step([np.ones(40_000)])
    assert numba.get_num_threads() == 1


@pytest.mark.skipif(_backend.load().isa == "numba", reason="this fastopt was built without its compiled library")
def test_a_library_of_another_layout_is_refused(monkeypatch):
    right = layout.layout_hash()
    for fields in (vars(layout), *layout.STRUCTURES.values()):
        for name in layout.NAMES if fields is vars(layout) else fields:
            with monkeypatch.context() as patch:
                patch.setitem(fields, name, 77 if fields is vars(layout) else "float")
                assert layout.layout_hash() != right
    monkeypatch.setattr(library, "layout_hash", lambda: right + 1)
    for kind in (None, lambda path: SimpleNamespace()):
        with pytest.raises(ImportError, match="belongs to another version of fastopt; install it again"):
            _backend.load() if kind is None else library.open_library("old.so", kind)
