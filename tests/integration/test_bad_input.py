"""A wrong argument to an operation of the context is refused at its line, by a message that names the step."""

import re
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from pgconductor import Conductor, Context, ExecutionFailed, RetryPolicy, SyncContext
from tests.integration.conftest import Working

App = Conductor[None]
Operation = Callable[[Any], Any]


async def coroutine() -> None: ...


def plain(conn: Any) -> int:
    return 1


WRONG: list[tuple[Operation, str]] = [
    (lambda ctx: ctx.step("s", 5), "step 's': 5 is not a function"),
    (lambda ctx: ctx.step("s", coroutine()), "step 's': <coroutine object coroutine"),
    (lambda ctx: ctx.transaction("s", 5), "transaction 's': 5 is not a function"),
    (lambda ctx: ctx.step_options(retry=5), "step_options: retry: 5 is not a RetryPolicy"),
    (lambda ctx: ctx.step_options(max_attempts="2"), "step_options: max_attempts: '2' is not a whole number"),
    (
        lambda ctx: ctx.sleep_until("s", timedelta(1)),
        "sleep_until 's': at: datetime.timedelta(days=1) is not",
    ),
    (lambda ctx: ctx.invoke("s", 5), "invoke 's': 5 is not a call; bind its arguments"),
    (lambda ctx: ctx.invoke_all("s", None), "invoke_all 's': None is not a sequence of calls"),
    (lambda ctx: ctx.invoke_all("s", [5]), "invoke_all 's': 5 is not a call"),
    (lambda ctx: ctx.start("s", None), "start 's': None is not a call"),
    (lambda ctx: ctx.wait("s", 5), "wait 's': 5 is not a sequence of children"),
    (lambda ctx: ctx.wait("s", [5]), "wait 's': 5 is not a child; give what ctx.start returned"),
    (lambda ctx: ctx.wait_for("s", "order.paid"), "wait_for 's': 'order.paid' is not an event definition"),
    (lambda ctx: ctx.emit("order.paid", {}), "emit: 'order.paid' is not an event definition"),
    (lambda ctx: ctx.cancel("7"), "cancel: '7' is not an execution's id"),
    (lambda ctx: ctx.schedule("s", 5, cron="@daily"), "schedule 's': 5 is not a call"),
    (lambda ctx: ctx.unschedule("s", "work"), "unschedule 's': 'work' is not a task"),
]


async def messages(app: App, working: Working, wrong: list[tuple[Operation, str]]) -> list[str]:
    """Run each in an `async def` handler and in a plain one; return what they raised."""

    @app.task(retry=RetryPolicy(delays=[0.01]), max_attempts=1)
    async def work(ctx: Context, number: int) -> None:
        await wrong[number][0](ctx)

    @app.task(max_attempts=1)
    def work_plainly(ctx: SyncContext, number: int) -> None:
        wrong[number][0](ctx)

    found: list[str] = []
    async with working():
        for task in (work, work_plainly):
            for run in await app.invoke_many([task.bind(number) for number in range(len(wrong))]):
                with pytest.raises(ExecutionFailed) as failure:
                    await run.result(30)
                found.append(str(failure.value))
    return found


async def test_a_wrong_argument_is_refused_at_its_line(app: App, working: Working) -> None:
    found = await messages(app, working, WRONG)

    for message, (_, expected) in zip(found, [*WRONG, *WRONG], strict=True):
        assert expected in message


async def test_a_task_is_no_step(app: App, working: Working) -> None:
    @app.task
    async def charge(ctx: Context, cents: int) -> int:
        return cents

    found = await messages(app, working, [(lambda ctx: ctx.step("s", charge, 5), "")])

    assert all("step 's': <Task charge queue=default> is a task; invoke it" in message for message in found)


async def test_a_wait_for_a_number_of_children_that_is_none_is_refused(app: App, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> None: ...

    @app.task(max_attempts=1)
    async def parent(ctx: Context, count: str) -> None:
        await ctx.wait("s", [await ctx.start("c", child.bind())], count=count)  # type: ignore[arg-type]

    async with working():
        with pytest.raises(ExecutionFailed, match=re.escape("wait 's': count must be from 1 to 1, not '2'")):
            await (await parent.invoke("2")).result(30)


async def test_a_plain_function_is_no_async_transaction(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def work(ctx: Context) -> int:
        return await ctx.transaction("s", plain)  # type: ignore[arg-type]

    async with working():
        with pytest.raises(ExecutionFailed, match="transaction 's': is a plain function; use async def"):
            await (await work.invoke()).result(30)


async def test_a_coroutine_function_is_no_step_of_a_plain_handler(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    def work(ctx: SyncContext) -> None:
        _ = ctx.step("s", coroutine)

    async with working():
        with pytest.raises(ExecutionFailed, match="step 's': an async def cannot be awaited in a plain def handler"):
            await (await work.invoke()).result(30)
