"""One user at a time: two steps at once would be a race over the user's parameters."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


class _Swap:
    """Uses an object while its parameters hold their averages."""


def exclusive(method: Method) -> Method:
    """A method that raises RuntimeError while another call of such a method of the same object is going on.

    That may be one in another thread, or one that a signal handler interrupts. The object has a list ``_users``.

    It is no lock, because a lock can stay locked: Python raises KeyboardInterrupt after any call, also after the lock
    was taken and before a block is entered that gives it back. ``with lock`` has such a place in Python 3.14, and every
    context manager that is written in Python has several. Here both ends are one call into C, the first of them inside
    the block: what is interrupted after it goes through ``remove``, and what is interrupted before it, as Python 3.10
    can be inside the block, did nothing and has nothing to remove.
    """
    name = method.__name__.lstrip("_")

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        users, me = self._users, object()
        try:
            users.append(me)
            if users[0] is not me:
                raise _refusal(self, name)
            return method(self, *args, **kwargs)
        finally:
            if me in users:
                users.remove(me)

    return alone  # type: ignore[return-value]


def _refusal(used: Any, name: str) -> RuntimeError:
    why = "another thread is using this optimizer."
    if used._users and isinstance(used._users[0], _Swap):
        why = "the parameters hold their averages; call it after the block of swap_ema, which puts them back."
    return RuntimeError(f"{type(used).__name__}.{name}: {why}")


@contextlib.contextmanager
def swapping(
    optimizer: Any,
    pairs: Callable[[], Iterable[tuple[Any, Any]]],
    copy: Callable[[Any], Any],
    assign: Callable[[Any, Any], None],
) -> Iterator[None]:
    """A block in which arrays hold the values of others, and in which all exclusive methods of the optimizer refuse.

    Args:
        optimizer: It has a list ``_users``.
        pairs: Lists the arrays, each with the one whose values it is to hold.
        copy: Returns a copy of an array.
        assign: Writes values, its second argument, into an array.
    """
    users, me = optimizer._users, _Swap()
    kept: list[tuple[Any, Any]] = []

    def put_back() -> None:
        for array, values in kept:
            assign(array, values)

    try:
        users.append(me)
        if users[0] is not me:
            raise _refusal(optimizer, "swap_ema")
        for array, average in pairs():
            kept.append((array, copy(array)))
            assign(array, average)
        yield
    finally:
        try:
            finish(put_back)
        finally:
            if me in users:
                users.remove(me)


def finish(action: Callable[[], None]) -> None:
    """Run what must not be left half done: if it is interrupted, it is run again from the start, before that is raised.

    The action must do the same each time. A second interrupt, during the second run, tears it.
    """
    try:
        action()
    except BaseException:
        action()
        raise


def makes_many(function: Method) -> Method:
    """A function that makes objects for each of perhaps 100,000 arrays, all of which stay.

    The garbage collector would look at them again and again, in vain: a third of the time of a first step. It waits.
    """

    @functools.wraps(function)
    def without_collector(*args: Any, **kwargs: Any) -> Any:
        enabled = gc.isenabled()
        try:
            gc.disable()
            return function(*args, **kwargs)
        finally:
            if enabled:
                gc.enable()

    return without_collector  # type: ignore[return-value]
