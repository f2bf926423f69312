"""What is measured: cases, and the bars that fastopt sets itself."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from .shapes import Shape, resnet50

MILLION = 1_000_000


@dataclass(frozen=True)
class Bar:
    """A limit on the ratio of two contenders' times, or on the first one's time in microseconds."""

    contender: str
    limit: float
    against: str | None = None

    @property
    def text(self) -> str:
        """The bar in words."""
        if self.against is None:
            return f"{self.contender} ≤ {self.limit:g} µs"
        if self.against == "stream":
            return f"{self.contender} ≥ {1 / self.limit:.2f} of {self.against}'s speed"
        return f"{self.contender} ≤ {self.limit:g} × {self.against}"


@dataclass(frozen=True)
class Case:
    """One optimizer on arrays of given shapes.

    Attributes:
        name: Name on the command line.
        optimizer: Class name, in fastopt and in torch.optim where torch has it.
        hyper: Options of the constructor.
        shapes: Shape of each array by name.
        dtype: dtype of parameters and gradients.
        step: Options of ``step``: grad_scale, max_norm, skip_nonfinite.
        contenders: Names in contenders.py, in the order in which a round runs them.
        bars: Limits that the case is to meet.
    """

    name: str
    optimizer: str
    hyper: dict[str, Any]
    shapes: dict[str, Shape]
    contenders: tuple[str, ...]
    dtype: str = "float32"
    step: dict[str, Any] = field(default_factory=dict)
    bars: tuple[Bar, ...] = ()

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def _fraction(of_stream: float) -> Bar:
    return Bar("fastopt", 1 / of_stream, "stream")


ONE = {"w": (64 * MILLION,)}
THOUSAND = {str(i): (1000,) for i in range(1000)}

SUITE: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "adam",
            "Adam",
            {"lr": 1e-3},
            ONE,
            ("fastopt", "stream", "torch fused", "torch loop", "numpy"),
            bars=(
                _fraction(0.93),
                Bar("fastopt", 0.90, "torch fused"),
                Bar("fastopt", 0.20, "torch loop"),
                Bar("fastopt", 0.08, "numpy"),
            ),
        ),
        *(
            Case(name, optimizer, hyper, ONE, ("fastopt", "stream"), bars=(_fraction(0.90),))
            for name, optimizer, hyper in (
                ("momentum", "SGD", {"lr": 1e-2, "momentum": 0.9}),
                ("rmsprop", "RMSprop", {"lr": 1e-3}),
                ("adagrad", "Adagrad", {"lr": 1e-2}),
                ("adamw", "AdamW", {"lr": 1e-3}),
                ("lion", "Lion", {"lr": 1e-4}),
            )
        ),
        Case(
            "adam-1000x1000",
            "Adam",
            {"lr": 1e-3},
            THOUSAND,
            ("fastopt", "fastopt arrays", "fastopt moving", "torch fused"),
            bars=(Bar("fastopt", 0.10, "torch fused"), Bar("fastopt arrays", 0.15, "torch fused")),
        ),
        Case(
            "lars-resnet50",
            "LARS",
            {"lr": 1.0, "weight_decay": 1e-4},
            resnet50(),
            ("fastopt", "fastopt keep", "momentum"),
            bars=(Bar("fastopt", 1.35, "momentum"), Bar("fastopt keep", 1.35, "momentum")),
        ),
        Case(
            "adam-clip",
            "Adam",
            {"lr": 1e-3},
            ONE,
            ("fastopt", "fastopt plain"),
            step={"grad_scale": 1024.0, "max_norm": 1.0, "skip_nonfinite": True},
            bars=(Bar("fastopt", 1.25, "fastopt plain"),),
        ),
        *(
            Case(f"adam-{dtype}", "Adam", {"lr": 1e-3}, ONE, ("fastopt", "stream"), dtype, bars=(_fraction(bar),))
            for dtype, bar in (("float16", 0.90), ("bfloat16", 0.80))
        ),
        Case(
            "torch-adamw",
            "AdamW",
            {"lr": 1e-3},
            ONE,
            ("fastopt.torch", "torch fused"),
            bars=(Bar("fastopt.torch", 0.92, "torch fused"),),
        ),
        Case(
            "torch-1000x1000",
            "AdamW",
            {"lr": 1e-3},
            THOUSAND,
            ("fastopt.torch moving", "fastopt.torch flat", "torch fused moving"),
            bars=(
                Bar("fastopt.torch moving", 0.20, "torch fused moving"),
                Bar("fastopt.torch flat", 0.10, "torch fused moving"),
            ),
        ),
        Case(
            "torch-resnet50",
            "AdamW",
            {"lr": 1e-3},
            resnet50(),
            ("fastopt.torch", "torch fused", "torch loop"),
            bars=(Bar("fastopt.torch", 0.85, "torch fused"), Bar("fastopt.torch", 0.2, "torch loop")),
        ),
        *(
            Case(
                f"torch-{name.lower()}",
                name,
                {"lr": 1e-3},
                ONE,
                ("fastopt.torch", "torch foreach", "torch loop"),
                bars=tuple(Bar("fastopt.torch", 0.25, f"torch {best}") for best in ("foreach", "loop")),
            )
            for name in ("RMSprop", "NAdam", "RAdam", "Adamax")
        ),
        Case(
            "torch-amp",
            "AdamW",
            {"lr": 1e-3},
            ONE,
            ("fastopt.torch amp", "torch fused amp"),
            step={"grad_scale": 1024.0, "max_norm": 1.0, "skip_nonfinite": True},
            bars=(Bar("fastopt.torch amp", 0.6, "torch fused amp"),),
        ),
        Case(
            "adam-1x1000", "Adam", {"lr": 1e-3}, {"w": (1000,)}, ("fastopt", "torch fused"), bars=(Bar("fastopt", 15),)
        ),
    )
}
