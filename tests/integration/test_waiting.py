"""Product section 3: sleeping, checkpoints, parking and what it does to a handler, with real workers."""

import asyncio
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import Conductor, Context, ExecutionFailed, RetryPolicy, StepMismatch
from tests.integration.conftest import Working
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[DictRow]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


def rows(db: Db, query: str, *parameters: object) -> list[DictRow]:
    return db.execute(query.encode(), parameters).fetchall()


def states(db: Db) -> dict[str, str]:
    return {row["task"]: row["state"] for row in rows(db, "select task, state from executions")}


# ---------------------------------------------------------------- sleeping


async def test_sleep_parks_on_the_database_clock(app: App, db: Db, working: Working) -> None:
    @app.task
    async def work(ctx: Context) -> None:
        await ctx.sleep("nap", "90m")

    async with working():
        run = await work.invoke()
        await until(lambda: states(db) == {"work": "waiting"})
        (step,) = rows(db, "select kind, status, due_at - created_at as span from steps")
        assert step == {"kind": "sleep", "status": "pending", "span": timedelta(minutes=90)}
        assert rows(db, "select execution_id from lease") == []
        db.execute("update step set due_at = clock_timestamp(); update timer set due_at = clock_timestamp()")
        await run.result(20)
    assert rows(db, "select status from steps") == [{"status": "completed"}]


async def test_sleep_until_wakes_at_an_instant_and_at_once_when_it_has_passed(
    app: App, db: Db, working: Working
) -> None:
    at = datetime(2100, 1, 1, tzinfo=UTC)

    @app.task
    async def work(ctx: Context) -> str:
        await ctx.sleep_until("past", datetime(2020, 1, 1, tzinfo=UTC))
        await ctx.sleep_until("future", at)
        return "never"

    async with working():
        await work.invoke()
        await until(lambda: len(rows(db, "select name from steps")) == 2)
    steps = rows(db, "select name, status, due_at from steps order by due_at")
    assert [(step["name"], step["status"]) for step in steps] == [("past", "completed"), ("future", "pending")]
    assert steps[1]["due_at"] == at


async def test_sleep_until_refuses_an_instant_without_a_zone(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        await ctx.sleep_until("nap", datetime(2100, 1, 1))  # noqa: DTZ001

    async with working():
        with pytest.raises(ExecutionFailed, match="has no time zone"):
            await (await work.invoke()).result(20)


async def test_a_checkpoint_is_where_a_stop_releases_a_handler_at_no_cost(app: App, db: Db, working: Working) -> None:
    runs: list[int] = []
    go_on = asyncio.Event()

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> int:
        runs.append(ctx.attempt)
        if len(runs) == 1:
            await go_on.wait()
        await ctx.checkpoint()
        return len(runs)

    async with working() as orchestrator:
        run = await work.invoke()
        await until(lambda: bool(runs))
        stop = asyncio.create_task(orchestrator.stop(grace=20))
        await until(lambda: orchestrator.is_shutting_down)
        go_on.set()
        await stop
    assert states(db) == {"work": "ready"}
    async with working():
        assert await run.result(20) == 2
    assert runs == [1, 1]


# ---------------------------------------------------------------- unwinding


async def test_parking_runs_finally_blocks_and_passes_except_exception(app: App, working: Working) -> None:
    events: list[str] = []

    @app.task
    async def work(ctx: Context) -> str:
        try:
            await ctx.sleep("nap", 0.01)
        except Exception:
            events.append("except Exception")
            raise
        finally:
            await asyncio.sleep(0)
            events.append("finally")
        return "done"

    async with working():
        assert await (await work.invoke()).result(20) == "done"
    assert events == ["finally", "finally"]


@pytest.mark.covers("F65")
async def test_a_handler_that_swallows_the_parking_is_named_and_its_value_dropped(
    app: App, working: Working, caplog: pytest.LogCaptureFixture
) -> None:
    runs: list[str] = []

    @app.task
    async def greedy(ctx: Context) -> str:
        runs.append("run")
        try:
            await ctx.sleep("nap", 0.01)
        except BaseException:  # noqa: BLE001
            return "swallowed"
        return "woken"

    async with working():
        run = await greedy.invoke()
        assert await run.result(20) == "woken"
    assert runs == ["run", "run"]
    (warning,) = [each.getMessage() for each in caplog.records if "catches BaseException" in each.getMessage()]
    assert "task 'greedy'" in warning
    assert str(run.id) in warning


@pytest.mark.covers("F65")
async def test_a_handler_that_goes_on_after_parking_can_do_nothing_more(app: App, db: Db, working: Working) -> None:
    refused: list[str] = []

    @app.task
    async def greedy(ctx: Context) -> str:
        try:
            await ctx.sleep("nap", 0.01)
        except BaseException:  # noqa: BLE001
            try:
                await ctx.step("stolen", lambda: 1)
            except BaseException as error:
                refused.append(type(error).__name__)
                raise
        return "woken"

    async with working():
        assert await (await greedy.invoke()).result(20) == "woken"
    assert refused == ["Suspend"]
    assert [row["name"] for row in rows(db, "select name from steps")] == ["nap"]


async def test_a_finally_block_that_raises_while_parking_costs_no_attempt(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def work(ctx: Context) -> int:
        parking = True
        try:
            await ctx.sleep("nap", 0.01)
            parking = False
        finally:
            if parking:
                raise ValueError("in the way")
        return ctx.attempt

    async with working():
        assert await (await work.invoke()).result(20) == 1


async def test_other_awaits_are_cancelled_and_done_again(app: App, working: Working) -> None:
    events: list[str] = []

    async def elsewhere() -> str:
        events.append("begins")
        try:
            await asyncio.sleep(0.5 if len(events) > 1 else 3600)
        except asyncio.CancelledError:
            events.append("is cancelled")
            raise
        return "answer"

    @app.task
    async def work(ctx: Context) -> str:
        answer, _ = await asyncio.gather(elsewhere(), ctx.sleep("nap", 0.01))
        return answer

    async with working():
        assert await (await work.invoke()).result(20) == "answer"
    assert events == ["begins", "is cancelled", "begins"]


# ---------------------------------------------------------------- asyncio, as handlers use it


async def test_gather_with_return_exceptions_does_not_swallow_the_parking(app: App, working: Working) -> None:
    @app.task(max_attempts=1)
    async def child(ctx: Context, n: int) -> int:
        if n == 1:
            raise ValueError("one")
        return n

    @app.task
    async def parent(ctx: Context) -> list[str]:
        calls = [ctx.invoke(f"child-{n}", child.bind(n)) for n in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [type(answer).__name__ for answer in answers]

    async with working():
        assert await (await parent.invoke()).result(20) == ["int", "ChildFailed", "int"]


async def test_nested_gathers_and_groups_go_on_behind_a_long_wait(app: App, db: Db, working: Working) -> None:
    @app.task
    async def child(ctx: Context, n: int) -> int:
        return n

    async def deep(ctx: Context, level: int) -> int:
        if level == 0:
            return await ctx.invoke("first", child.bind(1)) + await ctx.step("between", lambda: 1)
        async with asyncio.TaskGroup() as group:
            below = group.create_task(deep(ctx, level - 1))
        (value,) = await asyncio.gather(below)
        return value

    async def chain(ctx: Context) -> int:
        return await deep(ctx, 3) + await ctx.invoke("last", child.bind(10))

    @app.task
    async def parent(ctx: Context) -> int:
        long = asyncio.create_task(ctx.sleep("long", "1h"))
        value = await asyncio.gather(chain(ctx))
        long.cancel()
        return value[0]

    async with working():
        assert await (await parent.invoke()).result(20) == 12


async def test_the_first_of_several_waits_is_gone_on_with(app: App, db: Db, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> str:
        return "child"

    @app.task
    async def parent(ctx: Context) -> str:
        quick = asyncio.create_task(ctx.invoke("quick", child.bind()))
        slow = asyncio.create_task(ctx.sleep("slow", "1h"))
        done, pending = await asyncio.wait({quick, slow}, return_when=asyncio.FIRST_COMPLETED)
        assert done == {quick}
        assert pending == {slow}
        return quick.result()

    async with working():
        assert await (await parent.invoke()).result(20) == "child"
    assert rows(db, "select execution_id from timer") == []


async def test_a_wait_that_the_handler_gave_up_does_not_park_it(app: App, db: Db, working: Working) -> None:
    given_up = asyncio.Event()
    runs: list[str] = []

    @app.task
    async def work(ctx: Context) -> str:
        runs.append("run")
        long = asyncio.create_task(ctx.sleep("long", "1h"))
        await ctx.step("beside", given_up.wait if len(runs) > 1 else lambda: None)
        long.cancel()
        for _ in range(100):
            await asyncio.sleep(0)
        return "done"

    async with working():
        given_up.set()
        assert await (await work.invoke()).result(20) == "done"
    assert runs == ["run"]


async def test_timeouts_of_asyncio_are_per_run_and_their_own(app: App, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> int:
        return 3

    @app.task
    async def parent(ctx: Context) -> list[str | int]:
        async with asyncio.timeout(3600):
            value = await ctx.invoke("child", child.bind())
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            return [value, "own timeout", ctx.attempt]
        return []

    async with working():
        assert await (await parent.invoke()).result(20) == [3, "own timeout", 1]


async def test_a_timeout_beside_a_running_step_is_the_handlers_to_catch(app: App, working: Working) -> None:
    timed_out = asyncio.Event()

    @app.task
    async def parent(ctx: Context) -> str:
        async def impatient() -> str:
            try:
                async with asyncio.timeout(0.01):
                    await ctx.sleep("long", "1h")
            except TimeoutError:
                timed_out.set()
                return "gave up"
            return "slept"

        answer, _ = await asyncio.gather(impatient(), ctx.step("beside", timed_out.wait))
        return answer

    async with working():
        assert await (await parent.invoke()).result(20) == "gave up"


async def test_a_shielded_wait_parks_too(app: App, working: Working) -> None:
    @app.task
    async def parent(ctx: Context) -> str:
        await asyncio.shield(ctx.sleep("nap", 0.01))
        return "woken"

    async with working():
        assert await (await parent.invoke()).result(20) == "woken"


async def test_a_child_invoked_while_a_step_runs_exists_at_once(app: App, working: Working) -> None:
    child_ran = asyncio.Event()

    @app.task
    async def child(ctx: Context) -> str:
        child_ran.set()
        return "child"

    @app.task
    async def parent(ctx: Context) -> list[str | bool]:
        return list(await asyncio.gather(ctx.step("wait for it", child_ran.wait), ctx.invoke("child", child.bind())))

    async with working():
        assert await (await parent.invoke()).result(20) == [True, "child"]


async def test_children_that_the_database_refuses_beside_a_step_fail_the_attempt(
    app: App, db: Db, working: Working
) -> None:
    db.execute("alter table execution add constraint no_children check (depth = 0)")
    blocked = asyncio.Event()

    @app.task
    async def child(ctx: Context) -> None: ...

    @app.task
    async def parent(ctx: Context) -> None:
        await asyncio.gather(ctx.step("blocked", blocked.wait), ctx.invoke("child", child.bind()))

    async with working():
        with pytest.raises(ExecutionFailed, match="no_children") as caught:
            await (await parent.invoke()).result(20)
        assert caught.value.error_type == "pgconductor.errors.EncodeError"


# ---------------------------------------------------------------- waits on started children


async def test_wait_refuses_a_child_given_twice_and_a_count_out_of_bounds(app: App, working: Working) -> None:
    @app.task
    async def child(ctx: Context) -> None: ...

    @app.task
    async def parent(ctx: Context) -> list[str]:
        one = await ctx.start("one", child.bind())
        refused: list[str] = []
        for children, count in [([one, one], None), ([one], 2), ([one], 0)]:
            try:
                await ctx.wait("both", children, count=count)
            except ValueError as error:
                refused.append(str(error))
        return refused

    async with working():
        twice, over, under = await (await parent.invoke()).result(20)
    assert twice == "wait 'both': child 'one' is given twice"
    assert "from 1 to 1, not 2" in over
    assert "from 1 to 1, not 0" in under


async def test_a_wait_that_times_out_returns_what_there_is_in_every_run(app: App, db: Db, working: Working) -> None:
    seen: list[list[str]] = []

    given_up = asyncio.Event()

    @app.task
    async def child(ctx: Context) -> None:
        await given_up.wait()

    @app.task
    async def parent(ctx: Context) -> list[str]:
        slow = await ctx.start("slow", child.bind())
        done, pending = await ctx.wait("briefly", [slow], timeout=0.05)
        seen.append([each.step for each in pending])
        given_up.set()
        await slow.result()
        return [each.step for each in done]

    async with working():
        assert await (await parent.invoke()).result(20) == []
    assert len(seen) >= 2
    assert all(each == ["slow"] for each in seen)


async def test_a_result_that_comes_too_late_is_waited_for_again_by_the_next_attempt(
    app: App, db: Db, working: Working
) -> None:
    step = "a" * 200  # the wait's own name is a little longer

    @app.task
    async def child(ctx: Context) -> str:
        await ctx.sleep("nap", "1h")
        return "in the end"

    @app.task(retry=AT_ONCE)
    async def parent(ctx: Context) -> str:
        started = await ctx.start(step, child.bind())
        return await started.result(timeout=0.05 if ctx.attempt == 1 else 60)

    async with working():
        run = await parent.invoke()
        await until(lambda: bool(rows(db, "select 1 from executions where task = 'parent' and attempt = 2")))
        await until(lambda: states(db) == {"parent": "waiting", "child": "waiting"})
        db.execute(
            "update step s set due_at = clock_timestamp() from execution e where e.id = s.execution_id and e.depth = 1"
        )
        db.execute(
            "update timer t set due_at = clock_timestamp() from execution e where e.id = t.execution_id and e.depth = 1"
        )
        assert await run.result(20) == "in the end"


async def test_a_late_result_that_was_caught_stays_late(app: App, working: Working) -> None:
    seen: list[str] = []
    given_up = asyncio.Event()

    @app.task
    async def child(ctx: Context) -> str:
        await given_up.wait()
        return "value"

    @app.task
    async def parent(ctx: Context) -> str:
        started = await ctx.start("child", child.bind())
        try:
            await started.result(timeout=0.01)
        except TimeoutError as error:
            seen.append(str(error))
        given_up.set()
        return await started.result()

    async with working():
        assert await (await parent.invoke()).result(20) == "value"
    assert set(seen) == {"child 'child' did not end within the timeout"}


# ---------------------------------------------------------------- changed code


@pytest.mark.covers("F67")
@pytest.mark.parametrize("change", ["kind", "child task", "count", "task of a fan-out"])
async def test_changed_code_stops_with_a_mismatch_and_resumes_when_it_is_put_back(
    app: App, db: Db, working: Working, change: str
) -> None:
    found: list[str] = []
    is_changed = False

    @app.task
    async def one(ctx: Context) -> int:
        return 1

    @app.task
    async def two(ctx: Context) -> int:
        return 2

    async def ask(ctx: Context) -> int:
        if change == "kind" and is_changed:
            return await ctx.step("x", lambda: 7)
        if change in ("kind", "child task"):
            return await ctx.invoke("x", (two if is_changed else one).bind())
        if change == "count":
            return sum(await ctx.invoke_all("x", [one.bind()] * (2 if is_changed else 1)))
        return sum(await ctx.invoke_all("x", [(two if is_changed else one).bind()]))

    @app.task(retry=AT_ONCE)
    async def parent(ctx: Context) -> int:
        nonlocal is_changed
        try:
            value = await ask(ctx)
        except StepMismatch as error:
            found.append(error.recorded)
            is_changed = False  # the code is put back
            raise
        if not found:
            is_changed = True  # another version is deployed
            raise ValueError("and again")
        return value

    async with working():
        assert await (await parent.invoke()).result(20) == 1
    fan_outs = {"count": "invoke_all of 1 children", "task of a fan-out": "invoke_all with 'one' as child 1"}
    assert found == [fan_outs.get(change, "invoke of 'one'")]
