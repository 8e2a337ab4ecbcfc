"""`ctx.transaction`: each function begins on a session like new, and one that loses its connection each time ends."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, TypeAlias
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row
from psycopg.types.string import TextLoader

from pgconductor import Conductor, Context, ExecutionFailed, RetryPolicy, SyncContext
from tests.integration.conftest import Working
from tests.waiting import until

App: TypeAlias = Conductor[None]
Db: TypeAlias = psycopg.Connection[DictRow]
Answers: TypeAlias = Generator[str, Any, Any]
Body: TypeAlias = Callable[[Any], Answers]
"""The function of a transaction, async or plain: it yields statements, and is sent the first row of each answer."""
Perform: TypeAlias = Callable[..., Coroutine[Any, Any, list[Any]]]

WHO = "select pg_backend_pid()"
LOST_MAX = 5


async def transact(conn: Any, body: Body) -> Any:
    answers, row = body(conn), None
    while True:
        try:
            statement = answers.send(row)
        except StopIteration as end:
            return end.value
        cursor = await conn.execute(statement)
        row = await cursor.fetchone() if cursor.description else None


def transact_plainly(conn: Any, body: Body) -> Any:
    answers, row = body(conn), None
    while True:
        try:
            statement = answers.send(row)
        except StopIteration as end:
            return end.value
        cursor = conn.execute(statement)
        row = cursor.fetchone() if cursor.description else None


@pytest.fixture(params=["async", "plain"])
def perform(app: App, working: Working, request: pytest.FixtureRequest) -> Perform:
    """`await perform(body, body)`: a handler gives each a transaction in turn; what they returned."""
    bodies: list[Body] = []

    @app.task(max_attempts=2, retry=RetryPolicy(first=0.01))
    async def work(ctx: Context) -> list[Any]:
        return [await ctx.transaction(f"{n}", transact, body) for n, body in enumerate(bodies)]

    @app.task(max_attempts=2, retry=RetryPolicy(first=0.01))
    def work_plainly(ctx: SyncContext) -> list[Any]:
        return [ctx.transaction(f"{n}", transact_plainly, body) for n, body in enumerate(bodies)]

    async def perform(*given: Body) -> list[Any]:
        bodies.extend(given)
        async with working():
            return await (await (work if request.param == "async" else work_plainly).invoke()).result(30)

    return perform


def ask(statement: str) -> Body:
    def body(_conn: Any) -> Answers:
        (pid,) = yield WHO
        (answer,) = yield statement
        return [pid, answer]

    return body


def leave(statement: str) -> Body:
    def body(_conn: Any) -> Answers:
        (pid,) = yield WHO
        yield statement
        return pid

    return body


# ---------------------------------------------------------------- each begins anew


async def test_the_factories_that_a_function_sets_are_its_own(perform: Perform) -> None:
    def set_factories(conn: Any) -> Answers:
        conn.row_factory = dict_row
        is_async = isinstance(conn, psycopg.AsyncConnection)
        conn.cursor_factory = psycopg.AsyncClientCursor if is_async else psycopg.ClientCursor
        row = yield "select pg_backend_pid() as pid"
        return row["pid"]

    pid, (same, answer) = await perform(set_factories, ask("select 1"))
    assert (same, answer) == (pid, 1)


async def test_the_loaders_that_a_function_registers_are_its_own(perform: Perform) -> None:
    def register(conn: Any) -> Answers:
        conn.adapters.register_loader("int4", TextLoader)
        (pid,) = yield WHO
        return pid

    pid, (same, answer) = await perform(register, ask("select 1"))
    assert (str(same), answer) == (pid, 1)


@pytest.mark.parametrize(
    ("statement", "question", "answer"),
    [
        ("set search_path = nowhere", "show search_path", '"$user", public'),
        ("set idle_in_transaction_session_timeout = 0", "show idle_in_transaction_session_timeout", "1min"),
        ("set default_transaction_read_only = on", "show transaction_read_only", "off"),
        ("create temp table remains (n int)", "select to_regclass('pg_temp.remains') is not null", False),
        ("select pg_advisory_lock(7)", "select count(*) from pg_locks where pid = pg_backend_pid() and objid = 7", 0),
        ("listen remains", "select count(*) from pg_listening_channels()", 0),
        ("prepare remains as select 1", "select count(*) from pg_prepared_statements", 0),
        ("declare remains cursor with hold for select 1", "select count(*) from pg_cursors where is_holdable", 0),
    ],
    ids=["setting", "start-up option", "read-only", "temporary table", "lock", "listen", "prepared", "cursor"],
)
async def test_what_a_function_leaves_in_the_session_is_gone(
    perform: Perform, statement: str, question: str, answer: object
) -> None:
    pid, found = await perform(leave(statement), ask(question))
    assert found == [pid, answer]


@pytest.fixture
def superuser(db: Db) -> Iterator[str]:
    """Another role, as which the engine can still save."""
    name = f"other_{uuid4().hex[:12]}"
    db.execute(f"create role {name} superuser".encode())
    yield name
    db.execute(f"drop role {name}".encode())


@pytest.mark.parametrize("statement", ["set role", "set session authorization"])
async def test_the_role_that_a_function_takes_is_laid_down(perform: Perform, superuser: str, statement: str) -> None:
    pid, found = await perform(leave(f"{statement} {superuser}"), ask(f"select current_user = '{superuser}'"))
    assert found == [pid, False]


async def test_a_function_may_let_psycopg_prepare_as_the_one_before_did(perform: Perform) -> None:
    def prepare(conn: Any) -> Answers:
        conn.prepare_threshold = 0
        (pid,) = yield WHO
        (count,) = yield "select count(*) from pg_prepared_statements"
        return [pid, count > 0]

    first, second = await perform(prepare, prepare)
    assert first == second
    assert first[1]


async def test_a_connection_that_a_function_keeps_leads_nowhere(perform: Perform) -> None:
    kept: list[Any] = []

    def keep(conn: Any) -> Answers:
        kept.append(conn)
        yield WHO

    def look(_conn: Any) -> Answers:
        yield WHO
        return kept[0].closed

    assert await perform(keep, look) == [None, True]
    with pytest.raises(psycopg.OperationalError, match="closed"):
        kept[0].cursor().connection.fileno()


async def test_a_session_that_was_ended_while_it_was_idle_is_not_used(perform: Perform, db: Db) -> None:
    pids: list[int] = []

    def note(_conn: Any) -> Answers:
        (pid,) = yield WHO
        pids.append(pid)

    def end_others(_conn: Any) -> Answers:
        (pid,) = yield WHO
        pids.append(pid)
        db.execute("select pg_terminate_backend(pid, 10000) from pg_stat_activity where pid = %s", (pids[0],))

    await perform(note, end_others, note)
    assert len(set(pids)) > 1


# ---------------------------------------------------------------- lost each time


async def test_a_function_that_loses_its_connection_each_time_fails_as_others_do(
    perform: Perform, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[int] = []

    def end_oneself(conn: Any) -> Answers:
        tries.append(1)
        db.execute("select pg_terminate_backend(%s, 10000)", (conn.info.backend_pid,))
        yield WHO

    with pytest.raises(ExecutionFailed) as caught:
        await perform(end_oneself)
    assert caught.value.error_type == "psycopg.errors.AdminShutdown"
    assert len(tries) == 2 * LOST_MAX
    lost = [record for record in caplog.records if "transaction '0' lost its connection" in record.getMessage()]
    assert len(lost) == 2 * LOST_MAX


async def test_a_function_that_closes_its_connection_fails_in_the_end(perform: Perform) -> None:
    tries: list[int] = []

    def close(conn: Any) -> Answers:
        tries.append(1)
        conn.pgconn.finish()
        yield WHO

    with pytest.raises(ExecutionFailed, match="closed"):
        await perform(close)
    assert len(tries) == 2 * LOST_MAX


def at_once(_failure_count: int) -> float:
    return 0.01


async def test_that_no_connection_is_to_be_had_is_waited_out(
    perform: Perform, db: Db, server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgconductor.transactions.backoff_seconds", at_once)
    caplog.set_level(logging.DEBUG, "pgconductor.transactions")
    tries: list[int] = []
    admin = psycopg.connect(server, autocommit=True)

    def let_in(answer: bool) -> None:
        admin.execute(f'alter database "{db.info.dbname}" allow_connections {answer}'.encode())

    async def open_again() -> None:
        await until(lambda: sum("no connection" in record.getMessage() for record in caplog.records) > 2 * LOST_MAX)
        let_in(True)

    def lock_oneself_out(conn: Any) -> Answers:
        tries.append(1)
        if len(tries) == 1:
            let_in(False)
            db.execute("select pg_terminate_backend(%s, 10000)", (conn.info.backend_pid,))
        yield WHO
        return len(tries)

    async with asyncio.TaskGroup() as group:
        group.create_task(open_again())
        done = group.create_task(perform(lock_oneself_out))
    admin.close()
    assert done.result() == [2]
