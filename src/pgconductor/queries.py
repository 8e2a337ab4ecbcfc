"""Queries in general, and those that only read for people: reports, as plain JSON. See engine.py."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final, Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Struct

T = TypeVar("T")
Report: TypeAlias = dict[str, Any]
Table: TypeAlias = Sequence[Sequence[bytes | None]]


class Query(Struct, Generic[T], frozen=True):
    """A statement, and how to read its answer: the one column of one row, or with `is_table` all rows, as bytes.

    `harmless`: doing it again after a lost reply changes nothing.
    """

    statement: str
    parameters: Sequence[object]
    read: Callable[[Any], T]
    harmless: bool = True
    is_table: bool = False


_encode = msgspec.json.Encoder(uuid_format="canonical").encode


def reader(type_: type[T] | Any) -> Callable[[Any], Any]:
    """Return what reads an answer of this type; null is None."""
    decoder = msgspec.json.Decoder(type_)
    return lambda answer: None if answer is None else decoder.decode(answer)


def as_text(value: object) -> str:
    """Write a parameter as JSON."""
    return _encode(value).decode()


def as_is(answer: Any) -> Any:
    """Read an answer that needs no reading."""
    return answer


def is_true(answer: Any) -> bool:
    """Read a boolean."""
    return bool(answer == "true")


def quote(name: str) -> str:
    """Quote an identifier for use in a statement."""
    return '"' + name.replace('"', '""') + '"'


_names = reader(list[str])


class Queries:
    """Build the queries of one schema.

    Args:
        schema: The engine's schema.
        clock: Where `p_now` comes from; None leaves the time to the database.
    """

    def __init__(self, schema: str, clock: Callable[[], datetime] | None = None) -> None:
        self.schema = schema
        self._clock = clock
        self._statements: dict[str, str] = {}

    def _query(
        self, function: str, casts: str, parameters: Sequence[object], read: Callable[[Any], T], harmless: bool = True
    ) -> Query[T]:
        """`casts` names the parameter types; the instant is appended to all of them."""
        statement = self._statements.get(function)
        if statement is None:
            statement = f"select cast({self._call(function, casts)} as text)"
            self._statements[function] = statement
        return Query(statement, parameters, read, harmless)

    def _table(self, function: str, casts: str, parameters: Sequence[object], read: Callable[[Table], T]) -> Query[T]:
        """As `_query`, of a function that returns rows."""
        statement = f"select * from {self._call(function, casts)}"  # noqa: S608 (our own names, and the schema is quoted)
        return Query(statement, parameters, read, is_table=True)

    def _call(self, function: str, casts: str) -> str:
        marks = ", ".join(f"cast(%s as {cast})" for cast in casts.split())
        return f"{quote(self.schema).replace('%', '%%')}.{function}({marks})"

    def notify(self, payload: str) -> Query[None]:
        """Send a hint to whoever listens; the channel is the schema's name. Its commit waits for no disk."""
        statement = "select pg_notify(%s, %s), set_config('synchronous_commit', 'off', true)"
        return Query(statement, (self.schema, payload), as_is)

    def note_tasks(self, orchestrator: str, tasks: Sequence[int]) -> Query[None]:
        """See 05_register.sql."""
        return self._query("note_tasks", "uuid int[]", (orchestrator, list(tasks)), as_is)

    def confirm(self, execution: str) -> Query[bool]:
        """See 10_enqueue.sql."""
        return self._query("confirm", "uuid", (execution,), is_true)

    def hold_off_vacuum(self) -> Query[list[str] | None]:
        """See 62_vacuum.sql. None: there is nothing to hold off, or another process does it."""
        return self._query("hold_off_vacuum", "", (), _names)

    def _now(self) -> datetime | None:
        return self._clock() if self._clock else None

    def _within(self, function: str, flags: str, items: object, read: Callable[[Any], T]) -> Query[T]:
        now = self._now()
        instant = "null" if now is None else f"cast('{now.isoformat()}' as timestamptz)"
        schema = quote(self.schema).replace("%", "%%")
        # sent as text: a caller's connection may have a codec of its own for json, which would encode it once more
        statement = f"select cast({schema}.{function}(cast(cast(%s as text) as json), {flags}, {instant}) as text)"
        return Query(statement, (as_text(items),), read, harmless=False)


one_report = reader(dict[str, Any])
many_reports = reader(list[dict[str, Any]])

_SERVER_FACTS: Final = """\
select cast(json_build_object(
  'version', current_setting('server_version'), 'version_number', cast(current_setting('server_version_num') as int),
  'encoding', current_setting('server_encoding'), 'database', current_database(), 'role', current_user,
  'in_recovery', pg_is_in_recovery(), 'fsync', current_setting('fsync'),
  'full_page_writes', current_setting('full_page_writes'),
  'synchronous_commit', current_setting('synchronous_commit'),
  'autovacuum', current_setting('autovacuum'),
  'connections_max', cast(current_setting('max_connections') as int)
    - cast(current_setting('superuser_reserved_connections') as int),
  'connections', (select count(*) from pg_stat_activity where backend_type = 'client backend'),
  'snapshots', (select json_agg(json_build_object('holder', holder, 'seconds', seconds, 'transactions', transactions))
    from (
      select concat('session ', pid, ' of ', usename, ' ' || nullif(application_name, '')) as holder,
             extract(epoch from clock_timestamp() - xact_start) as seconds, cast(null as int) as transactions
      from pg_stat_activity
      where datname = current_database() and pid <> pg_backend_pid()
        and (backend_xmin is not null or backend_xid is not null)
      union all
      select 'prepared transaction ' || gid, extract(epoch from clock_timestamp() - prepared), null
      from pg_prepared_xacts where database = current_database()
      union all
      select 'replication slot ' || slot_name, null, age(xmin) from pg_replication_slots where xmin is not null
      order by 2 desc nulls last, 3 desc nulls last limit 20) h)) as text)"""


class Reports(Queries):
    """What people ask; nothing here changes anything."""

    def list_runs(self, state: str | None, task: str | None, queue: str | None, limit: int) -> Query[list[Report]]:
        """See 75_report.sql."""
        return self._query("list_runs", "text text text int", (state, task, queue, limit), many_reports)

    def show_run(self, id: str, limit: int) -> Query[Report | None]:
        """See 75_report.sql. None: no such execution."""
        return self._query("show_run", "uuid int", (id, limit), one_report)

    def why_not_running(self, id: str) -> Query[Report | None]:
        """See 72_why.sql. None: no such execution."""
        return self._query("why_not_running", "uuid", (id,), one_report)

    def list_workers(self) -> Query[list[Report]]:
        """See 72_why.sql."""
        return self._query("list_workers", "", (), many_reports)

    def list_tasks(self) -> Query[list[Report]]:
        """See 75_report.sql."""
        return self._query("list_tasks", "", (), many_reports)

    def list_queues(self) -> Query[list[Report]]:
        """See 75_report.sql."""
        return self._query("list_queues", "", (), many_reports)

    def list_events(self, name: str | None, limit: int) -> Query[list[Report]]:
        """See 56_events.sql."""
        return self._query("list_events", "text int", (name, limit), many_reports)

    def list_subscriptions(self) -> Query[list[Report]]:
        """See 56_events.sql."""
        return self._query("list_subscriptions", "", (), many_reports)

    def list_roles(self) -> Query[list[Report]]:
        """See 90_rights.sql."""
        return self._query("list_roles", "", (), many_reports)

    def overview(self) -> Query[Report]:
        """See 75_report.sql."""
        return self._query("overview", "", (), one_report)

    def server_facts(self) -> Query[Report]:
        """What the doctor asks any server, with or without the engine."""
        return Query(_SERVER_FACTS, (), one_report)
