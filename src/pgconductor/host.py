"""What a run is given by the process around it; see `attempt.Host`.

**Connections of transactions.** A function may do to its connection what it likes: set factories and adapters, settings
and a role, take locks, make temporary tables. The next one must not find it. So what is kept is the session alone. Each
transaction gets a psycopg connection of its own on one; the connection before leads nowhere from then on. The session
is sent a reset when it is given back, and the answer is read when it is taken again, so that nobody waits for it unless
the next transaction follows at once. Through a pooler nothing is reset: the session is the pooler's.
"""

import asyncio
import contextlib
import logging
import select
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import Future as ThreadFuture
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import psycopg
from psycopg import generators
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq import PGconn as PGConnection
from psycopg.pq.abc import PGconn, PGresult

from pgconductor.claimed import Loaded, Missing
from pgconductor.isolated import Processes
from pgconductor.loading import Loader
from pgconductor.route import FailedOver, Route, Timeline
from pgconductor.running_steps import RunningSteps
from pgconductor.session import Session
from pgconductor.threads import Threads
from pgconductor.transactions import NoConnection
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
_TRANSACTION_SETTINGS: Final = (
    "set transaction isolation level read committed, read write; set local idle_in_transaction_session_timeout = '60s'"
)
_RESET: Final = (
    b"close all; reset session authorization; reset role; reset all; deallocate all; unlisten *;"
    b" select pg_catalog.pg_advisory_unlock_all(); discard temp"
)
"""What `discard all` does, but for sequences, and for plans, since the engine's functions would be planned anew.
`reset` goes back to what the connection was opened with."""
_SUCCESSES: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)
_NOWHERE: Final = PGConnection.connect_start(b"=")  # no address, so nothing is opened
_NOWHERE.finish()
log = logging.getLogger("pgconductor.host")


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
        self.steps = RunningSteps()
        self.is_fenced: Callable[[], bool] = membership.is_fenced
        self.processes = Processes(dsn, engine.schema, membership.timing)
        self._idle_seconds = min(membership.timing.trust, _IDLE_SECONDS_MAX)
        self._route = Route(dsn, "pgconductor transaction", options=_TRANSACTION_OPTIONS, timeline=timeline)
        self._saver = saver
        self._session = session
        self._loader = Loader(session, engine)
        self._threads = threads
        self._idle: list[PGconn] = []
        self._slots = asyncio.Semaphore(CONNECTIONS_MAX)
        self._slots_sync = threading.BoundedSemaphore(CONNECTIONS_MAX)

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
        """Lend a connection, like new. That the database is away is nobody's failure.

        Raises:
            NoConnection: There is none to be had. Nothing was done.
        """
        async with self._slots:
            connection = await self._take()
            try:
                yield connection
            finally:
                self._give_back(connection)

    @contextmanager
    def sync_transaction(self) -> Generator[psycopg.Connection[Any]]:
        """Lend a connection to a thread; as `transaction`."""
        with self._slots_sync:
            connection = self._take_sync()
            try:
                yield connection
            finally:
                self._give_back(connection)

    async def _take(self) -> psycopg.AsyncConnection[Any]:
        while (session := self._idle_session()) is not None:
            connection = psycopg.AsyncConnection[Any](session)
            with _closed_unless_clean(session) as results:
                results.extend(await connection.wait(generators.execute(session)))
            if not connection.closed:
                connection.prepare_threshold = None
                return connection
        try:
            connection = await self._route.connect(psycopg.AsyncConnection[Any], autocommit=False)
        except (psycopg.OperationalError, FailedOver) as error:
            raise NoConnection from error
        connection.prepare_threshold = None
        return connection

    def _take_sync(self) -> psycopg.Connection[Any]:
        while (session := self._idle_session()) is not None:
            connection = psycopg.Connection[Any](session)
            with _closed_unless_clean(session) as results:
                results.extend(connection.wait(generators.execute(session)))
            if not connection.closed:
                connection.prepare_threshold = None
                return connection
        try:
            connection = self._route.connect_sync(autocommit=False)
        except (psycopg.OperationalError, FailedOver) as error:
            raise NoConnection from error
        connection.prepare_threshold = None
        return connection

    def _idle_session(self) -> PGconn | None:
        with contextlib.suppress(IndexError):  # threads take some too
            return self._idle.pop()
        return None

    def _give_back(self, connection: psycopg.AsyncConnection[Any] | psycopg.Connection[Any]) -> None:
        """Keep the session if it can be had like new, and cut it off from the connection."""
        session, connection.pgconn = connection.pgconn, _NOWHERE
        try:
            if session.transaction_status == TransactionStatus.IDLE:
                if not self._route.is_pooled:
                    session.send_query(_RESET)
                self._idle.append(session)
                return
        except psycopg.Error as error:
            log.debug("a connection is closed, since it cannot be reset: %s", error)
        session.finish()

    async def close(self) -> None:
        """Close the connections of transactions and let the threads end."""
        self._threads.close()
        await self._loader.close()
        await self.processes.close()
        while (session := self._idle_session()) is not None:
            session.finish()

    @property
    def transaction_settings(self) -> str | None:
        """What a transaction must say at its beginning, because its connection could not at its start."""
        return _TRANSACTION_SETTINGS if self._route.is_pooled else None


@contextmanager
def _closed_unless_clean(session: PGconn) -> Generator[list[PGresult]]:
    """Take the answers to the reset; close a session that was not reset, or is gone."""
    results: list[PGresult] = []
    is_clean = False
    try:
        with contextlib.suppress(psycopg.Error):
            yield results
            is_clean = all(result.status in _SUCCESSES for result in results) and not has_spoken(session.socket)
    finally:
        if not is_clean:
            session.finish()


def has_spoken(descriptor: int) -> bool:
    """Tell, without a round trip, whether the server has said something on an idle connection: that it is gone."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
