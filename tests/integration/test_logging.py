"""Product section 3: lines before the point where a run resumes are not repeated; each carries the ids of its run."""

import logging
from typing import Any
from uuid import UUID

import pytest

from pgconductor import ChildTimeout, Conductor, Context, RetryPolicy, SyncContext
from tests.integration.conftest import Working

App = Conductor[None]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "pgconductor.task")
    return caplog


def said(log: pytest.LogCaptureFixture) -> list[str]:
    return [line.getMessage() for line in log.records if line.name.startswith("pgconductor.task.")]


async def test_a_coroutines_lines_are_not_repeated(app: App, working: Working, log: pytest.LogCaptureFixture) -> None:
    @app.task
    async def child(ctx: Context) -> None: ...

    @app.task
    async def work(ctx: Context) -> None:
        ctx.logger.info("begins")
        await ctx.step("step", lambda: ctx.logger.info("in the step"))
        ctx.logger.info("after the step")
        await ctx.sleep("nap", 0.01)
        ctx.logger.info("after the nap")
        await ctx.invoke("child", child.bind())
        ctx.logger.info("after the child")
        started = await ctx.start("started", child.bind())
        await started.result()
        ctx.logger.info("after the started")
        await ctx.cancel(UUID(int=1))
        await ctx.sleep("last", 0.01)
        ctx.logger.info("ends")

    async with working():
        await (await work.invoke()).result(20)
    assert said(log) == [
        "begins",
        "in the step",
        "after the step",
        "after the nap",
        "after the child",
        "after the started",
        "ends",
    ]


async def test_a_plain_handlers_lines_are_not_repeated(
    app: App, working: Working, log: pytest.LogCaptureFixture
) -> None:
    @app.task
    def work(ctx: SyncContext) -> None:
        ctx.logger.info("begins")
        ctx.step("step", lambda: None)
        ctx.logger.info("after the step")
        ctx.sleep("nap", 0.01)
        ctx.logger.info("ends")

    async with working():
        await (await work.invoke()).result(20)
    assert said(log) == ["begins", "after the step", "ends"]


async def test_the_next_attempt_repeats_only_what_no_step_recorded(
    app: App, working: Working, log: pytest.LogCaptureFixture
) -> None:
    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        ctx.logger.info("begins")
        await ctx.step("step", lambda: None)
        ctx.logger.info("attempt %d", ctx.attempt)
        if ctx.attempt == 1:
            raise ValueError("not yet")

    async with working():
        await (await work.invoke()).result(20)
    assert said(log) == ["begins", "attempt 1", "attempt 2"]


async def test_a_run_speaks_again_from_the_last_step_before_an_operation_done_afresh(
    app: App, working: Working, log: pytest.LogCaptureFixture
) -> None:
    @app.task
    async def child(ctx: Context, attempt: int) -> None:
        await ctx.sleep("nap", "1h" if attempt == 1 else 0)

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> None:
        await ctx.step("step", lambda: None)
        ctx.logger.info("after the step")
        try:
            await ctx.invoke("child", child.bind(ctx.attempt), timeout=0.1 if ctx.attempt == 1 else 60)
        except ChildTimeout:
            ctx.logger.info("late")
            raise
        ctx.logger.info("ends")

    async with working():
        await (await work.invoke()).result(20)
    assert said(log) == ["after the step", "late", "after the step", "ends"]


async def test_a_line_carries_the_ids_of_its_run(app: App, working: Working, log: pytest.LogCaptureFixture) -> None:
    @app.task
    async def child(ctx: Context) -> None:
        ctx.logger.info("child", extra={"order": 7})

    @app.task
    async def parent(ctx: Context) -> str:
        await ctx.invoke("child", child.bind())
        return str(ctx.execution_id)

    async with working():
        parent_id = await (await parent.invoke()).result(20)
    (line,) = [line for line in log.records if line.getMessage() == "child"]
    facts: dict[str, Any] = vars(line)
    assert (facts["parent_id"], facts["root_id"], facts["task"]) == (parent_id, parent_id, "child")
    assert (facts["queue"], facts["attempt"], facts["order"]) == ("default", 1, 7)
    assert facts["execution_id"] != parent_id


async def test_is_enabled_for_spares_the_work_of_a_line_that_is_not_written(
    app: App, working: Working, log: pytest.LogCaptureFixture
) -> None:
    asked: list[bool] = []

    @app.task
    async def work(ctx: Context) -> None:
        asked.append(ctx.logger.isEnabledFor(logging.INFO))
        await ctx.sleep("nap", 0.01)

    async with working():
        await (await work.invoke()).result(20)
    assert asked == [True, False]
