"""Product sections 3 and 4 for plain `def` handlers, which run in threads, with real workers."""

import asyncio
import threading
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import (
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    Conductor,
    DuplicateStep,
    ExecutionFailed,
    Fail,
    Retry,
    RetryPolicy,
    StepMismatch,
    SyncContext,
)
from pgconductor.threads import Threads
from tests.integration.conftest import Working
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[DictRow]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


def rows(db: Db, query: str, *parameters: object) -> list[DictRow]:
    return db.execute(query.encode(), parameters).fetchall()


async def test_steps_are_saved_before_they_return_and_not_run_again(app: App, db: Db, working: Working) -> None:
    bodies: list[str] = []

    def body() -> int:
        bodies.append("run")
        return len(bodies)

    @app.task(retry=AT_ONCE)
    def work(ctx: SyncContext) -> list[Any]:
        value = ctx.step("once", body)
        saved = [row["name"] for row in rows(db, "select name from steps")]
        ctx.sleep("nap", 0.01)
        ctx.sleep_until("past", datetime(2020, 1, 1, tzinfo=UTC))
        ctx.checkpoint()
        if ctx.attempt == 1:
            raise ValueError("and again")
        return [value, "once" in saved, ctx.attempt]

    async with working():
        assert await (await work.invoke()).result(20) == [1, True, 2]
    assert bodies == ["run"]


async def test_a_failing_step_is_tried_again_and_not_recorded(app: App, db: Db, working: Working) -> None:
    tries: list[int] = []

    def flaky() -> int:
        tries.append(1)
        if len(tries) < 4:
            raise ValueError("not yet")
        return len(tries)

    @app.task(retry=AT_ONCE)
    def work(ctx: SyncContext) -> list[int]:
        patient = ctx.step_options(max_attempts=2, retry=AT_ONCE)
        return [patient.step("flaky", flaky), ctx.attempt]

    async with working():
        assert await (await work.invoke()).result(20) == [4, 2]
    assert [row["status"] for row in rows(db, "select status from steps")] == ["completed"]


async def test_one_name_for_two_operations_is_refused(app: App, working: Working) -> None:
    @app.task
    def work(ctx: SyncContext) -> list[str]:
        ctx.step("x", lambda: 1)
        refused: list[str] = []
        for use in (lambda: ctx.step("x", lambda: 1), lambda: ctx.sleep("x", 1)):
            try:
                use()
            except DuplicateStep as error:
                refused.append(error.step)
        return refused

    async with working():
        assert await (await work.invoke()).result(20) == ["x", "x"]


async def test_a_transaction_commits_with_its_record_or_not_at_all(app: App, db: Db, working: Working) -> None:
    db.execute("create table public.ledger (entry text)")

    def enter(conn: Any, attempt: int) -> str:
        conn.execute("insert into public.ledger values (%s)", (f"attempt {attempt}",))
        if attempt == 1:
            raise ValueError("no")
        if attempt == 2:
            conn.commit()
        return "entered"

    @app.task(retry=AT_ONCE)
    def work(ctx: SyncContext) -> str:
        entered = ctx.transaction("enter", enter, ctx.attempt)
        ctx.sleep("resume", 0.01)
        return entered

    async with working():
        assert await (await work.invoke()).result(20) == "entered"
    assert rows(db, "select entry from public.ledger") == [{"entry": "attempt 3"}]
    assert rows(db, "select kind from steps where name = 'enter'") == [{"kind": "transaction"}]


async def test_a_transaction_whose_connection_is_cut_is_done_again_at_no_cost(
    app: App, db: Db, working: Working
) -> None:
    db.execute("create table public.ledger (entry text)")
    tries: list[int] = []

    def enter(conn: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            rows(db, "select pg_terminate_backend(%s, 10000)", conn.info.backend_pid)
        conn.execute("insert into public.ledger values (%s)", (f"try {len(tries)}",))

    @app.task(max_attempts=1)
    def work(ctx: SyncContext) -> None:
        ctx.transaction("enter", enter)

    async with working():
        await (await work.invoke()).result(20)
    assert rows(db, "select entry from public.ledger") == [{"entry": "try 2"}]


async def test_parking_runs_finally_blocks_and_passes_except_exception(app: App, working: Working) -> None:
    events: list[str] = []

    @app.task
    def work(ctx: SyncContext) -> str:
        try:
            ctx.sleep("nap", 0.01)
        except Exception:
            events.append("except Exception")
            raise
        finally:
            events.append("finally")
        return "done"

    async with working():
        assert await (await work.invoke()).result(20) == "done"
    assert events == ["finally", "finally"]


@pytest.mark.covers("F65")
async def test_a_handler_that_swallows_the_parking_is_named(
    app: App, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task
    def greedy(ctx: SyncContext) -> str:
        try:
            ctx.sleep("nap", 0.01)
        except BaseException:  # noqa: BLE001
            return "swallowed"
        return "woken"

    async with working():
        assert await (await greedy.invoke()).result(20) == "woken"
    (warning,) = [each.getMessage() for each in caplog.records if "catches BaseException" in each.getMessage()]
    assert "task 'greedy'" in warning


async def test_children_raise_what_became_of_them(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=1)
    def broken(ctx: SyncContext) -> None:
        raise ValueError("boom")

    @app.task
    def slow(ctx: SyncContext) -> None:
        ctx.sleep("nap", "1h")

    @app.task
    def parent(ctx: SyncContext) -> list[str]:
        seen: list[str] = []
        try:
            ctx.invoke("broken", broken.bind())
        except ChildFailed as error:
            seen.append(str(error))
        try:
            ctx.invoke("slow", slow.bind(), timeout=0.05)
        except ChildTimeout as error:
            seen.append(str(error))
        cancelled = ctx.start("cancelled", slow.bind())
        assert ctx.cancel(cancelled.id, "not needed")
        try:
            cancelled.result_sync()
        except ChildCancelled as error:
            seen.append(str(error))
        late = ctx.start("late", slow.bind())
        try:
            late.result_sync(timeout=0.05)
        except TimeoutError as error:
            seen.append(str(error))
        done, pending = ctx.wait("both", [cancelled, late], count=1)
        return [*seen, *[each.step for each in done], *[each.step for each in pending]]

    async with working():
        assert await (await parent.invoke()).result(30) == [
            "Child execution failed: boom",
            "Child execution timed out after 50ms",
            "Child execution cancelled: not needed",
            "child 'late' did not end within the timeout",
            "cancelled",
            "late",
        ]


async def test_an_attempt_ends_by_retry_and_the_execution_by_fail(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=5)
    def work(ctx: SyncContext) -> None:
        if ctx.attempt == 1:
            raise Retry(after=0.01)
        raise Fail("for good")

    async with working():
        with pytest.raises(ExecutionFailed, match="for good"):
            await (await work.invoke()).result(20)
    assert rows(db, "select attempt from executions") == [{"attempt": 2}]


@pytest.mark.covers("F67")
async def test_a_changed_kind_stops_with_a_mismatch(app: App, working: Working) -> None:
    found: list[str] = []

    @app.task(retry=AT_ONCE)
    def work(ctx: SyncContext) -> int:
        if ctx.attempt == 2:
            try:
                ctx.sleep("x", 1)
            except StepMismatch as error:
                found.append(f"{error.recorded} → {error.found}")
                raise
        value = ctx.step("x", lambda: 7)
        if ctx.attempt == 1:
            raise ValueError("and again")
        return value

    async with working():
        assert await (await work.invoke()).result(20) == 7
    assert found == ["step → sleep"]


async def test_plain_handlers_run_side_by_side(app: App, working: Working) -> None:
    together = threading.Barrier(4)

    @app.task
    def work(ctx: SyncContext) -> bool:
        return together.wait() >= 0

    async with working(concurrency=4):
        runs = await app.invoke_many([work.bind() for _ in range(4)])
        assert all([await run.result(20) for run in runs])


async def test_a_handler_that_hangs_beyond_its_timeout_keeps_no_place_of_others(
    app: App, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    @app.task(timeout=0.1, max_attempts=1)
    def hung(ctx: SyncContext) -> None:
        go_on.wait()

    @app.task
    def work(ctx: SyncContext) -> str:
        return "done"

    async with working(concurrency=2):
        lost = [await hung.invoke() for _ in range(5)]
        for run in lost:
            with pytest.raises(ExecutionFailed, match="timeout"):
                await run.result(20)
        assert await (await work.invoke()).result(20) == "done"
        go_on.set()
    warned = [each.getMessage() for each in caplog.records if "goes on in its thread" in each.getMessage()]
    assert all(any(str(run.id) in line for line in warned) for run in lost)


async def test_a_thread_that_was_given_up_ends_when_it_returns_and_takes_no_queued_work_along() -> None:
    threads, go_on, has_begun = Threads(1, "given-up"), threading.Event(), threading.Event()

    def hang() -> None:
        has_begun.set()
        go_on.wait()

    hung = threads.submit(hang)
    await until(has_begun.is_set)
    queued = threads.submit(lambda: "done")
    assert not hung.cancel()
    assert queued.result(20) == "done"
    go_on.set()
    await until(lambda: sum(each.name.startswith("given-up") for each in threading.enumerate()) == 1)
    assert not threads.is_busy
    assert threads.submit(lambda: "again").result(20) == "again"
    threads.close()


async def test_a_stop_releases_a_plain_handler_at_its_next_operation(app: App, db: Db, working: Working) -> None:
    running, go_on = threading.Event(), threading.Event()
    runs: list[int] = []

    @app.task(max_attempts=1)
    def work(ctx: SyncContext) -> int:
        runs.append(ctx.attempt)
        running.set()
        go_on.wait()
        ctx.checkpoint()
        return len(runs)

    async with working() as orchestrator:
        run = await work.invoke()
        await until(running.is_set)
        stop = asyncio.create_task(orchestrator.stop(grace=20))
        await until(lambda: orchestrator.is_shutting_down)
        go_on.set()
        await stop
    assert await run.state() == "ready"
    async with working():
        assert await run.result(20) == 2
    assert runs == [1, 1]
