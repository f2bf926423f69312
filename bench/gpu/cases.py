"""What is measured on a GPU, and the bars that the project sets itself there."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import models
from ..models import Shape
from ..stats import quartiles

ROUNDS = 21


@dataclass(frozen=True)
class Bar:
    """A limit on what a case measures.

    Attributes:
        contender: Whose number it is.
        quantity: "fraction": bytes per second over those of ``against``, at least ``limit``. "ratio": time over that of
            ``against``, at most. "microseconds": time, at most. "count": the fact that a case counts, at most.
        limit: The limit.
        against: The other contender.
    """

    contender: str
    quantity: str
    limit: float
    against: str = ""

    @property
    def text(self) -> str:
        """The bar in words."""
        if self.quantity == "fraction":
            return f"≥ {self.limit:g} of {self.against}"
        return {
            "ratio": f"≤ {self.limit:g} × {self.against}",
            "microseconds": f"≤ {self.limit:g} µs on the host",
            "count": f"≤ {self.limit:g} waits of the host",
        }[self.quantity]


@dataclass(frozen=True)
class Case:
    """One optimizer on arrays of given shapes.

    Attributes:
        name: Name on the command line.
        kind: "device": time on the GPU, by events. "wall": host clock over many steps and one wait. "host": host clock
            around a step alone. "waits": how often the host waits in a step. "check": answers only.
        optimizer: Class name, in fastopt and in torch.optim where torch has it.
        hyper: Options of the constructor.
        shapes: Shape of each array by name.
        contenders: Names in contenders.py, in the order in which a round runs them.
        dtype: dtype of parameters and gradients; states are float32.
        flat: Whether fastopt's arrays lie in flat buffers.
        step: Options of ``step``.
        bars: Limits that the case is to meet.
    """

    name: str
    kind: str
    optimizer: str
    hyper: dict[str, Any]
    shapes: Mapping[str, Shape]
    contenders: tuple[str, ...]
    dtype: str = "float32"
    flat: bool = False
    step: dict[str, Any] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Optimizer(NamedTuple):
    """An optimizer of the table."""

    name: str
    hyper: dict[str, Any]


OPTIMIZERS = {
    "adam": Optimizer("Adam", {"lr": 1e-3}),
    "momentum": Optimizer("SGD", {"lr": 1e-2, "momentum": 0.9}),
    "sgd": Optimizer("SGD", {"lr": 8.0}),  # steps that bfloat16 shows
    "adamw": Optimizer("AdamW", {"lr": 1e-3, "weight_decay": 1e-2}),
    "lars": Optimizer("LARS", {"lr": 1e-2, "weight_decay": 1e-4}),
}
STATES = {"Adam": 2, "AdamW": 2, "SGD": 1, "LARS": 1}

ITEMSIZE = {"float32": 4, "bfloat16": 2}
STATE_ITEMSIZE = 4


def bytes_per_element(optimizer: str, hyper: Mapping[str, Any], dtype: str) -> int:
    """What a step must move: parameter and states are read and written, the gradient is read."""
    states = 0 if optimizer == "SGD" and not hyper.get("momentum") else STATES[optimizer]
    return 3 * ITEMSIZE[dtype] + 2 * STATE_ITEMSIZE * states


def _fraction(limit: float) -> Bar:
    return Bar("fastopt", "fraction", limit, "copy")


AGAINST_TORCH = ("fastopt", "copy", "torch fused", "torch foreach")


def _large(name: str, size: str, elements: int) -> Case:
    bars = _fraction(0.92), Bar("fastopt", "ratio", 1.0, "torch fused")
    shapes = {"w": (elements,)}
    return Case(f"{name}-{size}", "device", *OPTIMIZERS[name], shapes, AGAINST_TORCH, flat=True, bars=bars)


def _wall(name: str, shapes: Mapping[str, Shape]) -> Case:
    return Case(
        f"adam-{name}",
        "wall",
        *OPTIMIZERS["adam"],
        shapes,
        ("fastopt", "fastopt flat", "torch fused", "torch foreach"),
        bars=(Bar("fastopt", "ratio", 0.35, "torch fused"),),
    )


def _lars(name: str, shapes: Mapping[str, Shape]) -> Case:
    bars = (Bar("fastopt", "ratio", 1.3, "momentum"),)
    return Case(f"lars-{name}", "device", *OPTIMIZERS["lars"], shapes, ("fastopt", "momentum", "copy"), bars=bars)


ONE_G, HUNDRED_M = {"w": (1_000_000_000,)}, {"w": (100_000_000,)}
THOUSAND = {str(i): (1000,) for i in range(1000)}
GUARDED = {"grad_scale": 8.0, "max_norm": 1.0, "skip_nonfinite": True}
"""Unscaling, clipping (the norm is above 1 after unscaling) and the finite check."""

SIXTY_FOUR = {str(i): (ONE_G["w"][0] // 64,) for i in range(64)}

OTHERS = ("cupy", "cupy fuse", "torch loop", "apex", "transformer engine", "bitsandbytes")
"""Contenders in others.py."""

SUITE: dict[str, Case] = {
    case.name: case
    for case in (
        Case("copy", "device", *OPTIMIZERS["adam"], HUNDRED_M, ("copy", "torch copy")),
        _large("adam", "100m", 100_000_000),
        # Apart from adam-100m, whose bars do not have to wait for libraries that may be missing.
        Case("adam-others", "device", *OPTIMIZERS["adam"], HUNDRED_M, ("fastopt", "torch fused", *OTHERS), flat=True),
        _large("momentum", "100m", 100_000_000),
        _large("adamw", "100m", 100_000_000),
        Case(
            "adam-bfloat16",
            "device",
            *OPTIMIZERS["adam"],
            HUNDRED_M,
            ("fastopt", "copy"),
            dtype="bfloat16",
            flat=True,
            bars=(_fraction(0.88),),
        ),
        _wall("resnet50", models.shapes("resnet50")),
        _wall("1000x1000", THOUSAND),
        Case(
            "host-resnet50",
            "host",
            *OPTIMIZERS["adam"],
            models.shapes("resnet50"),
            ("fastopt", "fastopt flat", "momentum", "torch fused"),
            bars=(Bar("fastopt", "microseconds", 40.0),),
        ),
        _lars("resnet50", models.shapes("resnet50")),
        _lars("bert-large", models.shapes("bert-large")),
        Case(
            "adam-clip",
            "device",
            *OPTIMIZERS["adam"],
            HUNDRED_M,
            ("fastopt", "plain", "copy"),
            flat=True,
            step=GUARDED,
            bars=(Bar("fastopt", "ratio", 1.25, "plain"),),
        ),
        Case(
            "adam-clip-waits",
            "waits",
            *OPTIMIZERS["adam"],
            models.shapes("resnet50"),
            ("fastopt", "plain"),
            step=GUARDED,
            bars=(Bar("fastopt", "count", 0),),
        ),
        Case(
            "graph-resnet50",
            "device",
            *OPTIMIZERS["adam"],
            models.shapes("resnet50"),
            ("graph", "kernels"),
            bars=(Bar("graph", "ratio", 1.05, "kernels"),),
        ),
        Case(
            "amp-resnet50", "wall", *OPTIMIZERS["adam"], models.shapes("resnet50"), ("fastopt.torch amp", "torch amp")
        ),
        # The sum over the chunks of one array is one block's work, that over 64 arrays is 64 blocks'.
        *(
            Case(name, "device", *OPTIMIZERS["sgd"], shapes, ("norm", "copy"), step=GUARDED)
            for name, shapes in (("norm-1g", ONE_G), ("norm-64-arrays", SIXTY_FOUR))
        ),
        *(
            Case(f"sgd-bfloat16-{size}", "device", *OPTIMIZERS["sgd"], shapes, AGAINST_TORCH, "bfloat16", flat=True)
            for size, shapes in (("100m", HUNDRED_M), ("1g", ONE_G))
        ),
        _large("adam", "1g", 1_000_000_000),
        _large("momentum", "1g", 1_000_000_000),
        _large("adamw", "1g", 1_000_000_000),
        Case("bfloat16-beyond-2^31", "check", "SGD", {"lr": 0.5}, {"w": (2**31 + 17,)}, ("fastopt",), dtype="bfloat16"),
    )
}

_BANDWIDTH = ("adam", "momentum", "sgd-bfloat16")
STAGES: dict[str, tuple[str, ...]] = {
    "bandwidth": ("copy", *(f"{name}-{size}" for size in ("100m", "1g") for name in _BANDWIDTH))
}
STAGES["rest"] = tuple(name for name in SUITE if name not in STAGES["bandwidth"])
"""Cases by the stage of bench/gpu.sh that measures them."""

CHECKED = "right answers"
"""What stands in the place of a bar for a case without one."""


class Verdict(NamedTuple):
    """A row of the table of bars: a bar, or a contender that failed."""

    case: str
    bar: str
    verdict: str  # "reached", "MISSED", "WRONG ANSWER", "not measured", or "not installed: ...", "error: ..."
    measured: float | None = None
    spread: tuple[float, float] | None = None


def judge(case: Case, result: Mapping[str, Any] | None) -> list[Verdict]:
    """What became of the bars of a case, and of what failed; None is a case that did not run."""
    rows = [bar.text for bar in case.bars] or [CHECKED]
    if result is None:
        return [Verdict(case.name, row, "not measured") for row in rows]
    if result["error"]:
        return [Verdict(case.name, row, f"error: {result['error']}") for row in rows]
    verdicts, problems = [], dict(result["problems"])
    for bar in case.bars:
        values = quantities(bar, result)
        if values is not None:
            middle = statistics.median(values)
            reached = middle >= bar.limit if bar.quantity == "fraction" else middle <= bar.limit
            verdict = "reached" if reached else "MISSED"
            if {bar.contender, bar.against} & set(problems):
                verdict = "WRONG ANSWER"
            verdicts.append(Verdict(case.name, bar.text, verdict, middle, quartiles(values)))
        else:
            verdicts.append(Verdict(case.name, bar.text, "not measured"))
    if not case.bars and not problems:
        verdicts.append(Verdict(case.name, CHECKED, "reached"))
    return [*verdicts, *(Verdict(case.name, name, _said(text)) for name, text in problems.items())]


def _said(problem: str) -> str:
    """The verdict on a contender that failed: one that is not installed is no error."""
    kind, _, text = problem.partition(": ")
    return f"not installed: {text}" if kind == "NotInstalled" else f"error: {problem}"


def quantities(bar: Bar, result: Mapping[str, Any]) -> list[float] | None:
    """The bar's quantity in every round; None where a contender has a problem."""
    contenders = result["contenders"]
    if bar.contender not in contenders or (bar.against and bar.against not in contenders):
        return None
    mine = contenders[bar.contender]
    if bar.quantity == "count":
        return [mine["waits"]]
    if bar.quantity == "microseconds":
        return [1e6 * seconds for seconds in mine["samples"]]
    other = contenders[bar.against]
    ratios = [a / b for a, b in zip(mine["samples"], other["samples"], strict=True)]
    if bar.quantity == "ratio":
        return ratios
    return [mine["bytes"] / other["bytes"] / ratio for ratio in ratios]
