"""Product section 4: cancel in every state, what a running handler is told, and what is stored, with real workers."""

import asyncio
import threading
from collections.abc import AsyncIterator
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import Conductor, Context, ExecutionCancelled, ExecutionFailed, Orchestrator, RetryPolicy, SyncContext
from tests.integration.conftest import Working
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[DictRow]

isolated: Conductor[None] = Conductor(name="isolated")
"""Its handlers run in processes that import this module."""


def rows(db: Db, query: str, *parameters: object) -> list[DictRow]:
    return db.execute(query.encode(), parameters).fetchall()


def states(db: Db) -> dict[str, str]:
    return {row["task"]: row["state"] for row in rows(db, "select task, state from executions")}


# ---------------------------------------------------------------- in every state


@pytest.mark.parametrize("state", ["ready", "scheduled", "waiting", "backing off"])
async def test_what_does_not_run_is_cancelled_at_once(app: App, db: Db, working: Working, state: str) -> None:
    runs: list[str] = []

    @app.task(retry=RetryPolicy(first="1h", max="1h"))
    async def work(ctx: Context) -> None:
        runs.append(state)
        if state == "backing off":
            raise ValueError("not yet")
        await ctx.sleep("nap", "1h")

    if state in ("ready", "scheduled"):
        run = await (work.with_options(delay="1h") if state == "scheduled" else work).invoke()
        assert await run.state() == state
    else:
        async with working():
            run = await work.invoke()
            parked = "waiting" if state == "waiting" else "scheduled"
            await until(lambda: states(db) == {"work": parked})
    assert await run.cancel("no longer needed")
    assert await run.state() == "cancelled"
    async with working():
        with pytest.raises(ExecutionCancelled) as caught:
            await run.result(20)
    assert caught.value.reason == "no longer needed"
    assert len(runs) == (0 if state in ("ready", "scheduled") else 1)


async def test_a_running_coroutine_gets_cancelled_error_where_it_waits(app: App, db: Db, working: Working) -> None:
    told: list[bool] = []
    waiting = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            told.append(ctx.cancelled)
            raise

    async with working():
        run = await work.invoke()
        await waiting.wait()
        assert await run.cancel("enough")
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
    assert told == [True]
    assert rows(db, "select cancel_reason, error ->> 'message' as message from executions") == [
        {"cancel_reason": "enough", "message": "enough"}
    ]


@pytest.mark.covers("F65", "F70", "P11")
async def test_a_handler_that_does_not_heed_it_meets_it_again_and_its_value_is_refused(
    app: App, db: Db, working: Working
) -> None:
    met: list[str] = []
    waiting = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> str:
        try:
            waiting.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            met.append("await")
        for operation in (ctx.step("late", lambda: 1), ctx.sleep("late", 1), ctx.checkpoint()):
            try:
                await operation
            except asyncio.CancelledError:
                met.append("operation")
        return "too late"

    async with working():
        run = await work.invoke()
        await waiting.wait()
        await run.cancel()
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
    assert met == ["await", "operation", "operation", "operation"]
    assert rows(db, "select state, result from executions") == [{"state": "cancelled", "result": None}]
    assert rows(db, "select name from steps") == []


async def test_a_running_plain_handler_is_told_and_stopped_at_its_next_operation(
    app: App, db: Db, working: Working
) -> None:
    running = threading.Event()
    met: list[str] = []

    @app.task
    def work(ctx: SyncContext) -> None:
        running.set()
        while not ctx.cancelled:
            threading.Event().wait(0.01)
        try:
            ctx.step("late", lambda: 1)
        except asyncio.CancelledError as error:
            met.append(str(error))
            raise

    async with working():
        run = await work.invoke()
        await until(running.is_set)
        assert await run.cancel()
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
        await until(lambda: states(db) == {"work": "cancelled"})
    assert met == [f"execution {run.id} is being cancelled"]


async def test_a_plain_handler_is_not_kept_by_the_pause_between_two_tries_of_a_step(
    app: App, db: Db, working: Working
) -> None:
    tried = threading.Event()

    def fail() -> None:
        tried.set()
        raise ValueError("not yet")

    @app.task
    def work(ctx: SyncContext) -> None:
        ctx.step_options(max_attempts=5, retry=RetryPolicy(first="1h", max="1h")).step("flaky", fail)

    async with working():
        run = await work.invoke()
        await until(tried.is_set)
        await run.cancel()
        with pytest.raises(ExecutionCancelled):
            await run.result(20)


async def test_a_failure_after_the_request_ends_cancelled(app: App, db: Db, working: Working) -> None:
    waiting = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        try:
            waiting.set()
            await asyncio.Event().wait()
        finally:
            raise ValueError("while leaving")

    async with working():
        run = await work.invoke()
        await waiting.wait()
        await run.cancel("enough")
        with pytest.raises(ExecutionCancelled, match="enough"):
            await run.result(20)


@pytest.mark.covers("F70", "P23")
async def test_cancelling_while_a_handler_parks_is_not_lost(app: App, db: Db, working: Working) -> None:
    parking, go_on = asyncio.Event(), asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        try:
            await ctx.sleep("nap", "1h")
        finally:
            parking.set()
            await go_on.wait()

    async with working():
        run = await work.invoke()
        await parking.wait()
        assert await run.cancel()
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
    assert rows(db, "select execution_id from timer") == []


# ---------------------------------------------------------------- what cancel answers


@pytest.mark.covers("F70")
async def test_cancel_is_idempotent_and_false_once_it_has_ended(app: App, db: Db, working: Working) -> None:
    waiting = asyncio.Event()

    @app.task
    async def work(ctx: Context, *, wait: bool) -> None:
        if wait:
            waiting.set()
            await asyncio.Event().wait()

    async with working():
        run = await work.invoke(wait=True)
        await waiting.wait()
        assert await run.cancel("first") is True
        await run.cancel("second")
        with pytest.raises(ExecutionCancelled, match="first"):
            await run.result(20)
        assert await run.cancel() is False
        done = await work.invoke(wait=False)
        await done.result(20)
        assert await done.cancel() is False
        assert await done.state() == "completed"
    assert await app.cancel(uuid4()) is False


async def test_cancel_by_task_and_dedupe_key(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> None: ...

    run = await work.with_options(dedupe_key="order 7", delay="1h").invoke()
    assert await app.cancel(work, "order 8") is False
    assert await app.cancel(work, "order 7", reason="refunded") is True
    with pytest.raises(ExecutionCancelled, match="refunded"):
        await run.result(20)


async def test_ctx_cancel_is_done_once_and_answers_the_same_on_every_run(app: App, db: Db, working: Working) -> None:
    answers: list[list[bool]] = []

    @app.task
    async def victim(ctx: Context) -> None: ...

    @app.task
    async def killer(ctx: Context, ids: list[str]) -> None:
        from uuid import UUID

        answers.append([await ctx.cancel(UUID(each), "by another") for each in ids])
        await ctx.sleep("resume", 0.01)
        await ctx.sleep("and again", 0.01)

    late = await victim.with_options(delay="1h").invoke()
    gone = await victim.with_options(delay="1h").invoke()
    await gone.cancel()
    async with working():
        await (await killer.invoke([str(late.id), str(gone.id)])).result(20)
    assert answers == [[True, False]] * 3
    calls = rows(db, "select name, value from steps where kind = 'call' order by name")
    assert calls == [{"name": "cancel#1", "value": True}, {"name": "cancel#2", "value": False}]
    assert [
        row["cancel_reason"] for row in rows(db, "select cancel_reason from executions where id = %s", late.id)
    ] == ["by another"]


async def test_a_handler_may_cancel_its_child_and_itself(app: App, db: Db, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> None:
        await ctx.sleep("nap", "1h")

    @app.task
    async def parent(ctx: Context) -> None:
        started = await ctx.start("child", child.bind())
        assert await started.cancel("not you")
        assert await ctx.cancel(ctx.execution_id, "nor me")
        await asyncio.Event().wait()

    async with working():
        with pytest.raises(ExecutionCancelled, match="nor me"):
            await (await parent.invoke()).result(20)
    assert states(db) == {"parent": "cancelled", "child": "cancelled"}


async def test_a_child_started_by_a_cancelled_parent_never_runs(app: App, db: Db, working: Working) -> None:
    runs: list[str] = []
    stepping, go_on = asyncio.Event(), asyncio.Event()

    @app.task
    async def child(ctx: Context) -> None:
        runs.append("child")

    @app.task
    async def parent(ctx: Context) -> None:
        stepping.set()
        await asyncio.shield(asyncio.ensure_future(go_on.wait()))
        await ctx.start("child", child.bind())

    async with working():
        run = await parent.invoke()
        await stepping.wait()
        db.execute("update execution set cancel_requested_at = now(), cancel_reason = 'unheard'")  # before it is told
        go_on.set()
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
    assert runs == []
    assert states(db) == {"parent": "cancelled"}


# ---------------------------------------------------------------- tasks that nobody knows


@pytest.mark.covers("F68", "P29")
async def test_a_task_that_no_worker_knows_stays_at_no_cost(app: App, db: Db, database: str, working: Working) -> None:
    @app.task
    async def known(ctx: Context) -> int:
        return 1

    unknown = app.define_task("unknown", dict[str, int], int)
    async with working():
        waiting = await unknown.invoke({"n": 3})
        assert await (await known.invoke()).result(20) == 1
        assert await waiting.state() == "ready"
    assert rows(db, "select attempt, crashes from executions where task = 'unknown'") == [{"attempt": 1, "crashes": 0}]

    async with Conductor(database) as later:

        @later.task(name="unknown")
        async def arrives(ctx: Context, n: int) -> int:
            return n

        async with Orchestrator(later):
            assert await waiting.result(20) == 3


# ---------------------------------------------------------------- in a process of its own


@isolated.task(executor="process")
async def isolated_coroutine(ctx: Context) -> None:
    await ctx.step("running", lambda: 1)
    await asyncio.Event().wait()


@isolated.task(executor="process")
def isolated_function(ctx: SyncContext) -> None:
    ctx.step("running", lambda: 1)
    while not ctx.cancelled:
        threading.Event().wait(0.01)
    ctx.checkpoint()


@isolated.task(executor="process")
async def isolated_at_once(ctx: Context) -> None:
    await asyncio.Event().wait()


@pytest.fixture
async def processes(database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Conductor[None]]:
    monkeypatch.setenv("PGCONDUCTOR_URL", database)
    monkeypatch.setattr(isolated, "_given_dsn", database)
    monkeypatch.setattr(isolated, "_dsn", None)
    async with Orchestrator(isolated):
        yield isolated
    await isolated.close()


@pytest.mark.parametrize("task", [isolated_coroutine, isolated_function])
async def test_a_handler_in_its_own_process_is_told(processes: Conductor[None], db: Db, task: object) -> None:
    run = await (isolated_coroutine if task is isolated_coroutine else isolated_function).invoke()
    await until(lambda: bool(rows(db, "select 1 from steps")))
    assert await run.cancel("enough")
    with pytest.raises(ExecutionCancelled, match="enough"):
        await run.result(30)


async def test_a_request_that_comes_while_the_process_starts_is_not_lost(processes: Conductor[None], db: Db) -> None:
    run = await isolated_at_once.invoke()
    await until(lambda: bool(rows(db, "select 1 from executions where state = 'running'")))
    assert await run.cancel("enough")
    with pytest.raises(ExecutionCancelled, match="enough"):
        await run.result(30)


async def test_a_task_that_its_module_does_not_define_fails_and_says_so(app: App, working: Working) -> None:
    @app.task(executor="process", max_attempts=1)
    def local(ctx: SyncContext) -> None: ...

    async with working():
        with pytest.raises(ExecutionFailed, match="its module defines no task 'local'"):
            await (await local.invoke()).result(30)
