"""C3: what a handler with several tasks saw first, it sees first after every resume, whoever resumes it."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import ChildFailed, Conductor, Context, Fail, Worker
from pgconductor.run import Run
from pgconductor.task import Task
from tests.integration.conftest import Working
from tests.waiting import until, until_row

App = Conductor[None]
Db = psycopg.Connection[DictRow]


class Children:
    """Children that end when they are let go; some fail."""

    def __init__(self, app: App) -> None:
        self.released: set[str] = set()

        @app.task(max_attempts=1)
        async def child(ctx: Context, name: str) -> str:
            while name not in self.released:
                await ctx.checkpoint()  # a stop leaves it here
                await asyncio.sleep(0.01)
            if name.startswith("bad"):
                raise Fail(name)
            return name

        self.task: Task[[str], str] = child

    def let_go(self, name: str) -> None:
        self.released.add(name)


@pytest.fixture
def children(app: App) -> Children:
    return Children(app)


Resuming = Callable[[], AbstractAsyncContextManager[Callable[[], Any]]]


@pytest.fixture(params=["by the process that parked it", "by another process"])
def resuming(request: pytest.FixtureRequest, working: Working) -> Resuming:
    """Return what runs workers; the function that it yields lets the next runs be those of another process, or not."""

    @asynccontextmanager
    async def run() -> AsyncGenerator[Callable[[], Any]]:
        current = working()
        await current.__aenter__()

        async def go_on() -> None:
            nonlocal current
            if request.param == "by another process":
                await current.__aexit__(None, None, None)
                current = working()
                await current.__aenter__()

        try:
            yield go_on
        finally:
            await current.__aexit__(None, None, None)

    return run


def retrieve(task: "asyncio.Task[Any]") -> None:
    """Take notice of a failure, which asyncio would else log at the next collection."""
    if not task.cancelled():
        task.exception()


async def result_of(run: Run[Any]) -> Any:
    return await run.result(20)


async def test_branches_go_on_in_the_order_in_which_they_were_answered(
    app: App, children: Children, resuming: Resuming
) -> None:
    stories: list[list[str]] = []

    @app.task
    async def parent(ctx: Context) -> list[str]:
        story: list[str] = []
        stories.append(story)

        async def branch(name: str) -> None:
            story.append(await ctx.invoke(name, children.task.bind(name)))
            await ctx.step(f"after {name}", lambda: None)
            story.append(f"after {name}")

        await asyncio.gather(*[branch(name) for name in "abc"])
        return story

    async with resuming() as go_on:
        run = await parent.invoke()
        expected = [each for name in "cab" for each in (name, f"after {name}")]
        for count, name in enumerate("cab", 1):
            await go_on()
            children.let_go(name)
            await until(partial(stories.__contains__, expected[: 2 * count]))
        assert await result_of(run) == expected
    assert all(story == expected[: len(story)] for story in stories)


@pytest.mark.parametrize("way", ["wait", "as_completed", "gather"])
async def test_who_came_first_came_first_in_every_run(
    app: App, children: Children, resuming: Resuming, way: str
) -> None:
    seen: list[str] = []

    async def first(ctx: Context) -> str:
        names = "bad 1", "bad 2", "bad 3"
        tasks = [asyncio.create_task(ctx.invoke(name, children.task.bind(name))) for name in names]
        for task in tasks:
            task.add_done_callback(retrieve)
        try:
            if way == "wait":
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                await done.pop()
            elif way == "as_completed":
                await next(asyncio.as_completed(tasks))
            else:
                await asyncio.gather(*tasks)
        except ChildFailed as error:
            return error.message
        return "nobody"

    @app.task
    async def parent(ctx: Context) -> tuple[str, str]:
        name = await first(ctx)
        seen.append(name)
        decided = await ctx.step("decide", lambda: name)
        last = await ctx.invoke("last", children.task.bind("last"))
        return decided, last

    async with resuming() as go_on:
        run = await parent.invoke()
        children.let_go("bad 2")
        await until(lambda: bool(seen))
        await go_on()
        for name in ("bad 1", "bad 3", "last"):
            children.let_go(name)
        assert await result_of(run) == ("bad 2", "last")
    assert set(seen) == {"bad 2"}
    assert len(seen) > 1


async def test_an_operation_of_the_handler_itself_has_its_place_among_those_of_its_tasks(
    app: App, children: Children, resuming: Resuming
) -> None:
    stories: list[list[str]] = []

    @app.task
    async def parent(ctx: Context) -> list[str]:
        story: list[str] = []
        stories.append(story)

        async def branch(name: str) -> str:
            story.append(await ctx.invoke(name, children.task.bind(name)))
            return name

        early, late = asyncio.create_task(branch("early")), asyncio.create_task(branch("late"))
        await asyncio.wait([early, late], return_when=asyncio.FIRST_COMPLETED)
        story.append(await ctx.invoke("own", children.task.bind("own")))
        await asyncio.gather(early, late)
        return story

    async with resuming() as go_on:
        run = await parent.invoke()
        children.let_go("early")
        await until(lambda: ["early"] in stories)
        children.let_go("own")
        await until(lambda: ["early", "own"] in stories)
        await go_on()
        children.let_go("late")
        assert await result_of(run) == ["early", "own", "late"]


async def test_a_step_that_was_done_while_a_child_ended_unseen_comes_before_it(
    app: App, db: Db, children: Children, resuming: Resuming
) -> None:
    seen: list[str] = []
    is_stepping = asyncio.Event()

    @app.task
    async def parent(ctx: Context) -> list[str]:
        async def slow() -> str:
            is_stepping.set()
            await until_row(db, "select from executions where task = 'child' and state = 'completed'")
            return "step"

        tasks = [
            asyncio.create_task(ctx.invoke("child", children.task.bind("child"))),
            asyncio.create_task(ctx.step("step", slow)),
        ]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = done.pop().result()
        seen.append(first)
        after = await ctx.invoke(f"after {first}", children.task.bind("after"))
        return [first, after, *await asyncio.gather(*tasks)]

    async with resuming() as go_on:
        run = await parent.invoke()
        await is_stepping.wait()
        children.let_go("child")
        await until_row(db, "select from executions where task = 'child' and state <> 'completed'")
        await until(lambda: bool(seen))
        await go_on()
        children.let_go("after")
        assert await result_of(run) == ["step", "after", "child", "step"]
    assert set(seen) == {"step"}
    assert len(seen) > 1


async def test_waits_for_one_result_keep_their_numbers(app: App, children: Children, resuming: Resuming) -> None:
    seen: list[list[object]] = []

    @app.task
    async def parent(ctx: Context) -> str:
        child = await ctx.start("child", children.task.bind("child"))
        whole, hasty = asyncio.create_task(child.result()), asyncio.create_task(child.result(timeout=0.01))
        seen.append([type(each).__name__ for each in await asyncio.gather(hasty, return_exceptions=True)])
        await ctx.step("note", lambda: None)
        return await whole

    async with resuming() as go_on:
        run = await parent.invoke()
        await until(lambda: bool(seen))
        await go_on()
        children.let_go("child")
        assert await result_of(run) == "child"
    assert all(each == ["TimeoutError"] for each in seen)
    assert len(seen) > 1


async def test_an_answer_that_was_asked_for_is_not_said_to_be_unasked(
    app: App, children: Children, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task
    async def parent(ctx: Context) -> str:
        tasks = [asyncio.create_task(ctx.invoke(name, children.task.bind(name))) for name in ("a", "b")]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ctx.logger.warning("one has ended")
        return done.pop().result()

    for name in ("a", "b"):
        children.let_go(name)
    async with working(workers=[Worker("default", concurrency=1)]):
        assert await result_of(await parent.invoke()) in ("a", "b")
    assert "no longer asks" not in caplog.text
    assert "one has ended" in caplog.text


async def test_what_the_code_no_longer_asks_for_holds_up_nothing(
    app: App, children: Children, working: Working
) -> None:
    ended: list[str] = []
    dropped: set[str] = set()

    @app.task
    async def parent(ctx: Context) -> list[str]:
        ended.clear()

        async def branch(name: str) -> None:
            await ctx.step(f"before {name}", lambda: None)
            ended.append(await ctx.invoke(name, children.task.bind(name)))

        await asyncio.gather(*[branch(name) for name in ("a", "b", "c") if name not in dropped])
        return ended

    async with working():
        run = await parent.invoke()
        children.let_go("b")
        await until(lambda: ended == ["b"])
        dropped.add("b")
        for name in ("c", "a"):
            children.let_go(name)
        assert sorted(await result_of(run)) == ["a", "c"]
