"""The examples run and learn."""

import importlib.util
import itertools
import pathlib
import re

import pytest
from fresh import program, python

pytest.importorskip("torch")
pytestmark = pytest.mark.full
EXAMPLES = sorted((pathlib.Path(__file__).parents[2] / "examples").glob("torch_*.py"))
NEEDS = {"torch_huggingface": ("transformers", "accelerate"), "torch_lightning": ("lightning",)}
SEVERAL = {x.stem: x for x in EXAMPLES if "\ntorchrun " in x.read_text()}

# What torchrun does, by fork: torch is imported once. A process of torch 2.13 now and then aborts while it ends.
TORCHRUN = """
    import os, runpy, socket, sys
    import torch, torch.distributed.checkpoint, torch.distributed.fsdp, torch.multiprocessing as mp
    import fastopt.torch

    fastopt.torch.AdamW([torch.nn.Parameter(torch.ones(1))])  # imports much of torch

    def run(rank, world, port, command):
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")
        sys.stdout.flush()
        os._exit(0)

    def torchrun(world, *command):
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        mp.start_processes(run, (world, port, list(command)), nprocs=world, start_method="fork")
        print("====", flush=True)
"""


def started(*commands):
    """What each command prints: a number of processes, an example and its arguments."""
    starts = "".join(f"\n    torchrun({world}, *{list(map(str, command))})" for world, *command in commands)
    return python(TORCHRUN + starts, timeout=300.0).split("====")[: len(commands)]


def numbers(name, printed):
    return [float(x) for x in re.findall(rf"{name} (-?[\d.]+)", printed)]


def same_on_all(name, printed, processes=2):
    """All processes print the same number."""
    found = numbers(name, printed)
    return len(found) == processes and len(set(found)) == 1


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(x, marks=pytest.mark.integrations if x.stem in NEEDS else (), id=x.stem)
        for x in EXAMPLES
        if x.stem not in SEVERAL
    ],
)
def test_example(example):
    for package in NEEDS.get(example.stem, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f'needs {package}: pip install "fastopt[integrations]"')
    done = program("-W", "ignore", example)
    assert done.returncode == 0, done.stderr
    losses = numbers("loss", done.stdout)
    assert losses
    assert max(losses) < 0.5


def test_examples_of_several_processes_learn_and_all_have_the_same_parameters():
    chosen = [stem for stem in SEVERAL if stem not in ("torch_elastic", "torch_text_lamb")]
    printed = dict(zip(chosen, started(*((2, SEVERAL[stem]) for stem in chosen)), strict=True))
    for stem in chosen:
        assert max(numbers("loss", printed[stem])) < 0.05, printed  # from 8
        assert same_on_all("parameters", printed[stem]), printed
    parts = re.findall(r"(\d+) of (\d+) elements", printed["torch_sharded_ddp"])
    assert sum(int(part) for part, _ in parts) == int(parts[0][1])
    assert all(int(part) < 0.6 * int(whole) for part, whole in parts)
    assert same_on_all("norm", printed["torch_fsdp2"])


def test_torchrun_trains_the_transformer_with_lamb(tmp_path):
    tmp_path.joinpath("start.py").write_text(
        "import os, runpy, sys\nrunpy.run_path(sys.argv[1], run_name='__main__')\nsys.stdout.flush()\nos._exit(0)\n"
    )
    example = SEVERAL["torch_text_lamb"]
    command = re.search(r"^torchrun (.+) \S+$", example.read_text(), re.MULTILINE)[1].split()
    done = program("-m", "torch.distributed.run", *command, tmp_path / "start.py", example, timeout=300.0)
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"([\d.]+) nats", done.stdout)]
    assert losses[0] > 5.5  # log 256 is 5.55
    assert losses[-1] < 2.7  # letters by how often they occur: 3.2
    assert same_on_all("parameters", done.stdout), done.stdout


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """With the loss of one that was not stopped, but for the rounding of averages over one process or two."""
    a, b, example = tmp_path / "a", tmp_path / "b", SEVERAL["torch_elastic"]
    first, second, whole = started((2, example, a, "--until", 50), (1, example, a), (2, example, b))
    assert "2 processes begin at step 0" in first
    assert "1 processes begin at step 40" in second
    curves = [dict(re.findall(r"step (\d+): loss ([\d.]+)", x)) for x in (first, second, whole)]
    assert list(map(len, curves)) == [5, 4, 8]
    for step, loss in itertools.chain(*(x.items() for x in curves[:2])):
        assert float(loss) == pytest.approx(float(curves[2][step]), rel=1e-3, abs=2e-6), curves  # printed to 1e-6
    assert float(curves[1]["80"]) < 0.1 < float(curves[0]["10"])
    assert [x for x in a.iterdir() if x.suffix] == []
    assert same_on_all("parameters", first)
    assert numbers("parameters", second)[0] == pytest.approx(numbers("parameters", whole)[0], rel=1e-5)
