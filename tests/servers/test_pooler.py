"""Everything through a PgBouncer in transaction mode, where no two transactions need share a session."""

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgconductor import (
    Change,
    Conductor,
    Context,
    ExecutionCancelled,
    ExecutionNotFound,
    Orchestrator,
    SyncContext,
    schema,
    table,
)
from pgconductor.cli import main
from pgconductor.engine import Engine
from pgconductor.membership import Timing
from pgconductor.notify import Listener
from pgconductor.session import Session
from pgconductor.vacuum import hold_off_vacuum
from tests.servers import pgbouncer
from tests.servers.pgbouncer import Pooler, pooled
from tests.sql.support import Db
from tests.waiting import until

pytestmark = [
    pytest.mark.covers("F48"),
    pytest.mark.skipif(bool(pgbouncer.MISSING), reason=pgbouncer.MISSING),
]
POOL_SIZE = 3
TIMING = Timing(beat=0.2, expiry=4.0, sweep=0.2)


@pytest.fixture(params=[pgbouncer.REFUSING, pgbouncer.IGNORING], ids=["refuses options", "ignores options"])
def pooler(request: pytest.FixtureRequest, server: str) -> Iterator[Pooler]:
    """A pooler that refuses start-up options, and one that drops them in silence."""
    with pooled(server, ignored=request.param, pool_size=POOL_SIZE) as running:
        yield running


@pytest.fixture
def dsn(pooler: Pooler, database: str) -> str:
    """The address of the test's database through the pooler."""
    return pooler.address(str(conninfo_to_dict(database)["dbname"]))


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[Conductor]:
    """An app that reaches its database through the pooler only."""
    async with Conductor(dsn) as conductor:
        yield conductor


def sessions(dsn: str, query: str) -> list[tuple[Any, ...]]:
    """Ask each of the pooler's sessions, which open transactions keep apart."""
    found: list[tuple[Any, ...]] = []
    with ExitStack() as stack:
        for _ in range(POOL_SIZE):
            conn = stack.enter_context(psycopg.connect(dsn, prepare_threshold=None))
            found += conn.execute(query.encode()).fetchall()
    return found


def define_tree(app: Conductor) -> Any:
    @app.task
    async def leaf(ctx: Context, number: int) -> int:
        return await ctx.step("double", lambda: 2 * number)

    @app.task
    async def tree(ctx: Context, number: int) -> int:
        await ctx.sleep("nap", 0.01)
        values = await ctx.invoke_all("leaves", [leaf.bind(number), leaf.bind(1)])
        await ctx.transaction("note", write, number)
        return sum(values)

    async def write(conn: psycopg.AsyncConnection[Any], number: int) -> None:
        await conn.execute("insert into public.effect values (%s)", [number])

    return tree


async def test_two_workers_and_their_clients_work_and_nothing_is_left_in_any_session(
    app: Conductor, dsn: str, db: Db
) -> None:
    db.execute("create table public.effect (number int)")
    tree = define_tree(app)
    runs = await app.invoke_many([tree.bind(number) for number in range(40)])
    async with Orchestrator(app, _timing=TIMING), Orchestrator(app, _timing=TIMING):
        assert await asyncio.gather(*(run.result(60) for run in runs)) == [2 * number + 2 for number in range(40)]
    assert db.execute("select from executions where state <> 'completed' or attempt <> 1 or crashes <> 0").rowcount == 0
    assert db.execute("select from public.effect").rowcount == 40
    state = """
        select (select count(*) from pg_prepared_statements), (select count(*) from pg_listening_channels()),
               current_setting('search_path'), current_setting('idle_in_transaction_session_timeout')"""
    assert sessions(dsn, state) == [(0, 0, '"$user", public', "0")] * POOL_SIZE
    locks = "select from pg_locks l join pg_database d on d.oid = l.database where l.locktype = 'advisory'"
    assert db.execute(f"{locks} and d.datname = current_database()".encode()).rowcount == 0


async def test_calls_read_committed_whatever_the_sessions_default(app: Conductor, dsn: str, db: Db) -> None:
    db.execute(f'alter database "{db.info.dbname}" set default_transaction_isolation = serializable'.encode())
    db.execute("create table public.effect (number int)")
    tree = define_tree(app)

    @app.task
    async def ask(ctx: Context) -> list[str]:
        return await ctx.transaction("ask", levels)

    async def levels(conn: psycopg.AsyncConnection[Any]) -> list[str]:
        names = ("transaction_isolation", "idle_in_transaction_session_timeout")
        rows = [await (await conn.execute("select current_setting(%s)", [name])).fetchone() for name in names]
        return [str(row[0]) for row in rows if row]

    asked, *runs = [await ask.invoke(), *await app.invoke_many([tree.bind(number) for number in range(20)])]
    await asyncio.gather(*(Orchestrator(app, _timing=TIMING).drain() for _ in range(2)))
    assert await asked.result(5) == ["read committed", "1min"]
    assert {await run.state() for run in runs} == {"completed"}


@pytest.mark.parametrize("attrs", [None, "read-write"])
async def test_it_installs_and_works_where_the_sessions_default_is_to_read_only(
    pooler: Pooler, server: str, attrs: str | None
) -> None:
    name = f"pgconductor_empty_{uuid4().hex[:16]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'create database "{name}"'.encode())
        admin.execute(f'alter database "{name}" set default_transaction_read_only = on'.encode())
        async with Conductor(make_conninfo(pooler.address(name), target_session_attrs=attrs)) as app:

            @app.task
            async def double(ctx: Context, number: int) -> int:
                return await ctx.step("double", lambda: 2 * number)

            await app.migrate()
            async with Orchestrator(app, _timing=TIMING):
                assert await (await double.invoke(7)).result(60) == 14
        admin.execute(f'drop database "{name}" with (force)'.encode())


async def test_a_plain_handler_has_its_transaction_too(app: Conductor, db: Db) -> None:
    db.execute("create table public.effect (number int)")

    @app.task
    def work(ctx: SyncContext) -> None:
        ctx.transaction("note", lambda conn: conn.execute("insert into public.effect values (7)") and None)

    run = await work.invoke()
    await Orchestrator(app).drain()
    assert await run.state() == "completed"
    assert db.execute("select from public.effect where number = 7").rowcount == 1


async def test_an_error_of_the_engine_leaves_the_connection_usable(dsn: str) -> None:
    engine, session = Engine("pgconductor"), Session(dsn)
    for _ in range(3):
        with pytest.raises(psycopg.errors.CheckViolation):
            await session.run(engine.register_queues(["x" * 300]))
        wire = session._wire
        assert await session.run(engine.register_queues(["a"]))
        assert session._wire is wire
        assert session.route.is_pooled
    await session.close()


async def test_no_hint_is_waited_for_and_nothing_is_listened_to(dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pgconductor.notify")
    listener = Listener(dsn, "pgconductor", lambda _kind, _words: None)
    listener.start()
    await until(lambda: listener.is_pooled and bool(caplog.records))
    assert (listener.is_live, listener.error_count) == (False, 0)
    assert [record.getMessage() for record in caplog.records] == ["no hints through a pooler; polling instead"]
    assert sessions(dsn, "select count(*) from pg_listening_channels()") == [(0,)] * POOL_SIZE
    await listener.stop()


async def test_a_running_execution_is_cancelled_by_the_next_beat(app: Conductor) -> None:
    begun = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with Orchestrator(app, _timing=TIMING):
        run = await work.invoke()
        await begun.wait()
        assert await run.cancel()
        with pytest.raises(ExecutionCancelled):
            await run.result(30)
        assert await run.state() == "cancelled"


async def test_an_invoke_commits_with_the_callers_transaction(app: Conductor, dsn: str) -> None:
    @app.task
    async def work(ctx: Context, number: int) -> int:
        return number

    async with await psycopg.AsyncConnection.connect(dsn, prepare_threshold=None) as conn:
        gone = await app.invoke(work.bind(1), conn=conn)
        await conn.rollback()
        run = await app.invoke(work.bind(2), conn=conn)
        await conn.commit()
    await Orchestrator(app).drain()
    assert await run.result(5) == 2
    with pytest.raises(ExecutionNotFound):
        await gone.state()


async def test_row_changes_start_executions(app: Conductor, dsn: str, db: Db) -> None:
    db.execute("create table public.contact (id int, email text)")
    seen: list[Any] = []

    @app.task(on=table("public.contact", "insert", columns=["id"], when="new.id > 1"))
    async def work(ctx: Context, change: Change[dict[str, Any]]) -> None:
        seen.append(change.new)

    async with Orchestrator(app, _timing=TIMING):
        with psycopg.connect(dsn, prepare_threshold=None) as conn:
            conn.execute("insert into public.contact values (1, 'a'), (2, 'b')")
        await until(lambda: len(seen) == 1)


async def test_workers_outlive_their_pooler(app: Conductor, pooler: Pooler, db: Db) -> None:
    db.execute("create table public.effect (number int)")
    tree = define_tree(app)
    async with Orchestrator(app, _timing=TIMING):
        runs = await app.invoke_many([tree.bind(number) for number in range(40)])
        await until(lambda: db.execute("select from public.effect").rowcount > 5)
        await asyncio.to_thread(pooler.restart)
        await asyncio.gather(*(run.result(60) for run in runs))
    assert db.execute("select from public.effect").rowcount == 40


def test_doctor_tells_of_the_pooler(dsn: str) -> None:
    found = CliRunner().invoke(main, ["--dsn", dsn, "doctor", "--json"], catch_exceptions=False)
    (hints,) = [check for check in json.loads(found.stdout) if check["name"] == "hints"]
    assert hints["verdict"] == "warning"
    assert hints["found"] == "a pooler stands in front: there is no LISTEN, so workers and waiting clients poll"


async def test_nobody_holds_off_autovacuum_on_a_session_of_the_pooler(app: Conductor, dsn: str) -> None:
    await app.migrate()
    assert await hold_off_vacuum(dsn, app.engine) is False


def test_migrations_are_right_through_a_pooler(pooler: Pooler, server: str) -> None:
    name = f"pgconductor_empty_{uuid4().hex[:16]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'create database "{name}"'.encode())
        dsn = pooler.address(name)
        several = [threading.Thread(target=schema.migrate, args=[dsn, each]) for each in ("a", "b", "a")]
        for thread in several:
            thread.start()
        for thread in several:
            thread.join()
        with psycopg.connect(make_conninfo(server, dbname=name), autocommit=True) as conn:
            assert [schema.plan(conn, each) for each in ("a", "b")] == [[], []]
        state = "select (select count(*) from pg_prepared_statements), current_setting('check_function_bodies')"
        assert sessions(dsn, state) == [(0, "on")] * POOL_SIZE
        admin.execute(f'drop database "{name}" with (force)'.encode())
