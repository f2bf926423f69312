"""Everything that is measured against each other, by name. Names that begin with fastopt are ours."""

from __future__ import annotations

from .base import Contender
from .bitsandbytes_cpu import BitsAndBytes
from .deepspeed_cpu import DeepSpeed
from .fastopt_core import (
    Fastopt,
    FastoptAdamW,
    FastoptArrays,
    FastoptKeep,
    FastoptMomentum,
    FastoptMoving,
    FastoptPlain,
)
from .numba_loop import NumbaLoop
from .optax_jit import Optax
from .optimi_torch import Optimi
from .plain import Plain
from .stream import Stream
from .torch_compile import TorchCompile
from .torch_optim import (
    Front,
    FrontAmp,
    FrontFlat,
    FrontMoving,
    TorchForeach,
    TorchFused,
    TorchFusedAmp,
    TorchFusedMoving,
    TorchLoop,
)

CONTENDERS: dict[str, type[Contender]] = {
    "fastopt": Fastopt,
    "fastopt arrays": FastoptArrays,
    "fastopt moving": FastoptMoving,
    "fastopt plain": FastoptPlain,
    "fastopt keep": FastoptKeep,
    "fastopt momentum": FastoptMomentum,
    "fastopt adamw": FastoptAdamW,
    "fastopt.torch": Front,
    "fastopt.torch moving": FrontMoving,
    "fastopt.torch flat": FrontFlat,
    "fastopt.torch amp": FrontAmp,
    "torch fused": TorchFused,
    "torch foreach": TorchForeach,
    "torch loop": TorchLoop,
    "torch compile": TorchCompile,
    "torch fused moving": TorchFusedMoving,
    "torch fused amp": TorchFusedAmp,
    "optax": Optax,
    "deepspeed": DeepSpeed,
    "optimi": Optimi,
    "bitsandbytes": BitsAndBytes,
    "numba": NumbaLoop,
    "numpy": Plain,
    "stream": Stream,
}
