"""Pruning as hard as can be while trees run: nothing of a live tree goes, and what is due does."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor, Context
from tests.integration.conftest import Working
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[dict[str, Any]]
TREES = 40
LOOK_AT = """
    insert into prune_later (execution_id, look_at)
    select id, '-infinity' from execution where {} and parent_id is null
    on conflict (execution_id) do update set look_at = excluded.look_at"""


@contextlib.asynccontextmanager
async def pruning(dsn: str) -> AsyncGenerator[None]:
    """Prune all the time, and kill the session that does it now and then."""
    options = "-c search_path=pgconductor,pg_temp"

    async def prune() -> None:
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                async with await psycopg.AsyncConnection.connect(dsn, autocommit=True, options=options) as conn:
                    for _ in range(20):
                        await conn.execute(LOOK_AT.format("outcome is null").encode())
                        await conn.execute("select prune(5, 4)")
                    await conn.execute("begin")
                    await conn.execute("select prune(5, 4)")
                    await conn.execute("select pg_terminate_backend(pg_backend_pid())")

    running = asyncio.create_task(prune())
    yield
    running.cancel()
    await asyncio.wait([running])


@pytest.mark.covers("F76")
@pytest.mark.fault
async def test_no_part_of_a_live_tree_is_removed(database: str, app: App, db: Db, working: Working) -> None:
    @app.task(keep_completed=False)
    async def leaf(ctx: Context, n: int) -> int:
        return await ctx.step("n", lambda: n)

    @app.task(keep_completed="1ms")
    async def middle(ctx: Context, n: int) -> int:
        return sum(await ctx.invoke_all("leaves", [leaf.bind(n), leaf.bind(n + 1)], max_in_flight=1))

    @app.task(keep_completed="1ms")
    async def root(ctx: Context, n: int) -> int:
        first = await ctx.invoke("first", middle.bind(n))
        await ctx.sleep("nap", 0.01)
        again = await ctx.invoke("again", middle.bind(n))
        results.append(first + again - 4 * n)
        return 0

    results: list[int] = []
    async with pruning(database), working(concurrency=5):
        await app.invoke_many([root.bind(n) for n in range(TREES)])
        await until(lambda: len(results) == TREES)
        await until(lambda: not db.execute("select from execution where outcome is null").fetchall())
    assert results == [2] * TREES
    db.execute(LOOK_AT.format("outcome is not null").encode())
    while db.execute("select from execution").fetchall():
        db.execute("select prune(5, 4)")
    assert not db.execute("select from step").fetchall()
