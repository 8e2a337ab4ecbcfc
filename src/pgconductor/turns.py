"""The order in which the asyncio tasks of one run are given what earlier runs have recorded.

A handler that runs several tasks may decide by which of them comes first: under `asyncio.wait`, by what a `gather`
raises, by a list that they append to. When it runs again, all answers are there at once, and given in the order of the
code they would tell it another story than the first time. So a task that asks for an answer waits until all that was
recorded before has been given, and whoever waits for such a task has had some passes of the loop to go on.

What was recorded before and is not asked for, since the code has changed, or a task waits for something else than its
context, is waited for a little longer, and then passed over. It is given at once if it is asked for later.

What is no answer has no turn: the start of a child, and what is recorded under a number and not a name.
"""

import asyncio
from collections import deque
from typing import Any, Final, cast

from pgconductor.journal import Journal

PASSES_BETWEEN: Final = 8
"""How many passes of the loop are between two answers. A task that fails in a `TaskGroup` is heard of after six."""
PASSES_PATIENT: Final = 32
"""How many an answer that is not asked for holds up those behind it."""
_NO_ANSWERS: Final = ("start", "call")


class Turns:
    """Who waits for the turn of an answer.

    Args:
        journal: Of the run; it has begun, so some answers may have been given already.
        loop: That of the run's tasks.
    """

    __slots__ = ("_is_due", "_journal", "_loop", "_order", "_quiet", "_to_come", "_waiting")

    def __init__(self, journal: Journal, loop: asyncio.AbstractEventLoop) -> None:
        self._journal = journal
        self._loop = loop
        self._order = deque(name for name, memo in journal.unvisited.items() if memo.kind not in _NO_ANSWERS)
        self._to_come = set(self._order)
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._quiet = 0
        self._is_due = False

    def __len__(self) -> int:
        return len(self._waiting)

    async def wait(self, name: str) -> None:
        """Return when it is the turn of an operation; at once if it has none."""
        if name not in self._to_come or name in self._waiting:
            return
        self._quiet = 0
        self._come_again()
        self._waiting[name] = future = self._loop.create_future()
        self._journal.asked[name] = "waits"
        try:
            await future
        except asyncio.CancelledError:
            self._journal.asked[name] = "left"
            self._journal.late_tasks.append(cast("asyncio.Task[Any]", asyncio.current_task()))  # heard of by `go_on`
            raise
        finally:
            self._waiting.pop(name, None)

    def end(self) -> None:
        """End what still waits: the run is over."""
        for future in tuple(self._waiting.values()):
            future.cancel()

    def _give(self) -> None:
        """Look in each pass of the loop whether it is somebody's turn, as long as somebody waits."""
        self._quiet += 1
        name = self._next() if self._quiet >= PASSES_BETWEEN else None
        if name is not None:
            self._quiet = 0
            future = self._waiting.pop(name)
            if not future.done():  # its task may just have been cancelled
                future.set_result(None)
        self._is_due = False
        if self._waiting:
            self._come_again()

    def _come_again(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._give)

    def _next(self) -> str | None:
        order, waiting, unvisited = self._order, self._waiting, self._journal.unvisited
        while order and waiting:
            name = order[0]
            if name in unvisited and name not in waiting and self._quiet < PASSES_PATIENT:
                return None
            self._to_come.discard(order.popleft())
            if name in waiting:
                return name
        return None
