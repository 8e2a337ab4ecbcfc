"""What a run is given by the process around it; see `attempt.Host`."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future as ThreadFuture
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg_pool import AsyncConnectionPool, ConnectionPool, PoolTimeout

from pgconductor.attempt import OutcomeUnknown
from pgconductor.engine import Operation, SavedStep
from pgconductor.isolated import Processes
from pgconductor.session import Session, connection_string
from pgconductor.threads import Threads

if TYPE_CHECKING:
    from pgconductor.engine import Engine, Query
    from pgconductor.membership import Membership
    from pgconductor.settler import Saver

T = TypeVar("T")
POOL_SIZE_MAX: Final = 8
_TRANSACTION_OPTIONS: Final = "-c idle_in_transaction_session_timeout=60s"


class ProcessHost:
    """The host of all runs of one orchestrator.

    Args:
        dsn: Where the connections of `ctx.transaction` lead.
        engine: Builds queries.
        membership: The boot id.
        saver: Stores steps and operations.
        session: For any other call.
        threads: Runs plain `def` handlers.
        deps: What the conductor's lifespan yielded.
    """

    def __init__(
        self,
        dsn: str,
        engine: "Engine",
        membership: "Membership",
        saver: "Saver",
        session: Session,
        threads: Threads,
        deps: Any,
    ) -> None:
        self.deps: Any = deps
        self.loop = asyncio.get_running_loop()
        self.orchestrator_id = membership.id
        self.schema = engine.schema
        self.engine = engine
        self.is_leaving = False
        self.is_fenced: Callable[[], bool] = membership.is_fenced
        self.processes = Processes(dsn, engine.schema)
        self._dsn = dsn
        self._saver = saver
        self._session = session
        self._threads = threads
        self._pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] | None = None
        self._sync_pool: ConnectionPool[psycopg.Connection[Any]] | None = None
        self._pool_lock = asyncio.Lock()

    def is_stopping(self) -> bool:
        """Whether a graceful stop has begun."""
        return self.is_leaving

    def save(self, step: SavedStep) -> "asyncio.Future[None]":
        """Store a finished step, together with those of other runs."""
        return self._saver.add(step)

    def open(self, operation: Operation) -> "asyncio.Future[None]":
        """Store an operation and create its children."""
        return self._saver.add(operation)

    def submit_thread(self, fn: Callable[[], T]) -> "ThreadFuture[T]":
        """Run a function in a thread of the process's own."""
        return self._threads.submit(fn)

    async def run_query(self, query: "Query[T]") -> T:
        """Run any other call of the engine."""
        return await self._session.run(query)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        """Lend a connection, once there is one: that the database is away is nobody's failure.

        Raises:
            OutcomeUnknown: There has been none for half a minute. Nothing was done.
        """
        async with self._pool_lock:
            if self._pool is None:
                self._pool = AsyncConnectionPool(
                    self._pool_dsn(), min_size=0, max_size=POOL_SIZE_MAX, open=False, kwargs={"prepare_threshold": None}
                )
                await self._pool.open()
        async with AsyncExitStack() as stack:
            try:
                connection = await stack.enter_async_context(self._pool.connection())
            except PoolTimeout as error:
                raise OutcomeUnknown from error
            yield connection

    @contextmanager
    def sync_transaction(self) -> Generator[psycopg.Connection[Any]]:
        """Lend a connection to a thread; as `transaction`."""
        if self._sync_pool is None:
            self._sync_pool = ConnectionPool(
                self._pool_dsn(), min_size=0, max_size=POOL_SIZE_MAX, open=True, kwargs={"prepare_threshold": None}
            )
        with ExitStack() as stack:
            try:
                connection = stack.enter_context(self._sync_pool.connection())
            except PoolTimeout as error:
                raise OutcomeUnknown from error
            yield connection

    async def close(self) -> None:
        """Close the connections of transactions and let the threads end."""
        self._threads.close()
        await self.processes.close()
        if self._pool is not None:
            await self._pool.close(timeout=1)
        if self._sync_pool is not None:
            with contextlib.suppress(Exception):
                await asyncio.to_thread(self._sync_pool.close, 1)

    def _pool_dsn(self) -> str:
        return connection_string(self._dsn, "pgconductor transaction", options=_TRANSACTION_OPTIONS)
