"""The server that is measured on, fresh databases on it, and what it counted meanwhile."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from benchmarks.machine import tree_cpu_seconds
from benchmarks.tasks import QUEUE, register
from pgconductor import Conductor, Orchestrator, schema
from pgconductor.embedded import EmbeddedServer, ServerState

TEMPLATE = "bench_template"
DATABASE = "bench"


def settings() -> dict[str, str]:
    """Return the server's settings: durable, with memory and room for WAL, so that no checkpoint falls into a run."""
    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    return {
        "shared_buffers": f"{min(2048, max(512, memory_mib // 8))}MB",
        "max_wal_size": "8GB",
        "min_wal_size": "1GB",
        "checkpoint_timeout": "30min",
        "fsync": "on",
        "synchronous_commit": "on",
        "shared_preload_libraries": "pg_stat_statements",
        "pg_stat_statements.max": "10000",
        "jit": "off",
        "max_connections": "300",
    }


@dataclass(frozen=True)
class Counted:
    """What the server counted in some span of work."""

    wal_bytes: int
    full_pages: int
    statements: dict[str, int]
    cpu_seconds: float

    @property
    def round_trips(self) -> int:
        """All statements that clients sent."""
        return sum(self.statements.values())

    def calls(self, function: str) -> int:
        """How often an engine function was called."""
        return sum(calls for query, calls in self.statements.items() if f".{function}(" in query)


class Server:
    """A running server with the template of a migrated database; `over_tcp`: clients come over loopback."""

    def __init__(self, state: ServerState, *, over_tcp: bool = False) -> None:
        self.dsn = dsn = state.tcp_dsn if over_tcp else state.dsn
        self._pid = state.pid
        with psycopg.connect(dsn, autocommit=True) as admin:
            admin.execute(f"create database {TEMPLATE}")
        with psycopg.connect(make_conninfo(dsn, dbname=TEMPLATE), autocommit=True) as fresh:
            schema.migrate(fresh)
            fresh.execute("create extension pg_stat_statements")
        asyncio.run(_register_tasks(make_conninfo(dsn, dbname=TEMPLATE)))

    def url(self, database: str) -> str:
        """Return the address of a database as a URL, which every driver reads."""
        at = {key: quote(str(value), safe="") for key, value in conninfo_to_dict(self.dsn).items()}
        return f"postgresql://{at['user']}:{at['password']}@{at['host']}:{at['port']}/{database}"

    @asynccontextmanager
    async def database(self, template: str = TEMPLATE) -> AsyncIterator["Database"]:
        """Yield a fresh database, a copy of the template."""
        admin = await psycopg.AsyncConnection.connect(self.dsn, autocommit=True)
        async with admin:
            await admin.execute(f"drop database if exists {DATABASE} with (force)")
            await admin.execute(f"create database {DATABASE} template {template}")
            dsn = make_conninfo(self.dsn, dbname=DATABASE)
            async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, prepare_threshold=0) as connection:
                yield Database(dsn, self.url(DATABASE), connection, self._pid)

    async def top_statements(self, count: int) -> list[tuple[float, int, str]]:
        """Return (milliseconds, calls, text) of what cost the most in the last database, inside functions too."""
        query = """
            select total_exec_time + total_plan_time, calls, query
            from pg_stat_statements s join pg_database d on d.oid = s.dbid
            where d.datname = %s and query not like '%%pg_stat%%' and query not like '%%/* bench */%%'
            order by 1 desc limit %s"""
        async with await psycopg.AsyncConnection.connect(make_conninfo(self.dsn, dbname=DATABASE)) as connection:
            rows = await (await connection.execute(query, (DATABASE, count))).fetchall()
        return [(float(ms), int(calls), str(text)) for ms, calls, text in rows]

    def describe(self) -> dict[str, str]:
        """Return version and settings."""
        names = ("server_version", *settings(), "full_page_writes", "wal_compression")
        with psycopg.connect(self.dsn) as admin:
            return {name: _text(admin.execute("select current_setting(%s, true)", (name,))) for name in names}


class Database:
    """A fresh database and a connection to look at it; what that sends is not counted."""

    def __init__(self, dsn: str, url: str, connection: psycopg.AsyncConnection[Any], server_pid: int) -> None:
        self.dsn = dsn
        self.url = url
        self._connection = connection
        self._server_pid = server_pid
        self._began_at = "0/0"
        self._cpu = 0.0

    async def value(self, query: str, *parameters: object) -> Any:
        """Return the one value of a query."""
        row = await (await self._connection.execute(query.encode(), parameters or None)).fetchone()
        return row[0] if row else None

    async def execute(self, statement: str) -> None:
        """Run a statement that returns nothing."""
        await self._connection.execute(statement.encode())

    async def settle_down(self) -> None:
        """Bring statistics and checkpoint up to date, so that neither falls into the run."""
        await self._connection.execute("vacuum analyze")
        await self._connection.execute("checkpoint")

    async def begin_counting(self) -> None:
        """Start a span."""
        await self.value("select pg_stat_reset_shared('wal')")
        await self.value("select cast(pg_stat_statements_reset() as text)")
        self._began_at = await self.value("select pg_current_wal_insert_lsn()")
        self._cpu = tree_cpu_seconds(self._server_pid)

    async def counted(self) -> Counted:
        """End the span."""
        cpu = tree_cpu_seconds(self._server_pid) - self._cpu
        wal = await self.value("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s)", self._began_at)
        cursor = await self._connection.execute(
            "select query, calls from pg_stat_statements s join pg_database d on d.oid = s.dbid "
            "where d.datname = current_database() and toplevel and query not like '%pg_stat%' "
            "and query not like '%pg_wal_%' and query not like '%/* bench */%'"
        )
        statements: dict[str, int] = dict(await cursor.fetchall())
        return Counted(int(wal), await self.value("select wal_fpi from pg_stat_wal"), statements, cpu)

    async def index_inserts(self) -> int:
        """Return the index entries made so far: one an index for every insert, and for every update that is not HOT.

        An index of block ranges (BRIN) has one entry for many pages, and is not counted. The statistics of a process
        are complete a moment after it has left, so this waits for the others to leave.
        """
        while await self.connections():  # noqa: ASYNC110 (nothing tells us but the server)
            await asyncio.sleep(0.01)
        return int(
            await self.value("""
                select coalesce(sum((n_tup_ins + n_tup_upd - n_tup_hot_upd) * indexes.count), 0)
                from pg_stat_user_tables t
                cross join lateral (
                  select count(*) from pg_index i
                  join pg_class c on c.oid = i.indexrelid join pg_am a on a.oid = c.relam
                  where i.indrelid = t.relid and a.amname <> 'brin') as indexes
                where t.schemaname = 'pgconductor'""")
        )

    async def connections(self) -> int:
        """Return how many sessions clients have open, ours aside."""
        return int(
            await self.value("""
                select count(*) from pg_stat_activity
                where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()""")
        )


@contextmanager
def running_server(*, nested: bool = False, over_tcp: bool = False) -> Iterator[Server]:
    """Run a server of its own in a temporary place. `nested`: count statements inside functions too, which costs."""
    track = {"pg_stat_statements.track": "all", "pg_stat_statements.track_planning": "on"} if nested else {}
    with EmbeddedServer(settings=settings() | track) as server:
        yield Server(server.start(), over_tcp=over_tcp)


async def _register_tasks(dsn: str) -> None:
    """Let a process register the tasks, or what is enqueued goes to the default queue until a worker moves it."""
    async with Conductor(dsn) as app:
        register(app, lambda _: None)
        orchestrator = Orchestrator(app, queues={QUEUE: 1})
        await orchestrator.start()
        await orchestrator.stop()


def _text(cursor: psycopg.Cursor[Any]) -> str:
    row = cursor.fetchone()
    return str(row[0]) if row else ""
