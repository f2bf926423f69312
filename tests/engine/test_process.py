"""Threads, forks and spawned processes; what importing and stepping import."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fresh import program, python

import fastopt
from fastopt.engine import backend as _backend

SHAPES = {"large": (530, 400), "bias": (17,), "middle": (201, 301)}  # enough for threads to be used
SUPPORT = str(Path(__file__).parents[1] / "support")
OPTIMIZERS = {
    "Adam": lambda params: fastopt.Adam(params, lr=0.1),
    "LARS": lambda params: fastopt.LARS(params, lr=0.1, weight_decay=0.1, keep_weight_norms=True),
}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return fastopt.FlatBuffer.from_arrays({name: rng.standard_normal(s).astype("f4") for name, s in SHAPES.items()})


def run(name, seed, steps=5):
    """The bytes of parameters after some steps."""
    params, grads = arrays(seed), arrays(seed + 100)
    opt = OPTIMIZERS[name](params)
    for _ in range(steps):
        opt.step(grads, max_norm=1.0)
    return params.data.tobytes()


def test_these_arrays_are_large_enough_for_threads():
    assert arrays(0).size > 2 * _backend.SERIAL_BELOW


@pytest.mark.parametrize("kernels", ["library", "numba"])
def test_two_threads_step_two_optimizers_at_once(kernels, backend):
    if kernels == "numba":
        pytest.importorskip("numba")
        backend("numba")
    tasks = [(name, seed) for name in OPTIMIZERS for seed in (0, 1)]
    want = [run(*job) for job in tasks]  # one after another; compiles what is to be compiled, too
    start = threading.Barrier(len(tasks))
    for threads in (2, 1, 3):
        fastopt.set_num_threads(threads)
        with ThreadPoolExecutor(len(tasks)) as pool:
            assert list(pool.map(lambda job: (start.wait(), run(*job))[1], tasks)) == want


def test_the_number_of_threads_changes_while_others_step():
    want = run("Adam", 0, steps=40)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run, "Adam", 0, steps=40) for _ in range(2)]
        while not all(future.done() for future in running):
            for threads in (1, 4, 2):
                fastopt.set_num_threads(threads)
        assert [future.result() for future in running] == [want, want]


def test_one_optimizer_stepped_from_two_threads_is_never_corrupted():
    params, grads = fastopt.FlatBuffer({"w": (300_000,)}), fastopt.FlatBuffer({"w": (300_000,)})
    grads["w"] = 1.0
    opt = fastopt.SGD(params, lr=2.0**-10)
    start = threading.Barrier(2)

    def steps(_):
        start.wait()
        taken = 0
        for _ in range(100):
            try:
                opt.step(grads)
                taken += 1
            except RuntimeError as error:
                assert str(error) == "SGD.step: another thread is using this optimizer."  # noqa: PT017
        return taken

    with ThreadPoolExecutor(2) as pool:
        taken = sum(pool.map(steps, range(2)))
    assert taken > 0
    assert opt.state["w"]["step"] == taken
    assert (params["w"] == -taken * 2.0**-10).all()


def test_an_optimizer_in_use_refuses_another_thread(monkeypatch):
    inside, leave, w = threading.Event(), threading.Event(), np.zeros(3)
    opt, select_rule = fastopt.SGD([w], lr=1.0), fastopt.SGD.select_rule

    def slow(self, options):
        inside.set()
        assert leave.wait(60)
        return select_rule(self, options)

    monkeypatch.setattr(fastopt.SGD, "select_rule", slow)
    with ThreadPoolExecutor(1) as pool:
        step = pool.submit(opt.step, [np.ones(3)])
        try:
            assert inside.wait(60)
            for name, *arguments in (
                ("step", [np.ones(3)]),
                ("state_dict",),
                ("load_state_dict", {}),
                ("add_param_group", {"params": {"v": np.ones(3)}}),
            ):
                with pytest.raises(RuntimeError, match=rf"^SGD\.{name}: another thread is using this optimizer\.$"):
                    getattr(opt, name)(*arguments)
        finally:
            leave.set()
        step.result()
    assert w.tolist() == [-1.0] * 3
    with pytest.raises(ValueError, match="shape"):
        opt.step([np.ones(4)])
    opt.step([np.ones(3)])  # an error gave the lock back
    assert w.tolist() == [-2.0] * 3


FORK = """
import os, sys
import numpy as np, fastopt

fastopt.set_num_threads(2)
params, grads = (fastopt.FlatBuffer({"w": (300, 1000), "b": (7,)}) for _ in range(2))
params["w"], params["b"], grads["w"], grads["b"] = 1.0, 1.0, 0.5, 0.5
opt = getattr(fastopt, sys.argv[1])(params, lr=0.1)
for _ in range(int(sys.argv[2])):
    opt.step(grads, max_norm=1.0)
reading, writing = os.pipe()
child = os.fork()
opt.step(grads, max_norm=1.0)  # the parent goes on with threads
if child == 0:
    other = fastopt.SGD([np.ones(100_000)], lr=0.5)  # one that the parent never had
    other.step([np.ones(100_000)])
    kept = [np.unique(x) for x in (params["w"], params["b"], other.param_groups[0]["params"]["0"])]
    os.write(writing, np.concatenate(kept).astype("f8").tobytes())
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
got = np.frombuffer(os.read(reading, 1000))
assert got.tolist() == [float(params["w"][0, 0]), float(params["b"][0]), 0.5], got
assert (params["w"] == params["w"][0, 0]).all()
print("ok")
"""


@pytest.mark.parametrize(
    ("optimizer", "steps_before", "isa"), [*itertools.product(("Adam", "LARS"), "02", [""]), ("Adam", "2", "numba")]
)
def test_a_step_after_fork(optimizer, steps_before, isa):
    if isa == "numba":
        pytest.importorskip("numba")
    assert python(FORK, optimizer, steps_before, FASTOPT_ISA=isa) == "ok"


SPAWN = """
import multiprocessing
import fastopt

def work(params, queue):
    grads = params.copy()
    fastopt.Adam(params, lr=0.1).step(grads)
    queue.put(params)

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    params = fastopt.FlatBuffer({{"w": (300, 400), "b": (7,)}})
    params["w"], params["b"] = 1.0, -1.0
    fastopt.Adam(params.copy(), lr=0.1).step(params.copy())
    queue = context.Queue()
    processes = [context.Process(target=work, args=(params, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=50) for _ in processes]
    for process in processes:
        process.join(50)
        assert process.exitcode == 0
    grads = params.copy()
    fastopt.Adam(params, lr=0.1).step(grads)
    for result in results:
        assert result.data.tobytes() == params.data.tobytes()
    print("ok")
"""


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_multiprocessing(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SPAWN.format(method=method))
    done = program(script)
    assert (done.stdout.strip(), done.returncode) == ("ok", 0), done.stderr


LATE = ("numba", "llvmlite", "torch", "safetensors", "ml_dtypes", "multiprocessing")


def test_import_imports_nothing_heavy():
    assert python(f"import sys, fastopt; print([m for m in {LATE} if m in sys.modules])") == "[]"


@pytest.mark.skipif(_backend.load().isa == "numba", reason="this fastopt was built without its compiled library")
def test_no_step_imports_a_compiler():
    code = f"""
import sys, numpy as np, fastopt
from cases import CASES
for case in CASES:
    for dtype in ("float32", "float64", "float16"):
        params = [np.ones((3, 2), dtype), np.ones(70, dtype)]
        opt = getattr(fastopt, case.optimizer)(params, **case.hyper)
        opt.step([np.ones_like(p) for p in params])
        opt.step([np.ones_like(p) for p in params], max_norm=1.0, zero_grads=True)
        opt.load_state_dict(opt.state_dict())
print([m for m in {LATE} if m in sys.modules])
"""
    assert python(code, PYTHONPATH=SUPPORT) == "[]"


@pytest.mark.parametrize("threads", ["1", "3"])
def test_omp_num_threads_is_the_default(threads):
    assert python("import fastopt; print(fastopt.get_num_threads())", OMP_NUM_THREADS=threads) == threads


def test_bits_do_not_depend_on_the_threads_of_the_process():
    code = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
import test_process
print(*(hashlib.sha256(test_process.run(name, 7)).hexdigest() for name in test_process.OPTIMIZERS))
"""
    digests = {python(code, str(Path(__file__).parent), PYTHONPATH=SUPPORT, OMP_NUM_THREADS=str(n)) for n in (1, 2, 5)}
    assert len(digests) == 1
