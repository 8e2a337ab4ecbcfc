"""Handlers of several asyncio tasks: what they leave behind, what times out together, and when they are parked."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import (
    ChildFailed,
    ChildTimeout,
    Conductor,
    Context,
    ExecutionCancelled,
    ExecutionFailed,
    Fail,
    Orchestrator,
    RetryPolicy,
)
from tests.integration.conftest import Working
from tests.waiting import until, until_row

App = Conductor[None]
Db = psycopg.Connection[DictRow]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


def rows(db: Db, query: str, *parameters: object) -> list[DictRow]:
    return db.execute(query.encode(), parameters).fetchall()


# ---------------------------------------------------------------- what a handler leaves behind


class Told(logging.Handler):
    """Sets an event when a run says that it waits for what its handler has left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.event = asyncio.Event()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "has left steps behind" in record.getMessage():
            self.count += 1
            self.event.set()

    async def wait(self) -> None:
        async with asyncio.timeout(20):
            await self.event.wait()


@pytest.fixture
def told() -> Iterator[Told]:
    handler = Told()
    logging.getLogger("pgconductor.attempt").addHandler(handler)
    yield handler
    logging.getLogger("pgconductor.attempt").removeHandler(handler)


class Charge:
    """A step that goes on until it is let go, and notes how it ended."""

    def __init__(self, release: asyncio.Event) -> None:
        self.release = release
        self.begun = asyncio.Event()
        self.ends: list[str] = []

    async def __call__(self) -> str:
        self.begun.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise
        self.ends.append("charged")
        return "receipt"

    def begin(self, ctx: Context) -> "asyncio.Task[str]":
        return asyncio.create_task(ctx.step("charge", self.__call__))


def decline() -> None:
    raise ValueError("out of stock")


async def test_a_step_beside_one_that_fails_is_recorded_before_the_next_attempt(
    app: App, working: Working, told: Told
) -> None:
    charge = Charge(told.event)

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> str:
        if ctx.attempt > 1:
            charge.release.set()
        reserve = decline if ctx.attempt == 1 else lambda: None
        receipt, _ = await asyncio.gather(ctx.step("charge", charge.__call__), ctx.step("reserve", reserve))
        return receipt

    async with working():
        assert await (await work.invoke()).result(20) == "receipt"
    assert charge.ends == ["charged"]
    assert told.count == 1


async def test_a_parent_compensates_after_the_steps_that_its_child_left_behind(
    app: App, working: Working, told: Told
) -> None:
    charge = Charge(told.event)

    @app.task
    async def child(ctx: Context) -> None:
        async def decline_for_good() -> None:
            await charge.begun.wait()
            raise Fail("out of stock")

        await asyncio.gather(ctx.step("charge", charge.__call__), decline_for_good())

    @app.task
    async def parent(ctx: Context) -> list[str]:
        try:
            await ctx.invoke("child", child.bind())
        except ChildFailed:
            charge.release.set()
        return [*charge.ends, "compensated"]

    async with working():
        assert await (await parent.invoke()).result(20) == ["charged", "compensated"]


async def test_a_transaction_beside_a_step_that_fails_commits_before_the_next_attempt(
    app: App, db: Db, working: Working, told: Told
) -> None:
    db.execute("create table public.ledger (entry text)")

    tries: list[str] = []

    async def enter(conn: Any) -> str:
        tries.append("try")
        await conn.execute("insert into public.ledger values ('paid')")
        await told.event.wait()
        return "entered"

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> str:
        if ctx.attempt > 1:
            told.event.set()
        reserve = decline if ctx.attempt == 1 else lambda: None
        entered, _ = await asyncio.gather(ctx.transaction("enter", enter), ctx.step("reserve", reserve))
        return f"{entered} in attempt {ctx.attempt}"

    async with working():
        assert await (await work.invoke()).result(20) == "entered in attempt 2"
    assert tries == ["try"]
    assert len(rows(db, "select from public.ledger")) == 1
    assert rows(db, "select status from steps where name = 'enter'") == [{"status": "completed"}]


async def test_a_step_that_a_handler_returns_beside_is_recorded_first(
    app: App, db: Db, working: Working, told: Told
) -> None:
    charge = Charge(told.event)
    left: list[asyncio.Task[str]] = []

    @app.task
    async def work(ctx: Context) -> str:
        left.append(charge.begin(ctx))
        await charge.begun.wait()
        return "returned"

    async with working():
        assert await (await work.invoke()).result(20) == "returned"
        assert charge.ends == ["charged"]
    assert rows(db, "select name from steps") == [{"name": "charge"}]


async def test_what_was_left_behind_can_begin_nothing_more(app: App, db: Db, working: Working, told: Told) -> None:
    charge = Charge(told.event)
    left: list[asyncio.Task[None]] = []

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        async def branch() -> None:
            await ctx.step("charge", charge.__call__)
            await ctx.step("ship", lambda: None)

        left.append(asyncio.create_task(branch()))
        await charge.begun.wait()
        raise ValueError("broken")

    async with working():
        with pytest.raises(ExecutionFailed, match="broken"):
            await (await work.invoke()).result(20)
        assert "has returned" in str(left[0].exception())
    assert [row["name"] for row in rows(db, "select name from steps")] == ["charge"]


@pytest.fixture
def stuck() -> Charge:
    """A step that ends when it is cancelled only."""
    return Charge(asyncio.Event())


def leave_behind(app: App, charge: Charge, then: Callable[[], Awaitable[Any]], **options: Any) -> Any:
    """Define a task whose handler leaves a step behind, and does something else."""
    left: list[asyncio.Task[str]] = []

    @app.task(name="work", max_attempts=1, **options)
    async def work(ctx: Context) -> None:
        left.append(charge.begin(ctx))
        await charge.begun.wait()
        await then()

    return work


async def fail() -> None:
    raise ValueError("broken")


async def test_a_run_that_is_out_of_time_cancels_what_it_left_behind(
    app: App, working: Working, stuck: Charge, told: Told
) -> None:
    work = leave_behind(app, stuck, asyncio.Event().wait, timeout=0.3)
    async with working():
        with pytest.raises(ExecutionFailed) as caught:
            await (await work.invoke()).result(20)
        assert stuck.ends == ["cancelled"]
    assert caught.value.error_type == "pgconductor.errors.AttemptTimeout"
    assert told.count == 0


async def test_a_timeout_bounds_the_wait_for_what_was_left_behind(
    app: App, working: Working, stuck: Charge, told: Told
) -> None:
    work = leave_behind(app, stuck, fail, timeout=2)
    async with working():
        with pytest.raises(ExecutionFailed, match="broken"):
            await (await work.invoke()).result(20)
        assert stuck.ends == ["cancelled"]
    assert told.count == 1


async def test_a_cancel_reaches_a_run_that_waits_for_what_was_left_behind(
    app: App, working: Working, stuck: Charge, told: Told
) -> None:
    work = leave_behind(app, stuck, fail)
    async with working():
        run = await work.invoke()
        await told.wait()
        assert await run.cancel("enough")
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
        assert stuck.ends == ["cancelled"]


async def test_a_handler_that_is_cancelled_does_not_wait_for_what_it_left_behind(
    app: App, working: Working, stuck: Charge, told: Told
) -> None:
    work = leave_behind(app, stuck, asyncio.Event().wait)
    async with working():
        run = await work.invoke()
        await stuck.begun.wait()
        assert await run.cancel("enough")
        with pytest.raises(ExecutionCancelled):
            await run.result(20)
        await until(lambda: stuck.ends == ["cancelled"])
    assert told.count == 0


async def test_a_stop_reaches_a_run_that_waits_for_what_was_left_behind(
    app: App, db: Db, stuck: Charge, told: Told
) -> None:
    work = leave_behind(app, stuck, fail)
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await work.invoke()
    await told.wait()
    await orchestrator.stop(grace=0)
    assert stuck.ends == ["cancelled"]
    assert rows(db, "select state from executions") == [{"state": "failed"}]


async def test_a_run_whose_lease_is_lost_while_it_waits_settles_nothing(
    app: App, db: Db, working: Working, stuck: Charge, told: Told
) -> None:
    work = leave_behind(app, stuck, fail)
    async with working() as orchestrator:
        assert orchestrator._process is not None
        crew = orchestrator._process.crew
        await work.invoke()
        await told.wait()
        stuck.release.set()  # for the run that takes the execution over
        crew.abandon()
        await until(lambda: crew.running_count == 0)
        assert stuck.ends == ["cancelled"]
        assert rows(db, "select error from executions") == [{"error": None}]


async def test_a_slot_stays_taken_until_what_was_left_behind_has_ended(app: App, working: Working, told: Told) -> None:
    charge = Charge(told.event)
    order: list[str] = []

    @app.task
    async def neighbour(ctx: Context) -> None:
        order.extend([*charge.ends, "neighbour"])
        charge.release.set()

    work = leave_behind(app, charge, fail)
    async with working(concurrency=1):
        await work.invoke()
        await charge.begun.wait()
        await (await neighbour.invoke()).result(20)
    assert order == ["charged", "neighbour"]


async def test_children_that_are_refused_end_what_was_left_behind(
    app: App, db: Db, working: Working, stuck: Charge, told: Told
) -> None:
    db.execute("alter table execution add constraint no_children check (depth = 0)")
    left: list[asyncio.Task[str]] = []

    @app.task
    async def child(ctx: Context) -> None: ...

    @app.task
    async def parent(ctx: Context) -> None:
        left.append(stuck.begin(ctx))
        await ctx.invoke("child", child.bind())

    async with working():
        with pytest.raises(ExecutionFailed, match="no_children"):
            await (await parent.invoke()).result(20)
        assert stuck.ends == ["cancelled"]


# ---------------------------------------------------------------- what times out together


async def let_all_time_out(db: Db, count: int) -> None:
    """Have one sweep find so many waits due."""
    await until_row(db, "select from executions where task = 'parent' and state = 'waiting' and attempt = 1")
    due = "update step set due_at = clock_timestamp() where status = 'pending' and due_at is not null returning 1"
    with db.transaction():
        assert len(rows(db, due)) == count
        db.execute("update timer set due_at = clock_timestamp()")


def late_child(app: App) -> Any:
    """Define a child that ends in a parent's second attempt only."""

    @app.task(name="child")
    async def child(ctx: Context, attempt: int) -> int:
        if attempt == 1:
            await ctx.wait_for("never", app.event("never", int))
        return attempt

    return child


@pytest.mark.parametrize("way", ["plain", "with a step in between", "wrapped", "task group"])
async def test_children_that_time_out_together_are_all_invoked_afresh(
    app: App, db: Db, working: Working, way: str
) -> None:
    child = late_child(app)

    async def branch(ctx: Context, n: int) -> int:
        try:
            return await ctx.invoke(f"child-{n}", child.bind(ctx.attempt), timeout="1h")
        except ChildTimeout as timeout:
            if way == "wrapped":
                raise RuntimeError("late") from timeout
            raise

    @app.task(name="parent", retry=AT_ONCE, max_attempts=2)
    async def parent(ctx: Context) -> list[int]:
        if way == "task group":
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(branch(ctx, n)) for n in range(3)]
            return [task.result() for task in tasks]
        try:
            return await asyncio.gather(*(branch(ctx, n) for n in range(3)))
        except ChildTimeout:
            if way == "with a step in between":
                await ctx.step("note it", lambda: None)
            raise

    async with working():
        run = await parent.invoke()
        await let_all_time_out(db, 3)
        assert await run.result(20) == [2, 2, 2]
    assert len(rows(db, "select from executions where task = 'child'")) == 6


async def test_events_that_are_late_together_are_all_waited_for_afresh(app: App, db: Db, working: Working) -> None:
    news = app.event("news", int)

    @app.task(name="parent", retry=AT_ONCE, max_attempts=2)
    async def parent(ctx: Context) -> list[int]:
        waits = [ctx.wait_for(f"news-{n}", news, where=None, timeout="1h") for n in range(3)]
        return await asyncio.gather(*waits)

    async with working():
        run = await parent.invoke()
        await let_all_time_out(db, 3)
        await until_row(db, "select from executions where task = 'parent' and state = 'waiting' and attempt = 2")
        for n in range(3):
            await app.emit(news, n)
        assert sorted(await run.result(20)) == [0, 1, 2]


async def test_results_that_are_late_together_are_all_waited_for_afresh(app: App, db: Db, working: Working) -> None:
    news = app.event("news", int)

    @app.task(name="child")
    async def child(ctx: Context) -> int:
        return await ctx.wait_for("news", news)

    @app.task(name="parent", retry=AT_ONCE, max_attempts=2)
    async def parent(ctx: Context) -> list[int]:
        children = [await ctx.start(f"child-{n}", child.bind()) for n in range(3)]
        return await asyncio.gather(*(each.result(timeout="1h") for each in children))

    async with working():
        run = await parent.invoke()
        await let_all_time_out(db, 3)
        await until_row(db, "select from executions where task = 'parent' and state = 'waiting' and attempt = 2")
        await app.emit(news, 7)
        assert await run.result(20) == [7, 7, 7]


async def test_timeouts_that_a_handler_goes_through_one_by_one_are_all_done_afresh(
    app: App, db: Db, working: Working
) -> None:
    child = late_child(app)

    @app.task(name="parent", retry=AT_ONCE, max_attempts=2)
    async def parent(ctx: Context) -> list[int]:
        calls = [ctx.invoke(f"child-{n}", child.bind(ctx.attempt), timeout="1h") for n in range(4)]
        tasks = [asyncio.create_task(call) for call in calls]
        seen, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await ctx.checkpoint()  # so much for that one; the others are still to come
        assert all(isinstance(each.exception(), ChildTimeout) for each in seen)
        return [len(seen), *await asyncio.gather(*rest)]

    async with working():
        run = await parent.invoke()
        await let_all_time_out(db, 4)
        assert await run.result(20) == [1, 2, 2, 2]


async def test_timeouts_that_a_handler_has_seen_stay_when_later_ones_end_it(app: App, db: Db, working: Working) -> None:
    child = late_child(app)

    @app.task(name="parent", retry=AT_ONCE)
    async def parent(ctx: Context) -> list[str]:
        async def call(name: str) -> int:
            return await ctx.invoke(name, child.bind(ctx.attempt), timeout="1h")

        seen = await asyncio.gather(call("a"), call("b"), return_exceptions=True)
        await ctx.step("take note", lambda: None)
        more = await asyncio.gather(call("c"), call("d"))
        return [type(each).__name__ for each in [*seen, *more]]

    async with working():
        run = await parent.invoke()
        await let_all_time_out(db, 2)
        await until_row(db, "select from steps where name = 'd' and status = 'pending'")
        await let_all_time_out(db, 2)
        assert await run.result(20) == ["ChildTimeout", "ChildTimeout", "int", "int"]
    assert len(rows(db, "select from executions where task = 'child'")) == 6


# ---------------------------------------------------------------- when a handler of several tasks is parked


Step = Callable[[int], Awaitable[int]]


async def hand_over_by_queue(step: Step) -> None:
    queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)

    async def produce() -> None:
        for n in range(50):
            await queue.put(n)

    async def consume() -> None:
        for _ in range(50):
            await step(await queue.get())

    await asyncio.gather(produce(), consume())


async def take_turns_by_lock(step: Step) -> None:
    lock = asyncio.Lock()

    async def take_turns(first: int) -> None:
        for n in range(first, 50, 2):
            async with lock:
                await step(n)
                await asyncio.sleep(0)

    await asyncio.gather(take_turns(0), take_turns(1))


@pytest.mark.parametrize("go_through", [hand_over_by_queue, take_turns_by_lock])
async def test_a_handler_that_goes_through_what_is_recorded_is_not_parked_before_what_is_new(
    app: App, db: Db, working: Working, go_through: Callable[[Step], Awaitable[None]]
) -> None:
    bodies: list[int] = []

    @app.task(retry=AT_ONCE)
    async def work(ctx: Context) -> int:
        def body(n: int) -> int:
            if n == 40 and ctx.attempt == 1:
                raise ValueError("broken")
            bodies.append(n)
            return n

        async def step(n: int) -> int:
            return await ctx.step(f"step-{n}", body, n)

        deadline = asyncio.create_task(ctx.sleep("deadline", "1d"))
        await asyncio.sleep(0)
        await go_through(step)
        deadline.cancel()
        return ctx.attempt

    async with working():
        assert await (await work.invoke()).result(10) == 2
    assert sorted(bodies) == list(range(50))


async def test_a_handler_that_looks_for_what_another_task_waits_for_is_parked(app: App, working: Working) -> None:
    runs: list[str] = []

    @app.task
    async def work(ctx: Context) -> str:
        runs.append("run")
        is_over = asyncio.Event()

        async def look() -> None:
            while not is_over.is_set():
                await ctx.checkpoint()

        async def nap() -> None:
            await ctx.sleep("nap", 0.01)
            is_over.set()

        await asyncio.gather(nap(), look())
        return "woken"

    async with working():
        assert await (await work.invoke()).result(20) == "woken"
    assert runs == ["run", "run"]
