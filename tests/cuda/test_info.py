"""What `fastopt info` says of GPUs: what is there, or what is missing and the command that mends it."""

import importlib.metadata
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fastopt.engine.cuda import info


def installed(monkeypatch, **versions):
    """Let exactly these packages be installed."""
    names = {name.replace("_", "-"): version for name, version in versions.items()}
    found = [SimpleNamespace(metadata={"Name": name}, version=version) for name, version in names.items()]

    def version(name):
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return names[name]

    monkeypatch.setattr(info.importlib.metadata, "distributions", lambda: found)
    monkeypatch.setattr(info.importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("driver", "said"),
    [(0, "not found: arrays on a GPU need NVIDIA's driver"), (10020, "CUDA 10.2, too old"), (13000, "CUDA 13.0")],
)
def test_the_driver(monkeypatch, driver, said):
    monkeypatch.setattr(info, "_driver_version", lambda: driver)
    installed(monkeypatch)
    assert info.cuda_facts()["CUDA driver"].startswith(said)


@pytest.mark.parametrize(("driver", "major"), [(0, 12), (12080, 12), (13000, 13)])
def test_without_cupy_the_packages_for_the_driver_are_named(monkeypatch, driver, major):
    monkeypatch.setattr(info, "_driver_version", lambda: driver)
    installed(monkeypatch, numpy="2.4")
    facts = info.cuda_facts()
    command = f'pip install cupy-cuda{major}x "numba-cuda[cu{major}]"'
    assert facts["CuPy"] == f"not installed, needed for arrays on a GPU: {command}"
    assert "GPUs" not in facts


def test_two_installations_of_cupy(monkeypatch):
    monkeypatch.setattr(info, "_driver_version", lambda: 13000)
    installed(monkeypatch, cupy_cuda12x="14.2", cupy_cuda13x="14.2")
    assert "uninstall all but cupy-cuda13x" in info.cuda_facts()["CuPy"]


def test_gpus(monkeypatch):
    gpus = [{"name": b"NVIDIA H200", "major": 9}, {"name": b"Tesla P4", "major": 6}]
    cupy = Mock()
    cupy.cuda.runtime.getDeviceCount.return_value = 2
    cupy.cuda.runtime.getDeviceProperties = lambda n: {"minor": 0, "totalGlobalMem": 140 * 2**30, **gpus[n]}
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(info, "_driver_version", lambda: 12080)
    installed(monkeypatch, cupy_cuda12x="14.2")
    facts = info.cuda_facts()
    assert facts["CuPy"] == "cupy-cuda12x 14.2"
    assert facts["GPUs"].split("; ") == [
        "cuda:0 NVIDIA H200, 140 GiB, sm_90",
        "cuda:1 Tesla P4, 140 GiB, sm_60 (too old: needed is sm_75 or newer)",
    ]


def test_kernels(monkeypatch, tmp_path):
    (tmp_path / "a.ptx").touch()
    monkeypatch.setattr(info, "prebuilt_folder", lambda: tmp_path)
    assert info.cuda_facts()["CUDA kernels"] == f"1 prebuilt, in {tmp_path}"
    monkeypatch.setattr(info, "prebuilt_folder", lambda: None)
    installed(monkeypatch)
    assert 'pip install "numba-cuda[cu12]", or build fastopt with FASTOPT_CUDA=1' in info.cuda_facts()["CUDA kernels"]
    installed(monkeypatch, numba="0.68", numba_cuda="0.30", llvmlite="0.50")
    assert info.cuda_facts()["CUDA kernels"].startswith("compiled on first use by numba-cuda 0.30, kept in")
