"""Product section 3: `ctx.step`, `ctx.step_options` and `ctx.transaction`, with real workers."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import (
    AttemptTimeout,
    Conductor,
    Context,
    DuplicateStep,
    ExecutionFailed,
    Fail,
    RetryPolicy,
)
from pgconductor.errors import TooMany
from tests.integration.conftest import Working

App = Conductor[None]
Db = psycopg.Connection[DictRow]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


def rows(db: Db, query: str, *parameters: object) -> list[DictRow]:
    return db.execute(query.encode(), parameters).fetchall()


async def failure_of(run: Any) -> ExecutionFailed:
    with pytest.raises(ExecutionFailed) as caught:
        await run.result(20)
    return caught.value


# ---------------------------------------------------------------- steps


async def test_a_step_is_saved_before_it_returns(app: App, db: Db, working: Working) -> None:
    @app.task
    async def look(ctx: Context) -> list[str]:
        await ctx.step("first", lambda: 1)
        return [row["name"] for row in rows(db, "select name from steps")]

    async with working():
        assert await (await look.invoke()).result(20) == ["first"]


async def test_what_is_recorded_of_a_step_says_when_it_began(app: App, db: Db, working: Working) -> None:
    async def work_for(seconds: float) -> None:
        await asyncio.sleep(seconds)

    @app.task
    async def work(ctx: Context) -> None:
        await asyncio.gather(*[ctx.step(f"step {tenths}", work_for, tenths / 10) for tenths in (1, 3)])
        await asyncio.sleep(0.2)
        await ctx.transaction("write", pause)

    async def pause(conn: Any) -> None:
        await asyncio.sleep(0.1)

    async with working():
        await (await work.invoke()).result(20)
    found = rows(db, "select name, finished_at - created_at as took, created_at as began_at from steps order by name")
    one, three, write = found
    assert three["took"].total_seconds() >= 0.3
    assert one["took"].total_seconds() >= 0.1
    assert 0.1 <= write["took"].total_seconds() < (write["began_at"] - three["began_at"]).total_seconds()


async def test_a_failing_step_is_not_recorded_and_runs_again(app: App, db: Db, working: Working) -> None:
    tries: list[int] = []

    def flaky() -> int:
        tries.append(1)
        if len(tries) < 2:
            raise ValueError("not yet")
        return len(tries)

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> int:
        return await ctx.step("flaky", flaky)

    async with working():
        assert await (await work.invoke()).result(20) == 2
    assert rows(db, "select name, status from steps") == [{"name": "flaky", "status": "completed"}]


async def test_step_options_try_a_step_again_within_the_attempt(app: App, working: Working) -> None:
    tries: list[str] = []

    async def coroutine() -> str:
        tries.append("coroutine")
        if tries.count("coroutine") < 3:
            raise ValueError("not yet")
        return "a"

    def function() -> str:
        tries.append("function")
        if tries.count("function") < 3:
            raise ValueError("not yet")
        return "b"

    @app.task
    async def work(ctx: Context) -> list[str | int]:
        patient = ctx.step_options(max_attempts=3, retry=AT_ONCE)
        return [await patient.step("a", coroutine), await patient.step("b", function), ctx.attempt]

    async with working():
        assert await (await work.invoke()).result(20) == ["a", "b", 1]


async def test_a_step_is_not_tried_again_for_fail_or_what_its_policy_gives_up_on(app: App, working: Working) -> None:
    tries: list[str] = []

    def fails() -> int:
        tries.append("fails")
        raise Fail("for good")

    def gives_up() -> int:
        tries.append("gives up")
        raise KeyError("x")

    @app.task(max_attempts=1)
    async def work(ctx: Context, name: str) -> int:
        policy = RetryPolicy(first=0.01, max=0.01, give_up_on=[KeyError])
        patient = ctx.step_options(max_attempts=5, retry=policy)
        return await patient.step("x", fails if name == "fails" else gives_up)

    async with working():
        assert (await failure_of(await work.invoke("fails"))).error_type == "pgconductor.errors.Fail"
        assert (await failure_of(await work.invoke("gives up"))).error_type == "KeyError"
    assert tries == ["fails", "gives up"]


async def test_a_step_that_outlives_its_timeout_fails_with_its_name(app: App, working: Working) -> None:
    async def for_ever() -> None:
        await asyncio.Event().wait()

    @app.task
    async def work(ctx: Context) -> list[str | None]:
        try:
            await ctx.step_options(timeout=0.05).step("slow", for_ever)
        except AttemptTimeout as timeout:
            return [timeout.step, timeout.task]
        return []

    async with working():
        assert await (await work.invoke()).result(20) == ["slow", "work"]


async def test_a_plain_function_with_a_timeout_leaves_the_loop_free(app: App, working: Working) -> None:
    from threading import Event

    @app.task
    async def work(ctx: Context) -> str:
        done = Event()
        try:
            await ctx.step_options(timeout=0.05).step("slow", done.wait)
        except AttemptTimeout as timeout:
            return str(timeout.step)
        finally:
            done.set()
        return "in time"

    async with working(concurrency=1):
        assert await (await work.invoke()).result(20) == "slow"


async def test_a_timeout_of_the_function_itself_is_its_own(app: App, working: Working) -> None:
    async def late() -> None:
        raise TimeoutError("mine")

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        await ctx.step_options(timeout=60).step("late", late)

    async with working():
        failure = await failure_of(await work.invoke())
    assert (failure.error_type, failure.message) == ("TimeoutError", "mine")


@pytest.mark.covers("F66")
async def test_one_name_for_two_operations_of_any_kind_raises_duplicate_step(app: App, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> int:
        return 1

    async def write(conn: Any) -> int:
        return 1

    @app.task
    async def work(ctx: Context) -> list[str]:
        await ctx.step("x", lambda: 1)
        refused: list[str] = []
        again: dict[str, Callable[[], Awaitable[Any]]] = {
            "step": lambda: ctx.step("x", lambda: 1),
            "transaction": lambda: ctx.transaction("x", write),
            "sleep": lambda: ctx.sleep("x", 0),
            "invoke": lambda: ctx.invoke("x", child.bind()),
            "invoke_all": lambda: ctx.invoke_all("x", [child.bind()]),
            "start": lambda: ctx.start("x", child.bind()),
        }
        for kind, use in again.items():
            try:
                await use()
            except DuplicateStep as error:
                refused.append(f"{kind} {error.step}")
        started = await ctx.start("y", child.bind())
        try:
            await ctx.wait("x", [started])
        except DuplicateStep as error:
            refused.append(f"wait {error.step}")
        return refused

    async with working():
        kinds = ["step", "transaction", "sleep", "invoke", "invoke_all", "start", "wait"]
        assert await (await work.invoke()).result(20) == [f"{kind} x" for kind in kinds]


async def test_an_uncaught_duplicate_step_fails_at_once(app: App, db: Db, working: Working) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        await asyncio.gather(ctx.step("x", lambda: 1), ctx.step("x", lambda: 2))

    async with working():
        assert (await failure_of(await work.invoke())).error_type == "pgconductor.errors.DuplicateStep"
    assert rows(db, "select attempt from executions") == [{"attempt": 1}]


@pytest.mark.covers("F66")
async def test_concurrent_steps_run_together_and_each_keeps_its_own_value(app: App, working: Working) -> None:
    running: set[int] = set()
    together = asyncio.Event()

    async def meet(n: int) -> int:
        running.add(n)
        if len(running) == 20:
            together.set()
        await together.wait()
        return n * 2

    @app.task
    async def work(ctx: Context) -> list[int]:
        values = await asyncio.gather(*[ctx.step(f"step-{n}", meet, n) for n in range(20)])
        await ctx.sleep("and again", 0.01)
        return values

    async with working():
        assert await (await work.invoke()).result(20) == [n * 2 for n in range(20)]


async def test_a_step_whose_save_was_under_way_when_it_was_cancelled_is_remembered(app: App, working: Working) -> None:
    bodies: list[str] = []

    def body() -> str:
        bodies.append("run")
        task = cast("asyncio.Task[str]", asyncio.current_task())
        asyncio.get_running_loop().call_soon(task.cancel)  # strikes while the save is awaited
        return f"value {len(bodies)}"

    @app.task
    async def work(ctx: Context) -> str:
        first = asyncio.create_task(ctx.step("saved", body))
        await asyncio.wait([first])
        await ctx.sleep("resume", 0.01)
        return first.result()

    async with working():
        assert await (await work.invoke()).result(20) == "value 1"
    assert bodies == ["run"]


async def test_a_child_whose_start_was_under_way_when_it_was_cancelled_is_the_same_child(
    app: App, db: Db, working: Working
) -> None:
    @app.task
    async def child(ctx: Context) -> int:
        return 7

    @app.task
    async def work(ctx: Context) -> int:
        first = asyncio.create_task(ctx.start("child", child.bind()))
        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(first.cancel))
        await asyncio.wait([first])
        await ctx.sleep("resume", 0.01)
        assert not first.cancelled()
        assert [row["id"] for row in rows(db, "select id from executions where task = 'child'")] == [first.result().id]
        return await first.result().result()

    async with working():
        assert await (await work.invoke()).result(20) == 7
    assert len(rows(db, "select id from executions where task = 'child'")) == 1


async def test_the_ten_thousandth_operation_is_the_last(app: App, working: Working) -> None:
    @app.task
    async def work(ctx: Context) -> list[int | str]:
        values = await asyncio.gather(*[ctx.step(f"step-{n}", lambda: 1) for n in range(10_000)])
        try:
            await ctx.step("one more", lambda: 1)
        except TooMany as error:
            return [sum(values), error.what]
        return []

    async with working():
        assert await (await work.invoke()).result(60) == [10_000, "steps"]


@pytest.mark.covers("F67")
async def test_a_recorded_step_that_the_code_no_longer_asks_for_is_reported(
    app: App, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[int] = []

    @app.task
    async def work(ctx: Context) -> str:
        runs.append(1)
        if len(runs) == 1:
            await ctx.step("old", lambda: 1)
        await ctx.sleep("resume", 0.01)
        return "done"

    async with working():
        assert await (await work.invoke()).result(20) == "done"
    assert any("'old'" in record.getMessage() and "no longer" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------- transactions


@pytest.fixture
def ledger(db: Db) -> Db:
    db.execute("create table public.ledger (entry text)")
    return db


def entries(db: Db) -> list[str]:
    return [row["entry"] for row in rows(db, "select entry from public.ledger")]


async def enter(conn: Any, entry: str) -> str:
    await conn.execute("insert into public.ledger values (%s)", (entry,))
    return entry


async def test_a_transaction_commits_with_its_record(app: App, ledger: Db, working: Working) -> None:
    @app.task
    async def work(ctx: Context) -> str:
        entry = await ctx.transaction("enter", enter, "a")
        await ctx.sleep("resume", 0.01)
        return entry

    async with working():
        assert await (await work.invoke()).result(20) == "a"
    assert entries(ledger) == ["a"]
    assert rows(ledger, "select kind, value from steps where name = 'enter'") == [{"kind": "transaction", "value": "a"}]


async def test_a_failed_transaction_leaves_neither_writes_nor_a_record(app: App, ledger: Db, working: Working) -> None:
    async def enter_and_fail(conn: Any, attempt: int) -> str:
        await enter(conn, f"attempt {attempt}")
        if attempt == 1:
            raise ValueError("no")
        return "entered"

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> str:
        return await ctx.transaction("enter", enter_and_fail, ctx.attempt)

    async with working():
        assert await (await work.invoke()).result(20) == "entered"
    assert entries(ledger) == ["attempt 2"]


async def test_a_value_that_cannot_be_stored_rolls_the_writes_back(app: App, ledger: Db, working: Working) -> None:
    async def enter_nan(conn: Any) -> float:
        await enter(conn, "x")
        return float("nan")

    @app.task
    async def work(ctx: Context) -> float:
        return await ctx.transaction("enter", enter_nan)

    async with working():
        failure = await failure_of(await work.invoke())
    assert failure.error_type == "pgconductor.errors.EncodeError"
    assert "transaction 'enter'" in failure.message
    assert entries(ledger) == []


def take_for_dead(db: Db) -> None:
    """Do as another process does that has not heard of this one for long; its own beats and sweeps go on meanwhile."""
    is_lost = False
    while not is_lost:
        rows(db, "update orchestrator set beat_at = clock_timestamp() - interval '1 day' returning id")
        (swept,) = rows(db, "select sweep('20 seconds', clock_timestamp()) ->> 'lost' as lost")
        is_lost = swept["lost"] == "1"


async def test_writes_are_rolled_back_when_the_lease_was_lost_under_them(
    app: App, ledger: Db, working: Working
) -> None:
    tries: list[int] = []

    async def enter_as_a_zombie(conn: Any) -> str:
        tries.append(1)
        if len(tries) == 1:
            take_for_dead(ledger)
        return await enter(conn, f"try {len(tries)}")

    @app.task
    async def work(ctx: Context) -> str:
        return await ctx.transaction("enter", enter_as_a_zombie)

    async with working():
        assert await (await work.invoke()).result(30) == "try 2"
    assert entries(ledger) == ["try 2"]


async def test_the_function_of_a_transaction_cannot_commit(app: App, ledger: Db, working: Working) -> None:
    async def commit_early(conn: Any) -> None:
        await enter(conn, "x")
        await conn.commit()

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        await ctx.transaction("enter", commit_early)

    async with working():
        assert (await failure_of(await work.invoke())).error_type == "psycopg.ProgrammingError"
    assert entries(ledger) == []


async def test_a_transaction_that_rolls_back_without_an_error_is_told_to_raise_one(
    app: App, ledger: Db, working: Working
) -> None:
    async def give_up(conn: Any) -> None:
        await enter(conn, "x")
        raise psycopg.Rollback

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        await ctx.transaction("enter", give_up)

    async with working():
        assert "raised Rollback" in (await failure_of(await work.invoke())).message
    assert entries(ledger) == []


async def test_a_transaction_whose_connection_is_cut_is_done_again_at_no_cost(
    app: App, ledger: Db, working: Working
) -> None:
    tries: list[int] = []

    async def enter_on_a_cut_line(conn: Any) -> str:
        tries.append(1)
        if len(tries) == 1:
            rows(ledger, "select pg_terminate_backend(%s, 10000)", conn.info.backend_pid)
        return await enter(conn, f"try {len(tries)}")

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> str:
        return await ctx.transaction("enter", enter_on_a_cut_line)

    async with working():
        assert await (await work.invoke()).result(20) == "try 2"
    assert entries(ledger) == ["try 2"]
