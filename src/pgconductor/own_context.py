"""Awaiting a coroutine in context variables of its own, without an asyncio task of its own."""

import time
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class OwnContext(Generic[T]):
    """Await a coroutine in the asyncio task of whoever awaits this, each of its steps in the context given.

    Args:
        coroutine: Has not begun.
        context: Entered for each step, so that what is set in it is seen by the coroutine alone.
        on_suspend: Called once, when the coroutine first waits for something.

    Attributes:
        suspended_at: When it first waited for something, by the monotonic clock; None if it never did.
    """

    __slots__ = ("_context", "_coroutine", "_on_suspend", "suspended_at")

    def __init__(self, coroutine: Coroutine[Any, Any, T], context: Context, on_suspend: Callable[[], None]) -> None:
        self.suspended_at: float | None = None
        self._coroutine = coroutine
        self._context = context
        self._on_suspend = on_suspend

    def __await__(self) -> Generator[Any, Any, T]:
        """Pass on what the coroutine waits for, and to the coroutine what comes of it."""
        step: Callable[[], Any] = partial(self._coroutine.send, None)
        while True:
            try:
                pending = self._context.run(step)
            except StopIteration as done:
                value: T = done.value
                return value
            finally:
                del step  # an error thrown in holds this frame by its traceback: else only the collector frees the run
            if self.suspended_at is None:
                self.suspended_at = time.monotonic()
                self._on_suspend()
            try:
                step = partial(self._coroutine.send, (yield pending))
            except BaseException as error:  # noqa: BLE001 (it is the coroutine's, which may catch it)
                step = partial(self._coroutine.throw, error)
