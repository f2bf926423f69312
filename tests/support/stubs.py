"""Writes what type checkers and editors read of classes whose constructors are made of the rules' records."""

import inspect
import pathlib

from torch.optim.optimizer import ParamsT

import fastopt
import fastopt.torch

ROOT = pathlib.Path(__file__).parents[2]


def _exports(module):
    return "\n".join(["__all__ = [", *(f'    "{name}",' for name in module.__all__), "]"])


HEAD = "# Written by tests/support/stubs.py from the rules' records, for type checkers and editors.\n"
NUMPY = f"""{HEAD}
from ..base import Optimizer, Params

{_exports(fastopt.optimizers)}
"""
TORCH = f"""{HEAD}
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from ..kernels.rules.rule import Rule
from .base import TensorOptimizer

{_exports(fastopt.torch.optimizers)}

def optimizer(rule: Rule) -> type[Any]: ...
"""


def _type(annotation):
    names = [name for name, of in (("Params", fastopt.base.Params), ("ParamsT", ParamsT)) if annotation == of]
    return names[0] if names else inspect.formatannotation(annotation)


def _class(cls, bases):
    signature = inspect.signature(cls.__init__)
    parameters = [*signature.parameters.values()][1:]
    lines = [f"{p.name}: {_type(p.annotation)}" + f" = {p.default!r}" * (p.default is not p.empty) for p in parameters]
    lines.insert(sum(p.kind is not p.KEYWORD_ONLY for p in parameters), "*")
    methods = [name for name, x in vars(cls).items() if inspect.isfunction(x) and not hasattr(cls.__mro__[1], name)]
    body = [f"class {cls.__name__}({bases}):", "    def __init__(", "        self,"]
    body += [f"        {line}," for line in lines] + ["    ) -> None: ..."]
    return "\n".join([*body, *(f"    def {name}(self) -> None: ..." for name in methods)])


def _classes(module, base):
    found = [getattr(module, name) for name in module.__all__]
    return [c for c in found if isinstance(c, type) and issubclass(c, base) and c is not base]


def stubs():
    """Text of each stub by its path."""
    numpy = [_class(c, "Optimizer") for c in _classes(fastopt, fastopt.Optimizer)]
    torchs = []
    for c in _classes(fastopt.torch, fastopt.torch.TensorOptimizer):
        own = c.__bases__[1].__module__ == c.__module__  # not torch's
        torchs.append(_class(c, f"TensorOptimizer, torch.optim.{'Optimizer' if own else c.__name__}"))
    return {
        ROOT / "fastopt/optimizers/__init__.pyi": "\n\n".join([NUMPY.rstrip(), *numpy]) + "\n",
        ROOT / "fastopt/torch/optimizers.pyi": "\n\n".join([TORCH.rstrip(), *torchs]) + "\n",
    }


if __name__ == "__main__":
    for path, text in stubs().items():
        path.write_text(text)
