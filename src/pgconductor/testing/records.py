"""What a test asks of the database: which executions and steps there are, and which have failed."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from uuid import UUID

import psycopg

from pgconductor.engine import Ended, Engine, quote
from pgconductor.run import error_of
from pgconductor.task import Call
from pgconductor.wire import table_of

if TYPE_CHECKING:
    from psycopg.pq.abc import PGresult

SHOWN_MAX = 20


class ExecutionRow(NamedTuple):
    """An execution as messages show it."""

    id: UUID
    task: str
    payload: str
    state: str

    def __str__(self) -> str:
        payload = self.payload if len(self.payload) <= 100 else f"{self.payload[:100]}…"
        return f"{self.task} {payload} is {self.state}"


class StepRow(NamedTuple):
    """A recorded operation as messages show it."""

    name: str
    kind: str
    status: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} is {self.status}"


class Records:
    """Reads one test's database, on a connection of its own, made on first use.

    Args:
        dsn: The database.
        engine: Whose schema to read.
    """

    def __init__(self, dsn: str, engine: Engine) -> None:
        self._dsn = dsn
        self._engine = engine
        self._connection: psycopg.Connection[tuple[Any, ...]] | None = None

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def executions(self) -> list[ExecutionRow]:
        """All executions, oldest first."""
        query = "select id, task, payload::text, state from {}.executions order by created_at, id"
        return [ExecutionRow(*row) for row in self._rows(query)]

    def execution(self, id: UUID) -> ExecutionRow | None:
        """One execution."""
        rows = self._rows("select id, task, payload::text, state from {}.executions where id = %s", id)
        return ExecutionRow(*rows[0]) if rows else None

    def count(self, call: Call[Any]) -> int:
        """How many executions there are of a call: of its task, with an equal payload."""
        query = "select count(*) from {}.executions where task = %s and payload = %s::jsonb"
        return int(self._rows(query, call.task, call.payload)[0][0])

    def steps(self, id: UUID) -> list[StepRow]:
        """What an execution has recorded, in order; of repeated operations the last round."""
        query = """
            select name, kind, status from (
              select distinct on (name) name, kind, status, created_at, round
              from {}.steps where execution_id = %s and index = 0 order by name, round desc
            ) s order by created_at, name"""
        return [StepRow(*row) for row in self._rows(query, id)]

    def worker_count(self) -> int:
        """How many processes work here: the test's own worker, and orchestrators that the test has started."""
        return int(self._rows("select count(*) from {}.workers")[0][0])

    def failed_roots(self) -> set[UUID]:
        """The executions that failed and have no parent which might have handled it."""
        return {row[0] for row in self._rows("select id from {}.failed_executions where parent_id is null")}

    def errors_of(self, ids: Iterable[UUID], known: Callable[[UUID], BaseException | None]) -> list[BaseException]:
        """Return what failed executions failed with: the very error where it is known, else as `result()` raises it."""
        rows = self._ended([str(id) for id in ids])
        errors: list[BaseException] = []
        for row in sorted(rows, key=lambda each: each.id):
            error = known(UUID(row.id)) or error_of(row)
            note = f"in task {row.task!r}, execution {row.id}"
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
            errors.append(error)
        return errors

    def _ended(self, ids: list[str]) -> list[Ended]:
        query = self._engine.watch_results(ids, None)
        cursor = self._connect().execute(query.statement.encode(), list(query.parameters))
        return query.read(table_of(cast("PGresult", cursor.pgresult)))

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        schema = quote(self._engine.schema)
        statement = query.replace("{}", schema.replace("%", "%%") if values else schema)
        return self._connect().execute(statement.encode(), values or None).fetchall()

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True)
        return self._connection


def listed(title: str, rows: Iterable[object]) -> str:
    """Write rows one a line under a title."""
    lines = [f"  {row}" for row in rows]
    if len(lines) > SHOWN_MAX:
        lines = [*lines[:SHOWN_MAX], f"  … and {len(lines) - SHOWN_MAX} more"]
    return "\n".join([title, *lines]) if lines else f"{title} none"
