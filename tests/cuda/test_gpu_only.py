"""What only a GPU can show; the rest is in test_plan.py, which runs on one, too."""

import functools
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from cases import CASES, Case
from compare import DTYPES, bits, build
from fastopt.kernels.dtypes import PAIRS, cuda_symbol
from fastopt.kernels.registry import RULES
from refusal import refused

import fastopt
from fastopt.engine.cuda import kernels
from fastopt.engine.cuda.device import CudaDevice

pytestmark = pytest.mark.gpu

ONE_PER_RULE = list({case.rule: case for case in CASES}.values())
SIZE = (1 << 20) + 3
PLUG_BYTES = 2**30
F32 = np.float32


@pytest.fixture(autouse=True)
def cupy() -> Iterator[Any]:
    """CuPy, whose memory is given back."""
    import cupy
    import gpus

    gpus.forget_devices()
    yield cupy
    gpus.forget_devices()
    cupy.cuda.runtime.deviceSynchronize()
    cupy.get_default_memory_pool().free_all_blocks()


@pytest.fixture
def plug(cupy: Any) -> Callable[[int], None]:
    """Keeps a stream busy for some milliseconds."""
    source, to = (cupy.zeros(PLUG_BYTES, np.uint8) for _ in range(2))

    def run(stream: int) -> None:
        for _ in range(20):
            kind = cupy.cuda.runtime.memcpyDeviceToDevice
            cupy.cuda.runtime.memcpyAsync(to.data.ptr, source.data.ptr, PLUG_BYTES, kind, stream)

    cupy.cuda.runtime.deviceSynchronize()
    return run


@functools.cache
def draw(seed: int, dtype: str, *shape: int) -> Any:
    """Normal numbers; drawn once, because there are many tests of many elements."""
    array = np.random.default_rng(seed).standard_normal(shape, F32).astype(DTYPES[dtype])
    array.flags.writeable = False
    return array


def problem(dtype: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters and gradients."""
    params = {name: draw(k, dtype, *shape).copy() for k, (name, shape) in enumerate(shapes.items())}
    return params, {name: draw(k + 100, dtype, *shape) for k, (name, shape) in enumerate(shapes.items())}


def put(cupy: Any, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: cupy.asarray(array) for name, array in arrays.items()}


def assert_same_bits(cupy: Any, there: Any, here: Any, where: object) -> None:
    differ = np.flatnonzero(bits(cupy.asnumpy(there)) != bits(here))
    assert not differ.size, f"{where} differs in {differ.size} elements, first in {differ[0]}"


# --- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("p", "g"), [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS])
@pytest.mark.parametrize("case", ONE_PER_RULE, ids=lambda case: case.rule)
def test_many_elements_have_the_bits_of_the_cpu(cupy: Any, case: Case, p: str, g: str) -> None:
    """An aligned array, and arrays one element into an allocation, where no access of several elements is aligned."""
    names = ("aligned", "shifted", "both shifted")
    params = {name: draw(k, p, 1, SIZE).copy() for k, name in enumerate(names)}
    there = {name: array_at(cupy, params[name], shifted=name != "aligned") for name in names}
    opt, on_gpu = build(case, params), build(case, there)
    for t in range(2):
        grads = {name: draw(10 + 3 * t + k, g, 1, SIZE) for k, name in enumerate(names)}
        grads_there = {name: array_at(cupy, grads[name], shifted=name == "both shifted") for name in names}
        opt.step(grads, grad_scale=2.0)
        on_gpu.step(grads_there, grad_scale=2.0)
    state, state_there = opt.state, on_gpu.state
    for name in names:
        assert_same_bits(cupy, there[name], params[name], name)
        for key, value in state[name].items():
            if isinstance(value, np.ndarray):
                assert_same_bits(cupy, state_there[name][key], value, (name, key))


def array_at(cupy: Any, array: Any, shifted: bool) -> Any:
    made = cupy.empty(array.size + 1, array.dtype)[int(shifted) :][: array.size].reshape(array.shape)
    made.set(array)
    return made


@pytest.mark.parametrize("p", ["float32", "float64", "bfloat16"])
def test_a_norm_of_many_elements_has_the_bits_of_the_cpu(cupy: Any, p: str) -> None:
    params, grads = problem(p, {"long": (1, 5 * SIZE), "short": (7, 111), "more": (1, SIZE)})
    there, grads_there = put(cupy, params), put(cupy, grads)
    info = fastopt.LARS(params, lr=0.1).step(grads, max_norm=0.5, skip_nonfinite=True)
    found = fastopt.LARS(there, lr=0.1).step(grads_there, max_norm=0.5, skip_nonfinite=True)
    assert found.grad_norm == info.grad_norm
    for name, array in params.items():
        assert_same_bits(cupy, there[name], array, name)


def test_more_elements_than_32_bits_count(cupy: Any) -> None:
    from bench.gpu.cases import SUITE
    from bench.gpu.contenders import Fastopt
    from bench.gpu.data import Problem
    from bench.gpu.device import Gpu

    case = SUITE["bfloat16-beyond-2^31"]
    assert case.elements == 2**31 + 17
    Fastopt(Problem(case, Gpu()), copy=None).check()  # type: ignore[arg-type]


# --- streams --------------------------------------------------------------------------------------------------------


def test_a_step_goes_on_cupys_current_stream(cupy: Any, plug: Any) -> None:
    w, g = cupy.ones(1000, F32), cupy.full(1000, np.nan, F32)
    new = cupy.full(1000, 2.0, F32)
    opt = fastopt.SGD([w], lr=0.25)
    opt.step([cupy.zeros(1000, F32)])  # what is uploaded once is there
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        plug(stream.ptr)
        g.data.copy_from_device_async(new.data, g.nbytes, stream)
        opt.step([g])
        assert not stream.done
    stream.synchronize()
    assert cupy.asnumpy(w).tolist() == [0.5] * 1000  # NaN if the step did not wait for the gradient


def test_torchs_tensors_are_updated_on_torchs_current_stream(cupy: Any, plug: Any) -> None:
    torch = pytest.importorskip("torch")
    params, grads = problem("float32", {"w": (33, 65), "b": (65,)})
    there = {name: torch.from_numpy(array).cuda() for name, array in params.items()}
    new = {name: torch.from_numpy(array.copy()).cuda() for name, array in grads.items()}
    grads_there = {name: torch.full_like(array, torch.nan) for name, array in there.items()}
    addresses = [tensor.data_ptr() for tensor in there.values()]
    opt, on_gpu = fastopt.AdamW(params), fastopt.AdamW(there)
    on_gpu.step({name: torch.zeros_like(array) for name, array in there.items()})
    opt.step({name: np.zeros_like(array) for name, array in params.items()})
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        plug(stream.cuda_stream)
        for name, tensor in grads_there.items():
            tensor.copy_(new[name])
        on_gpu.step(grads_there)
        assert not stream.query()
    opt.step(grads)
    stream.synchronize()
    assert [tensor.data_ptr() for tensor in there.values()] == addresses
    for name, array in params.items():
        assert there[name].cpu().numpy().tobytes() == array.tobytes(), name


# --- waits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hyper", "options"),
    [
        ("SGD", {}, {}),
        ("Adam", {}, {}),
        ("Adam", {}, {"max_norm": 1.0, "grad_scale": 8.0}),
        ("Adam", {}, {"max_norm": 1.0, "grad_scale": 8.0, "skip_nonfinite": True}),
        ("Adam", {"capturable": True}, {}),
        ("LARS", {"lr": 0.1}, {"zero_grads": True}),
    ],
)
def test_a_step_returns_while_the_gpu_is_busy(cupy: Any, plug: Any, name: str, hyper: Any, options: Any) -> None:
    params, first, second = ({f"p{k}": cupy.ones((k + 1, 100), F32) for k in range(50)} for _ in range(3))
    opt = getattr(fastopt, name)(params, **hyper)
    for grads in (first, second) * 3:
        opt.step(grads, **options)
    cupy.cuda.runtime.deviceSynchronize()
    stream = cupy.cuda.get_current_stream()
    plug(stream.ptr)
    for grads in (first, second, first):  # gradients that moved are uploaded, too
        opt.step(grads, **options)
    assert not stream.done


# --- memory ----------------------------------------------------------------------------------------------------------


def test_state_that_does_not_fit_is_refused_and_the_optimizer_goes_on(cupy: Any) -> None:
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    w, g = cupy.ones(1000, F32), cupy.ones(1000, F32)
    opt = fastopt.Adam([w], lr=0.5)
    opt.step([g])
    free, _ = cupy.cuda.runtime.memGetInfo()
    huge = cupy.empty(int(0.4 * free) // 4, F32)  # the first of two states fits beside it
    used = pool.used_bytes()
    with refused(MemoryError, "Adam", "exp_avg_sq", "GiB", "cuda:0", "free"):
        opt.add_param_group({"params": [huge]})
    gc.collect()  # the error is gone, and with it the frames that it came through
    assert pool.used_bytes() == used
    assert len(opt.param_groups) == 1
    opt.step([g])
    on_cpu = np.ones(1000, F32)
    wanted = fastopt.Adam([on_cpu], lr=0.5)
    for _ in range(2):
        wanted.step([np.ones(1000, F32)])
    assert_same_bits(cupy, w, on_cpu, "w")


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_prebuilt_kernels_are_there_and_are_what_is_loaded(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kernels.prebuilt_folder()
    assert folder is not None, "built without kernels for CUDA: see what CMake said, or use FASTOPT_CUDA=ON"
    assert {path.stem for path in folder.glob("*.ptx")} == {
        *(cuda_symbol("update", name, *pair) for name in RULES for pair in PAIRS),
        *(cuda_symbol("terms", name, *pair) for name, rule in RULES.items() if rule.ratio for pair in PAIRS),
        *(cuda_symbol("prologue", name) for name in RULES),
    }
    loaded = []
    function = CudaDevice.function

    def note(self: CudaDevice, ptx: str, symbol: str, threads: int) -> Any:
        loaded.append(symbol)
        assert ptx == (folder / f"{symbol}.ptx").read_text()
        return function(self, ptx, symbol, threads)

    monkeypatch.setattr(CudaDevice, "function", note)
    w = cupy.ones(10, F32)
    fastopt.Adam([w]).step([cupy.ones(10, F32)], max_norm=1.0)
    assert set(loaded) == {"fastopt_cuda_adam_float32_float32", "fastopt_cuda_prologue_adam"}


FIRST_STEP = """
import sys, time
import cupy, numpy as np
import fastopt
cupy.ones(1, np.float32)  # CUDA has started
cupy.cuda.runtime.deviceSynchronize()
start = time.perf_counter()
params = fastopt.FlatBuffer({"w": (1000,)}, device="cuda")
opt, grads = fastopt.Adam(params), params.zeros_like()
opt.step(grads, max_norm=1.0)
cupy.cuda.runtime.deviceSynchronize()
print(1e3 * (time.perf_counter() - start), "numba" in sys.modules)
"""


def test_a_first_step_waits_for_no_compiler(record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run([sys.executable, "-c", FIRST_STEP], capture_output=True, text=True, check=True, timeout=120)
    milliseconds, numba = run.stdout.split()[-2:]
    record_property("first step, ms", milliseconds)
    with capsys.disabled():
        print(f"\nfirst step, update and prologue loaded: {float(milliseconds):.1f} ms")
    assert numba == "False"
