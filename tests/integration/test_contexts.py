"""What a context refuses: use inside a step, after its handler, from elsewhere; and nothing leaks between runs."""

import asyncio
import threading
from contextvars import ContextVar

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import Conductor, Context, ExecutionFailed, Orchestrator, SyncContext
from pgconductor.errors import ConductorError
from tests.integration.conftest import Working
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[DictRow]
tenant: ContextVar[str] = ContextVar("tenant", default="nobody")


@pytest.mark.covers("F66")
async def test_a_context_used_inside_a_step_is_refused_and_named(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        async def inner() -> None:
            await ctx.sleep("nap", 1)

        await ctx.step("outer", inner)

    async with working():
        with pytest.raises(ExecutionFailed, match="step 'outer' uses its context") as caught:
            await (await work.invoke()).result(20)
    assert caught.value.error_type == "pgconductor.errors.ConductorError"


async def test_a_task_that_a_step_left_behind_is_still_inside_it(app: App, working: Working) -> None:
    @app.task
    async def work(ctx: Context) -> str:
        left: list[asyncio.Task[None]] = []

        async def inner() -> None:
            left.append(asyncio.create_task(ctx.sleep("nap", 1)))

        await ctx.step("outer", inner)
        (answer,) = await asyncio.gather(*left, return_exceptions=True)
        return str(answer)

    async with working():
        assert "step 'outer' uses its context" in await (await work.invoke()).result(20)


@pytest.mark.covers("F66")
async def test_a_context_used_after_its_handler_returned_is_refused(app: App, db: Db, working: Working) -> None:
    kept: list[Context] = []

    @app.task
    async def work(ctx: Context) -> None:
        kept.append(ctx)

    async with working():
        await (await work.invoke()).result(20)
        for use in (kept[0].step("late", lambda: 1), kept[0].sleep("late", 1), kept[0].checkpoint()):
            with pytest.raises(ConductorError, match="the handler of task 'work' has returned"):
                await use
    assert db.execute("select from steps").rowcount == 0


@pytest.mark.covers("F66", "F69")
async def test_a_context_used_by_a_task_that_outlives_its_handler_is_refused(app: App, working: Working) -> None:
    returned = asyncio.Event()
    left: list[asyncio.Task[int]] = []

    @app.task
    async def work(ctx: Context) -> None:
        async def later() -> int:
            await returned.wait()
            return await ctx.step("late", lambda: 1)

        left.append(asyncio.create_task(later()))

    async with working():
        await (await work.invoke()).result(20)
        returned.set()
        with pytest.raises(ConductorError, match="has returned"):
            await left[0]


async def test_a_wait_that_outlives_its_handler_ends(app: App, db: Db, working: Working) -> None:
    left: list[asyncio.Task[None]] = []

    @app.task
    async def work(ctx: Context) -> str:
        left.append(asyncio.create_task(ctx.sleep("long", "1h")))
        await ctx.step("beside", lambda: None)
        return "done"

    async with working():
        assert await (await work.invoke()).result(20) == "done"
        await asyncio.wait(left)
    assert left[0].cancelled()
    assert db.execute("select from timer").rowcount == 0


@pytest.mark.covers("F66")
async def test_a_plain_context_used_from_another_thread_is_refused(app: App, working: Working) -> None:
    @app.task
    def work(ctx: SyncContext) -> str:
        refused: list[str] = []

        def use() -> None:
            try:
                ctx.step("elsewhere", lambda: 1)
            except ConductorError as error:
                refused.append(str(error))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        return refused[0]

    async with working():
        assert "outside its handler's thread" in await (await work.invoke()).result(20)


async def test_a_plain_context_used_inside_a_step_is_refused(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    def work(ctx: SyncContext) -> None:
        ctx.step("outer", lambda: ctx.sleep("nap", 1))

    async with working():
        with pytest.raises(ExecutionFailed, match="step 'outer' uses its context"):
            await (await work.invoke()).result(20)


async def test_a_plain_context_used_after_its_handler_returned_is_refused(app: App, working: Working) -> None:
    kept: list[SyncContext] = []

    @app.task
    def keep(ctx: SyncContext) -> None:
        kept.append(ctx)

    @app.task
    def use(ctx: SyncContext) -> str:
        try:
            kept[0].step("late", lambda: 1)
        except ConductorError as error:
            return str(error)
        return "accepted"

    async with working(concurrency=1):
        await (await keep.invoke()).result(20)
        assert "the handler of task 'keep' has returned" in await (await use.invoke()).result(20)


@pytest.mark.covers("F69")
async def test_context_variables_of_plain_handlers_do_not_leak(app: App, working: Working) -> None:
    @app.task
    def work(ctx: SyncContext, name: str) -> str:
        before = tenant.get()
        tenant.set(name)
        return before

    async with working(concurrency=1):
        runs = await app.invoke_many([work.bind(f"tenant {n}") for n in range(5)])
        assert [await run.result(20) for run in runs] == ["nobody"] * 5


@pytest.mark.covers("F69")
async def test_context_variables_of_coroutines_do_not_leak(app: App, db: Db) -> None:
    @app.task
    async def work(ctx: Context, name: str) -> str:
        before = tenant.get()
        tenant.set(name)
        return before

    runs = await app.invoke_many([work.bind(f"tenant {n}") for n in range(20)])
    await Orchestrator(app, concurrency=1).drain()
    assert [await run.result(20) for run in runs] == ["nobody"] * 20


# ---------------------------------------------------------------- what a handler may raise


@pytest.mark.covers("F60", "F64")
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, BaseException, RecursionError, asyncio.CancelledError])
async def test_whatever_a_handler_raises_is_its_own_failure(
    app: App, working: Working, kind: type[BaseException]
) -> None:
    @app.task(max_attempts=1)
    async def coroutine(ctx: Context) -> None:
        raise kind("out")

    @app.task(max_attempts=1)
    def plain(ctx: SyncContext) -> None:
        raise kind("out")

    @app.task
    async def neighbour(ctx: Context) -> int:
        return 1

    async with working():
        runs = [await coroutine.invoke(), await plain.invoke()]
        for run in runs:
            with pytest.raises(ExecutionFailed) as caught:
                await run.result(20)
            assert caught.value.error_type.endswith(kind.__name__)
        assert await (await neighbour.invoke()).result(20) == 1


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
async def test_a_step_that_exits_beside_others_is_its_executions_failure(
    app: App, working: Working, kind: type[BaseException]
) -> None:
    def leave() -> None:
        raise kind("3")

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        await asyncio.gather(ctx.step("leave", leave), ctx.step("stay", lambda: 1))

    @app.task
    async def neighbour(ctx: Context) -> int:
        return 1

    async with working():
        with pytest.raises(ExecutionFailed, match=f"step 'leave' raised {kind.__name__}: 3"):
            await (await work.invoke()).result(20)
        assert await (await neighbour.invoke()).result(20) == 1


async def test_stop_iteration_in_a_plain_handler_does_not_hang_it(app: App, working: Working) -> None:
    empty: list[int] = []

    @app.task(max_attempts=1)
    def work(ctx: SyncContext) -> int:
        return next(iter(empty))

    @app.task(max_attempts=1)
    async def step(ctx: Context) -> int:
        return await ctx.step_options(timeout=60).step("next", lambda: next(iter(empty)))

    async with working():
        for run in (await work.invoke(), await step.invoke()):
            with pytest.raises(ExecutionFailed, match="raised StopIteration"):
                await run.result(20)


async def test_a_handler_that_cancels_its_own_task_fails(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel("my own doing")
        await asyncio.sleep(0)

    async with working():
        with pytest.raises(ExecutionFailed) as caught:
            await (await work.invoke()).result(20)
    assert caught.value.error_type == "asyncio.exceptions.CancelledError"


@pytest.mark.covers("F69")
async def test_tasks_left_behind_do_not_keep_others_from_stopping(app: App, working: Working) -> None:
    left: list[asyncio.Task[bool]] = []

    @app.task
    async def work(ctx: Context) -> None:
        left.append(asyncio.create_task(asyncio.Event().wait()))

    async with working() as orchestrator:
        await (await work.invoke()).result(20)
    assert orchestrator.is_stopped
    await until(lambda: len(left) == 1)
    left[0].cancel()
