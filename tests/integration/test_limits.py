"""Limits, where users meet them: just below works, just above is refused at the call or the operation itself."""

import asyncio
import logging
from typing import Any

import psycopg
import pytest

from pgconductor import Conductor, Context, Orchestrator, RetryPolicy, SyncContext
from pgconductor.codec import VALUE_BYTES_MAX
from pgconductor.errors import ConfigurationError, EncodeError, ExecutionFailed
from tests.integration.conftest import Working

App = Conductor[None]
Db = psycopg.Connection[dict[str, Any]]


def count(db: Db, table: str) -> int:
    found = db.execute(f"select count(*) as count from {table}".encode()).fetchone()  # noqa: S608
    assert found is not None
    return int(found["count"])


@pytest.mark.covers("F59")
async def test_a_payload_over_a_mebibyte_never_reaches_the_database(app: App, db: Db) -> None:
    @app.task
    async def work(ctx: Context, text: str) -> None: ...

    room = VALUE_BYTES_MAX - len('{"text":""}')
    await work.invoke("x" * room)
    for size in (room + 1, 100 * 1024 * 1024):
        with pytest.raises(EncodeError, match="at most 1048576 are allowed"):
            await work.invoke("x" * size)
    with pytest.raises(EncodeError):
        await app.invoke_many([work.bind("small"), work.bind("x" * (room + 1))])
    assert count(db, "execution") == 1


@pytest.mark.covers("F59")
@pytest.mark.parametrize("kind", ["step", "plain step", "transaction", "result"])
async def test_a_value_of_a_mebibyte_is_stored_and_one_byte_more_fails_the_execution_alone(
    app: App, working: Working, kind: str
) -> None:
    async def write(conn: psycopg.AsyncConnection[Any], size: int) -> str:
        return "x" * size

    @app.task(name="async")
    async def coroutine(ctx: Context, size: int) -> str:
        if kind == "step":
            await ctx.step("big", lambda: "x" * size)
        elif kind == "transaction":
            await ctx.transaction("big", write, size)
        return "x" * size if kind == "result" else "small"

    @app.task(name="plain")
    def plain(ctx: SyncContext, size: int) -> str:
        ctx.step("big", lambda: "x" * size)
        return "small"

    task = plain if kind == "plain step" else coroutine
    fits, exceeds = await app.invoke_many([task.bind(VALUE_BYTES_MAX - 2), task.bind(VALUE_BYTES_MAX - 1)])
    async with working():
        assert await fits.result(30)
        with pytest.raises(ExecutionFailed, match=r"1048577 bytes of JSON") as caught:
            await exceeds.result(30)
    assert caught.value.error_type == "pgconductor.errors.EncodeError"


@pytest.mark.covers("F61")
async def test_names_of_200_bytes_are_accepted_and_longer_or_unprintable_ones_refused(app: App, db: Db) -> None:
    refused: list[str] = []

    @app.task(name="n" * 200, queue="q" * 200)
    async def work(ctx: Context) -> None:
        await ctx.step("s" * 200, lambda: 1)
        for name in ("s" * 201, "é" * 101, "", "a\nb", "\u202e"):
            try:
                await ctx.step(name, lambda: 1)
            except ConfigurationError as error:
                refused.append(error.remedy)

    await work.with_options(dedupe_key="k" * 200).invoke()
    for key in ("k" * 201, "é" * 101):
        with pytest.raises(ConfigurationError, match="give 1 to 200"):
            work.with_options(dedupe_key=key)
    await Orchestrator(app).drain()
    assert len(refused) == 5
    assert [each["name"] for each in db.execute("select name from steps")] == ["s" * 200]


@pytest.mark.covers("F72")
async def test_many_children_wake_their_parent_once_and_more_than_ten_thousand_are_refused(app: App, db: Db) -> None:
    runs: list[str] = []

    @app.task
    async def child(ctx: Context, n: int) -> int:
        return n

    @app.task
    async def parent(ctx: Context, n: int) -> int:
        runs.append("run")
        return sum(await ctx.invoke_all("all", [child.bind(i) for i in range(n)]))

    fits, exceeds = await app.invoke_many([parent.bind(1_000), parent.bind(10_001)])
    await Orchestrator(app, concurrency=100).drain()
    with pytest.raises(ExecutionFailed, match=r"10,?000"):
        await exceeds.result(10)
    assert await fits.result(10) == sum(range(1_000))
    assert len(runs) == 3
    assert count(db, "execution") == 1_002
    woken = "select 1 from audit.history where execution_id = %s and from_state = 'waiting'"
    assert db.execute(woken, (fits.id,)).rowcount == 1


@pytest.mark.covers("F73")
async def test_two_tasks_that_invoke_each_other_end_at_depth_100_and_the_error_names_every_level(
    app: App, db: Db
) -> None:
    one, two = (app.define_task(name, dict[str, int], int) for name in ("one", "two"))

    @app.task(name="one")
    async def first(ctx: Context, n: int) -> int:
        return await ctx.invoke("down", two.bind({"n": n + 1}))

    @app.task(name="two")
    async def second(ctx: Context, n: int) -> int:
        return await ctx.invoke("down", one.bind({"n": n + 1}))

    run = await first.invoke(0)
    await Orchestrator(app).drain()
    with pytest.raises(ExecutionFailed, match="maximum depth of 100 reached") as caught:
        await run.result(10)
    assert caught.value.message.count("Child execution failed: ") == 100
    failed = db.execute("select task, count(*) from failed_executions group by 1 order by 1").fetchall()
    assert [tuple(each.values()) for each in failed] == [("one", 51), ("two", 50)]


@pytest.mark.covers("F73")
async def test_a_task_reached_twice_in_one_tree_is_no_recursion(app: App) -> None:
    @app.task
    async def leaf(ctx: Context) -> int:
        return 1

    @app.task
    async def side(ctx: Context) -> int:
        return await ctx.invoke("leaf", leaf.bind())

    @app.task
    async def top(ctx: Context) -> int:
        left, right = await asyncio.gather(ctx.invoke("left", side.bind()), ctx.invoke("right", side.bind()))
        return left + right

    run = await top.invoke()
    await Orchestrator(app).drain()
    assert await run.result(10) == 2


@pytest.mark.covers("F71")
async def test_a_storm_of_failures_stands_in_nobody_s_way_and_comes_back_spread(
    app: App, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "pgconductor.attempt")

    @app.task(max_attempts=2, retry=RetryPolicy(first="1h"))
    async def broken(ctx: Context) -> None:
        raise ValueError("the service is down")

    @app.task
    async def healthy(ctx: Context, n: int) -> int:
        return n

    await app.invoke_many([broken.bind() for _ in range(2_000)])
    runs = await app.invoke_many([healthy.bind(n) for n in range(100)])
    orchestrator = Orchestrator(app, concurrency=50)
    await orchestrator.drain()
    assert [await run.result(10) for run in runs] == list(range(100))
    states = db.execute("select task, state, count(*) from executions group by 1, 2 order by 1").fetchall()
    assert [tuple(each.values()) for each in states] == [("broken", "scheduled", 2_000), ("healthy", "completed", 100)]
    assert count(db, "ready") == 0  # what waits for its next attempt stands before nobody
    spread = "select max(due_at) - min(due_at) > interval '5 minutes' as wide, count(distinct due_at) as n from timer"
    found = db.execute(spread).fetchone()
    assert found is not None
    assert found["wide"]
    assert found["n"] > 1_900
