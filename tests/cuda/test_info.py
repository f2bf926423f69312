"""What `fastopt info` says of GPUs: what is there, or the command that brings what is missing."""

import sys
from unittest.mock import Mock

import pytest
from refusal import hide

from fastopt import __main__ as info
from fastopt.engine.cuda import device


@pytest.fixture
def fake(monkeypatch):
    """Puts a CuPy, or None, in the place of CuPy."""

    def put(cupy):
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        device.cupy.cache_clear()

    yield put
    device.cupy.cache_clear()


@pytest.mark.parametrize(("driver", "said"), [(0, "not found"), (10020, "CUDA 10.2"), (13000, "CUDA 13.0")])
def test_the_driver(monkeypatch, driver, said):
    monkeypatch.setattr(info, "_driver_version", lambda: driver)
    assert info.cuda_facts()["CUDA driver"].startswith(said)


def test_without_cupy_the_packages_are_named(fake):
    fake(None)
    assert 'pip install cupy-cuda12x "numba-cuda[cu12]"' in info.cuda_facts()["GPUs"]


def test_gpus(fake):
    gpus = [{"name": b"NVIDIA H200", "major": 9}, {"name": b"Tesla P4", "major": 6}]
    cupy = Mock(__version__="14.2")
    cupy.cuda.runtime.getDeviceCount.return_value = 2
    cupy.cuda.runtime.getDeviceProperties = lambda n: {"minor": 0, "totalGlobalMem": 140 * 2**30, **gpus[n]}
    fake(cupy)
    assert info.cuda_facts()["GPUs"] == "NVIDIA H200 (sm_90, 140 GiB), Tesla P4 (sm_60, 140 GiB); CuPy 14.2"
    cupy.cuda.runtime.getDeviceCount.side_effect = RuntimeError("no device")
    assert info.cuda_facts()["GPUs"] == "not usable: no device"


@pytest.mark.parametrize("cuda", [12, 13])
def test_kernels(monkeypatch, tmp_path, cuda):
    monkeypatch.setattr(info, "_driver_version", lambda: 1000 * cuda)
    (tmp_path / "a.ptx").touch()
    monkeypatch.setattr(info, "prebuilt_folder", lambda: tmp_path)
    assert info.cuda_facts()["CUDA kernels"] == f"1 prebuilt, in {tmp_path}"
    monkeypatch.setattr(info, "prebuilt_folder", lambda: None)
    hide(monkeypatch, "numba-cuda")
    said = info.cuda_facts()["CUDA kernels"]
    assert said.startswith("compiled on first use, into ")
    assert said.endswith(f'not installed, needed for that: pip install "numba-cuda[cu{cuda}]"')
