"""What a conductor does on one event loop: enqueue, hint, wait; and how it gets a loop where there is none.

**Enqueueing.** See `gathering`. Every call has its id before it is sent, so a lost reply is repeated. Calls with a
`dedupe_key`, a throttle or a debounce wait for transactions that have named the same key and are not over: they never
share a statement with others, and only `KEYED_STATEMENTS_MAX` of their statements are on their way at once.

**Hints.** See `hints`.

**Threads.** `invoke_sync` and `result_sync` run on an event loop in a thread of the process's own, shared by its
threads, so that they gather and wait as the others do. A forked child makes its own.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

from pgconductor.engine import Carried, Ended, Engine, Enqueued, Moved, Query
from pgconductor.errors import ConductorError, ServerError
from pgconductor.events import NewEvent
from pgconductor.gathering import Gathering
from pgconductor.hints import Hints
from pgconductor.pool import NotMigrated, Pool
from pgconductor.results import Results
from pgconductor.written import AlikeExecutions, NewExecution, alike

T = TypeVar("T")

STATEMENTS_MAX: Final = 2
KEYED_STATEMENTS_MAX: Final = 2
"""Together they leave connections of the pool to everything else."""
KEY_SECONDS_MAX: Final = 2.0
"""How long a try waits for another transaction that has named the same key; `Pool.run` repeats it while it may."""
CARRYING_CALLS_MAX: Final = 200
"""Other hints wait for calls that carry theirs, and other notifications for their flush: only short ones do."""
_NOTIFY_QUEUE_IS_FULL: Final = "54000"

Loop = asyncio.AbstractEventLoop


class LoopClient:
    """A conductor's client on one event loop.

    Args:
        engine: Builds the queries.
        address: Where the server is.
        migrate: Installs the engine where that is ours to do; returns False where it is not.
    """

    def __init__(
        self, engine: Engine, address: Callable[[], Awaitable[str]], migrate: Callable[[], Awaitable[bool]]
    ) -> None:
        self._engine = engine
        self._migrate = migrate
        self.pool = Pool(address, engine.schema, "pgconductor client")
        self.results = Results(engine, self.pool)
        self._tasks: set[asyncio.Task[None]] = set()
        self._plain = Gathering(self.enqueue_many, self._spawn, statements_max=STATEMENTS_MAX)
        self._keyed = Gathering(self.enqueue_many, self._spawn, statements_max=KEYED_STATEMENTS_MAX)
        self._keyed_slots = asyncio.Semaphore(KEYED_STATEMENTS_MAX)
        self._hints = Hints(engine, self.pool, self._spawn)

    async def run(self, query: Query[T], again: Callable[[Query[T]], Query[T]] | None = None) -> T:
        """Run a query; see `Pool.run`. On a development server of ours, install the engine first if it is missing."""
        try:
            return await self.pool.run(query, again)
        except NotMigrated:
            if not await self._migrate():
                raise
        return await self.pool.run(query, again)

    async def move(self, query: Query[Moved]) -> str:
        """Run an operation, tell whom it concerns, and return its result."""
        moved = await self.run(query)
        self.hint(moved.queues, moved.watchers)
        return moved.result

    async def enqueue(self, row: NewExecution) -> str:
        """Enqueue one call, together with others that come at the same time; return its id."""
        if row.replace:  # replaces what stands committed, so it cannot share a statement with what it replaces
            return (await self.enqueue_many([row]))[0]
        return await (self._keyed if row.is_keyed else self._plain).enqueue(row)

    async def enqueue_many(self, rows: Sequence[NewExecution]) -> list[str]:
        """Enqueue calls in one statement; return their ids, which a dedupe key may have changed."""
        if len(rows) == 1 and rows[0].is_plain:
            enqueued = await self._enqueue_plain([rows[0].id], lambda hint: self._engine.enqueue_one(rows[0], hint))
        elif (calls := alike(rows)) is not None:
            return await self.enqueue_alike(calls)
        elif any(row.is_keyed for row in rows):
            async with self._keyed_slots:
                enqueued = await self._enqueue_mixed(rows, KEY_SECONDS_MAX)
        else:
            enqueued = await self._enqueue_mixed(rows)
        return ids_of(rows, enqueued)

    async def enqueue_alike(self, calls: AlikeExecutions) -> list[str]:
        """Enqueue plain calls that differ in their payloads only, in one statement; return their ids."""
        await self._enqueue_plain(calls.ids, lambda hint: self._engine.enqueue_alike(calls, hint))
        return calls.ids

    async def emit(self, event: NewEvent) -> None:
        """Emit one event."""
        emitted = await self.run(self._engine.emit([event]))
        self.hint(emitted.queues, to_all=emitted.awaited)

    async def ended(self, execution_id: str) -> Ended:
        """Wait for an execution's end."""
        return await self.results.wait(execution_id)

    def hint(
        self, queues: Sequence[int] | None = None, watchers: Sequence[str] | None = None, *, to_all: bool = False
    ) -> None:
        """Name queues with new work, and who waited for what has ended; see `Hints.add`."""
        self._hints.add(queues, watchers, to_all=to_all)

    async def close(self) -> None:
        """Let what is on its way arrive, then close the connections. May be used again."""
        while self._tasks or self._hints.are_gathered:
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._hints.flush()
        await self.results.close()
        await self.pool.close()

    async def _enqueue(self, query: Query[Enqueued]) -> Enqueued:
        enqueued = await self.run(query, self._engine.enqueue_again)
        if enqueued.hinted:
            self._hints.went_along(enqueued.queues)
        else:
            self.hint(enqueued.queues)
        return enqueued

    async def _enqueue_mixed(self, rows: Sequence[NewExecution], lock_seconds: float | None = None) -> Enqueued:
        def calls(hint: Carried | None) -> Query[Enqueued]:
            return self._engine.enqueue(rows, hint, lock_seconds=lock_seconds)

        if len(rows) > CARRYING_CALLS_MAX:
            return await self._enqueue(calls(None))
        with self._hints.carry() as hint:
            return await self._enqueue_hinted(calls, hint)

    async def _enqueue_plain(self, ids: Sequence[str], calls: Callable[[Carried | None], Query[Enqueued]]) -> Enqueued:
        """Enqueue plain calls, which may be named, and are then confirmed; see `Hints.carry`."""
        if len(ids) > CARRYING_CALLS_MAX:
            return await self._enqueue(calls(None))
        try:
            with self._hints.carry(may_name=True) as hint:
                enqueued = await self._enqueue_hinted(calls, hint)
            if hint == "named" and enqueued.unconfirmed and not await self._confirm(ids[0]):
                again = self._engine.enqueue_again(calls(None))
                return await self._enqueue(again)  # the server went down before its disk had the calls
            return enqueued
        finally:
            self._hints.call_ended()

    async def _enqueue_hinted(
        self, calls: Callable[[Carried | None], Query[Enqueued]], hint: Carried | None
    ) -> Enqueued:
        """Enqueue with a hint; without it where the server's queue of notifications is full."""
        try:
            return await self._enqueue(calls(hint))
        except ServerError as error:
            if hint is None or getattr(error.__cause__, "sqlstate", None) != _NOTIFY_QUEUE_IS_FULL:
                raise
        return await self._enqueue(calls(None))

    async def _confirm(self, first_id: str) -> bool:
        """Return whether calls whose commit has not waited for the disk are there to stay; it has all or none."""
        try:
            return await self.run(self._engine.confirm(first_id))
        except ServerError as error:
            raise ServerError(
                f"the call was sent, and may have begun, but whether the server has kept it is unknown: {error}",
                "look before you repeat it, or give it a dedupe_key and repeat it with that",
            ) from error

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Clients:
    """A conductor's clients: one for each event loop that uses it, made on first use."""

    def __init__(self, make: Callable[[], LoopClient]) -> None:
        self._make = make
        self._by_loop: dict[Loop, LoopClient] = {}
        self._pid = os.getpid()
        self._lock = threading.Lock()

    def here(self) -> LoopClient:
        """Return the client of the running event loop."""
        loop = asyncio.get_running_loop()
        client = self._by_loop.get(loop)
        if client is not None and self._pid == os.getpid():
            return client
        with self._lock:
            self._forget_the_gone()
            client = self._by_loop[loop] = self._make()
        return client

    def run_sync(self, work: Callable[[LoopClient], Coroutine[Any, Any, T]]) -> T:
        """Do something with a client from code without an event loop, and wait for it."""

        async def here() -> T:
            return await work(self.here())

        return background().run(here())

    async def close(self) -> None:
        """Close the clients of this loop and of the background thread; drop those of loops that have ended."""
        self._forget_the_gone()
        for loop, client in list(self._by_loop.items()):
            if loop is asyncio.get_running_loop():
                await client.close()
            elif not loop.is_running():
                client.pool.abandon()
            else:
                with suppress(RuntimeError):  # it ended just now
                    await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(client.close(), loop))

    def _forget_the_gone(self) -> None:
        forked = self._pid != os.getpid()
        for loop, client in list(self._by_loop.items()):
            if forked:
                del self._by_loop[loop]  # the connections are the parent's
            elif loop.is_closed():
                client.pool.abandon()
                del self._by_loop[loop]
        self._pid = os.getpid()


class Background:
    """An event loop in a daemon thread, for code that has none."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._is_stopped = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pgconductor client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it; an interrupt of the waiting thread cancels it."""
        if self._is_stopped:
            work.close()
            raise ConductorError("the process is exiting; nothing was sent")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """Cancel what runs there, and end the thread, as the process ends."""
        self._is_stopped = True
        if self.pid == os.getpid() and self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).add_done_callback(
                lambda _: self._loop.call_soon_threadsafe(self._loop.stop)
            )
            self._thread.join(5)
            if not self._thread.is_alive():
                self._loop.close()


_background: Background | None = None
_background_lock = threading.Lock()


def background() -> Background:
    """Return the process's background loop; make it on first use, and anew in a forked child."""
    global _background  # noqa: PLW0603
    with _background_lock:
        if _background is None or _background.pid != os.getpid():
            _background = Background()
            atexit.register(_background.stop)
        return _background


def ids_of(rows: Sequence[NewExecution], enqueued: Enqueued) -> list[str]:
    """Return the executions' ids: those that were sent, unless dedupe keys kept earlier executions."""
    return [row.id for row in rows] if enqueued.ids is None else enqueued.ids


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
