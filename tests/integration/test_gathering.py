"""Calls that are made at the same time: what delays or refuses one concerns the others as little as can be."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import msgspec
import psycopg
import pytest

from pgconductor import Conductor, Context, Task, client, gathering, pool
from pgconductor.errors import ConductorError, ServerError
from tests.integration.conftest import client_of
from tests.sql.support import Db
from tests.waiting import until

ALIKE = "enqueue_alike(uuid[], text, text, smallint, json, text, boolean, timestamptz)"


WAITING = "from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"


async def add(ctx: Context, a: int, b: int = 1) -> int:
    return a + b


def numbers(db: Db) -> list[int]:
    return sorted(row["payload"]["a"] for row in db.execute("select payload from executions"))


def waiting_count(db: Db) -> int:
    return len(db.execute(f"select pid {WAITING}").fetchall())


def break_alike(db: Db, body: str) -> None:
    """Let the function that enqueues calls of one kind do something else."""
    db.execute(f"drop function pgconductor.{ALIKE}".encode())
    db.execute(f"create function pgconductor.{ALIKE} returns json language plpgsql as $$ begin {body}; end $$".encode())


@asynccontextmanager
async def locked(dsn: str) -> AsyncGenerator[None]:
    """Let every enqueue wait."""
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        await other.execute("lock table pgconductor.execution in access exclusive mode")
        yield


async def outcomes(task: Task[..., Any], count: int) -> list[Any]:
    async with asyncio.timeout(60):
        answers: list[Any] = await asyncio.gather(*(task.invoke(n) for n in range(count)), return_exceptions=True)
        return answers


async def test_calls_that_wait_for_a_key_of_another_transaction_delay_no_others(
    app: Conductor, db: Db, database: str
) -> None:
    plain = app.create_task(add)
    await plain.invoke(0)  # a task that is new belongs to the transaction that made it
    keyed = plain.with_options(dedupe_key="k")
    async with await psycopg.AsyncConnection.connect(database) as caller:
        first = await app.invoke(keyed.bind(1), conn=caller)
        waiting = [asyncio.create_task(keyed.invoke(n)) for n in range(2, 6)]
        waiting.append(asyncio.create_task(keyed.with_options(on_duplicate="replace").invoke(6)))
        await until(lambda: waiting_count(db) == client.KEYED_STATEMENTS_MAX)
        async with asyncio.timeout(60):
            await asyncio.gather(*(plain.invoke(n) for n in range(10, 30)))
            await app.invoke_many([plain.bind(30), plain.with_options(priority=1).bind(31)])
        assert not any(task.done() for task in waiting)
        await caller.commit()
    assert {(await task).id for task in waiting} == {first.id}
    assert numbers(db) in ([0, n, *range(10, 32)] for n in (1, 6))


async def test_a_key_whose_transaction_does_not_end_is_reported_and_other_keys_are_enqueued(
    app: Conductor, db: Db, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "KEY_SECONDS_MAX", 0.05)
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.2)
    task = app.create_task(add)
    await task.invoke(0)
    async with await psycopg.AsyncConnection.connect(database) as caller:
        await app.invoke(task.with_options(dedupe_key="k").bind(1), conn=caller)
        keys = ["k", "k", "k", "x", "y", "z"]
        calls = [task.with_options(dedupe_key=key).invoke(n) for n, key in enumerate(keys)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [isinstance(each, ServerError) for each in answers] == [True, True, True, False, False, False]
        assert "another transaction holds what is needed" in str(answers[0])
        assert "dedupe_key" in str(answers[0])
        await caller.rollback()
    assert numbers(db) == [0, 3, 4, 5]


async def test_a_new_task_whose_transaction_does_not_end_is_reported(
    app: Conductor, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.2)
    task = app.create_task(add)
    async with await psycopg.AsyncConnection.connect(database) as caller:
        await app.invoke(task.bind(1), conn=caller)
        answers = await outcomes(task, 3)
        await caller.commit()
    assert ["another transaction holds" in str(each) for each in answers] == [True] * 3
    assert isinstance((await outcomes(task, 1))[0].id, UUID)


async def test_an_answer_that_cannot_be_read_is_told_to_all_who_wait_for_it(app: Conductor, db: Db) -> None:
    break_alike(db, """return '{"queues": "none"}'""")
    answers = await outcomes(app.create_task(add), 50)
    assert [type(each) for each in answers[1:]] == [msgspec.ValidationError] * 49


async def test_a_server_that_is_full_is_reported_after_one_patience_for_all(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "PATIENCE_SECONDS", 0.2)
    break_alike(db, "raise 'no space left' using errcode = '53100'")
    answers = await outcomes(app.create_task(add), 200)
    assert sum(isinstance(each, ServerError) for each in answers) == 199
    assert client_of(app).pool.query_count < 40
    assert len(numbers(db)) == 1


async def test_calls_of_a_refused_statement_are_not_sent_by_themselves_for_ever(
    app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "SINGLY_SECONDS_MAX", -1.0)
    break_alike(db, "raise 'no' using errcode = '22000'")
    answers = await outcomes(app.create_task(add), 20)
    assert [isinstance(each, ServerError) for each in answers] == [False] + [True] * 19


async def test_a_call_that_is_cancelled_before_it_is_sent_is_not_sent(app: Conductor, db: Db, database: str) -> None:
    task = app.create_task(add)
    async with locked(database):
        calls = [asyncio.create_task(task.invoke(n)) for n in range(6)]
        await until(lambda: waiting_count(db) == client.STATEMENTS_MAX)
        late = [asyncio.create_task(task.invoke(n)) for n in range(6, 9)]
        await asyncio.sleep(0)
        late[1].cancel()
    await asyncio.gather(*calls, late[0], late[2])
    assert numbers(db) == [0, 1, 2, 3, 4, 5, 6, 8]


async def test_an_end_that_cannot_be_read_is_told_to_who_waits_for_it(app: Conductor, db: Db) -> None:
    run = await app.create_task(add).invoke(1)
    (found,) = db.execute(
        "select oid::regprocedure::text as name from pg_proc where proname = 'watch_results'"
    ).fetchall()
    db.execute(f"drop function {found['name']}".encode())
    db.execute(f"create function {found['name']} returns setof json language sql as $$ select '[]'::json $$".encode())
    async with asyncio.timeout(60):
        with pytest.raises(msgspec.ValidationError):
            await run.result()


async def test_a_connection_in_use_while_the_pool_is_closed_is_not_kept(app: Conductor, db: Db, database: str) -> None:
    task = app.create_task(add)
    async with locked(database):
        call = asyncio.create_task(task.invoke(1))
        await until(lambda: waiting_count(db) == 1)
        (busy,) = db.execute(f"select pid {WAITING}").fetchall()
        await client_of(app).pool.close()
    await call
    await until(lambda: not db.execute("select from pg_stat_activity where pid = %s", (busy["pid"],)).fetchall())
    await task.invoke(2)


def test_a_call_while_the_process_exits_is_refused() -> None:
    background = client.Background()
    assert background.run(asyncio.sleep(0, 7)) == 7
    background.stop()
    with pytest.raises(ConductorError, match="exiting"):
        background.run(asyncio.sleep(0))
