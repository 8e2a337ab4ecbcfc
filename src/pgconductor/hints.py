"""Hints of a client on one event loop: who has new work, and who waited for what has ended, is named on the channel.

A plain call that comes alone brings its hint along: its commit sends it. All other hints go out behind the commit, from
a transaction of its own. One hint at a time is on its way; a pause follows, and what comes meanwhile is gathered. A
call that will be committed when the pause is over brings along what was gathered for its queue. A lost hint costs a
worker's poll.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, Final

from pgconductor.engine import Engine
from pgconductor.errors import ConductorError
from pgconductor.pool import Pool

BYTES_MAX: Final = 7_900  # Postgres allows 8,000
PAUSE_SECONDS: Final = 0.002  # whoever was hinted is awake by now; the first hint after a silence goes at once


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
        self._time = asyncio.get_running_loop().time
        self._queues: set[int] = set()
        self._watchers: set[str] = set()
        self._is_for_all = False
        self._is_sending = False  # or pausing
        self._quiet_until = 0.0
        self._carrier_count = 0
        self._call_seconds = 0.0

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
        self._watchers.update(watchers or ())
        self._is_for_all = self._is_for_all or to_all
        self._go()

    @contextmanager
    def carrier(self) -> Generator[bool]:
        """Tell a call whether it is to bring its hint along; it is to be sent within."""
        began_at = self._time()
        carries = self._may_carry(began_at)
        self._carrier_count += carries
        try:
            yield carries
            self._call_seconds = self._time() - began_at
        finally:
            self._carrier_count -= carries
            self._go()

    def went_along(self, queues: Sequence[int]) -> None:
        """Know that the commit of a call has named these queues."""
        self._queues.difference_update(queues)
        self._quiet_until = self._time() + PAUSE_SECONDS
        if not self._is_sending:
            self._is_sending = True
            self._spawn(self._send(is_quiet=True))

    def _may_carry(self, now: float) -> bool:
        if self._carrier_count:
            return False
        return not self._is_sending or now + self._call_seconds >= self._quiet_until > 0

    @property
    def _has_any(self) -> bool:
        return bool(self._queues or self._watchers or self._is_for_all)

    def _go(self) -> None:
        if self._has_any and not self._is_sending and not self._carrier_count:
            self._is_sending = True
            self._spawn(self._send())

    async def _send(self, *, is_quiet: bool = False) -> None:
        try:
            if is_quiet:
                await self._pause()
            while self._has_any and not self._carrier_count:
                self._quiet_until = 0.0
                for hint in self._take():
                    await self._pool.run(self._engine.notify(hint))
                self._quiet_until = self._time() + PAUSE_SECONDS
                await self._pause()
        except ConductorError:
            self._take()  # only hints: workers and waiters look for themselves
        finally:
            self._is_sending = False

    async def _pause(self) -> None:
        while (left := self._quiet_until - self._time()) > 0:  # noqa: ASYNC110 (a call may make it longer)
            await asyncio.sleep(max(left, 0.001))  # loops count in milliseconds

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
