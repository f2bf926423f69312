"""State dicts of a sharded optimizer: pieces by parameter, under the keys of an optimizer that is not sharded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine.exclusive import exclusive, makes_many
from .layout import Member
from .piece import Piece
from .reducer import Reducer
from .wire import Facts, agree


class Checkpoints(torch.optim.Optimizer):
    """``state``, ``state_dict``, ``load_state_dict`` and ``full_state_dict``."""

    _where: str
    _group: Any
    _inner: Any
    _users: list[object]
    _names: Collection[str]  # of the options of a param group
    _members: list[Member]
    _reducer: Reducer | None
    _is_broken = False  # in the middle of a step, whose results some processes have and others not

    @property  # type: ignore[override]
    def state(self) -> dict[Tensor, Any]:
        """The states of this process's pieces, as plain tensors; parameters that require no gradient may have none."""
        states = {} if self._inner is None else self._inner.state
        return {m.param: states[m.piece] for m in self._members if m.piece in states}

    @state.setter
    def state(self, value: Any) -> None:
        if value:
            raise TypeError(f"{self._where}: state cannot be assigned; use load_state_dict.")

    def _told(self) -> Any:
        """The inner optimizer, with the options of the param groups as they are; refuses where processes differ."""
        if self._is_broken or (self._reducer is not None and self._reducer.is_broken):
            raise RuntimeError(
                f"{self._where}: a step or backward was broken off after it had begun to send, so parameters may "
                "differ between processes. Begin anew from a checkpoint, with new processes or a new process group."
            )
        for group, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update((name, value) for name, value in group.items() if name not in ("params", "param_names"))
        return self._inner

    def _agree(self, facts: Callable[[], Facts], what: str) -> None:
        """Refuse on all processes what one of them refuses. An interrupt leaves messages that nobody takes."""
        self._is_broken = True
        try:
            agree(facts, self._group, f"{self._where}.{what}")
        except Exception:
            self._is_broken = False
            raise
        self._is_broken = False

    @exclusive
    @makes_many
    def state_dict(self) -> dict[str, Any]:
        """The pieces of this process, for torch.distributed.checkpoint: keys are the same on all processes.

        What was saved with it can be loaded by any number of processes, and into the state dict of an optimizer that
        is not sharded; ``load_state_dict`` takes what was loaded. Tensors are copies of one moment. Processes do not
        wait for each other.

        Raises:
            RuntimeError: Another thread uses this optimizer, or it is inside ``swap_ema``.

        Example:
            >>> import tempfile, torch, fastopt.torch
            >>> path = tempfile.mkdtemp()
            >>> torch.distributed.init_process_group("gloo", init_method=f"file://{path}/s", rank=0, world_size=1)
            >>> opt = fastopt.torch.ShardedOptimizer([torch.nn.Parameter(torch.ones(2))], fastopt.torch.AdamW)
            >>> torch.distributed.checkpoint.save(opt.state_dict(), checkpoint_id=path)  # doctest: +ELLIPSIS
            Metadata(...)
            >>> saved = opt.state_dict()
            >>> torch.distributed.checkpoint.load(saved, checkpoint_id=path)
            >>> opt.load_state_dict(saved)
            >>> torch.distributed.destroy_process_group()
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = self._told().state_dict()
        for key, state in saved["state"].items():
            for name, value in state.items():
                if name in self._inner.names.states:
                    member = self._members[key]
                    state[name] = Piece(value.view(-1), member.part, member.view.shape, member.view.stride())
        saved["param_groups"] = self._named(saved["param_groups"])
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved  # type: ignore[no-any-return]

    def _named(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        names = [{k: own[k] for k in ("param_names",) if k in own} for own in self.param_groups]
        return [{**group, **name} for group, name in zip(groups, names, strict=True)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of ``state_dict``, into which torch.distributed.checkpoint may have loaded, or one of
        an optimizer of the class that is not sharded. All processes must call it.

        Raises:
            ValueError: As the class; also for pieces of another number of processes, and where options, counts or the
                names of states are not the same on all processes.
            KeyError: As the class.
            RuntimeError: Another process refused. In all cases nothing was changed on any.
        """
        loaded: dict[str, Any] = {}
        inner, given = self._told(), state_dict

        def own() -> Facts:
            changed = given
            for before in self._optimizer_load_state_dict_pre_hooks.values():
                changed = before(self, changed) or changed
            loaded.update(self._own(changed))
            groups = enumerate(inner._checked_groups(loaded))
            facts = [(f"{n} of group {g}", x) for g, group in groups for n, x in group.items() if n in self._names]
            for i, state in sorted(loaded["state"].items()):
                numbers = {name: None if name in inner.names.states else x for name, x in state.items()}
                facts.append((f"state of parameter {i}", sorted(numbers.items())))
            return facts

        self._agree(own, "load_state_dict")
        inner.load_state_dict(loaded)
        inner.init_state()  # of parameters of which nothing was loaded: keys stay the same on all processes
        for group, own_group in zip(self.param_groups, inner.param_groups, strict=True):
            group.update((name, value) for name, value in own_group.items() if name not in ("params", "param_names"))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _own(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict of this process's pieces, for the inner optimizer."""
        groups = state_dict["param_groups"]
        counts = [len(group["params"]) for group in groups]
        if counts != (expected := [len(group["params"]) for group in self.param_groups]):
            raise ValueError(
                f"{self._where}.load_state_dict: its groups have {counts} parameters, but those of the optimizer "
                f"{expected}."
            )
        keys = [key for group in groups for key in group["params"]]
        states, begin = {}, 0
        for i, key in enumerate(keys):
            state = state_dict["state"].get(key, {})
            if state:
                states[i] = {name: self._cut(i, name, value) for name, value in state.items()}
        own = []
        for group, count in zip(groups, counts, strict=True):
            own.append({**group, "params": list(range(begin, begin + count))})
            own[-1].pop("param_names", None)
            begin += count
        return {**state_dict, "state": states, "param_groups": own}

    def _cut(self, i: int, name: str, value: Any) -> Any:
        """The elements of a state that are here."""
        if name not in self._inner.names.states or not isinstance(value, Tensor):
            return value
        part, whole, shape = self._members[i].part, self._members[i].view, self._members[i].shape
        where = f"{self._where}.load_state_dict: {name} of parameter {i}"
        if value.shape != whole.shape:
            raise ValueError(f"{where} has shape {tuple(value.shape)}, but the parameter has {tuple(whole.shape)}.")
        if isinstance(value, Piece):
            if value.part != part:
                raise ValueError(
                    f"{where} has elements {value.part.lo} to {value.part.hi}, but this process owns {part.lo} to "
                    f"{part.hi}: it is of another process, number of processes or bucket_cap_mb. Save and load it with "
                    "torch.distributed.checkpoint, which brings each process its own."
                )
            return value.local.view(shape)
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        if value.stride() != whole.stride():
            value = torch.empty_strided(whole.shape, whole.stride(), dtype=value.dtype, device=value.device).copy_(
                value
            )
        return value.detach().as_strided(shape, self._members[i].strides, value.storage_offset() + part.lo)

    @exclusive
    def full_state_dict(self, rank: int = 0) -> dict[str, Any]:
        """States and masters in float32 (float64 for parameters of float64), whole, on one process.

        Tensors travel one after the other. All processes must call it.

        Args:
            rank: The process of the group that gets them.

        Returns:
            {"state": {index: {name: tensor}}, "param_groups": [...]}; {} on the other processes.

        Raises:
            RuntimeError: Another thread uses this optimizer, or it is inside ``swap_ema``.
        """
        saved = self._told().full_state_dict()
        me, self._is_broken = self._group.rank(), True
        for i, name in [(i, name) for i, state in sorted(saved["state"].items()) for name in sorted(state)]:
            if name not in self._inner.names.states:
                continue
            value, member = saved["state"][i][name].view(-1), self._members[i]
            if me != rank:
                if member.part.hi:
                    dist.send(value, group=self._group, group_dst=rank)
                continue
            shape, strides = member.view.shape, member.view.stride()
            whole = torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
            flat = whole.as_strided((whole.numel(),), (1,))
            for process in range(self._group.size()):
                lo, hi = member.part_of(process)
                if process == me:
                    flat[lo:hi] = value
                elif hi:
                    dist.recv(flat[lo:hi], group=self._group, group_src=process)
            saved["state"][i][name] = whole
        self._is_broken = False
        if me != rank:
            return {}
        saved["param_groups"] = self._named(saved["param_groups"])
        return saved  # type: ignore[no-any-return]
