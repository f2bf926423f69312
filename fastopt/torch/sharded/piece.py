"""The part of a state that one process holds, as torch.distributed.checkpoint saves and loads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .layout import Part

aten = torch.ops.aten


class Piece(Tensor):
    """A tensor of which this process holds a run of elements, in their order in memory.

    It has the shape of the whole. torch.distributed.checkpoint takes it for a few boxes of a tensor of that shape, so
    that any number of processes, or one optimizer that is not sharded, can load what was saved. It can be copied, moved
    and pickled; the elements are in ``local``.

    Attributes:
        local: The elements, of one dimension.
        part: Which of all they are.
    """

    local: Tensor
    part: Part

    @staticmethod
    def __new__(cls, local: Tensor, part: tuple[int, ...], shape: Sequence[int], strides: Sequence[int]) -> Piece:
        """A piece of a tensor of this shape and these strides."""
        piece: Piece = Tensor._make_wrapper_subclass(
            cls, torch.Size(shape), strides=strides, dtype=local.dtype, device=local.device
        )
        piece.local, piece.part = local, Part(*part)
        return piece

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func not in COPIES:
            raise NotImplementedError(
                f"{func} of a {cls.__name__}: this process has only some of its elements. "
                "Use its .local, or the optimizer's full_state_dict()."
            )
        target = args[0]
        if func is aten.new_empty.default:  # how asynchronous saving begins a copy
            func, args = aten.empty_like.default, args[:1]
        if func is aten.copy_.default and not (type(target) is type(args[1]) is cls and args[1].part == target.part):
            raise ValueError("A Piece can be copied only into one of the same elements.")
        kwargs = {k: v for k, v in (kwargs or {}).items() if k != "memory_format"}
        local = func(*(x.local if type(x) is cls else x for x in args), **kwargs)
        return target if local is target.local else cls(local, target.part, target.shape, target.stride())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Piece, (self.local, tuple(self.part), tuple(self.shape), tuple(self.stride()))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Piece({self.local}, elements {self.part[0]} to {self.part[1]} of shape {tuple(self.shape)})"

    # --- torch.distributed.checkpoint ----------------------------------------------------------------------------

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s, _ in self._boxes()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        chunks = [TensorWriteData(chunk, properties, self.shape) for chunk in self.__create_chunk_list__()]
        return [
            WriteItem(MetadataIndex(name, data.chunk.offsets), WriteItemType.SHARD, tensor_data=data) for data in chunks
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for offsets, _, view in self._boxes() if torch.Size(offsets) == index.offset)

    def _boxes(self) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """Boxes that make up the elements: where each begins, its sizes, and the elements in it."""
        strides = self.stride()
        order = sorted(range(self.dim()), key=lambda d: -strides[d])  # dimensions as they lie in memory
        done = 0
        for offsets, sizes in boxes([self.shape[d] for d in order], *self.part):
            count, back = math.prod(sizes), [order.index(d) for d in range(self.dim())]
            view = self.local[done : done + count].view(sizes).permute(back)
            done += count
            yield [offsets[k] for k in back], [sizes[k] for k in back], view


COPIES: set[Callable[..., Any]] = {
    *(aten.clone.default, aten.detach.default, aten._to_copy.default, aten.copy_.default),
    *(aten.empty_like.default, aten.new_empty.default, aten.alias.default),
}
"""What can be done to it."""


def boxes(shape: Sequence[int], lo: int, hi: int) -> Iterator[tuple[list[int], list[int]]]:
    """Boxes of an array that make up its elements lo to hi - 1 in the order of memory: offsets and sizes."""
    if lo == hi:
        return
    if not shape:
        yield [], []
        return
    row = math.prod(shape[1:])
    first, last = -(-lo // row), hi // row  # whole rows
    if first > last:  # within one row
        first = last = lo // row
        yield from (([first, *o], [1, *s]) for o, s in boxes(shape[1:], lo - first * row, hi - first * row))
        return
    if lo < first * row:
        at = first - 1
        yield from (([at, *o], [1, *s]) for o, s in boxes(shape[1:], lo - at * row, row))
    if first < last:
        yield [first, *[0] * (len(shape) - 1)], [last - first, *shape[1:]]
    if last * row < hi:
        yield from (([last, *o], [1, *s]) for o, s in boxes(shape[1:], 0, hi - last * row))


torch.serialization.add_safe_globals([Piece])
