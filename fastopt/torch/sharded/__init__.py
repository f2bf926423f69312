"""A sharded optimizer: each process of a group keeps and updates a part of the parameters."""

from .optimizer import ShardedOptimizer

__all__ = ["ShardedOptimizer"]
