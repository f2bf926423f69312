"""The tests of optimizers on a GPU once more, with kernels as Numba compiles them for CUDA (cuda_compiled.py).

In processes of their own: in this one Numba's simulator is on.
"""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("cupy")
pytest.importorskip("numba_cuda")

pytestmark = pytest.mark.full
TESTS = pathlib.Path(__file__).parent

PLANTED = """
import sys
import pytest
sys.path.insert(0, {support!r})
import cuda_compiled
right = cuda_compiled._for_host
cuda_compiled._for_host = lambda text: right(text).replace({old!r}, {new!r})
sys.exit(pytest.main(["-q", "-m", "full", "-p", "no:cacheprovider", {test!r}]))
"""


def run(shared: pathlib.Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Python without the simulator. What Numba makes of a kernel is shared by all processes of this run of pytest."""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "0", "FASTOPT_TEST_IR": str(shared)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", ["test_plan.py", "test_launch.py", "test_copy.py", "../torch/test_cuda_amp.py"])
def test_compiled_kernels_have_the_bits_of_the_cpu(name: str, shared: pathlib.Path) -> None:
    done = run(shared, "-m", "pytest", "-q", "-m", "full", "-p", "no:cacheprovider", str(TESTS / name))
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [("fmul float", "fadd float"), ("<4 x float>", "<2 x float>"), ("lshr i32", "shl i32")],
    ids=["arithmetic", "half a vector", "the wrong half of a word"],
)
def test_a_mistake_of_the_compiler_is_found(old: str, new: str, shared: pathlib.Path) -> None:
    test = str(TESTS / "test_plan.py") + "::test_every_dtype_has_the_bits_of_the_cpu"
    done = run(shared, "-c", PLANTED.format(support=str(TESTS.parent / "support"), old=old, new=new, test=test))
    assert done.returncode == 1, done.stdout[-5000:] + done.stderr[-5000:]
    assert " failed" in done.stdout
