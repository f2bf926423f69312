"""What contenders have in common whose optimizers have only some of torch's options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..case import Case
from .base import Contender


class Limited(Contender):
    """A contender that names the options of each of its optimizers, with torch's names and torch's meaning."""

    known: ClassVar[Mapping[str, tuple[str, ...]]]
    optimizers = None  # `known` says it, also for those that inherit from torch's contender

    @classmethod
    def refusal(cls, case: Case) -> str | None:  # noqa: D102
        if case.optimizer not in cls.known:
            return f"has no {case.optimizer}"
        # An option that is False, 0 or None says in torch that something is left out.
        unknown = [name for name, value in case.hyper.items() if value and name not in cls.known[case.optimizer]]
        if unknown:
            return f"its {case.optimizer} has no {', '.join(unknown)} as torch's"
        return super().refusal(case)

    @classmethod
    def hyper(cls, case: Case) -> dict[str, Any]:
        """The case's options that it knows; the others leave something out."""
        return {name: value for name, value in case.hyper.items() if name in cls.known[case.optimizer]}
