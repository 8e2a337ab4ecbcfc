"""Flow control with real workers: what a user declares, and what then happens."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pgconductor import (
    Batch,
    BatchContext,
    Concurrency,
    Conductor,
    Context,
    ExecutionFailed,
    Orchestrator,
    RateLimit,
    RetryPolicy,
    SyncContext,
)
from tests.conftest import connect
from tests.integration.conftest import Working
from tests.sql.support import Db
from tests.waiting import until

App = Conductor[None]
AT_ONCE = RetryPolicy(first=0.01, max=0.01)


class Crowd:
    """Counts how many are inside at once."""

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0
        self.order: list[str] = []

    async def visit(self, name: str = "") -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.order.append(name)
        for _ in range(5):
            await asyncio.sleep(0)
        self.inside -= 1


async def test_a_limit_holds_over_two_orchestrators(app: App, database: str) -> None:
    crowd = Crowd()

    @app.task(concurrency=2)
    async def work(ctx: Context, n: int) -> int:
        await crowd.visit()
        return n

    async with Orchestrator(app), Orchestrator(app):
        runs = await app.invoke_many([work.bind(n) for n in range(60)])
        assert [await run.result(30) for run in runs] == list(range(60))
    assert crowd.most == 2


async def test_each_tenant_has_its_share_and_they_take_turns(app: App, working: Working) -> None:
    crowd = Crowd()

    @app.task(concurrency=[Concurrency(1, key="tenant"), Concurrency(1)])
    async def work(ctx: Context, tenant: str) -> None:
        await crowd.visit(tenant)

    runs = await app.invoke_many([work.bind(tenant) for tenant in ["a"] * 20 + ["b"] * 2])
    async with working():
        for run in runs:
            await run.result(30)
    assert crowd.most == 1
    assert crowd.order[:4] == ["a", "b", "a", "b"]


@pytest.mark.covers("F74")
async def test_74_parent_and_child_of_one_limit_do_not_deadlock(app: App, working: Working) -> None:
    @app.task(concurrency=1)
    async def countdown(ctx: Context, n: int) -> int:
        return 0 if n == 0 else 1 + await ctx.invoke("next", countdown.bind(n - 1))

    async with working():
        assert await (await countdown.invoke(5)).result(30) == 5


async def test_a_limit_that_an_operator_raises_is_used_at_once(app: App, db: Db, working: Working) -> None:
    gate = asyncio.Event()

    @app.task(concurrency=1)
    async def work(ctx: Context) -> None:
        await gate.wait()

    async def running() -> int:
        return len(db.execute("select from lease").fetchall())

    async with working():
        runs = await app.invoke_many([work.bind() for _ in range(4)])
        await until(lambda: _is(running, 1))
        db.execute("select set_limit('work', 3)")
        await until(lambda: _is(running, 3))
        gate.set()
        for run in runs:
            await run.result(30)


async def _is(count: Callable[[], Awaitable[int]], wanted: int) -> bool:
    return await count() == wanted


async def test_a_rate_lets_the_next_start_when_the_first_is_forgotten(app: App, db: Db, working: Working) -> None:
    @app.task(rate_limit=RateLimit(2, per=0.5))
    async def work(ctx: Context, n: int) -> int:
        return n

    async with working():
        runs = await app.invoke_many([work.bind(n) for n in range(5)])
        assert [await run.result(30) for run in runs] == list(range(5))
    rows = db.execute("select started_at from execution order by started_at").fetchall()
    starts = [row["started_at"] for row in rows]
    assert min((later - first).total_seconds() for first, later in zip(starts, starts[2:], strict=False)) >= 0.5


async def test_the_others_get_the_handle_of_a_throttled_call(app: App, working: Working) -> None:
    @app.task
    async def work(ctx: Context, n: int) -> int:
        return n

    throttled = work.with_options(throttle="1h", dedupe_key="k")
    async with working():
        runs = [await throttled.invoke(1), await throttled.invoke(2)]
        runs += await app.invoke_many([throttled.bind(3), throttled.bind(4), work.bind(5)])
        assert [await run.result(30) for run in runs] == [1, 1, 1, 1, 5]


async def test_the_last_call_of_a_debounce_runs(app: App, working: Working) -> None:
    @app.task
    async def work(ctx: Context, n: int) -> int:
        return n

    runs = await app.invoke_many([work.bind(n) for n in range(3)], debounce=0.3)
    runs.append(await work.with_options(debounce=0.3).invoke(7))
    async with working():
        assert {await run.result(30) for run in runs} == {7}


async def test_fifty_callers_of_one_key_share_one_run(app: App, working: Working) -> None:
    ran: list[int] = []

    @app.task
    async def work(ctx: Context, n: int) -> int:
        ran.append(n)
        return n

    async with working():
        keyed = work.with_options(dedupe_key="k")
        runs = await asyncio.gather(*(keyed.invoke(n) for n in range(50)))
        assert len({await run.result(30) for run in runs}) == 1
    assert len(ran) == 1


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_closing_window_releases_the_run_at_its_next_step(
    app: App, database: str, db: Db, working: Working, is_async: bool
) -> None:
    began: list[int] = []

    def wait_until_closed() -> str:
        with connect(database) as other:
            while other.execute("select 1 from task t where closes_in(t, now()) is not null").fetchone():
                pass
        return "kept"

    async def on_the_loop(ctx: Context) -> str:
        began.append(1)
        value = await ctx.step("first", asyncio.to_thread, wait_until_closed)
        while len(began) == 1:  # the worker counts from the claim's reply, a moment behind the database
            await ctx.checkpoint()
        return value

    def in_a_thread(ctx: SyncContext) -> str:
        began.append(1)
        value = ctx.step("first", wait_until_closed)
        while len(began) == 1:
            ctx.checkpoint()
        return value

    task = app.create_task(on_the_loop, name="work") if is_async else app.create_task(in_a_thread, name="work")
    async with working():
        close_soon(db)
        run = await task.invoke()
        await until(lambda: _is_state(run.state, "running"))
        await until(lambda: _is_state(run.state, "ready"))
        assert began == [1]
        db.execute("update task set window_start = null, window_end = null, window_zone = null")
        assert await run.result(30) == "kept"
    assert began == [1, 1]


def close_soon(db: Db) -> None:
    """Give the task a window that closes in three seconds."""
    db.execute("""
        update task set window_start = (now() at time zone 'UTC' - interval '1 h')::time,
          window_end = (now() at time zone 'UTC' + interval '3 s')::time, window_zone = 'UTC'""")


async def _is_state(state: Callable[[], Awaitable[str]], wanted: str) -> bool:
    return await state() == wanted


# ---------------------------------------------------------------- expiry


async def test_an_expired_execution_fails_with_its_name(app: App, working: Working) -> None:
    @app.task(expires=0.05, queue="asleep")
    async def work(ctx: Context) -> None: ...

    @app.task
    async def other(ctx: Context) -> None: ...

    async with working(queues=["asleep", "default"]):
        await app.pause("asleep")
        run = await work.invoke()
        with pytest.raises(ExecutionFailed, match="was not started within"):
            await run.result(30)


# ---------------------------------------------------------------- batches


async def test_a_batch_takes_several_payloads_and_deals_out_the_results(app: App, working: Working) -> None:
    sizes: list[int] = []

    @app.task(batch=Batch(size=20, timeout=2))  # in which all are claimed on the busiest machine
    async def double(ctx: BatchContext, numbers: list[int]) -> list[int]:
        sizes.append(len(numbers))
        return [2 * n for n in numbers]

    runs = await app.invoke_many([double.bind(n) for n in range(50)])
    async with working():
        assert [await run.result(30) for run in runs] == [2 * n for n in range(50)]
    assert sizes == [20, 20, 10]


async def test_a_batch_waits_for_more_until_it_is_full(app: App, working: Working) -> None:
    sizes: list[int] = []

    @app.task(batch=Batch(size=3, timeout=60))
    async def collect(ctx: BatchContext, numbers: list[int]) -> list[int] | None:
        sizes.append(len(numbers))
        return None

    async with working(concurrency=1):
        runs = [await collect.invoke(n) for n in range(3)]
        for run in runs:
            await run.result(30)
    assert sizes == [3]


async def test_a_batch_that_is_not_full_runs_when_its_time_is_over(app: App, working: Working) -> None:
    @app.task(batch=Batch(size=100, timeout=0.05))
    async def count(ctx: BatchContext, numbers: list[int]) -> list[int]:
        return [len(numbers)] * len(numbers)

    async with working():
        runs = await app.invoke_many([count.bind(n) for n in range(3)])
        assert [await run.result(30) for run in runs] == [3, 3, 3]


async def test_an_error_fails_the_whole_batch_and_each_by_its_own_budget(app: App, db: Db, working: Working) -> None:
    calls: list[list[int]] = []

    @app.task(batch=Batch(size=3, timeout=0), max_attempts=2, retry=AT_ONCE)
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int]:
        calls.append(numbers)
        if len(calls) == 1:
            raise ValueError("not now")
        return numbers

    runs = await app.invoke_many([work.bind(n) for n in range(3)])
    async with working():
        assert [await run.result(30) for run in runs] == [0, 1, 2]
    assert calls[0] == [0, 1, 2]
    assert db.execute("select distinct failures from execution").fetchall() == [{"failures": 1}]


async def test_a_wrong_number_of_results_fails_the_batch(app: App, working: Working) -> None:
    @app.task(batch=Batch(size=3, timeout=0), max_attempts=1)
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int]:
        return numbers[1:]

    runs = await app.invoke_many([work.bind(n) for n in range(3)])
    async with working():
        for run in runs:
            with pytest.raises(ExecutionFailed, match="given 3 payloads and returned 2 results"):
                await run.result(30)


async def test_one_bad_payload_or_result_of_a_batch_fails_alone(app: App, db: Db, working: Working) -> None:
    @app.task(batch=Batch(size=3, timeout=0), max_attempts=1)
    async def work(ctx: BatchContext, numbers: list[int]) -> list[float]:
        return [float("nan") if n == 1 else n for n in numbers]

    runs = await app.invoke_many([work.bind(n) for n in range(3)])
    db.execute("""update execution set payload = '{"numbers": "no number"}' where id = %s""", (runs[2].id,))
    async with working():
        assert await runs[0].result(30) == 0
        for run in runs[1:]:
            with pytest.raises(ExecutionFailed):
                await run.result(30)


@pytest.mark.covers("P27")
async def test_p27_a_batch_of_cancelled_and_live_executions_settles_all(app: App, db: Db, working: Working) -> None:
    inside, go = asyncio.Event(), asyncio.Event()
    given: list[int] = []

    @app.task(batch=Batch(size=4, timeout=60))
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int]:
        given.extend(numbers)
        inside.set()
        await go.wait()
        return numbers

    async with working():
        runs = await app.invoke_many([work.bind(n) for n in range(3)])
        await until(lambda: _is_state(runs[0].state, "running"))
        assert await runs[0].cancel()
        await until(lambda: len(db.execute("select from lease").fetchall()) == 3)
        await work.invoke(3)
        await inside.wait()
        assert await runs[1].cancel()
        go.set()
        assert await runs[2].result(30) == 2
        await until(lambda: _is_state(runs[0].state, "cancelled"))
        await until(lambda: _is_state(runs[1].state, "cancelled"))
    assert 1 in given


async def test_a_batch_that_gathers_is_given_back_when_the_process_stops(app: App, db: Db, working: Working) -> None:
    @app.task(batch=Batch(size=10, timeout=60))
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int] | None: ...

    async with working():
        run = await work.invoke(1)
        await until(lambda: _is_state(run.state, "running"))
    assert await run.state() == "ready"
    assert db.execute("select failures, crashes from execution").fetchall() == [{"failures": 0, "crashes": 0}]


async def test_a_batch_task_can_be_a_child(app: App, working: Working) -> None:
    @app.task(batch=Batch(size=10, timeout=0.01))
    async def double(ctx: BatchContext, numbers: list[int]) -> list[int]:
        return [2 * n for n in numbers]

    @app.task
    async def parent(ctx: Context) -> int:
        return sum(await ctx.invoke_all("all", [double.bind(n) for n in range(10)]))

    async with working():
        assert await (await parent.invoke()).result(30) == 90


async def test_a_batch_is_bound_by_the_tasks_timeout(app: App, working: Working) -> None:
    @app.task(batch=Batch(size=2, timeout=0), timeout=0.05, max_attempts=1)
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int] | None:
        await asyncio.Event().wait()
        return None

    runs = await app.invoke_many([work.bind(n) for n in range(2)])
    async with working():
        for run in runs:
            with pytest.raises(ExecutionFailed, match="longer than its timeout of 50ms"):
                await run.result(30)


@pytest.mark.covers("P28")
async def test_p28_a_long_handler_does_not_stop_new_starts(app: App, working: Working) -> None:
    go = asyncio.Event()

    @app.task
    async def long(ctx: Context) -> None:
        await go.wait()

    @app.task
    async def short(ctx: Context, n: int) -> int:
        return n

    async with working(concurrency=2):
        slow = await long.invoke()
        runs = await app.invoke_many([short.bind(n) for n in range(50)])
        assert [await run.result(30) for run in runs] == list(range(50))
        go.set()
        await slow.result(30)
