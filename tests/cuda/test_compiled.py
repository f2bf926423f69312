"""The tests of optimizers on a GPU once more, with kernels as Numba compiles them for CUDA (cuda_compiled.py).

In processes of their own: in this one Numba's simulator is on.
"""

import pathlib

import pytest
from fresh import program

pytest.importorskip("cupy")
pytest.importorskip("numba_cuda")

pytestmark = pytest.mark.full
TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parents[1]

PLANTED = """
import sys
import pytest
sys.path.insert(0, {support!r})
import cuda_compiled
right = cuda_compiled._for_host
cuda_compiled._for_host = lambda text: right(text).replace({old!r}, {new!r})
sys.exit(pytest.main(["-qx", "-m", "full", "-p", "no:cacheprovider", {test!r}]))
"""


def run(shared, *command):
    """Python without the simulator. What Numba makes of a kernel is shared by all processes of this run of pytest."""
    return program(*command, cwd=ROOT, timeout=600, NUMBA_ENABLE_CUDASIM="0", FASTOPT_TEST_IR=str(shared))


@pytest.mark.parametrize("name", ["test_plan.py", "test_launch.py", "test_copy.py", "../torch/test_cuda_amp.py"])
def test_compiled_kernels_have_the_bits_of_the_cpu(name, shared):
    done = run(shared, "-m", "pytest", "-q", "-m", "full", "-p", "no:cacheprovider", str(TESTS / name))
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("fmul float", "fadd float", id="arithmetic"),
        pytest.param("<4 x float>", "<2 x float>", id="half a vector"),
        pytest.param("lshr i32", "shl i32", id="the wrong half of a word"),
        pytest.param("call void () inttoptr", ";", id="no barriers"),
    ],
)
def test_a_mistake_of_the_compiler_is_found(old, new, shared):
    test = str(TESTS / "test_plan.py") + "::test_every_dtype_has_the_bits_of_the_cpu"
    done = run(shared, "-c", PLANTED.format(support=str(TESTS.parent / "support"), old=old, new=new, test=test))
    assert done.returncode == 1, done.stdout[-5000:] + done.stderr[-5000:]
    assert " failed" in done.stdout
