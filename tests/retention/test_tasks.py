"""keep_completed and keep_failed, as tasks declare them and callers meet them."""

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor, Context, ExecutionNotFound, Fail, Orchestrator
from pgconductor.membership import Timing
from tests.integration.conftest import Working
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[dict[str, Any]]


async def test_what_tasks_declare_is_what_the_database_knows(app: App, db: Db, working: Working) -> None:
    @app.task
    async def plain(ctx: Context) -> None: ...

    @app.task(keep_completed="2h", keep_failed=True)
    async def both(ctx: Context) -> None: ...

    @app.task(keep_completed=False, keep_failed=timedelta(days=1))
    async def nothing(ctx: Context) -> None: ...

    async with working():
        rows = db.execute("select name, keep_completed_for, keep_failed_for from task").fetchall()
    assert {row["name"]: (row["keep_completed_for"], row["keep_failed_for"]) for row in rows} == {
        "plain": (timedelta(days=7), timedelta(days=30)),
        "both": (timedelta(hours=2), None),
        "nothing": (timedelta(0), timedelta(days=1)),
    }


async def test_who_waits_for_what_is_removed_at_once_gets_its_value(app: App, db: Db, working: Working) -> None:
    somebody_waits = asyncio.Event()

    @app.task(keep_completed=False)
    async def add(ctx: Context, a: int, b: int) -> int:
        await somebody_waits.wait()
        return a + b

    async with working():
        result = asyncio.create_task((await add.invoke(2, 3)).result(20))
        await until(lambda: bool(db.execute("select from watch").fetchall()))
        somebody_waits.set()
        assert await result == 5


async def test_the_result_of_a_removed_execution_is_not_found(app: App, db: Db, working: Working) -> None:
    @app.task(keep_completed=False)
    async def quick(ctx: Context) -> int:
        return 1

    async with working():
        run = await quick.invoke()
        await until(lambda: not db.execute("select from execution where id = %s", (run.id,)).fetchall())
        with pytest.raises(ExecutionNotFound):
            await run.result(20)


async def test_a_running_process_prunes(app: App, db: Db) -> None:
    @app.task(keep_failed=False)
    async def hopeless(ctx: Context) -> None:
        raise Fail("no")

    orchestrator = Orchestrator(app, _timing=Timing(beat=0.05, expiry=20, sweep=0.05))
    await orchestrator.start()
    run = await hopeless.invoke()
    await until(lambda: not db.execute("select from execution where id = %s", (run.id,)).fetchall())
    await orchestrator.stop()
