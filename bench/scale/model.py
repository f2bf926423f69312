"""A model of a step: messages cost a latency each and a time per byte, the kernel moves bytes at the memory's speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..results import Timing

FLOAT = 4
PASS = 28
"""Bytes that AdamW moves for a float32 parameter: it reads p, g, m, v and writes p, m, v."""


def share(n: int) -> float:
    """Of what all processes hold, the part that others have."""
    return (n - 1) / n


def pipeline(update: float, wire: float, buckets: int) -> float:
    """Seconds of updating all buckets and sending each while the next is updated, when the two do not slow another."""
    return (update + wire) / buckets + (buckets - 1) / buckets * max(update, wire)


# --- this machine ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a contender does, in units of the parameters' bytes.

    Attributes:
        exchanges: How often a process receives what the others have of all parameters.
        sharded: Whether a process updates its part only.
        backward: Whether gradients go to memory that is new in each step.
        fresh: How much memory more it fills anew.
        passes: How much it reads and writes, beside that and the update: copies into buckets, sums.
    """

    exchanges: int = 0
    sharded: bool = True
    backward: bool = False
    fresh: float = 0.0
    passes: float = 0.0


COPIED = 4.0
"""Passes of DDP: each gradient goes through memory that is used again at once into a bucket."""

PLANS = {
    "ShardedOptimizer": Plan(1),
    "ZeroRedundancyOptimizer": Plan(1),
    "ZeroRedundancyOptimizer, bucket views": Plan(1),
    "fused AdamW, not sharded": Plan(0, sharded=False),
    # Buckets and what comes in are new in each step; each process adds up its slices of all.
    "ShardedOptimizer(reduce_gradients=True)": Plan(2, backward=True, fresh=2.0, passes=3.0),
    "DDP + ShardedOptimizer": Plan(3, passes=COPIED),
    "DDP + ZeroRedundancyOptimizer": Plan(3, passes=COPIED),
    "DDP + fused AdamW": Plan(2, sharded=False, passes=COPIED),
    "FSDP2 + fused AdamW": Plan(2, backward=True, fresh=2.0, passes=2.0),
}


@dataclass(frozen=True)
class Machine:
    """What was calibrated with so many processes at once.

    Attributes:
        processes: How many.
        cores: Of the machine.
        kernel: Bytes that the update moves in a second, of one process.
        latency: Seconds of an exchange of nothing.
        per_byte: Seconds for each byte that a process receives, while it sends as much.
        backward: Seconds for all gradients, in new memory.
        fresh: Seconds for each byte of new memory that is written.
    """

    processes: int
    cores: int
    kernel: float
    latency: float
    per_byte: float
    backward: float
    fresh: float

    @classmethod
    def calibrated(cls, processes: int, cores: int, found: Mapping[str, Any]) -> Machine:
        """From the samples of the measurements, which tell how many bytes each moved."""
        seconds = {name: Timing(entry["samples"]).median for name, entry in found.items() if "moved" in entry}
        moved = {name: entry["moved"] for name, entry in found.items() if "moved" in entry}
        exchanges = [name for name in seconds if name.startswith("exchange")]
        latency, per_byte = line([moved[name] for name in exchanges], [seconds[name] for name in exchanges])
        return cls(
            *(processes, cores, moved["kernel alone"] / seconds["kernel alone"], latency, per_byte),
            *(seconds["backward alone"], seconds["fresh memory"] / moved["fresh memory"]),
        )

    def wire(self, plan: Plan, nbytes: int) -> float:
        """Bytes that each process receives in a step."""
        return plan.exchanges * share(self.processes) * nbytes

    def step(self, plan: Plan, nbytes: int) -> float:
        """Seconds of a step on float32 parameters of so many bytes."""
        part = self.processes if plan.sharded else 1
        update = nbytes / FLOAT / part * PASS / self.kernel
        wire = self.wire(plan, nbytes) * self.per_byte + plan.exchanges * self.latency
        rest = plan.backward * self.backward + nbytes * (plan.fresh * self.fresh + plan.passes / self.kernel)
        # Sending is work of a core, too: it goes on beside the update where each process has two.
        return rest + (max(update, wire) if self.cores >= 2 * self.processes else update + wire)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Start and slope, neither negative, with the least squares of relative errors."""
    if not any(x):
        return 0.0, 0.0
    a, b = np.array(x, float), np.array(y, float)
    (start, slope), *_ = np.linalg.lstsq(np.stack([1 / b, a / b], 1), np.ones(len(b)), rcond=None)
    return (float(start), float(slope)) if start >= 0 else (0.0, float((a / b).sum() / (a * a / b / b).sum()))


# --- stated networks -------------------------------------------------------------------------------------------------

NODE = 8
"""Ranks of a node."""


@dataclass(frozen=True)
class Link:
    """Seconds until a message arrives, seconds of the sender for each, bytes per second."""

    latency: float
    overhead: float
    rate: float


@dataclass(frozen=True)
class Network:
    """Nodes of eight ranks: a link for each rank inside, and one for each node between them."""

    name: str
    inside: Link
    between: Link

    def ring(self, ranks: int, nbytes: float) -> float:
        """Seconds of an all-gather of so many bytes in all: each rank passes on what it got; one crosses per node."""
        link = self._slowest(ranks, 1)
        return (ranks - 1) * (link.latency + link.overhead + nbytes / ranks / link.rate)

    def direct(self, ranks: int, nbytes: float) -> float:
        """The same when each rank sends its part to each other one: a node's link carries it eight times."""
        slice_, near = nbytes / ranks, min(ranks, NODE)
        inside = self.inside.latency + (near - 1) * max(self.inside.overhead, slice_ / self.inside.rate)
        far = ranks - near
        between = self.between.latency + far * max(self.between.overhead, NODE * slice_ / self.between.rate)
        return max(inside, between) if far else inside

    def two_level(self, ranks: int, nbytes: float) -> float:
        """The same in eight rings between nodes, of the ranks with the same place, and then inside of nodes."""
        nodes, near = max(1, ranks // NODE), min(ranks, NODE)
        link = self._slowest(ranks, NODE)
        across = (nodes - 1) * (link.latency + link.overhead + nbytes / ranks / link.rate)
        inside = (near - 1) * (self.inside.latency + self.inside.overhead + nbytes / near / self.inside.rate)
        return across + inside

    def gather(self, ranks: int, nbytes: float) -> float:
        """The same by the fastest way; a reduce-scatter takes as long."""
        return min(way(ranks, nbytes) for way in (self.ring, self.direct, self.two_level))

    def _slowest(self, ranks: int, sharing: int) -> Link:
        if ranks <= NODE:
            return self.inside
        rate = min(self.inside.rate, self.between.rate / sharing)
        return Link(self.between.latency, self.between.overhead, rate)


NETWORKS = (
    Network("100 Gb/s Ethernet per node", Link(5e-6, 1e-6, 25e9), Link(30e-6, 5e-6, 12.5e9)),
    Network("400 Gb/s InfiniBand per node", Link(3e-6, 1e-6, 200e9), Link(5e-6, 1e-6, 50e9)),
    Network("400 Gb/s InfiniBand per rank", Link(3e-6, 1e-6, 200e9), Link(5e-6, 1e-6, 400e9)),
)
RANKS = tuple(2**k for k in range(3, 13))


@dataclass(frozen=True)
class Training:
    """A model on accelerators: 16-bit parameters and gradients, float32 masters and states of AdamW.

    Attributes:
        parameters: How many.
        tokens: Of a step on one rank.
        flops: Per second that backward reaches.
        memory: Bytes per second that the update reaches.
        bucket: Bytes of a bucket.
        layer: Bytes of the largest layer, which FSDP2 has whole.
    """

    parameters: float = 8.03e9
    tokens: float = 8192
    flops: float = 400e12
    memory: float = 2.7e12
    bucket: float = 25 * 2**20
    layer: float = 128256 * 4096 * 2

    @property
    def nbytes(self) -> float:
        """Of the parameters, and of the gradients."""
        return 2 * self.parameters

    @property
    def backward(self) -> float:
        """Seconds: four operations for each parameter and token."""
        return 4 * self.parameters * self.tokens / self.flops

    def update(self, ranks: int) -> float:
        """Seconds: the masters' pass reads g, w, m, v and writes w, m, v and the 16-bit parameter."""
        return 28 * self.parameters / ranks / self.memory

    def times(self, network: Network, ranks: int, bucket: float | None = None) -> dict[str, float]:
        """Seconds of the parts of a step of ZeRO-2, those of communication without what is hidden.

        Returns:
            "update"; "gather": what the step takes longer for it; "reduction": what comes after backward; "hidden
            gather" and "hidden reduction".
        """
        buckets = math.ceil(self.nbytes / (bucket or self.bucket))
        whole = buckets * network.gather(ranks, self.nbytes / buckets)
        update = self.update(ranks)
        exposed = pipeline(update, whole, buckets) - update
        late = pipeline(self.backward, whole, buckets) - self.backward
        return {
            "update": update,
            "gather": exposed,
            "reduction": late,
            "hidden gather": whole - exposed,
            "hidden reduction": whole - late,
        }

    def memory_per_rank(self, ranks: int) -> dict[str, float]:
        """Bytes of parameters, gradients, masters and states by the way of sharding."""
        states = 12 * self.parameters
        return {
            "DDP": 2 * self.nbytes + states,
            "DDP + ShardedOptimizer": 2 * self.nbytes + states / ranks,
            "FSDP2": (2 * self.nbytes + states) / ranks + 2 * self.layer,
        }
