"""Product section 4: attempts, back-off and how a failure is stored, with real workers."""

import asyncio
import logging
from functools import partial

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import (
    ChildFailed,
    Conductor,
    Context,
    ExecutionCancelled,
    ExecutionFailed,
    Fail,
    Retry,
    RetryPolicy,
    SyncContext,
)
from tests.integration.conftest import Working
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[DictRow]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


def rows(db: Db, query: str, *parameters: object) -> list[DictRow]:
    return db.execute(query.encode(), parameters).fetchall()


def hurry(db: Db) -> None:
    """Let every delay pass."""
    db.execute("update timer set due_at = clock_timestamp() where due_at > clock_timestamp()")


async def delays_of(app: App, db: Db, count: int) -> list[float]:
    """The delays before the first tries of the only task, as the timers have them; then it completes or fails."""
    delays: list[float] = []

    def failed(times: int) -> bool:
        return bool(rows(db, "select 1 from executions where attempt = %s", times + 1))

    run = await next(iter(app.tasks.values())).invoke()
    for number in range(1, count + 1):
        await until(partial(failed, number))
        (timer,) = rows(
            db,
            """select extract(epoch from t.due_at - h.at)::float8 as delay from timer t, lateral (
                 select at from audit.history where to_state = 'scheduled' order by seq desc limit 1) h""",
        )
        delays.append(timer["delay"])
        hurry(db)
    await run.result(20)
    return delays


async def test_the_default_delays_double_from_15_seconds_with_a_tenth_of_jitter(
    app: App, db: Db, working: Working
) -> None:
    @app.task(max_attempts=5)
    async def work(ctx: Context) -> int:
        if ctx.attempt < 5:
            raise ValueError("not yet")
        return ctx.attempt

    async with working():
        delays = await delays_of(app, db, 4)
    for delay, longest in zip(delays, [15, 30, 60, 120], strict=True):
        assert longest * 0.9 - 5 < delay <= longest


async def test_a_policy_without_jitter_is_kept_to_the_letter(
    app: App, db: Db, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task(max_attempts=4, retry=RetryPolicy(delays=["1m", "7m"], jitter=0))
    async def work(ctx: Context) -> int:
        if ctx.attempt < 4:
            raise ValueError("not yet")
        return ctx.attempt

    async with working():
        await delays_of(app, db, 3)
    lines = [each.getMessage() for each in caplog.records if each.name == "pgconductor.attempt"]
    assert [line.rpartition(" in ")[2] for line in lines] == ["60s", "420s", "420s"]


async def test_retry_after_replaces_the_delay_and_counts_as_an_attempt(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=2)
    async def work(ctx: Context) -> int:
        if ctx.attempt == 1:
            raise Retry(after="2h", message="come back later")
        return ctx.attempt

    async with working():
        (delay,) = await delays_of(app, db, 1)
    assert 7200 - 5 < delay <= 7200


@pytest.mark.covers("P10")
async def test_retry_on_the_last_attempt_fails(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        raise Retry(after="2h", message="come back later")

    async with working():
        with pytest.raises(ExecutionFailed, match="come back later"):
            await (await work.invoke()).result(20)


@pytest.mark.covers("P10")
async def test_attempts_are_numbered_and_end_at_the_maximum(app: App, db: Db, working: Working) -> None:
    numbers: list[int] = []

    @app.task(max_attempts=3, retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        numbers.append(ctx.attempt)
        raise ValueError(f"attempt {ctx.attempt}")

    async with working():
        with pytest.raises(ExecutionFailed, match="attempt 3"):
            await (await work.invoke()).result(20)
    assert numbers == [1, 2, 3]
    assert rows(db, "select attempt, state from executions") == [{"attempt": 3, "state": "failed"}]


async def test_the_default_is_three_attempts(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> None: ...

    assert work.config.max_attempts == 3
    assert work.config.max_crashes == 5


@pytest.mark.parametrize("kind", [Fail, KeyError])
async def test_fail_and_what_the_policy_gives_up_on_leave_no_further_attempt(
    app: App, db: Db, working: Working, kind: type[Exception]
) -> None:
    @app.task(max_attempts=9, retry=RetryPolicy(first=0.01, max=0.01, give_up_on=[LookupError]))
    async def work(ctx: Context) -> None:
        raise kind("for good")

    async with working():
        with pytest.raises(ExecutionFailed, match="for good"):
            await (await work.invoke()).result(20)
    assert rows(db, "select attempt from executions") == [{"attempt": 1}]


@pytest.mark.covers("P21")
async def test_resumes_cost_no_attempt(app: App, working: Working) -> None:
    numbers: list[int] = []

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        numbers.append(ctx.attempt)
        for n in range(5):
            await ctx.sleep(f"nap-{n}", 0)

    async with working():
        await (await work.invoke()).result(20)
    assert numbers == [1] * 6


async def test_a_group_of_nothing_but_permanent_failures_is_permanent(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=1)
    async def broken(ctx: Context) -> None:
        raise ValueError("no")

    @app.task(max_attempts=5, retry=AT_ONCE)
    async def parent(ctx: Context) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(ctx.invoke("one", broken.bind()))
            group.create_task(ctx.invoke("two", broken.bind()))

    async with working():
        with pytest.raises(ExecutionFailed) as caught:
            await (await parent.invoke()).result(20)
    assert caught.value.error_type == "ExceptionGroup"
    assert rows(db, "select attempt from executions where task = 'parent'") == [{"attempt": 1}]


async def test_a_child_failure_wrapped_in_another_error_follows_the_policy(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=1)
    async def broken(ctx: Context) -> None:
        raise ValueError("no")

    @app.task(max_attempts=2, retry=AT_ONCE)
    async def parent(ctx: Context) -> int:
        try:
            await ctx.invoke("broken", broken.bind())
        except ChildFailed as failure:
            if ctx.attempt == 1:
                raise RuntimeError("wrapped") from failure
        return ctx.attempt

    async with working():
        assert await (await parent.invoke()).result(20) == 2
    assert len(rows(db, "select 1 from executions where task = 'broken'")) == 1


# ---------------------------------------------------------------- how a failure is stored


async def test_an_error_is_stored_with_its_traceback_and_causes(app: App, db: Db, working: Working) -> None:
    def root() -> None:
        raise KeyError("root")

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        try:
            root()
        except KeyError as error:
            raise ValueError("on top") from error

    async with working():
        with pytest.raises(ExecutionFailed) as caught:
            await (await work.invoke()).result(20)
    (row,) = rows(db, "select error from failed_executions")
    error = row["error"]
    assert (error["type"], error["message"]) == ("ValueError", "on top")
    assert (error["cause"]["type"], error["cause"]["message"]) == ("KeyError", "'root'")
    assert error["traceback"][0]["file"] == __file__  # where the engine called the handler
    assert error["traceback"][-1]["text"] == 'raise ValueError("on top") from error'
    assert error["cause"]["traceback"][-1]["function"].endswith("root")
    assert 'raise KeyError("root")' in caught.value.remote_traceback


async def test_the_members_of_a_group_are_stored(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        raise ExceptionGroup("both", [ValueError("one"), ExceptionGroup("inner", [KeyError("two")])])

    async with working():
        with pytest.raises(ExecutionFailed):
            await (await work.invoke()).result(20)
    (row,) = rows(db, "select error from failed_executions")
    one, inner = row["error"]["group"]
    assert (one["type"], inner["group"][0]["type"]) == ("ValueError", "KeyError")


class Hostile(Exception):
    def __str__(self) -> str:
        raise SystemExit("no text for you")

    __repr__ = __str__


@pytest.mark.covers("F56", "F60")
@pytest.mark.parametrize("name", ["nul", "surrogate", "hostile", "endless", "circle"])
async def test_storing_an_error_never_fails(app: App, db: Db, working: Working, name: str) -> None:
    circle = ValueError("circle")
    circle.__cause__ = KeyError("back")
    circle.__cause__.__cause__ = circle
    errors = {
        "nul": ValueError("a\0b"),
        "surrogate": ValueError("a\ud800b"),
        "hostile": Hostile(),
        "endless": ValueError("x" * 10_000_000),
        "circle": circle,
    }

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        raise errors[name]

    logging.getLogger("pgconductor.attempt").disabled = True  # what a log handler makes of these is not our matter
    try:
        async with working():
            with pytest.raises(ExecutionFailed):
                await (await work.invoke()).result(20)
    finally:
        logging.getLogger("pgconductor.attempt").disabled = False
    (row,) = rows(db, "select error ->> 'message' as message from failed_executions")
    assert row["message"]
    assert len(row["message"].encode()) <= 32 * 1024


async def test_the_error_of_a_failed_attempt_is_kept_until_the_next_one(app: App, db: Db, working: Working) -> None:
    @app.task(retry=RetryPolicy(first="1h", max="1h"))
    def work(ctx: SyncContext) -> None:
        raise ValueError("look at me")

    async with working():
        await work.invoke()
        await until(lambda: bool(rows(db, "select 1 from executions where state = 'scheduled'")))
    (row,) = rows(db, "select error ->> 'message' as message, attempt from executions")
    assert row == {"message": "look at me", "attempt": 2}


async def test_a_group_asks_for_the_longest_delay_of_its_members(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=2)
    async def work(ctx: Context) -> int:
        if ctx.attempt == 1:
            inner = ExceptionGroup("inner", [Retry(after="2h"), ValueError()])
            raise ExceptionGroup("both", [Retry(after="1h"), inner])
        return ctx.attempt

    async with working():
        (delay,) = await delays_of(app, db, 1)
    assert 7200 - 5 < delay <= 7200


async def test_a_group_of_what_is_given_up_on_is_given_up_on(app: App, working: Working) -> None:
    attempts: list[int] = []

    @app.task(max_attempts=5, retry=RetryPolicy(first=0.01, max=0.01, give_up_on=[KeyError]))
    async def work(ctx: Context) -> None:
        attempts.append(ctx.attempt)
        raise ExceptionGroup("both", [KeyError("a"), KeyError("b")])

    async with working():
        with pytest.raises(ExecutionFailed):
            await (await work.invoke()).result(20)
    assert attempts == [1]


async def test_a_step_that_pauses_between_two_tries_is_told_of(app: App, db: Db, working: Working) -> None:
    async def refuse() -> None:
        raise ConnectionError("the bank refuses")

    @app.task
    async def work(ctx: Context) -> None:
        patient = ctx.step_options(max_attempts=3, retry=RetryPolicy(first="1h"))
        await patient.step("pay", refuse)

    async with working():
        run = await work.invoke()
        select = "select step, number, most, error, next_at > now() as is_later from running_steps(%s)"
        await until(lambda: rows(db, select, run.id) != [])
        assert rows(db, select, run.id) == [
            {"step": "pay", "number": 1, "most": 3, "error": "ConnectionError: the bank refuses", "is_later": True}
        ]
        await run.cancel()
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
    assert rows(db, select, run.id) == []
