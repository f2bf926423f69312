"""The cases, family by family, and which of them a quick and a full run take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from .case import Bar, Case, Shapes
from .models import MODELS, shapes

MILLION = 1_000_000
ONE = {"w": (64 * MILLION,)}
THOUSAND = {str(i): (1000,) for i in range(1000)}

ALL = (
    *("fastopt", "stream", "torch fused", "torch foreach", "torch loop", "torch compile"),
    *("optax", "deepspeed", "optimi", "bitsandbytes", "numba", "numpy"),
)
"""Everybody who has Adam."""

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 1e-2}),
    "momentum": ("SGD", {"lr": 1e-2, "momentum": 0.9}),
    "adagrad": ("Adagrad", {"lr": 1e-2}),
    "rmsprop": ("RMSprop", {"lr": 1e-3}),
    "adam": ("Adam", {"lr": 1e-3}),
    "adamw": ("AdamW", {"lr": 1e-3}),
    "adadelta": ("Adadelta", {"lr": 1.0}),
    "adamax": ("Adamax", {"lr": 1e-3}),
    "nadam": ("NAdam", {"lr": 1e-3}),
    "radam": ("RAdam", {"lr": 1e-3}),
    "rprop": ("Rprop", {"lr": 1e-3}),
    "asgd": ("ASGD", {"lr": 1e-2}),
    "lion": ("Lion", {"lr": 1e-4}),
}
"""Rules by the name of their case, with the options that they are measured with."""


def size(text: str) -> int:
    """A number of elements like 1000, 64k, 64M or 1G.

    Raises:
        ValueError: It is none.
    """
    units = {"k": 1000, "M": MILLION, "G": 1000 * MILLION}
    return int(float(text[:-1]) * units[text[-1]]) if text[-1:] in units else int(text)


def cut(elements: int, arrays: int) -> Shapes:
    """Arrays of nearly equal size with so many elements in all."""
    base, more = divmod(elements, arrays)
    return {str(i): (base + (i < more),) for i in range(arrays)}


def _fraction(of_stream: float) -> Bar:
    return Bar("fastopt", 1 / of_stream, "stream")


AGAINST_TORCH = ("torch fused", "torch foreach")


def _rules() -> Iterator[Case]:
    """Every rule on one large array."""
    bars = {
        "adam": (
            _fraction(0.93),
            Bar("fastopt", 0.90, "torch fused"),
            Bar("fastopt", 0.20, "torch loop"),
            Bar("fastopt", 0.08, "numpy"),
        ),
        **{name: (_fraction(0.90),) for name in ("momentum", "rmsprop", "adagrad", "adamw", "lion")},
    }
    for name, (optimizer, hyper) in OPTIMIZERS.items():
        who = ALL if name == "adam" else ("fastopt", "stream", *AGAINST_TORCH)
        yield Case(name, optimizer, hyper, ONE, who, bars=bars.get(name, ()), family="rules")


def _dtypes() -> Iterator[Case]:
    """Adam in other dtypes."""
    for dtype, bar in (("float16", 0.90), ("bfloat16", 0.80), ("float64", None)):
        bars = (_fraction(bar),) if bar else ()
        who = ("fastopt", "stream", *AGAINST_TORCH)
        yield Case(f"adam-{dtype}", *OPTIMIZERS["adam"], ONE, who, dtype, bars=bars, family="dtypes")


AMP = {"grad_scale": 1024.0, "max_norm": 1.0, "skip_nonfinite": True}


def _options() -> Iterator[Case]:
    """What else a step can do."""
    adam, hyper = OPTIMIZERS["adam"]
    both = ("fastopt", "fastopt.torch", *AGAINST_TORCH)
    yield Case("adam-decay", adam, {**hyper, "weight_decay": 0.1}, ONE, both, family="options")
    yield Case("adam-zero", adam, hyper, ONE, both, step={"zero_grads": True}, family="options")
    clip = (Bar("fastopt", 1.25, "fastopt plain"),)
    yield Case("adam-clip", adam, hyper, ONE, ("fastopt", "fastopt plain"), step=AMP, bars=clip, family="options")
    amp = (Bar("fastopt.torch amp", 0.6, "torch fused amp"),)
    yield Case(
        "torch-amp",
        *OPTIMIZERS["adamw"],
        ONE,
        ("fastopt.torch amp", "torch fused amp"),
        step=AMP,
        bars=amp,
        family="options",
    )


def _bars() -> Iterator[Case]:
    """What else the project set itself."""
    yield Case(
        "adam-1000x1000",
        *OPTIMIZERS["adam"],
        THOUSAND,
        ("fastopt", "fastopt arrays", "fastopt moving", "torch fused"),
        bars=(Bar("fastopt", 0.10, "torch fused"), Bar("fastopt arrays", 0.15, "torch fused")),
    )
    yield Case(
        "lars-resnet50",
        "LARS",
        {"lr": 1.0, "weight_decay": 1e-4},
        shapes("resnet50"),
        ("fastopt", "fastopt keep", "fastopt momentum"),
        bars=(Bar("fastopt", 1.35, "fastopt momentum"), Bar("fastopt keep", 1.35, "fastopt momentum")),
    )
    yield Case(
        "lamb-bert",
        "LAMB",
        {"lr": 1e-3, "weight_decay": 0.01},
        shapes("bert-base"),
        ("fastopt", "fastopt adamw"),
        bars=(Bar("fastopt", 1.6, "fastopt adamw"),),
    )
    yield Case(
        "torch-adamw",
        *OPTIMIZERS["adamw"],
        ONE,
        ("fastopt.torch", "torch fused"),
        bars=(Bar("fastopt.torch", 0.92, "torch fused"),),
    )
    yield Case(
        "torch-1000x1000",
        *OPTIMIZERS["adamw"],
        THOUSAND,
        ("fastopt.torch moving", "fastopt.torch flat", "torch fused moving"),
        bars=(
            Bar("fastopt.torch moving", 0.20, "torch fused moving"),
            Bar("fastopt.torch flat", 0.10, "torch fused moving"),
        ),
    )
    yield Case(
        "torch-resnet50",
        *OPTIMIZERS["adamw"],
        shapes("resnet50"),
        ("fastopt.torch", "torch fused", "torch loop"),
        bars=(Bar("fastopt.torch", 0.85, "torch fused"), Bar("fastopt.torch", 0.2, "torch loop")),
    )
    for name in ("rmsprop", "nadam", "radam", "adamax"):
        bars = tuple(Bar("fastopt.torch", 0.25, f"torch {best}") for best in ("foreach", "loop"))
        yield Case(f"torch-{name}", *OPTIMIZERS[name], ONE, ("fastopt.torch", "torch foreach", "torch loop"), bars=bars)
    small = {"w": (1000,)}
    yield Case("adam-1x1000", *OPTIMIZERS["adam"], small, ("fastopt", "torch fused"), bars=(Bar("fastopt", 15),))
    yield Case("torch-1x1000", *OPTIMIZERS["adamw"], small, ("fastopt.torch", "torch fused"))


def _models() -> Iterator[Case]:
    """AdamW on the parameters of real models."""
    contenders = ("fastopt.torch", "torch fused", "torch foreach", "torch loop", "torch compile", "optimi", "deepspeed")
    for model in MODELS:
        # Two copies of a billion parameters are as many contenders as a large machine can hold.
        who = contenders if model not in ("gpt2-xl", "llama3-8b-shard") else contenders[:2]
        yield Case(model, *OPTIMIZERS["adamw"], shapes(model), who, family="models", model=model, rotate=True)


SIZES = ("1k", "10k", "100k", "1M", "4M", "16M", "64M", "256M", "1G")


def _sizes() -> Iterator[Case]:
    """Adam on one array."""
    small = ("fastopt", "stream", "torch fused", "torch foreach", "torch loop", "torch compile", "numba", "numpy")
    for text in SIZES:
        elements = size(text)
        # Below 100,000 elements the time is that of launching, so data stay in cache.
        yield Case(
            f"size-{text}",
            *OPTIMIZERS["adam"],
            {"w": (elements,)},
            small if elements <= 64 * MILLION else small[:3],
            family="sizes",
            rotate=elements >= 100_000,
        )


def _arrays() -> Iterator[Case]:
    """A million elements in one array, in ten, in a hundred: what an array costs, with data in cache."""
    contenders = ("fastopt", "fastopt arrays", "fastopt.torch", "torch fused", "torch foreach", "torch loop", "numba")
    for arrays in (1, 10, 100, 1000, 10_000):
        yield Case(f"arrays-{arrays}", *OPTIMIZERS["adamw"], cut(MILLION, arrays), contenders, family="arrays")


def thread_counts() -> list[int]:
    """1, 2, 4... and all cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    return sorted({*(2**k for k in range(cores.bit_length()) if 2**k <= cores), cores})


def _threads() -> Iterator[Case]:
    """Adam with one thread, with two..."""
    for threads in thread_counts():
        yield Case(
            f"threads-{threads}",
            *OPTIMIZERS["adam"],
            ONE,
            ("fastopt", "stream", "torch fused"),
            family="threads",
            threads=threads,
        )


FAMILIES = {
    "bars": _bars,
    "models": _models,
    "sizes": _sizes,
    "arrays": _arrays,
    "threads": _threads,
    "rules": _rules,
    "dtypes": _dtypes,
    "options": _options,
}

SUITE: dict[str, Case] = {case.name: case for make in FAMILIES.values() for case in make()}

QUICK = (
    *("adam", "momentum", "rmsprop", "adagrad", "adamw", "lion"),
    *("resnet50", "mobilenet-v3-large", "vit-b16"),
    *("size-1k", "size-10k", "size-100k", "size-1M", "size-16M"),
    *("arrays-1", "arrays-10", "arrays-100", "arrays-1000"),
    *(name for name, case in SUITE.items() if case.family in ("threads", "bars")),
    *("adam-float16", "adam-bfloat16", "adam-clip", "torch-amp"),
)
SLOW = ("torch compile", "deepspeed")
"""Contenders that compile for a minute: only in a full run, or when asked for."""
