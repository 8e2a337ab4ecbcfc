"""Threads for plain `def` handlers: started when needed, never more than the limit, none of them keeps the process.

The standard library's executor joins its threads at the interpreter's exit; a handler that hangs would make a worker
unstoppable. These are daemon threads: what a stop's grace time could not end, the end of the process does.

No thread can be made to end. A function whose future is cancelled while it runs keeps its thread, and the limit is one
higher until it returns: what hangs for good takes memory, but no place of what comes after it.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class _Promise(Future[T]):
    """What a function is going to return. To cancel it while the function runs gives up the thread."""

    def __init__(self, give_up: "Callable[[_Promise[Any]], None]") -> None:
        super().__init__()
        self.is_over = False
        self.is_given_up = False
        self._give_up = give_up

    def cancel(self) -> bool:
        """Cancel what has not begun."""
        is_cancelled = super().cancel()
        if not is_cancelled:
            self._give_up(self)
        return is_cancelled


_Job = tuple[_Promise[Any], Callable[[], Any]]


class Threads:
    """An executor of our own, sized to the concurrency of a process.

    Args:
        limit: The most threads, besides those that are given up.
        name: The beginning of their names.
    """

    def __init__(self, limit: int, name: str = "pgconductor") -> None:
        self.limit = limit
        self.name = name
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread_count = 0
        self._open_count = 0  # functions that wait or run
        self._given_up_count = 0

    def submit(self, fn: Callable[[], T]) -> Future[T]:
        """Run a function in a thread; with all of them busy, it waits for one."""
        promise: _Promise[T] = _Promise(self._give_up)
        with self._lock:
            self._open_count += 1
            self._start_if_needed()
        self._jobs.put((promise, fn))
        return promise

    @property
    def is_busy(self) -> bool:
        """Whether a function still runs in one of them."""
        return self._open_count > 0

    def close(self) -> None:
        """Let every thread end after what it is running."""
        for _ in range(self._thread_count):
            self._jobs.put(None)

    def _start_if_needed(self) -> None:
        """Start a thread if there is one too few for what is open. The lock is held."""
        if self._thread_count < min(self._open_count, self.limit + self._given_up_count):
            self._thread_count += 1
            threading.Thread(target=self._work, name=f"{self.name}-{self._thread_count}", daemon=True).start()

    def _give_up(self, promise: _Promise[Any]) -> None:
        with self._lock:
            if promise.is_over or promise.is_given_up:
                return
            promise.is_given_up = True
            self._given_up_count += 1
            self._start_if_needed()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            tell = _run(*job)
            is_surplus = self._end(job[0])
            tell()
            del job, tell  # the result must not live until the next one comes
            if is_surplus:
                return

    def _end(self, promise: _Promise[Any]) -> bool:
        """Count a function off, before anybody hears what it returned; tell whether its thread is one too many."""
        with self._lock:
            promise.is_over = True
            self._open_count -= 1
            self._given_up_count -= promise.is_given_up
            is_surplus = self._thread_count > self.limit + self._given_up_count
            self._thread_count -= is_surplus
            return is_surplus


def _run(promise: _Promise[Any], fn: Callable[[], Any]) -> Callable[[], object]:
    """Call a function; return what tells the outcome."""
    if not promise.set_running_or_notify_cancel():
        return lambda: None
    try:
        result = fn()
    except BaseException as error:  # noqa: BLE001 (the future carries it to whoever waits)
        return partial(promise.set_exception, error)
    return partial(promise.set_result, result)
