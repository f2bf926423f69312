"""One user at a time: two steps at once would be a race over the user's parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def exclusive(method: Method) -> Method:
    """A method that raises RuntimeError while another call of such a method of the same object is going on.

    That may be one in another thread, or one that a signal handler interrupts. The object has a list ``_users``.

    It is no lock, because a lock can stay locked: Python raises KeyboardInterrupt after any call, also after the lock
    was taken and before a block is entered that gives it back. ``with lock`` has such a place in Python 3.14, and every
    context manager that is written in Python has several. Here both ends are one call into C, the first of them inside
    the block: what is interrupted before that did nothing, and what is interrupted after it goes through ``remove``.
    """
    name = method.__name__.lstrip("_")

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        users, me = self._users, object()
        try:
            users.append(me)
            if users[0] is not me:
                raise RuntimeError(f"{type(self).__name__}.{name}: another thread is using this optimizer.")
            return method(self, *args, **kwargs)
        finally:
            users.remove(me)

    return alone  # type: ignore[return-value]


def finish(action: Callable[[], None]) -> None:
    """Run what must not be left half done: if it is interrupted, it is run again from the start, before that is raised.

    The action must do the same each time. A second interrupt, during the second run, tears it.
    """
    try:
        action()
    except BaseException:
        action()
        raise
