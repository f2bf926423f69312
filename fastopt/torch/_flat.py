"""``flatten=True``: parameters and gradients of a group side by side in flat memory."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.device import Layout
from ._tensors import PLAIN, layout_of, parameter_memory, part_of, shaped_like


class FlatGroup:
    """Tensors of one group, dtype and device, moved into one flat tensor, and their gradients into another.

    Both are laid out as the states will be, so that a step walks all of it in one run.
    """

    def __init__(self, params: Sequence[Tensor], where: str) -> None:
        self.params = list(params)
        memories = [parameter_memory(p, where) for p in params]
        layout = Layout.of({str(i): (m.numel(),) for i, m in enumerate(memories)})
        self._values, self._gradients = (memories[0].new_zeros(layout.total) for _ in range(2))
        self.views = []
        for p, memory, offset in zip(params, memories, layout.offsets, strict=True):
            value, view = (
                shaped_like(p, part_of(flat, offset, offset + memory.numel(), layout_of(memory)))
                for flat in (self._values, self._gradients)
            )
            value.copy_(p.detach())
            if p.grad is not None:
                view.copy_(p.grad)
            p.data = value
            p.grad = view
            self.views.append(view)

    def zero(self) -> None:
        """Set all gradients to zero."""
        self._gradients.zero_()


class FlatGroups:
    """All that was flattened."""

    def __init__(self) -> None:
        self._groups: list[FlatGroup] = []
        self._members: set[int] = set()

    def has(self, parameter: Tensor) -> bool:
        """Whether a parameter was moved."""
        return id(parameter) in self._members

    def add(self, params: Sequence[Tensor], where: str) -> None:
        """Move the tensors of a new group, but for those that are frozen."""
        params = [p for p in params if p.requires_grad]
        strange = [p for p in params if type(p) not in PLAIN or p.untyped_storage().is_shared()]
        if strange:
            raise ValueError(
                f"{where}: flatten=True moves parameters, which cannot be done to a {type(strange[0]).__name__} "
                "that is distributed or shared between processes."
            )
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for p in params:
            alike.setdefault((p.dtype, p.device), []).append(p)
        self._groups += [FlatGroup(members, where) for members in alike.values()]
        self._members.update(map(id, params))

    def gather(self) -> None:
        """Bring gradients that autograd put elsewhere back; without gradient there is zero, unless it was frozen."""
        for group in self._groups:
            grads = [p.grad for p in group.params]
            if all(map(operator.is_, grads, group.views)):
                continue
            for p, grad, view in zip(group.params, grads, group.views, strict=True):
                if grad is not view and (grad is not None or p.requires_grad):
                    if grad is None:
                        view.zero_()
                    else:
                        view.copy_(grad)
                    p.grad = view

    def zero(self) -> None:
        """Set all gradients to zero and keep them where they are; frozen parameters have none."""
        for group in self._groups:
            group.zero()
            for p, view in zip(group.params, group.views, strict=True):
                if not p.requires_grad:
                    p.grad = None
                elif p.grad is not view:
                    p.grad = view
