"""Bad input of the benchmarks' command line is refused in one line, with status 2, before anything is written."""

from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("altair")
pytest.importorskip("psutil")

from bench.__main__ import main

pytestmark = pytest.mark.full
NEEDS = {"train": ("sklearn", "torch"), "compare": ("scipy",), "gpu": ("cupy",), "scale": ("torch", "vl_convert")}
TEXT = ("--task", "text")
REFUSED = [
    ("train", ("--optimizer", "adamv"), "--optimizer must be all or one of SGD, Momentum,"),
    ("train", ("--schedule", "zigzag"), "--schedule must be one of constant, cosine,"),
    ("train", ("--batch-size", "0"), "--batch-size must be in [1, 1536], the number of training images, got 0."),
    ("train", ("--batch-size", "1537"), "--batch-size must be in [1, 1536], the number of training images, got 1537."),
    ("train", ("--batch-size", "many"), "--batch-size must be a whole number, got 'many'."),
    ("train", ("--lr", "0"), "--lr must be in (0, inf), got 0."),
    ("train", ("--lr", "nan"), "--lr must be in (0, inf), got nan."),
    ("train", ("--lr", "fast"), "--lr must be a number, got 'fast'."),
    ("train", ("--optimizer", "all", "--lr", "1"), "--lr belongs to one optimizer"),
    ("train", ("--epochs", "0"), "--epochs must be at least 1, got 0."),
    ("train", ("--seed=-1",), "--seed must be at least 0, got -1."),
    ("train", ("--hidden", "8,0"), "--hidden must list widths of at least 1, got '8,0'."),
    ("train", ("--sweep", "--lr", "1"), "--sweep sets --lr itself"),
    ("train", ("--sweep", "--batch-size", "32"), "--sweep sets --batch-size itself"),
    ("train", ("--out", "file"), "--out 'file' is not a folder that can be written: "),
    ("train", ("--out", "file/below"), "--out 'file/below' is not a folder that can be written: "),
    ("train", ("--task", "chess"), "there is no task 'chess'; there are digits, text."),
    ("train", ("--steps", "5"), "--steps belongs to --task text, not to digits."),
    ("train", ("--json", "x"), "--json belongs to --task text, not to digits."),
    ("train", (*TEXT, "--epochs", "1"), "--epochs belongs to --task digits, not to text."),
    ("train", (*TEXT, "--hidden", "8"), "--hidden belongs to --task digits, not to text."),
    ("train", (*TEXT, "--schedule", "step"), "--schedule belongs to --task digits, not to text."),
    ("train", (*TEXT, "--sweep"), "--sweep belongs to --task digits, not to text."),
    ("train", (*TEXT, "--optimizer", "all"), "--optimizer must be one of AdamW, Adam,"),
    ("train", (*TEXT, "--steps", "1"), "--steps must be at least 2: the first one is not counted in times."),
    ("train", (*TEXT, "--width", "33"), "--width must be a multiple of 32, the width of a head, got 33."),
    ("train", (*TEXT, "--lr", "nan"), "--lr must be in (0, inf), got nan."),
    ("train", (*TEXT, "--clip", "0"), "--clip must be in (0, inf), got 0."),
    ("train", (*TEXT, "--json", "."), "--json must name a file, got the folder '.'."),
    ("step", ("nothing",), "there is no case 'nothing'; there are adam-1000x1000, "),
    ("step", ("adam", "--rounds", "0"), "--rounds and --threads must be at least 1"),
    ("step", ("adam", "--contenders", "fastopt,me"), "there is no contender 'me'; there are fastopt, "),
    ("step", ("adam", "--size", "1k"), "name cases, or describe one by options: not both"),
    ("step", ("--optimizer", "nope"), "there is no optimizer 'nope'; there are sgd, "),
    ("step", ("--model", "nope"), "there is no model 'nope'; there are resnet50, "),
    ("step", ("--model", "gpt2", "--size", "1k"), "--model brings its own --size and --arrays"),
    ("step", ("--size", "much"), "--size must be a number like 1000, 64k, 16M or 1G, got 'much'"),
    ("step", ("--size", "10", "--arrays", "11"), "--arrays must be in [1, 10], the number of elements, got 11"),
    ("step", ("adam", "--json", "/proc/no/x.json"), "the folder of --json '/proc/no' is not a folder that can be wri"),
    ("report", ("--from", "/no/such/file.json"), "/no/such/file.json cannot be read: No such file or directory"),
    ("report", ("--out", "/proc/no"), "--out '/proc/no' is not a folder that can be written"),
    ("report", ("--threads", "0"), "--threads must be at least 1"),
    ("report", ("--threads", "two"), "--threads must be a whole number, got 'two'"),
    ("compare", (".", ".", "--threshold=-1"), "--threshold must be"),
    ("compare", (".", ".", "--threshold=nan"), "--threshold must be"),
    ("compare", (".", ".", "--threshold=many"), "--threshold must be"),
    ("gpu", ("nothing",), "there is no case 'nothing'; cases are bandwidth, rest, copy, "),
    ("gpu", ("--out", "/no/such/folder/x.json"), "the folder of /no/such/folder/x.json does not exist"),
    ("gpu", ("--show", "/no/such/file"), "there is no file /no/such/file"),
    ("scale", ("--size", "few"), "--size must be a number like 2M or 50M, got 'few'."),
    ("scale", ("--size", "1"), "--size must be at least 1k."),
    ("scale", ("--size", "900G"), "900G parameters on 4 processes need about 267300.0 GB; "),
    ("scale", ("--rounds", "0"), "--rounds and --processes must be at least 1."),
    ("scale", ("--processes", "1,two"), "--processes must be a whole number, got 'two'."),
    ("scale", ("--from", "/no/such/file.json"), "/no/such/file.json cannot be read: No such file or directory"),
    ("scale", ("--from", "file"), "file was not written by bench scale."),
    ("scale", ("--size", "1M", "--out", "/proc/no"), "--out '/proc/no' is not a folder that can be written"),
]


@pytest.mark.parametrize(("command", "arguments", "message"), REFUSED, ids=[" ".join((x, *y)) for x, y, _ in REFUSED])
def test_bad_input_is_refused_in_one_line(command, arguments, message, tmp_path, capsys, monkeypatch):  # fmt: skip
    for package in NEEDS.get(command, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main([command, *arguments, *(() if command != "train" or "--out" in arguments else ("--out", "out"))]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"bench {command}: {message}")
    assert printed.err.count("\n") == 1
    Path("out").rmdir() if "--json" in arguments and "." in arguments else None  # an empty folder
    assert list(Path().iterdir()) == [Path("file")]
