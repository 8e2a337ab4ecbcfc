"""One connection to Postgres that mends itself, for the engine's calls.

An engine call is one function in one statement, autocommitted: one message to the server, so a process that is stopped
between two statements holds no locks. What a failure means is decided here, once:

- The server refused and rolled back (deadlock, serialization, lock or statement timeout, too many connections,
  read-only standby, disk full): the call did not happen. It is repeated, with back-off.
- The connection went away during the call: nobody knows whether it happened. A `harmless` query is repeated; of any
  other, the caller learns by `ConnectionLost` and must look.
- Everything else is the caller's: SQLSTATE class PC arrives as the class of `errors` that belongs to it.

The functions assume read committed, whatever the role's default: it is asked for when the connection starts. A pooler
that refuses start-up options gets explicit transactions instead, in one pipelined message.
"""

import asyncio
import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor.errors import ConductorError, engine_error

if TYPE_CHECKING:
    from pgconductor.engine import Query

T = TypeVar("T")
log = logging.getLogger("pgconductor.session")

BACKOFF_SECONDS_FIRST: Final = 0.05
BACKOFF_SECONDS_MAX: Final = 2.0
_OPTIONS: Final = "-c default_transaction_isolation=read\\ committed -c default_transaction_read_only=off"
_DEFAULTS: Final[dict[str, str]] = {
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "target_session_attrs": "read-write",
}
# The server rolled back and said so: the call did not happen.
_ROLLED_BACK: Final = {"40001", "40P01", "55P03", "57014", "25006", "57P03"}
# A statement timeout may be too short for what is asked; after so many the caller had better ask for less.
_TOO_SLOW: Final = "57014"
_TOO_SLOW_MAX: Final = 3
# The server went away while it worked: unknown.
_UNKNOWN: Final = {"57P01", "57P02", "57P04", "57P05", "25P03"}


class ConnectionLost(ConductorError):
    """The connection broke during a call: whether the call took effect is not known."""


def connection_string(dsn: str, name: str, *, with_options: bool = True, options: str = "") -> str:
    """Complete a DSN: application name, timeouts, isolation; what the user gave stays.

    Args:
        dsn: The user's.
        name: Shown in `pg_stat_activity` unless the DSN names the application itself.
        with_options: False for poolers that refuse start-up options.
        options: More of them, such as `-c idle_in_transaction_session_timeout=60s`.

    Returns:
        A DSN for psycopg.
    """
    given = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value is not None}
    settings = {**_DEFAULTS, "application_name": name, **given}
    if with_options:
        settings["options"] = " ".join(filter(None, (given.get("options"), _OPTIONS, options)))
    return make_conninfo("", **settings)


def is_rolled_back(error: psycopg.Error) -> bool:
    """Tell whether the server refused a call and did nothing of it, so that it may simply be repeated."""
    return error.sqlstate is not None and (error.sqlstate in _ROLLED_BACK or error.sqlstate.startswith("53"))


def is_lost(error: psycopg.Error) -> bool:
    """Tell whether a call's outcome is unknown because the connection went away."""
    if error.sqlstate is None:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate in _UNKNOWN or error.sqlstate.startswith("08")


def refuses_options(error: psycopg.Error) -> bool:
    """Tell whether a pooler refused start-up options."""
    return "unsupported startup parameter" in str(error)


def translate(error: psycopg.Error) -> Exception:
    """Return the library's error for what an engine function reported; other errors as they are."""
    if error.sqlstate is not None and error.sqlstate.startswith("PC"):
        return engine_error(error.sqlstate, error.diag.message_primary or "", error.diag.message_detail)
    return error


def backoff_seconds(failure_count: int) -> float:
    """Return how long to wait after so many failures in a row: doubling, capped, with jitter."""
    ceiling: float = min(BACKOFF_SECONDS_MAX, BACKOFF_SECONDS_FIRST * 2.0 ** min(failure_count - 1, 10))
    return ceiling * (0.5 + random.random() / 2)  # noqa: S311 (spreads load; guards nothing)


class _Judge:
    """Decides, for both kinds of session, what a failed try means."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.failure_count = 0

    def after(self, error: psycopg.Error, *, is_connecting: bool, is_harmless: bool) -> float:
        """Return how long to wait before the next try, or raise what the caller must know."""
        if not is_connecting and not is_rolled_back(error):
            if not is_lost(error):
                raise translate(error)
            if not is_harmless:
                raise ConnectionLost(f"the connection was lost during a call: {error}") from error
        if error.sqlstate == _TOO_SLOW and self.failure_count >= _TOO_SLOW_MAX:
            self.failure_count = 0
            raise error
        self.failure_count += 1
        pause = backoff_seconds(self.failure_count)
        level = logging.WARNING if self.failure_count in (1, 10) or self.failure_count % 100 == 0 else logging.DEBUG
        log.log(level, "%s: try %d failed, again in %.2f s: %s", self.name, self.failure_count, pause, error)
        return pause

    def succeeded(self) -> None:
        if self.failure_count:
            log.info("%s: works again after %d failed tries", self.name, self.failure_count)
            self.failure_count = 0


class Session:
    """One asyncio connection; calls queue up. It connects on first use and again whenever it must.

    Args:
        dsn: Where to.
        name: For `pg_stat_activity` and the log.
    """

    def __init__(self, dsn: str, name: str = "pgconductor") -> None:
        self.name = name
        self._dsn = dsn
        self._with_options = True
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()
        self._judge = _Judge(name)
        self._closed = False

    @property
    def failure_count(self) -> int:
        """How many tries in a row have failed."""
        return self._judge.failure_count

    async def run(self, query: "Query[T]", *, timeout: float | None = None) -> T:
        """Run one engine call.

        Args:
            query: What to call.
            timeout: Seconds for all tries together; None waits for as long as it takes.

        Returns:
            What the query reads from the answer.

        Raises:
            ConnectionLost: The connection broke during a call that is not harmless; it may have taken effect.
            TimeoutError: The time is over; the call may have taken effect.
            ConductorError: The engine refused. Nothing happened.
            psycopg.Error: The server refused. Nothing happened.
        """
        if timeout is None:
            async with self._lock:
                return await self._run(query)
        async with asyncio.timeout(timeout), self._lock:
            return await self._run(query)

    async def close(self) -> None:
        """Close the connection; calls under way fail with `ConnectionLost`."""
        self._closed = True
        await self._drop()

    async def _run(self, query: "Query[T]") -> T:
        while True:
            is_connecting = True
            try:
                connection = self._connection or await self._connect()
                is_connecting = False
                answer = await self._execute(connection, query)
            except psycopg.Error as error:
                await self._recover(error, is_connecting, query.harmless)
            except BaseException:
                await self._drop()  # cancelled in the middle: the connection may still be at work
                raise
            else:
                if self._judge.failure_count:
                    self._judge.succeeded()
                return query.read(answer)

    async def _recover(self, error: psycopg.Error, is_connecting: bool, is_harmless: bool) -> None:
        if is_connecting and self._with_options and refuses_options(error):
            self._with_options = False
            return
        if self._closed:
            raise ConnectionLost(f"{self.name} was closed") from error
        if is_lost(error) or error.sqlstate == "25006":
            await self._drop()
        await asyncio.sleep(self._judge.after(error, is_connecting=is_connecting, is_harmless=is_harmless))
        if self._closed:
            raise ConnectionLost(f"{self.name} was closed") from error

    async def _connect(self) -> psycopg.AsyncConnection[Any]:
        if self._closed:
            raise ConnectionLost(f"{self.name} is closed")
        self._connection = await psycopg.AsyncConnection.connect(
            connection_string(self._dsn, self.name, with_options=self._with_options),
            autocommit=True,
            prepare_threshold=0 if self._with_options else None,
        )
        return self._connection

    async def _execute(self, connection: psycopg.AsyncConnection[Any], query: "Query[Any]") -> Any:
        statement = query.statement.encode()
        if self._with_options:
            cursor = await connection.execute(statement, query.parameters)
        else:
            async with connection.pipeline():
                await connection.execute("begin isolation level read committed")
                cursor = await connection.execute(statement, query.parameters)
                await connection.execute("commit")
        row = await cursor.fetchone()
        return row[0] if row else None

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                await connection.close()


class SyncSession:
    """The same for threads; calls queue up."""

    def __init__(self, dsn: str, name: str = "pgconductor", sleep: Callable[[float], None] = time.sleep) -> None:
        self.name = name
        self._dsn = dsn
        self._sleep = sleep
        self._with_options = True
        self._connection: psycopg.Connection[Any] | None = None
        self._lock = threading.Lock()
        self._judge = _Judge(name)
        self._closed = False

    def run(self, query: "Query[T]", *, timeout: float | None = None) -> T:
        """Run one engine call; as `Session.run`, but that `timeout` is looked at between tries only."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            while True:
                is_connecting = True
                try:
                    connection = self._connection or self._connect()
                    is_connecting = False
                    answer = self._execute(connection, query)
                except psycopg.Error as error:
                    self._recover(error, is_connecting, query.harmless, deadline)
                except BaseException:
                    self._drop()
                    raise
                else:
                    self._judge.succeeded()
                    return query.read(answer)

    def close(self) -> None:
        """Close the connection."""
        self._closed = True
        self._drop()

    def _recover(self, error: psycopg.Error, is_connecting: bool, is_harmless: bool, deadline: float | None) -> None:
        if is_connecting and self._with_options and refuses_options(error):
            self._with_options = False
            return
        if self._closed:
            raise ConnectionLost(f"{self.name} was closed") from error
        if is_lost(error) or error.sqlstate == "25006":
            self._drop()
        pause = self._judge.after(error, is_connecting=is_connecting, is_harmless=is_harmless)
        if deadline is not None and time.monotonic() + pause > deadline:
            raise TimeoutError(f"{self.name}: no answer from Postgres in time: {error}") from error
        self._sleep(pause)

    def _connect(self) -> psycopg.Connection[Any]:
        if self._closed:
            raise ConnectionLost(f"{self.name} is closed")
        self._connection = psycopg.Connection.connect(
            connection_string(self._dsn, self.name, with_options=self._with_options),
            autocommit=True,
            prepare_threshold=0 if self._with_options else None,
        )
        return self._connection

    def _execute(self, connection: psycopg.Connection[Any], query: "Query[Any]") -> Any:
        statement = query.statement.encode()
        if self._with_options:
            row = connection.execute(statement, query.parameters).fetchone()
        else:
            with connection.pipeline():
                connection.execute("begin isolation level read committed")
                cursor = connection.execute(statement, query.parameters)
                connection.execute("commit")
            row = cursor.fetchone()
        return row[0] if row else None

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()
