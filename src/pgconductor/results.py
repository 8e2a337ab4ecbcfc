"""Waiting for ends: one listener and one question for all who wait on an event loop.

Whoever waits registers a watch row; whoever ends the execution removes the row and sends `told <watcher> ...` on the
channel named like the schema. The hint says that something ended, not what: all that is waited for is then asked
about in one query. A hint may be lost, and through a pooler none comes at all; so the same question is also asked by
the clock, after 1 second, then ever more slowly, at most every 5 seconds.

The listening connection is opened by the first wait that does not find its execution ended, and kept.
"""

import asyncio
import secrets
from typing import Final

from pgconductor.engine import Ended, Engine
from pgconductor.errors import ConductorError
from pgconductor.notify import Listener
from pgconductor.pool import Pool

POLL_SECONDS_FIRST: Final = 1.0
POLL_SECONDS_MAX: Final = 5.0
IDS_PER_QUERY_MAX: Final = 1_000


class _Watched:
    """One execution that is waited for, by how many, and its end."""

    def __init__(self) -> None:
        self.end: asyncio.Future[Ended] = asyncio.get_running_loop().create_future()
        self.waiter_count = 0


class Results:
    """Everyone on one event loop who waits for an execution to end.

    Args:
        engine: Builds the queries.
        pool: Runs them, and opens the listener's connection.
    """

    def __init__(self, engine: Engine, pool: Pool) -> None:
        self.watcher = secrets.token_hex(8)
        self._engine = engine
        self._pool = pool
        self._waiting: dict[str, _Watched] = {}
        self._fresh: set[str] = set()
        self._told = False
        self._stirred = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._listener: Listener | None = None

    async def wait(self, execution_id: str) -> Ended:
        """Return how an execution ended, once it has; `outcome` None where it does not exist.

        Raises:
            ServerError: The server cannot be asked. The execution goes on.
        """
        watched = self._waiting.get(execution_id)
        if watched is None:
            watched = self._waiting[execution_id] = _Watched()
            self._fresh.add(execution_id)
            self._stirred.set()
        watched.waiter_count += 1
        self._start()
        try:
            return await asyncio.shield(watched.end)
        finally:
            self._leave(execution_id, watched)

    async def close(self) -> None:
        """Stop listening. Those who still wait are told that the client was closed."""
        task, self._task = self._task, None
        listener, self._listener = self._listener, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if listener is not None:
            await listener.stop()
        self._fail(ConductorError("the conductor was closed while a result was waited for; the execution goes on"))

    def _leave(self, execution_id: str, watched: "_Watched") -> None:
        watched.waiter_count -= 1
        if watched.waiter_count == 0 and self._waiting.get(execution_id) is watched:
            del self._waiting[execution_id]
            self._fresh.discard(execution_id)

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer(), name="pgconductor results")

    async def _answer(self) -> None:
        """Ask about new ids at once, and about all of them when told, and by the clock."""
        interval = POLL_SECONDS_FIRST
        while True:
            timed_out = not await self._stirs_within(interval)
            interval = min(interval * 2, POLL_SECONDS_MAX) if timed_out else POLL_SECONDS_FIRST
            self._stirred.clear()
            everyone = timed_out or self._told
            self._told = False
            ids = list(self._waiting if everyone else self._fresh)
            self._fresh.clear()
            try:
                await self._ask(ids)
            except Exception as error:  # noqa: BLE001 (all who wait are told)
                self._fail(error)
            if self._waiting and self._listener is None:
                await self._listen()

    async def _stirs_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds if self._waiting else None):
                await self._stirred.wait()
        except TimeoutError:
            return False
        return True

    async def _ask(self, ids: list[str]) -> None:
        for start in range(0, len(ids), IDS_PER_QUERY_MAX):
            chunk = ids[start : start + IDS_PER_QUERY_MAX]
            for ended in await self._pool.run(self._engine.watch_results(chunk, self.watcher)):
                watched = self._waiting.pop(ended.id, None)
                if watched is not None:
                    watched.end.set_result(ended)

    def _fail(self, error: Exception) -> None:
        waiting, self._waiting = self._waiting, {}
        self._fresh.clear()
        for watched in waiting.values():
            watched.end.set_exception(error)

    async def _listen(self) -> None:
        dsn = await self._pool.address()
        self._listener = Listener(dsn, self._engine.schema, self._hear, "pgconductor client listener")
        self._listener.start()

    def _hear(self, kind: str, words: list[str]) -> None:
        listens_anew = kind == "ready" and not words
        if listens_anew or (kind == "told" and self.watcher in words):
            self._told = True
            self._stirred.set()
