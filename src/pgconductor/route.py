"""The way to a server: what a connection asks for when it starts, and what it finds standing between.

**Poolers.** A pooler in transaction mode gives each transaction whatever session is free. Nothing may be left in a
session there: no setting, no prepared statement, no LISTEN. Whether one stands between is found out when a connection
starts, not configured: some refuse start-up options and some drop them in silence, but the process id that a pooler
names at the start is of its own making, and that of the session which answers the first question is another. In a mode
that keeps sessions this is stricter than need be, and right.

What the engine's functions need of a session is read committed, and leave to write. A direct connection asks for it by
start-up options. Through a pooler each call says so itself: it travels as begin, call and commit, in one message. So a
role or a database whose default is to read only may work here, and `read-write`, which libpq would refuse it for,
is sent as `primary`.

**Failover.** A standby that was promoted continues on another timeline of the database, and an asynchronous one may
lack the last commits, which the processes have been told of. So those who keep such things in memory give a `Timeline`:
the first connection that finds another one tells it, and is not used.
"""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import PGconn, Ping

from pgconductor.errors import ConductorError, ServerError

Kind = TypeVar("Kind", bound=psycopg.AsyncConnection[Any])

_OPTIONS: Final = "-c default_transaction_isolation=read\\ committed -c default_transaction_read_only=off"
_DEFAULTS: Final[dict[str, str]] = {
    "client_encoding": "UTF8",
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
    "target_session_attrs": "read-write",
}
STANDBY: Final = "the server is a read-only standby"
STANDBY_REMEDY: Final = "connect to the primary, or name all servers in the address: host=a,b"
_REFUSALS: Final = ("unsupported startup parameter", "command-line options")  # PgBouncer; RDS Proxy
_WHO: Final = b"select pg_backend_pid(), current_setting('default_transaction_isolation')"
_TIMELINE: Final = b"select left(pg_walfile_name(pg_current_wal_lsn()), 8)"


class FailedOver(ConductorError):
    """The connection that was opened leads to another timeline than those before; nothing was asked of it."""


class Timeline:
    """The timeline that a process' connections were last seen on.

    Args:
        on_change: Called when a connection finds another one, before anything is asked of it.

    Attributes:
        change_count: How often one was found.
        heard_count: How many of these changes the process has acted on: it voids what it had not stored.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.change_count = 0
        self.heard_count = 0
        self._on_change = on_change
        self._last: str | None = None

    def note(self, found: str | None) -> None:
        """Take what a new connection found; None is a server that does not say.

        Raises:
            FailedOver: It is not what the one before found.
        """
        if found is None:
            return
        before, self._last = self._last, found
        if before not in (None, found):
            self.change_count += 1
            self._on_change()
            raise FailedOver(f"the database has failed over, from timeline {before} to {found}")


class Route:
    """The way from here to a server.

    Args:
        dsn: The user's.
        name: Shown in `pg_stat_activity` unless the DSN names the application itself.
        options: Start-up options beside the engine's own, such as `-c idle_in_transaction_session_timeout=60s`.
        timeline: Told of the timeline that each connection finds.

    Attributes:
        dsn: As given.
        is_pooled: Whether the last connection found a pooler between.
    """

    def __init__(self, dsn: str, name: str, *, options: str = "", timeline: Timeline | None = None) -> None:
        self.is_pooled = False
        self.dsn = dsn
        self._name = name
        self._options = options
        self._timeline = timeline
        self._takes_options = True

    async def connect(self, kind: type[Kind], *, autocommit: bool = True) -> Kind:
        """Open a connection for calls, which go over a `Wire`, or for whatever else.

        Raises:
            psycopg.Error: It could not be opened. Nothing is left open.
            FailedOver: It leads to another timeline; so does the next one, without complaint.
        """
        connection = await self._open(kind)
        try:
            row = await (await connection.execute(_WHO)).fetchone()
            self._learn(connection, row)
            if self.is_pooled:
                await connection.set_isolation_level(psycopg.IsolationLevel.READ_COMMITTED)
                await connection.set_read_only(False)
            if self._timeline is not None:
                self._timeline.note(await _timeline_of(connection))
            await connection.set_autocommit(autocommit)
        except BaseException:
            connection.pgconn.finish()
            raise
        return connection

    def connect_sync(self, *, autocommit: bool = True) -> psycopg.Connection[Any]:
        """Do as `connect`, for threads."""
        connection = self._open_sync()
        try:
            self._learn(connection, connection.execute(_WHO).fetchone())
            if self.is_pooled:
                connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
                connection.read_only = False
            if self._timeline is not None:
                self._timeline.note(_timeline_of_sync(connection))
            connection.autocommit = autocommit
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def address(self) -> str:
        """The DSN with everything that a connection asks for at its start."""
        return connection_string(self.dsn, self._name, with_options=self._takes_options, options=self._options)

    async def _open(self, kind: type[Kind]) -> Kind:
        while True:
            try:
                return await kind.connect(self.address, autocommit=True, prepare_threshold=None)
            except psycopg.OperationalError as error:
                self._judge(error)

    def _open_sync(self) -> psycopg.Connection[Any]:
        while True:
            try:
                return psycopg.Connection[Any].connect(self.address, autocommit=True, prepare_threshold=None)
            except psycopg.OperationalError as error:
                self._judge(error)

    def _judge(self, error: psycopg.OperationalError) -> None:
        """Return if it is worth another try at once."""
        if not (self._takes_options and refuses_options(error)):
            raise error
        self._takes_options = False

    def _learn(self, connection: psycopg.AsyncConnection[Any] | psycopg.Connection[Any], row: Any) -> None:
        pid, isolation = row
        self.is_pooled = pid != connection.info.backend_pid or isolation != "read committed"
        if not self.is_pooled:
            connection.prepare_threshold = 0


def connection_string(dsn: str, name: str, *, with_options: bool = True, options: str = "") -> str:
    """Complete a DSN: application name, timeouts, isolation; what the user gave stays, as far as it matters here.

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
    if settings["target_session_attrs"] == "read-write":  # of the session's default, which no transaction here keeps to
        settings["target_session_attrs"] = "primary"
    return make_conninfo("", **settings)


def is_absent(dsn: str) -> bool:
    """Return whether no server answers there, or only one that does not let anybody in yet.

    What a server refuses, such as a password, is an answer. Blocks for as long as a connection may take.
    """
    return PGconn.ping(connection_string(dsn, "pgconductor ping").encode()) in (Ping.NO_RESPONSE, Ping.REJECT)


def why_absent(dsn: str) -> str | None:
    """Return why no connection can be made there; None where one can. Blocks for as long as that takes."""
    try:
        psycopg.connect(connection_string(dsn, "pgconductor ping")).close()
    except psycopg.OperationalError as error:
        return _reason(error)
    return None


def unreachable(error: BaseException) -> ServerError:
    """Return what a user is to see where no connection could be made."""
    if finds_standbys_only(error):
        return ServerError(STANDBY, STANDBY_REMEDY)
    return ServerError(
        f"cannot connect to Postgres: {_reason(error)}", "check the address, PGCONDUCTOR_URL and DATABASE_URL"
    )


def _reason(error: BaseException) -> str:
    return first_line(error).removeprefix("connection failed: ")


def first_line(error: BaseException) -> str:
    """Return what an error of the driver says first; more lines tell of other addresses, or give hints."""
    return str(error).strip().partition("\n")[0]


def refuses_options(error: psycopg.Error) -> bool:
    """Tell whether a pooler refused start-up options."""
    return any(words in str(error) for words in _REFUSALS)


def finds_standbys_only(error: BaseException) -> bool:
    """Tell whether a connection failed because no server of the address takes writes."""
    return "server is in hot standby" in str(error)


async def _timeline_of(connection: psycopg.AsyncConnection[Any]) -> str | None:
    """Ask on which timeline the server writes; some services that speak Postgres' protocol have none."""
    try:
        row = await (await connection.execute(_TIMELINE)).fetchone()
    except psycopg.Error:
        if connection.closed:
            raise
        return None
    return row[0] if row else None


def _timeline_of_sync(connection: psycopg.Connection[Any]) -> str | None:
    try:
        row = connection.execute(_TIMELINE).fetchone()
    except psycopg.Error:
        if connection.closed:
            raise
        return None
    return row[0] if row else None
