"""`timeout=` of a task: the running time of one run; and which timeouts of children the next attempt does afresh."""

import asyncio
import threading

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import (
    AttemptTimeout,
    ChildFailed,
    ChildTimeout,
    Conductor,
    Context,
    ExecutionFailed,
    RetryPolicy,
    SyncContext,
)
from tests.integration.conftest import Working

App = Conductor[None]
Db = psycopg.Connection[DictRow]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


def rows(db: Db, query: str) -> list[DictRow]:
    return db.execute(query.encode()).fetchall()


@pytest.mark.covers("F27")
async def test_a_run_that_takes_too_long_fails_its_attempt(app: App, db: Db, working: Working) -> None:
    cleaned: list[int] = []

    @app.task(timeout=0.05, max_attempts=2, retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append(ctx.attempt)

    async with working():
        with pytest.raises(ExecutionFailed, match="ran longer than its timeout of 50ms") as caught:
            await (await work.invoke()).result(20)
    assert caught.value.error_type == "pgconductor.errors.AttemptTimeout"
    assert cleaned == [1, 2]


async def test_waiting_does_not_count(app: App, working: Working) -> None:
    @app.task(timeout=2, max_attempts=1)
    async def work(ctx: Context) -> int:
        await ctx.sleep("nap", 2.5)
        return ctx.attempt

    async with working():
        assert await (await work.invoke()).result(20) == 1


@pytest.mark.covers("F27")
async def test_a_plain_handler_that_outlives_its_run_is_refused_everything(app: App, db: Db, working: Working) -> None:
    timed_out, ended = threading.Event(), threading.Event()
    refused: list[str] = []

    @app.task(timeout=0.05, max_attempts=1)
    def work(ctx: SyncContext) -> None:
        timed_out.wait()
        try:
            ctx.step("late", lambda: 1)
        except BaseException as error:
            refused.append(type(error).__name__)
            raise
        finally:
            ended.set()

    async with working():
        with pytest.raises(ExecutionFailed) as caught:
            await (await work.invoke()).result(20)
        timed_out.set()
        await asyncio.to_thread(ended.wait)
    assert caught.value.error_type == "pgconductor.errors.AttemptTimeout"
    assert refused == ["Suspend"]
    assert db.execute("select from steps").rowcount == 0


async def test_the_steps_that_a_run_finished_in_time_stay(app: App, db: Db, working: Working) -> None:
    bodies: list[int] = []

    @app.task(timeout=2, retry=AT_ONCE)  # in which the step is saved on the busiest machine
    async def work(ctx: Context) -> int:
        await ctx.step("quick", lambda: bodies.append(1))
        if ctx.attempt == 1:
            await asyncio.Event().wait()
        return len(bodies)

    async with working():
        assert await (await work.invoke()).result(20) == 1


async def test_a_plain_handlers_step_has_a_timeout_even_in_the_only_slot(app: App, working: Working) -> None:
    release = threading.Event()

    @app.task
    def work(ctx: SyncContext) -> list[str | int | None]:
        patient = ctx.step_options(timeout=60)
        value = patient.step("quick", lambda: 7)
        try:
            ctx.step_options(timeout=0.05).step("slow", release.wait)
        except AttemptTimeout as timeout:
            return [value, timeout.step]
        finally:
            release.set()
        return []

    async with working(concurrency=1):
        assert await (await work.invoke()).result(20) == [7, "slow"]


# ---------------------------------------------------------------- timeouts of children


async def test_a_timeout_that_was_caught_stays_when_what_follows_fails(app: App, db: Db, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> None:
        await ctx.sleep("nap", "1h")

    @app.task(retry=AT_ONCE)
    async def parent(ctx: Context) -> int:
        try:
            await ctx.invoke("child", child.bind(), timeout=0.05)
        except ChildTimeout:
            if ctx.attempt == 1:
                raise ValueError("the fallback failed")  # noqa: B904
        return ctx.attempt

    async with working():
        assert await (await parent.invoke()).result(20) == 2
    assert len(rows(db, "select 1 from executions where task = 'child'")) == 1


@pytest.mark.covers("P19")
async def test_each_call_after_a_timeout_that_was_caught_has_a_deadline_of_its_own(
    app: App, db: Db, working: Working
) -> None:
    @app.task
    async def child(ctx: Context, seconds: int) -> str:
        await ctx.sleep("nap", seconds)
        return "in time"

    @app.task(max_attempts=1)
    async def parent(ctx: Context) -> list[str]:
        told: list[str] = []
        for name, seconds, limit in (("a", 3600, 0.05), ("b", 0, 3600), ("c", 3600, 0.05), ("d", 0, 3600)):
            try:
                told.append(await ctx.invoke(name, child.bind(seconds), timeout=limit))
            except ChildTimeout as timeout:
                told.append(str(timeout.execution_id))
        return told

    async with working():
        told = await (await parent.invoke()).result(60)
    query = "select e.id::text, e.state from executions e join steps s on s.child_id = e.id order by s.name"
    children = rows(db, query)
    assert told == [children[0]["id"], "in time", children[2]["id"], "in time"]
    assert [each["state"] for each in children] == ["cancelled", "completed"] * 2


@pytest.mark.parametrize("way", ["cause", "group"])
async def test_a_timeout_that_an_error_comes_from_is_invoked_afresh(
    app: App, db: Db, working: Working, way: str
) -> None:
    @app.task(max_attempts=1)
    async def broken(ctx: Context) -> None:
        raise ValueError("no")

    @app.task
    async def child(ctx: Context, attempt: int) -> int:
        await ctx.sleep("nap", "1h" if attempt == 1 else 0)
        return attempt

    @app.task(retry=AT_ONCE)
    async def parent(ctx: Context) -> int:
        try:
            return await ctx.invoke("child", child.bind(ctx.attempt), timeout=0.2 if ctx.attempt == 1 else 60)
        except ChildTimeout as timeout:
            if way == "cause":
                raise RuntimeError("late") from timeout
            try:
                await ctx.invoke("broken", broken.bind())
            except ChildFailed as failure:
                raise ExceptionGroup("both", [failure, timeout]) from None
        return 0

    async with working():
        assert await (await parent.invoke()).result(20) == 2
    assert len(rows(db, "select 1 from executions where task = 'child'")) == 2


async def test_an_error_with_attributes_like_ours_is_only_an_error(app: App, working: Working) -> None:
    class Odd(Exception):
        operation = ("GET", "/path")

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> int:
        if ctx.attempt == 1:
            raise Odd("odd")
        return ctx.attempt

    async with working():
        assert await (await work.invoke()).result(20) == 2


async def test_a_fan_out_done_afresh_sees_the_new_children_only(app: App, db: Db, working: Working) -> None:
    @app.task
    async def child(ctx: Context, n: int) -> int:
        await ctx.sleep("nap", "1h" if n < 0 else 0)
        return n

    @app.task(retry=AT_ONCE)
    async def parent(ctx: Context) -> list[int]:
        first = ctx.attempt == 1
        numbers = [1, 2, -3] if first else [4, 5]
        values = await ctx.invoke_all("all", [child.bind(n) for n in numbers], timeout=0.5 if first else 60)
        await ctx.sleep("resume", 0.01)
        return values

    async with working():
        assert await (await parent.invoke()).result(20) == [4, 5]
    assert len(rows(db, "select 1 from executions where task = 'child'")) == 5
