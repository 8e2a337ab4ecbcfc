"""Schedules from declaration to handler, with real workers; the expressions fire every second."""

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest

from pgconductor import Conductor, Context, Orchestrator, SyncContext, Tick, cron, invocable
from pgconductor.errors import ConfigurationError
from tests.integration.conftest import Working
from tests.sql.support import WORKER, call, claim, enqueue, register
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[dict[str, Any]]
EVERY_SECOND = "* * * * * *"


def rows(db: Db, query: str) -> list[dict[str, Any]]:
    return db.execute(query.encode()).fetchall()


async def test_a_static_schedule_hands_its_tick_to_the_handler(app: App, working: Working) -> None:
    seen: list[tuple[Tick, str]] = []

    @app.task(on=cron(EVERY_SECOND, name="often"))
    async def report(ctx: Context, tick: Tick) -> None:
        seen.append((tick, ctx.trigger))

    async with working():
        await until(lambda: len(seen) >= 3)
    instants = [tick.scheduled_at for tick, _ in seen]
    assert {(tick.name, trigger) for tick, trigger in seen} == {("often", "often")}
    assert len(set(instants)) == len(instants)
    assert all(at.microsecond == 0 and at.tzinfo == UTC for at in instants)


async def test_several_schedules_of_a_task_are_told_apart(app: App, working: Working) -> None:
    names: set[str] = set()

    @app.task(on=[cron(EVERY_SECOND), cron("*/2 * * * * *", name="second")])
    async def report(ctx: Context, tick: Tick) -> None:
        names.add(tick.name)

    async with working():
        await until(lambda: len(names) == 2)
    assert names == {EVERY_SECOND, "second"}


async def test_an_invocation_finds_the_default_of_the_tick(app: App, working: Working) -> None:
    @app.task(on=[cron("@yearly"), invocable()])
    async def report(ctx: Context, tick: Tick | None = None) -> str:
        return f"{tick} {ctx.trigger}"

    async with working():
        assert await (await report.invoke()).result(20) == "None invoke"


@pytest.mark.covers("F63", "P42")
async def test_63_a_payload_that_looks_like_a_tick_is_plain_data(app: App, working: Working) -> None:
    @app.task(on=[cron("@yearly"), invocable()])
    async def report(ctx: Context, name: str = "", scheduled_at: str = "", tick: Tick | None = None) -> str:
        return f"{name} {scheduled_at} {tick}"

    async with working():
        run = await report.invoke(name="x", scheduled_at="2026-01-01T00:00:00Z")
        assert await run.result(20) == "x 2026-01-01T00:00:00Z None"


async def test_plain_and_isolated_handlers_get_their_tick(app: App, working: Working) -> None:
    seen: list[Tick] = []

    @app.task(on=cron(EVERY_SECOND))
    def report(ctx: SyncContext, tick: Tick) -> None:
        seen.append(tick)

    async with working():
        await until(lambda: bool(seen))
    assert isinstance(seen[0].scheduled_at, datetime)


async def test_what_code_no_longer_declares_is_gone_after_a_start(app: App, working: Working, db: Db) -> None:
    @app.task(on=[cron("@daily"), cron("@hourly", tz="Asia/Tokyo", catch_up="all"), invocable()])
    async def report(ctx: Context) -> None: ...

    async with working():
        pass
    first = rows(db, "select cron, tz, catch_up from schedules order by cron")
    assert [tuple(each.values()) for each in first] == [
        ("@daily", "UTC", "latest"),
        ("@hourly", "Asia/Tokyo", "all"),
    ]
    async with Conductor[None](app.dsn) as later:
        later.create_task(lambda_free, name="report", on=[cron("@daily", tz="Asia/Tokyo"), invocable()])
        async with Orchestrator(later):
            pass
    assert [(each["cron"], each["tz"]) for each in rows(db, "select * from schedules")] == [("@daily", "Asia/Tokyo")]


async def lambda_free(ctx: Context) -> None:
    """A handler that is registered under a name of the test's choice."""


@pytest.mark.covers("P41")
async def test_41_deployments_leave_each_other_their_schedules(app: App, working: Working, db: Db) -> None:
    app.create_task(lambda_free, on=cron("@daily"))
    async with working(), Conductor[None](app.dsn, name="another") as another:
        another.create_task(lambda_free, name="mine", on=cron("@hourly"))
        async with Orchestrator(another):
            pass
    assert [(each["deployment"], each["task"]) for each in rows(db, "select * from schedules order by 1")] == [
        ("default", "lambda_free"), ("another", "mine"),
    ]  # fmt: skip


# ---------------------------------------------------------------- made at run time


async def test_a_handler_schedules_and_unschedules(app: App, working: Working, db: Db) -> None:
    seen: list[tuple[str, str]] = []

    @app.task
    async def greet(ctx: Context, name: str, tick: Tick | None = None) -> None:
        seen.append((name, tick.name if tick else ""))

    @app.task
    async def begin(ctx: Context) -> None:
        await ctx.schedule("hello", greet.bind("Ada"), cron=EVERY_SECOND, tz="Europe/Berlin")

    @app.task
    def end(ctx: SyncContext) -> None:
        ctx.unschedule("hello", greet)

    async with working():
        await (await begin.invoke()).result(20)
        await until(lambda: len(seen) >= 2)
        await (await end.invoke()).result(20)
        assert rows(db, "select * from schedules") == []
    assert set(seen) == {("Ada", "hello")}


async def test_a_plain_handler_schedules_with_the_options_of_the_call(app: App, working: Working, db: Db) -> None:
    app.create_task(lambda_free, name="work")

    @app.task
    def begin(ctx: SyncContext) -> None:
        call = app.tasks["work"].with_options(queue="slow", priority=7).bind()
        ctx.schedule("later", call, cron="@yearly")

    async with working():
        await (await begin.invoke()).result(20)
    (found,) = rows(db, "select * from schedules")
    assert (found["task"], found["queue"], found["priority"], found["deployment"]) == ("work", "slow", 7, None)


async def test_scheduling_is_done_once_however_often_the_handler_runs(app: App, working: Working, db: Db) -> None:
    app.create_task(lambda_free, name="work")

    @app.task
    async def begin(ctx: Context) -> None:
        await ctx.schedule("later", app.tasks["work"].bind(), cron="@yearly")
        await ctx.unschedule("earlier", app.tasks["work"])
        await ctx.sleep("a moment", 0.01)

    async with working():
        await (await begin.invoke()).result(20)
    (found,) = rows(db, "select revision from schedule")
    assert found["revision"] <= 1  # the second run's first look at it, not another change
    recorded = {(each["name"], each["kind"]) for each in rows(db, "select name, kind from steps")}
    assert recorded == {("schedule#1", "call"), ("unschedule#1", "call"), ("a moment", "sleep")}


async def test_a_changed_call_is_what_the_next_tick_runs(app: App, working: Working) -> None:
    seen: list[int] = []

    @app.task
    async def count(ctx: Context, n: int) -> None:
        seen.append(n)

    @app.task
    async def begin(ctx: Context, n: int) -> None:
        await ctx.schedule("counting", count.bind(n), cron=EVERY_SECOND)

    async with working():
        await (await begin.invoke(1)).result(20)
        await until(lambda: 1 in seen)
        await (await begin.invoke(2)).result(20)
        await until(lambda: 2 in seen)
        done = seen.index(2)
        await until(lambda: len(seen) >= done + 2)
    assert 1 not in seen[done:]


@pytest.mark.parametrize(
    ("options", "schedule", "reason"),
    [
        ({}, {"cron": "@reboot"}, "instant"),
        ({}, {"cron": "0 0 31 2 *"}, "day-of-month"),
        ({}, {"cron": "@daily", "tz": "Mars/Olympus"}, "Mars/Olympus"),
        ({"dedupe_key": "k"}, {"cron": "@daily"}, "dedupe_key"),
        ({"delay": 5}, {"cron": "@daily"}, "delay"),
    ],
)
async def test_what_cannot_be_scheduled_is_refused_at_the_line(
    app: App, working: Working, db: Db, options: Any, schedule: Any, reason: str
) -> None:
    app.create_task(lambda_free, name="work")

    @app.task
    async def begin(ctx: Context) -> str:
        with pytest.raises(ConfigurationError, match=reason):
            await ctx.schedule("later", app.tasks["work"].with_options(**options).bind(), **schedule)
        return "refused"

    async with working():
        assert await (await begin.invoke()).result(20) == "refused"
    assert rows(db, "select * from schedules") == []


@pytest.mark.covers("P33")
async def test_dynamic_schedules_outlive_every_start(app: App, working: Working, db: Db) -> None:
    db.execute("select schedule('work', 'made', '@daily')")
    app.create_task(lambda_free, name="work", on=[cron("@daily"), invocable()])
    async with working():
        pass
    async with Conductor[None](app.dsn) as later:
        later.create_task(lambda_free, name="work")
        async with Orchestrator(later):
            pass
    assert [each["name"] for each in rows(db, "select name from schedules")] == ["made"]


async def test_ticks_go_on_while_every_slot_is_taken(app: App, working: Working, db: Db) -> None:
    release = asyncio.Event()

    @app.task
    async def hold(ctx: Context) -> None:
        await release.wait()

    app.create_task(lambda_free, name="work", on=cron(EVERY_SECOND))
    async with working(concurrency=1):
        await hold.invoke()
        await until(lambda: len(rows(db, "select * from tick")) >= 2)
        release.set()


def test_a_repetition_after_a_lost_reply_schedules_nothing_again(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    nightly = [{"task": "work", "name": "nightly", "expr": "0 3 * * *", "zone": "UTC", "catch_up": "latest"}]
    assert call(db, "schedule_as_step", WORKER, UUID(id), 1, "schedule nightly", nightly) is True
    assert call(db, "unschedule", "work", "nightly") is True
    assert call(db, "schedule_as_step", WORKER, UUID(id), 1, "schedule nightly", nightly) is True
    assert db.execute("select from schedule").fetchall() == []
    assert call(db, "schedule_as_step", WORKER, UUID(id), 2, "schedule other", nightly) is False
