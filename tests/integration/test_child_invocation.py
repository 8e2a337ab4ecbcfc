"""The rules C1 to C12 of child invocation, each by the test that is named for it, with real workers."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
import pytest
from pydantic import BaseModel
from typing_extensions import TypedDict

from pgconductor import (
    ChildCancelled,
    ChildFailed,
    ChildTimeout,
    Conductor,
    Context,
    ExecutionFailed,
    RetryPolicy,
    SyncContext,
    attempt,
)
from tests.integration.conftest import Working
from tests.waiting import until_row

App = Conductor[None]
Db = psycopg.Connection[dict[str, Any]]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


def rows(db: Db, query: str, *parameters: object) -> list[dict[str, Any]]:
    return db.execute(query.encode(), parameters).fetchall()


async def test_c1_a_parked_parent_holds_no_slot_and_no_lease(app: App, db: Db, working: Working) -> None:
    gate = asyncio.Event()

    @app.task
    async def child(ctx: Context) -> int:
        await gate.wait()
        return 1

    @app.task
    async def parent(ctx: Context) -> int:
        return await ctx.invoke("child", child.bind())

    async with working(concurrency=1) as orchestrator:
        run = await parent.invoke()
        await until_row(db, "select 1 from executions where task = 'child' and state = 'running'")
        assert await run.state() == "waiting"
        assert rows(db, "select running_count from workers where id = %s", orchestrator.id) == [{"running_count": 1}]
        gate.set()
        assert await run.result(20) == 1


async def test_c2_the_value_comes_back_at_the_same_line_and_finished_steps_do_not_run_again(
    app: App, working: Working
) -> None:
    bodies: list[str] = []

    def seven() -> int:
        bodies.append("before")
        return 7

    @app.task
    async def child(ctx: Context, n: int) -> int:
        return n * 2

    @app.task
    async def parent(ctx: Context) -> list[int]:
        first = await ctx.step("before", seven)
        second = await ctx.invoke("child", child.bind(first))
        third = await ctx.step("after", lambda: second + 1)
        return [first, second, third]

    async with working():
        assert await (await parent.invoke()).result(20) == [7, 14, 15]
    assert bodies == ["before"]


@pytest.mark.covers("P20")
async def test_c3_a_failure_that_was_observed_is_observed_again_after_every_resume(app: App, working: Working) -> None:
    seen: list[str] = []

    @app.task(max_attempts=1)
    async def broken(ctx: Context) -> int:
        raise ValueError("no")

    @app.task
    async def parent(ctx: Context) -> str:
        try:
            await ctx.invoke("broken", broken.bind())
        except ChildFailed as failure:
            seen.append(str(failure))
        await ctx.sleep("a while", 0.01)
        await ctx.sleep("another", 0.01)
        return "went on"

    async with working():
        assert await (await parent.invoke()).result(20) == "went on"
    assert len(seen) == 3
    assert set(seen) == {"Child execution failed: no"}


@pytest.mark.covers("P20")
async def test_c4_a_failed_child_raises_with_its_facts(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def broken(ctx: Context) -> int:
        raise ValueError("boom")

    @app.task
    async def parent(ctx: Context) -> list[str]:
        try:
            return [str(await ctx.invoke("broken", broken.bind()))]
        except ChildFailed as failure:
            return [str(failure), failure.task, failure.error_type, str(failure.execution_id), failure.remote_traceback]

    async with working():
        message, task, kind, child_id, trace = await (await parent.invoke()).result(20)
    assert (message, task, kind) == ("Child execution failed: boom", "broken", "ValueError")
    assert UUID(child_id).version == 7
    assert 'raise ValueError("boom")' in trace


@pytest.mark.covers("P15")
async def test_c4_an_uncaught_failure_fails_every_ancestor_at_once(app: App, db: Db, working: Working) -> None:
    @app.task(max_attempts=1)
    async def leaf(ctx: Context) -> int:
        raise ValueError("boom")

    @app.task(max_attempts=5)
    async def middle(ctx: Context) -> int:
        return await ctx.invoke("leaf", leaf.bind())

    @app.task(max_attempts=5)
    async def top(ctx: Context) -> int:
        return await ctx.invoke("middle", middle.bind())

    async with working():
        with pytest.raises(ExecutionFailed, match="Child execution failed: Child execution failed: boom"):
            await (await top.invoke()).result(20)
    failed = rows(db, "select task, attempt, error ->> 'message' as message from failed_executions order by depth")
    assert [(row["task"], row["attempt"]) for row in failed] == [("top", 1), ("middle", 1), ("leaf", 1)]
    assert failed[1]["message"] == "Child execution failed: boom"


@pytest.mark.covers("P22")
async def test_c5_a_child_that_is_too_late_raises_and_is_cancelled_with_its_subtree(
    app: App, db: Db, working: Working
) -> None:
    @app.task
    async def leaf(ctx: Context) -> None:
        await ctx.sleep("for long", "1h")

    @app.task
    async def slow(ctx: Context) -> None:
        await ctx.invoke("leaf", leaf.bind())

    @app.task
    async def parent(ctx: Context) -> str:
        try:
            await ctx.invoke("slow", slow.bind(), timeout="5m")
        except ChildTimeout as timeout:
            return str(timeout)
        return "in time"

    async with working():
        run = await parent.invoke()
        await until_row(db, "select 1 from executions where task = 'leaf' and state = 'waiting'")
        db.execute("update step set due_at = clock_timestamp() where execution_id = %s", (run.id,))
        db.execute("update timer set due_at = clock_timestamp() where execution_id = %s", (run.id,))
        assert await run.result(20) == "Child execution timed out after 5m"
    states = {row["task"]: row["state"] for row in rows(db, "select task, state from executions")}
    assert states == {"parent": "completed", "slow": "cancelled", "leaf": "cancelled"}


async def test_c5_a_kept_child_goes_on_and_keeps_its_own_state(app: App, db: Db, working: Working) -> None:
    @app.task
    async def slow(ctx: Context) -> int:
        await ctx.sleep("longer than the parent waits", 0.6)
        return 5

    @app.task
    async def parent(ctx: Context) -> str:
        try:
            await ctx.invoke("slow", slow.bind(), timeout=0.2, on_timeout="keep")
        except ChildTimeout:
            return "late"
        return "in time"

    async with working():
        assert await (await parent.invoke()).result(20) == "late"
        await until_row(db, "select 1 from executions where task = 'slow' and state = 'completed'")
    assert rows(db, "select result from executions where task = 'slow'") == [{"result": 5}]


async def test_c5_an_uncaught_timeout_fails_the_attempt_and_the_retry_invokes_afresh(
    app: App, db: Db, working: Working
) -> None:
    @app.task
    async def child(ctx: Context, attempt: int) -> int:
        if attempt == 1:
            await ctx.sleep("too long", "1h")
        return attempt

    @app.task(retry=AT_ONCE)
    async def parent(ctx: Context) -> int:
        return await ctx.invoke("child", child.bind(ctx.attempt), timeout=0.2 if ctx.attempt == 1 else 60)

    async with working():
        assert await (await parent.invoke()).result(20) == 2
    children = rows(db, "select state from executions where task = 'child' order by created_at")
    assert [row["state"] for row in children] == ["cancelled", "completed"]


@pytest.mark.covers("P16")
async def test_c6_a_cancelled_child_raises_in_its_parent(app: App, db: Db, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> None:
        await ctx.sleep("for long", "1h")

    @app.task
    async def parent(ctx: Context) -> str:
        try:
            await ctx.invoke("child", child.bind())
        except ChildCancelled as cancelled:
            return cancelled.message
        return "completed"

    async with working():
        run = await parent.invoke()
        await until_row(db, "select 1 from executions where task = 'child' and state = 'waiting'")
        (child_row,) = rows(db, "select id from executions where task = 'child'")
        assert await app.cancel(child_row["id"], reason="not needed")
        assert await run.result(20) == "not needed"


@pytest.mark.covers("F70", "P17")
async def test_c6_cancelling_a_parent_cancels_its_attached_descendants_and_not_the_detached(
    app: App, db: Db, working: Working
) -> None:
    @app.task
    async def leaf(ctx: Context) -> None:
        await ctx.sleep("for long", "1h")

    @app.task
    async def middle(ctx: Context) -> None:
        await ctx.invoke("leaf", leaf.bind())

    @app.task
    async def apart(ctx: Context) -> None:
        await ctx.sleep("for long", "1h")

    @app.task
    async def top(ctx: Context) -> None:
        await ctx.start("apart", apart.bind(), detached=True)
        await ctx.invoke("middle", middle.bind())

    async with working():
        run = await top.invoke()
        await until_row(
            db, "select 1 from executions where task in ('leaf', 'apart') and state = 'waiting' having count(*) = 2"
        )
        assert await run.cancel("enough")
    states = {row["task"]: row["state"] for row in rows(db, "select task, state from executions")}
    assert states == {"top": "cancelled", "middle": "cancelled", "leaf": "cancelled", "apart": "waiting"}


async def test_c7_gather_and_task_groups_work_as_written(app: App, working: Working) -> None:
    @app.task
    async def double(ctx: Context, n: int) -> int:
        return n * 2

    @app.task
    async def parent(ctx: Context) -> list[int]:
        one, two = await asyncio.gather(ctx.invoke("one", double.bind(1)), ctx.invoke("two", double.bind(2)))
        async with asyncio.TaskGroup() as group:
            three = group.create_task(ctx.invoke("three", double.bind(3)))
            four = group.create_task(ctx.invoke("four", double.bind(4)))
        return [one, two, three.result(), four.result()]

    async with working():
        assert await (await parent.invoke()).result(20) == [2, 4, 6, 8]


async def test_c7_invoke_all_wakes_the_parent_once(app: App, working: Working) -> None:
    runs: list[str] = []

    @app.task
    async def double(ctx: Context, n: int) -> int:
        return n * 2

    @app.task
    async def parent(ctx: Context) -> int:
        runs.append("run")
        return sum(await ctx.invoke_all("all", [double.bind(n) for n in range(300)]))

    async with working():
        assert await (await parent.invoke()).result(30) == 299 * 300
    assert len(runs) == 2


async def test_c7_max_in_flight_bounds_the_unfinished_children(app: App, working: Working) -> None:
    running = peak = 0

    @app.task
    async def child(ctx: Context, n: int) -> int:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.002)
        running -= 1
        return n

    @app.task
    async def parent(ctx: Context) -> list[int]:
        return await ctx.invoke_all("all", [child.bind(n) for n in range(30)], max_in_flight=4)

    async with working(concurrency=20):
        assert await (await parent.invoke()).result(30) == list(range(30))
    assert peak <= 4


async def test_c7_wait_returns_the_first_of_several_started_children(app: App, working: Working) -> None:
    @app.task
    async def child(ctx: Context, name: str, seconds: float) -> str:
        await ctx.sleep("nap", seconds)
        return name

    @app.task
    async def parent(ctx: Context) -> list[str]:
        slow = await ctx.start("slow", child.bind("slow", 60))
        fast = await ctx.start("fast", child.bind("fast", 0.05))
        done, pending = await ctx.wait("first", [slow, fast], count=1)
        return [*[await each.result() for each in done], *[each.step for each in pending]]

    async with working():
        assert await (await parent.invoke()).result(20) == ["fast", "slow"]


async def test_c7_a_fan_out_raises_every_failure_in_a_group(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def child(ctx: Context, n: int) -> int:
        if n % 3 == 0:
            raise ValueError(f"no {n}")
        return n

    @app.task
    async def parent(ctx: Context) -> list[str]:
        failures: list[str] = []
        try:
            await ctx.invoke_all("all", [child.bind(n) for n in range(10)])
        except* ChildFailed as group:
            failures = sorted(str(each) for each in group.exceptions)
        return failures

    async with working():
        assert await (await parent.invoke()).result(20) == [f"Child execution failed: no {n}" for n in (0, 3, 6, 9)]


async def test_c8_a_child_on_another_queue_and_one_by_reference(app: App, working: Working) -> None:
    @app.task(queue="elsewhere")
    async def child(ctx: Context, n: int) -> str:
        return f"{ctx.queue} {n}"

    reference = app.define_task("child", dict[str, int], str, queue="elsewhere")

    @app.task
    async def parent(ctx: Context) -> list[str]:
        return [await ctx.invoke("a", child.bind(1)), await ctx.invoke("b", reference.bind({"n": 2}))]

    async with working():
        assert await (await parent.invoke()).result(20) == ["elsewhere 1", "elsewhere 2"]


@pytest.mark.covers("F73")
async def test_c8_recursion_ends_at_depth_100_with_an_error_that_says_so(app: App, db: Db, working: Working) -> None:
    @app.task
    async def dive(ctx: Context, depth: int) -> int:
        return await ctx.invoke("deeper", app.define_task("dive", dict[str, int], int).bind({"depth": depth + 1}))

    async with working():
        with pytest.raises(ExecutionFailed, match="maximum depth of 100 reached"):
            await (await dive.invoke(0)).result(60)
    assert rows(db, "select count(*) as count, max(depth) as depth from executions") == [{"count": 101, "depth": 100}]


async def test_c9_the_child_of_a_step_is_the_same_on_every_run(app: App, db: Db, working: Working) -> None:
    seen: list[UUID] = []

    @app.task
    async def child(ctx: Context) -> int:
        return 1

    @app.task(retry=AT_ONCE)
    async def parent(ctx: Context) -> int:
        started = await ctx.start("child", child.bind())
        seen.append(started.id)
        await ctx.invoke("other", child.bind())
        if ctx.attempt < 3:
            raise RuntimeError("again")
        return await started.result()

    async with working():
        assert await (await parent.invoke()).result(20) == 1
    assert len(seen) >= 3
    assert len(set(seen)) == 1
    assert rows(db, "select count(*) as count from executions where task = 'child'") == [{"count": 2}]


@pytest.mark.covers("P21")
async def test_c10_fifty_sequential_children_cost_no_attempt(app: App, working: Working) -> None:
    @app.task
    async def child(ctx: Context, n: int) -> int:
        return n

    @app.task(max_attempts=1)
    async def parent(ctx: Context) -> int:
        total = 0
        for n in range(50):
            total += await ctx.invoke(f"child-{n}", child.bind(n))
        assert ctx.attempt == 1
        return total

    async with working():
        assert await (await parent.invoke()).result(60) == sum(range(50))


async def test_c11_parents_and_children_in_one_slot_do_not_deadlock(app: App, working: Working) -> None:
    @app.task
    async def child(ctx: Context, n: int) -> int:
        return n

    @app.task
    async def parent(ctx: Context, n: int) -> int:
        return await ctx.invoke("child", child.bind(n))

    async with working(concurrency=1):
        runs = await app.invoke_many([parent.bind(n) for n in range(20)])
        assert [await run.result(30) for run in runs] == list(range(20))


async def test_c11_a_woken_parent_goes_before_fresh_work(app: App, db: Db, working: Working) -> None:
    order: list[str] = []

    @app.task(queue="children")
    async def child(ctx: Context) -> None: ...

    @app.task
    async def parent(ctx: Context) -> None:
        await ctx.invoke("child", child.bind())
        order.append("parent")

    @app.task
    async def other(ctx: Context, n: int) -> None:
        if not order:
            await until_row(db, "select 1 from executions where task = 'parent' and state = 'ready'")
        order.append("other")

    await app.invoke_many([parent.bind(), *[other.bind(n) for n in range(20)]])
    async with working(queues={"default": 1, "children": 1}) as orchestrator:
        await orchestrator.drain()
    assert order.index("parent") <= 2  # one runs, one may have been fetched


@dataclass
class Point:
    x: int


class Model(BaseModel):
    name: str


class Row(TypedDict):
    key: str


async def test_c12_values_are_decoded_to_the_annotation_on_the_first_run_and_on_replay(
    app: App, working: Working
) -> None:
    seen: list[list[Any]] = []

    @app.task
    async def point(ctx: Context) -> Point:
        return Point(1)

    @app.task
    async def model(ctx: Context) -> Model:
        return Model(name="a")

    @app.task
    async def row(ctx: Context) -> Row:
        return {"key": "k"}

    @app.task
    async def parent(ctx: Context) -> bool:
        seen.append([
            await ctx.invoke("point", point.bind()),
            await ctx.invoke("model", model.bind()),
            await ctx.invoke("row", row.bind()),
        ])  # fmt: skip
        await ctx.sleep("and again", 0.01)
        return True

    async with working():
        assert await (await parent.invoke()).result(20)
    assert seen == [[Point(1), Model(name="a"), {"key": "k"}]] * 2


def test_c2_plain_functions_invoke_children_too(app: App, database: str) -> None:
    @app.task
    def double(ctx: SyncContext, n: int) -> int:
        return ctx.step("double", lambda: n * 2)

    @app.task
    def parent(ctx: SyncContext) -> int:
        first = ctx.invoke("first", double.bind(1))
        started = ctx.start("second", double.bind(first))
        ctx.sleep("nap", 0.01)
        done, _ = ctx.wait("both", [started])
        return done[0].result_sync() + sum(ctx.invoke_all("all", [double.bind(n) for n in range(5)]))

    async def work() -> int:
        from pgconductor import Orchestrator

        async with Orchestrator(app):
            return await (await parent.invoke()).result(20)

    assert asyncio.run(work()) == 4 + 20


async def test_a_start_that_is_stored_while_its_parent_is_left_is_among_what_the_parent_has_open(
    app: App, db: Db, database: str, working: Working, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "LONG_COUNT", 0)
    is_running, is_locked, is_given_up = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @app.task(queue="elsewhere")
    async def child(ctx: Context) -> None: ...

    @app.task
    async def parent(ctx: Context) -> None:
        is_running.set()
        await is_locked.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await ctx.start("given up", child.bind())
        is_given_up.set()
        await ctx.invoke("call", child.bind())

    async with working(queues=["default"]):
        run = await parent.invoke()
        await is_running.wait()
        with psycopg.connect(database) as other:
            other.execute("select from pgconductor.execution where id = %s for update", (run.id,))
            is_locked.set()
            await is_given_up.wait()  # the start waits for the lock
            for _ in range(100):
                await asyncio.sleep(0)  # the run is left
        await until_row(db, "select from wait")
        (found,) = rows(db, "select cached_open from wait")
    assert sorted(found["cached_open"]) == ["call", "given up"]
