"""The table of optimizers and options that the suite runs through, and the data it runs them on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    optimizer: str  # the class, and the key of reference.REFERENCES
    rule: str  # the rule that the options must select
    hyper: dict[str, Any]  # keyword arguments of the class; what is left out has its default

    @property
    def id(self) -> str:
        def text(name: str, value: Any) -> str:
            if value is True:
                return name
            return f"{name}={'/'.join(map(str, value)) if isinstance(value, tuple) else value}"

        return "-".join([self.optimizer, *(text(*item) for item in self.hyper.items())])


def _case(optimizer: str, rule: str, **hyper: Any) -> Case:
    return Case(optimizer, rule, hyper)


_DECAYED = {"alpha": 0.9, "eps": 0.01, "weight_decay": 0.1}
_FAST = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 0.01, "weight_decay": 0.1}

# Values that tell: large enough for a forgotten or misplaced option to show within a few steps (`eps` not far below
# the gradients, averages that turn over within 20 steps, step sizes and t0 that 20 steps reach). At a constant lr
# `lr_in_momentum` shows in the momentum buffer alone, and t0 of ASGD shows in `ax` alone: compare states too.
CASES: tuple[Case, ...] = (
    _case("SGD", "sgd"),
    _case("SGD", "sgd", lr=0.05, weight_decay=0.1, maximize=True),
    _case("SGD", "momentum", lr=0.01, momentum=0.9),
    _case("SGD", "momentum", lr=0.01, momentum=0.9, weight_decay=0.1, nesterov=True),
    _case("SGD", "momentum", lr=0.01, momentum=0.8, weight_decay=0.1, nesterov=True, lr_in_momentum=True),
    _case("SGD", "momentum", lr=0.01, momentum=0.8, dampening=0.3, weight_decay=0.1),
    _case("SGD", "momentum", lr=0.01, momentum=0.8, dampening=0.3, maximize=True, lr_in_momentum=True),
    _case("Adagrad", "adagrad"),
    _case("Adagrad", "adagrad", lr=0.05, lr_decay=0.1, weight_decay=0.1),
    _case("Adagrad", "adagrad", initial_accumulator_value=0.5, eps=0.01, maximize=True),
    _case("Adagrad", "adagrad", initial_accumulator_value=0.1, eps=0.01, eps_inside_sqrt=True),
    _case("RMSprop", "rmsprop"),
    _case("RMSprop", "rmsprop", lr=0.02, alpha=0.9, eps=0.01, weight_decay=0.1, maximize=True),
    _case("RMSprop", "rmsprop", alpha=0.9, eps=0.01, eps_inside_sqrt=True),
    _case("RMSprop", "rmsprop_momentum", alpha=0.9, eps=0.01, weight_decay=0.1, momentum=0.8),
    _case("RMSprop", "rmsprop_momentum", alpha=0.9, eps=0.01, momentum=0.8, maximize=True, eps_inside_sqrt=True),
    _case("RMSprop", "rmsprop_centered", alpha=0.9, eps=0.01, weight_decay=0.1, centered=True),
    _case("RMSprop", "rmsprop_centered", alpha=0.9, eps=0.01, centered=True, maximize=True, eps_inside_sqrt=True),
    _case("RMSprop", "rmsprop_centered_momentum", alpha=0.9, eps=0.01, momentum=0.8, centered=True, maximize=True),
    _case("RMSprop", "rmsprop_centered_momentum", **_DECAYED, momentum=0.8, centered=True, eps_inside_sqrt=True),
    _case("Adam", "adam"),
    _case("Adam", "adam", lr=0.01, betas=(0.8, 0.95), eps=0.01, weight_decay=0.1, maximize=True),
    _case("Adam", "adam", lr=0.01, betas=(0.8, 0.95), eps=0.01, weight_decay=0.1, eps_hat=True),
    _case("Adam", "amsgrad", lr=0.01, betas=(0.8, 0.9), eps=0.01, weight_decay=0.1, amsgrad=True),
    _case("Adam", "amsgrad", lr=0.01, betas=(0.8, 0.9), eps=0.01, amsgrad=True, maximize=True, eps_hat=True),
    _case("AdamW", "adamw"),
    _case("AdamW", "adamw", lr=0.01, betas=(0.8, 0.95), eps=0.01, weight_decay=0.1, maximize=True),
    _case("AdamW", "adamw", lr=0.01, betas=(0.8, 0.95), eps=0.01, weight_decay=0.1, eps_hat=True),
    _case("AdamW", "adamw", lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, fully_decoupled=True),
    _case("AdamW", "amsgradw", lr=0.01, betas=(0.8, 0.9), eps=0.01, weight_decay=0.1, amsgrad=True),
    _case("AdamW", "amsgradw", **_FAST, amsgrad=True, maximize=True, eps_hat=True, fully_decoupled=True),
    _case("Adadelta", "adadelta"),
    _case("Adadelta", "adadelta", lr=0.5, rho=0.8, eps=0.01, weight_decay=0.1, maximize=True),
    _case("Adamax", "adamax"),
    _case("Adamax", "adamax", lr=0.01, betas=(0.8, 0.9), eps=0.01, weight_decay=0.1, maximize=True),
    _case("NAdam", "nadam"),
    _case("NAdam", "nadam", lr=0.01, betas=(0.8, 0.95), eps=0.01, weight_decay=0.1, momentum_decay=0.5, maximize=True),
    _case("NAdam", "nadam", lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    _case("RAdam", "radam"),  # rectified from step 6 on
    _case("RAdam", "radam", lr=0.01, betas=(0.8, 0.95), eps=0.01, weight_decay=0.1, maximize=True),
    _case("RAdam", "radam", lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    _case("Rprop", "rprop"),
    _case("Rprop", "rprop", lr=0.05, etas=(0.4, 1.5), step_sizes=(0.01, 0.1), maximize=True),
    _case("ASGD", "asgd"),
    _case("ASGD", "asgd", lr=0.02, lambd=0.1, alpha=0.5, t0=5.0, weight_decay=0.1, maximize=True),
    _case("Lion", "lion"),
    _case("Lion", "lion", lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, maximize=True),
    _case("LARS", "lars", lr=0.1),
    _case("LARS", "lars", lr=0.1, weight_decay=0.1, trust_coefficient=0.02, nesterov=True),
    _case("LARS", "lars", lr=0.01, trust_coefficient=2.0, nesterov=True, lr_in_momentum=False, clip=True),
    _case("LARS", "lars", lr=0.1, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02, eps=0.5, maximize=True),
    _case("LARS", "lars", lr=0.1, weight_decay=0.1, lr_in_momentum=False, adapt=True),
    _case("LARS", "lars", lr=0.01, weight_decay=0.1, adapt=False),
    _case("LARS", "lars", lr=0.1, weight_decay=0.1, trust_coefficient=0.02, clip=True),  # below the limit of 1
    _case("LARS", "lars", lr=0.1, weight_decay=0.1, trust_coefficient=0.02, keep_weight_norms=True),
    _case("LAMB", "lamb"),
    _case("LAMB", "lamb", lr=0.05, betas=(0.8, 0.9), eps=0.01, weight_decay=0.1, maximize=True),
    _case("LAMB", "lamb", lr=0.02, weight_decay=0.1, adapt=True, decay_1d=False, trust_clip=1.5),
    _case("LAMB", "lamb", lr=0.02, betas=(0.8, 0.95), weight_decay=0.1, decay_1d=True, maximize=True),
)

_NOT_IN_TORCH = ("lr_in_momentum", "eps_inside_sqrt", "eps_hat")


def torch_hyper(case: Case) -> dict[str, Any] | None:
    """The arguments with which torch.optim's class of the same name is the same optimizer, or None."""
    if case.optimizer in ("Lion", "LARS", "LAMB") or any(case.hyper.get(name) for name in _NOT_IN_TORCH):
        return None
    hyper = {name: value for name, value in case.hyper.items() if name not in _NOT_IN_TORCH}
    if hyper.pop("fully_decoupled", False):
        # torch multiplies the decay by lr: divided by the first lr, the schedule's multiplier is what is left.
        hyper["weight_decay"] = hyper.get("weight_decay", 1e-2) / hyper.get("lr", 1e-3)
    return {**hyper, "foreach": False}


# One dimension, more, none, and nothing at all; sizes that no vector width divides, and one with many full vectors.
SHAPES: dict[str, tuple[int, ...]] = {"weight": (17, 9), "bias": (9,), "scale": (), "empty": (0, 3), "long": (4, 257)}


def _awkward(large: float, tiny: float) -> npt.NDArray[np.float64]:
    return np.array([0.0, -0.0, tiny, -tiny, large, -large, 1.0])


def parameters(rng: np.random.Generator, shapes: Shapes, dtype: npt.DTypeLike, *, awkward: bool = True) -> Arrays:
    """Normal values; the first half of each array, 49 elements at most, is awkward ones: 0, -0, 1e-30, 1e4, 1 ..."""
    values = _awkward(1e4, 1e-30)
    values = np.repeat(values, len(values))  # `gradients` tiles instead, so that every value meets every other
    return {name: _fill(rng.standard_normal(shape), values, awkward, dtype) for name, shape in shapes.items()}


def gradients(
    rng: np.random.Generator,
    shapes: Shapes,
    dtype: npt.DTypeLike,
    *,
    awkward: bool = True,
    tiny: float = 1e-30,
) -> Arrays:
    """Like `parameters`, the awkward values with a random sign, so that they do not repeat from step to step.

    Rprop multiplies two gradients in torch, and the product of two tiny ones is 0 in float32: give it `tiny=1e-15`.
    """
    large = 1e2 if np.dtype(dtype) == np.float16 else 1e4  # a momentum of 20 steps must stay below 65504
    values = np.tile(_awkward(large, tiny), 7)
    values = values * rng.choice([-1.0, 1.0], size=values.size)
    return {name: _fill(rng.standard_normal(shape), values, awkward, dtype) for name, shape in shapes.items()}


def _fill(
    array: npt.NDArray[np.float64] | float, values: npt.NDArray[np.float64], awkward: bool, dtype: npt.DTypeLike
) -> npt.NDArray[Any]:
    filled = np.array(array, dtype=np.float64)
    if awkward:
        count = min(filled.size // 2, values.size)
        filled.reshape(-1)[:count] = values[:count]
    return filled.astype(dtype)


def problem(
    rng: np.random.Generator,
    shapes: Shapes,
    dtype: npt.DTypeLike,
    steps: int = 1,
    *,
    grad_dtype: npt.DTypeLike | None = None,
    awkward: bool = True,
    tiny: float = 1e-30,
) -> tuple[Arrays, list[Arrays]]:
    """Parameters, and the gradients of `steps` steps; gradients have the dtype of the parameters unless told."""
    kind = dtype if grad_dtype is None else grad_dtype
    params = parameters(rng, shapes, dtype, awkward=awkward)
    return params, [gradients(rng, shapes, kind, awkward=awkward, tiny=tiny) for _ in range(steps)]


RULE_CASES = list({case.rule: case for case in CASES}.values())
"""One per rule, with telling options."""
