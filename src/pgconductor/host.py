"""What a run is given by the process around it; see `attempt.Host`."""

import asyncio
import contextlib
import select
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future as ThreadFuture
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import psycopg
from psycopg.pq import TransactionStatus

from pgconductor.attempt import OutcomeUnknown
from pgconductor.claimed import Loaded, Missing
from pgconductor.isolated import Processes
from pgconductor.loading import Loader
from pgconductor.route import FailedOver, Route, Timeline
from pgconductor.session import Session
from pgconductor.threads import Threads
from pgconductor.written import Operation, SavedStep

if TYPE_CHECKING:
    from pgconductor.engine import Engine, Query
    from pgconductor.membership import Membership
    from pgconductor.settler import Saver

T = TypeVar("T")
CONNECTIONS_MAX: Final = 8
_IDLE_SECONDS_MAX: Final = 60.0
"""So long a transaction may stand idle while its function runs; less, the trust, once its step is saved."""
_TRANSACTION_OPTIONS: Final = "-c idle_in_transaction_session_timeout=60s"
_TRANSACTION_SETTINGS: Final = "set local idle_in_transaction_session_timeout = '60s'"


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
        timeline: Told of the timeline that each connection finds.
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
        timeline: Timeline | None = None,
    ) -> None:
        self.deps: Any = deps
        self.loop = asyncio.get_running_loop()
        self.orchestrator_id = membership.id
        self.schema = engine.schema
        self.engine = engine
        self.is_leaving = False
        self.is_fenced: Callable[[], bool] = membership.is_fenced
        self.processes = Processes(dsn, engine.schema, membership.timing)
        self._idle_seconds = min(membership.timing.trust, _IDLE_SECONDS_MAX)
        self._route = Route(dsn, "pgconductor transaction", options=_TRANSACTION_OPTIONS, timeline=timeline)
        self._saver = saver
        self._session = session
        self._loader = Loader(session, engine)
        self._threads = threads
        self._idle: list[psycopg.AsyncConnection[Any]] = []
        self._idle_sync: list[psycopg.Connection[Any]] = []
        self._slots = asyncio.Semaphore(CONNECTIONS_MAX)
        self._slots_sync = threading.BoundedSemaphore(CONNECTIONS_MAX)

    def is_stopping(self) -> bool:
        """Whether a graceful stop has begun."""
        return self.is_leaving

    def save(self, step: SavedStep) -> "asyncio.Future[None]":
        """Store a finished step, together with those of other runs."""
        return self._saver.add(step)

    def open(self, operation: Operation) -> "asyncio.Future[None]":
        """Store an operation and create its children."""
        return self._saver.add(operation)

    def save_transaction(self, step: SavedStep) -> "Query[Literal['saved', 'lost', 'exists']]":
        """Build the call that stores a step in the transaction of its own writes, to be committed within the trust."""
        return self.engine.save_transaction(self.orchestrator_id, step, self._idle_seconds)

    def submit_thread(self, fn: Callable[[], T]) -> "ThreadFuture[T]":
        """Run a function in a thread of the process's own."""
        return self._threads.submit(fn)

    async def load(self, missing: Missing) -> Loaded:
        """Load what a claim left out of an execution."""
        return await self._loader.load(missing)

    async def run_query(self, query: "Query[T]") -> T:
        """Run any other call of the engine."""
        return await self._session.run(query)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[psycopg.AsyncConnection[Any]]:
        """Lend a connection. That the database is away is nobody's failure.

        Raises:
            OutcomeUnknown: There is none to be had. Nothing was done.
        """
        async with self._slots:
            connection = await self._take()
            try:
                yield connection
            finally:
                if connection.pgconn.transaction_status == TransactionStatus.IDLE:
                    self._idle.append(connection)
                else:
                    await connection.close()

    @contextmanager
    def sync_transaction(self) -> Generator[psycopg.Connection[Any]]:
        """Lend a connection to a thread; as `transaction`."""
        with self._slots_sync:
            connection = self._take_sync()
            try:
                yield connection
            finally:
                if connection.pgconn.transaction_status == TransactionStatus.IDLE:
                    self._idle_sync.append(connection)
                else:
                    connection.close()

    async def _take(self) -> psycopg.AsyncConnection[Any]:
        while self._idle:
            connection = self._idle.pop()
            if not has_spoken(connection.pgconn.socket):
                return connection
            await connection.close()
        try:
            connection = await self._route.connect(psycopg.AsyncConnection[Any], autocommit=False)
        except (psycopg.OperationalError, FailedOver) as error:
            raise OutcomeUnknown from error
        connection.prepare_threshold = None
        return connection

    def _take_sync(self) -> psycopg.Connection[Any]:
        with contextlib.suppress(IndexError):  # other threads take some too
            while True:
                connection = self._idle_sync.pop()
                if not has_spoken(connection.pgconn.socket):
                    return connection
                connection.close()
        try:
            connection = self._route.connect_sync(autocommit=False)
        except (psycopg.OperationalError, FailedOver) as error:
            raise OutcomeUnknown from error
        connection.prepare_threshold = None
        return connection

    async def close(self) -> None:
        """Close the connections of transactions and let the threads end."""
        self._threads.close()
        await self._loader.close()
        await self.processes.close()
        for connection in self._idle:
            await connection.close()
        for sync_connection in self._idle_sync:
            sync_connection.close()

    @property
    def transaction_settings(self) -> str | None:
        """What a transaction must say at its beginning, because its connection could not at its start."""
        return _TRANSACTION_SETTINGS if self._route.is_pooled else None


def has_spoken(descriptor: int) -> bool:
    """Tell, without a round trip, whether the server has said something on an idle connection: that it is gone."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
