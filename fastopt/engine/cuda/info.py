"""What ``fastopt info`` tells of GPUs: what is there, or what is missing and the command that mends it."""

from __future__ import annotations

import ctypes
import importlib.metadata
from typing import Any

from .kernels import cache_folder, prebuilt_folder

MINIMUM_DRIVER = 11000  # CUDA 11, by the version in the PTX
MINIMUM_CAPABILITY = 75
PACKAGES = {12: ("cupy-cuda12x", "numba-cuda[cu12]"), 13: ("cupy-cuda13x", "numba-cuda[cu13]")}


def cuda_facts() -> dict[str, str]:
    """Name and value of each line."""
    driver = _driver_version()
    facts = {"CUDA driver": _say_driver(driver), "CuPy": _say_cupy(driver)}
    if driver and not facts["CuPy"].startswith("not"):
        facts["GPUs"] = _say_gpus()
    return {**facts, "CUDA kernels": _say_kernels()}


def _driver_version() -> int:
    """The CUDA version that the driver supports, such as 12080 for 12.8; 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _say_driver(version: int) -> str:
    if not version:
        return "not found: arrays on a GPU need NVIDIA's driver (nvidia-smi tells whether it is installed)"
    text = f"CUDA {version // 1000}.{version % 1000 // 10}"
    return text if version >= MINIMUM_DRIVER else f"{text}, too old: needed is a driver for CUDA 11 or newer"


def _say_cupy(driver: int) -> str:
    name, numba = PACKAGES[13 if driver >= 13000 else 12]
    installed = {
        d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions() if d.metadata["Name"]
    }
    found = [f"{n} {v}" for n, v in installed.items() if n == "cupy" or n.startswith("cupy-")]
    if len(found) > 1:
        return f"several are installed ({', '.join(found)}), which spoil each other: uninstall all but {name}"
    return found[0] if found else f'not installed, needed for arrays on a GPU: pip install {name} "{numba}"'


def _say_gpus() -> str:
    try:
        import cupy

        runtime = cupy.cuda.runtime
        return "; ".join(_say_gpu(runtime.getDeviceProperties(k), k) for k in range(runtime.getDeviceCount()))
    except Exception as error:  # each broken installation fails in its own way, and info must go on
        return f"not usable: {error}"


def _say_gpu(properties: dict[str, Any], number: int) -> str:
    major, minor = properties["major"], properties["minor"]
    name, memory = properties["name"].decode(), properties["totalGlobalMem"] / 2**30
    text = f"cuda:{number} {name}, {memory:.0f} GiB, sm_{major}{minor}"
    return text if 10 * major + minor >= MINIMUM_CAPABILITY else f"{text} (too old: needed is sm_75 or newer)"


def _say_kernels() -> str:
    folder = prebuilt_folder()
    if folder is not None:
        return f"{len(list(folder.glob('*.ptx')))} prebuilt, in {folder}"
    try:
        numba = importlib.metadata.version("numba-cuda")
    except importlib.metadata.PackageNotFoundError:
        return (
            "none, and Numba's CUDA package is missing to compile them on first use: "
            'pip install "numba-cuda[cu12]", or build fastopt with FASTOPT_CUDA=1'
        )
    return f"compiled on first use by numba-cuda {numba}, kept in {cache_folder()}"
