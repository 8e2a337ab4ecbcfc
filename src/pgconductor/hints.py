"""Hints of a client on one event loop: who has new work, and who waited for what has ended, is named on the channel.

Calls bring their hint along: their commit sends it. That of plain calls which come after a silence names the executions
themselves, and goes out before the disk has the calls, which are then confirmed. All other hints go out behind the
commit, from a transaction of their own. One hint at a time is on its way; a pause follows, and what comes meanwhile is
gathered. A call that will be committed when the pause is over brings along what was gathered for its queue. A lost hint
costs a worker's poll.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Final

from pgconductor.engine import Carried, Engine
from pgconductor.errors import ConductorError
from pgconductor.pool import Pool

BYTES_MAX: Final = 7_900  # Postgres allows 8,000
PAUSE_SECONDS: Final = 0.002  # whoever was hinted is awake by now; the first hint after a silence goes at once
CARRIER_SECONDS_MAX: Final = 0.01
SILENCE_SECONDS: Final = 0.003  # from the end of a plain call; one after it is worth a second round trip: see `carry`


class Hints:
    """The hints of one client.

    Args:
        engine: Builds the query.
        pool: The client's connections.
        spawn: Runs a coroutine in a task that the client waits for when it closes.
    """

    def __init__(self, engine: Engine, pool: Pool, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self._engine = engine
        self._pool = pool
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._time = time.monotonic  # event loops may count in whole milliseconds
        self._queues: set[int] = set()
        self._watchers: set[str] = set()
        self._is_for_all = False
        self._is_on_its_way = False
        self._quiet_until = 0.0
        self._look_at: asyncio.TimerHandle | None = None  # whether to send
        self._carried_until = 0.0  # 0: no call carries one
        self._covered: set[int] = set()
        self._call_seconds = 0.0
        self._called_at = -SILENCE_SECONDS

    def add(
        self, queues: Sequence[int] | None = None, watchers: Sequence[str] | None = None, *, to_all: bool = False
    ) -> None:
        """Name queues with new work, and who waited for what has ended; soon, in the background.

        Args:
            queues: The queues.
            watchers: Who waited.
            to_all: Let every worker look, whatever its queues.
        """
        self._queues.update(queues or ())
        self._covered.difference_update(queues or ())
        self._watchers.update(watchers or ())
        self._is_for_all = self._is_for_all or to_all
        self._go()

    @contextmanager
    def carry(self, *, may_name: bool = False) -> Generator[Carried | None]:
        """Tell calls, which are to be sent within in one statement, which hint to bring along.

        For plain calls after a silence it is "named": the worker begins while the disk is still at work, and the
        caller has one more round trip. Calls that follow each other are sooner done with one, and their worker is
        awake.
        """
        began_at = self._time()
        carries = self._may_carry(began_at)
        if carries:
            self._covered, self._carried_until = set(self._queues), began_at + CARRIER_SECONDS_MAX
        try:
            is_first = may_name and not self.are_gathered and began_at - self._called_at >= SILENCE_SECONDS
            if carries and is_first:
                yield "named"
            else:
                yield "queue" if carries else None
                if may_name:
                    self._call_seconds = self._time() - began_at  # of a call that waits for the disk
        finally:
            if carries:
                self._carried_until = 0.0
                self._unplan()
            self._go()

    def call_ended(self) -> None:
        """Note the end of plain calls with all their round trips; the silence begins."""
        self._called_at = self._time()

    def went_along(self, queues: Sequence[int]) -> None:
        """Know that the commit of the call that carries has named these queues.

        What was gathered while the call was on its way may have been committed after it, and is hinted still.
        """
        self._queues.difference_update(self._covered.intersection(queues))
        if not self.are_gathered:
            self._quiet_until = self._time() + PAUSE_SECONDS

    async def flush(self) -> None:
        """Send what is gathered, without its pause."""
        self._unplan()
        if self.are_gathered and not self._is_on_its_way:
            await self._send()

    def _may_carry(self, now: float) -> bool:
        return not (self._carried_until or self._is_on_its_way) and now + self._call_seconds >= self._quiet_until

    @property
    def are_gathered(self) -> bool:
        """Whether there is any to be sent."""
        return bool(self._queues or self._watchers or self._is_for_all)

    def _go(self) -> None:
        if self._look_at is None:
            self._look()

    def _look(self) -> None:
        """Send what is gathered; where a pause, or a call that may name all of it, is to end first, look again then."""
        self._look_at = None
        if not self.are_gathered or self._is_on_its_way:
            return
        left = max(self._quiet_until, self._carried_until) - self._time()
        if left > 0:
            self._look_at = self._loop.call_later(max(left, 0.001), self._look)
        else:
            self._is_on_its_way = True
            self._spawn(self._send())

    def _unplan(self) -> None:
        if self._look_at is not None:
            self._look_at.cancel()
            self._look_at = None

    async def _send(self) -> None:
        self._is_on_its_way = True
        try:
            for hint in self._take():
                await self._pool.run(self._engine.notify(hint))
        except ConductorError:
            self._take()  # only hints: workers and waiters look for themselves
        finally:
            self._is_on_its_way = False
            self._quiet_until = self._time() + PAUSE_SECONDS
            self._go()

    def _take(self) -> list[str]:
        queues, self._queues = self._queues, set()
        watchers, self._watchers = self._watchers, set()
        to_all, self._is_for_all = self._is_for_all, False
        ready = ["ready"] if to_all else texts("ready", map(str, sorted(queues)))
        return [*ready, *texts("told", sorted(watchers))]


def texts(word: str, names: Iterable[str]) -> list[str]:
    """Write names behind a word, in as few texts as the server's limit allows."""
    hints: list[str] = []
    for name in names:
        if hints and len(hints[-1]) + 1 + len(name) <= BYTES_MAX:
            hints[-1] += f" {name}"
        else:
            hints.append(f"{word} {name}")
    return hints
