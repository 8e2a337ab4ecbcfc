"""Postgres goes away: workers never exit, nothing is lost, nothing is counted against an execution."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Generator
from functools import partial

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import Conductor, Context, Orchestrator
from pgconductor.embedded import EmbeddedServer
from pgconductor.membership import Timing
from tests.invariants import attach_audit, check_invariants
from tests.waiting import until

Db = psycopg.Connection[DictRow]
App = Conductor[None]
pytestmark = pytest.mark.fault
TIMING = Timing(beat=0.2, expiry=2.0, sweep=0.2)


@pytest.fixture
def own_server() -> Generator[EmbeddedServer]:
    """A server that the test may kill."""
    with EmbeddedServer() as server:
        yield server


@pytest.fixture
async def app(database: str) -> AsyncGenerator[App]:
    async with Conductor(database) as conductor:
        yield conductor


def tally(dsn: str) -> list[tuple[str, int, int]]:
    with psycopg.connect(dsn) as conn:
        check_invariants(conn)
        return conn.execute("select distinct state, attempt, crashes from pgconductor.executions").fetchall()


def is_at_most(db: Db, left: int) -> bool:
    return db.execute("select from execution where outcome is null").rowcount <= left


def is_at_least(ran: Counter[int], seen: int) -> bool:
    return len(ran) >= seen


async def test_terminated_backends_are_replaced(app: App, db: Db) -> None:
    @app.task
    async def work(ctx: Context, number: int) -> int:
        return await ctx.step("step", lambda: number)

    await app.invoke_many([work.bind(i) for i in range(3000)])
    orchestrator = Orchestrator(app, _timing=TIMING)
    draining = asyncio.create_task(orchestrator.drain())
    kill = (
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database()"
        " and application_name like 'pgconductor%' and application_name not like '%client%'"
    )
    for left in (2500, 2000, 1500, 1000, 500):
        await until(partial(is_at_most, db, left))
        await until(lambda: db.execute(kill).rowcount > 0)  # those of the last time may not be back yet
    await draining
    rows = db.execute("select state, attempt, crashes, count(*) from executions group by 1, 2, 3").fetchall()
    assert [tuple(row.values()) for row in rows] == [("completed", 1, 0, 3000)]


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_workers_outlive_a_restart(how: str, own_server: EmbeddedServer) -> None:
    dsn = own_server.start().dsn
    ran: Counter[int] = Counter()
    async with Conductor(dsn) as app:

        @app.task
        async def work(ctx: Context, number: int) -> None:
            ran[number] += 1

        await app.migrate()
        with psycopg.connect(dsn, autocommit=True) as conn:
            attach_audit(conn)
        await app.invoke_many([work.bind(i) for i in range(3000)])
        orchestrator = Orchestrator(app)
        draining = asyncio.create_task(orchestrator.drain())
        for seen in (500, 1500):
            await until(partial(is_at_least, ran, seen))
            await asyncio.to_thread(getattr(own_server, how))
            await asyncio.to_thread(own_server.start)
        await draining
    assert len(ran) == 3000
    assert tally(dsn) == [("completed", 1, 0)]


async def test_a_process_that_cannot_beat_fences_itself_and_joins_again(own_server: EmbeddedServer) -> None:
    dsn = own_server.start().dsn
    started, ended = asyncio.Event(), asyncio.Event()
    runs: list[str] = []
    async with Conductor(dsn) as app:

        @app.task
        async def work(ctx: Context) -> str:
            runs.append("run")
            if len(runs) == 1:
                started.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.set()
            return "done"

        await app.migrate()
        with psycopg.connect(dsn, autocommit=True) as conn:
            attach_audit(conn)
        run = await work.invoke()
        async with Orchestrator(app, _timing=TIMING) as orchestrator:
            old_id = orchestrator.id
            await started.wait()
            await asyncio.to_thread(own_server.stop)
            await asyncio.wait_for(ended.wait(), 60)
            await asyncio.to_thread(own_server.start)
            assert await run.result(timeout=60) == "done"
            assert orchestrator.is_running
            assert orchestrator.id != old_id
    assert len(runs) == 2
    assert tally(dsn) == [("completed", 1, 0)]
