"""`timeout=` of a task: the running time of one run, not of the whole; and what it leaves behind."""

import asyncio
import threading

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import AttemptTimeout, Conductor, Context, ExecutionFailed, RetryPolicy, SyncContext
from tests.integration.conftest import Working

App = Conductor[None]
Db = psycopg.Connection[DictRow]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


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
    @app.task(timeout=5, max_attempts=1)
    async def work(ctx: Context) -> int:
        for n in range(3):
            await ctx.sleep(f"nap-{n}", 0.2)
        return ctx.attempt

    async with working():
        assert await (await work.invoke()).result(20) == 1


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

    @app.task(timeout=0.3, retry=AT_ONCE)
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
