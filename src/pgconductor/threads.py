"""Threads for plain `def` handlers: started when needed, never more than the limit, none of them keeps the process.

The standard library's executor joins its threads at the interpreter's exit; a handler that hangs would make a worker
unstoppable. These are daemon threads: what a stop's grace time could not end, the end of the process does.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Future[Any], Callable[[], Any]]


class Threads:
    """An executor of our own, sized to the concurrency of a process.

    Args:
        limit: The most threads.
        name: The beginning of their names.
    """

    def __init__(self, limit: int, name: str = "pgconductor") -> None:
        self.limit = limit
        self.name = name
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread_count = 0
        self._idle_count = 0

    def submit(self, fn: Callable[[], T]) -> Future[T]:
        """Run a function in a thread; with all of them busy, it waits for one."""
        future: Future[T] = Future()
        with self._lock:
            if self._idle_count > 0:
                self._idle_count -= 1
            elif self._thread_count < self.limit:
                self._start_thread()
        self._jobs.put((future, fn))
        return future

    @property
    def is_busy(self) -> bool:
        """Whether a function still runs in one of them."""
        with self._lock:
            return self._idle_count < self._thread_count

    def close(self) -> None:
        """Let every thread end after what it is running."""
        for _ in range(self._thread_count):
            self._jobs.put(None)

    def _start_thread(self) -> None:
        self._thread_count += 1
        threading.Thread(target=self._work, name=f"{self.name}-{self._thread_count}", daemon=True).start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            _run(*job)
            del job  # its result must not live until the next one comes
            with self._lock:
                self._idle_count += 1


def _run(future: "Future[Any]", fn: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = fn()
    except BaseException as error:  # noqa: BLE001 (the future carries it to whoever waits)
        future.set_exception(error)
    else:
        future.set_result(result)
