"""What the harness promises beside running things: its clock, its errors, its messages, and what it leaves behind."""

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import psycopg
import pytest

from pgconductor import (
    Batch,
    BatchContext,
    ChildFailed,
    Conductor,
    Context,
    ExecutionFailed,
    Fail,
    RetryPolicy,
    Run,
    SyncContext,
    WorkerLost,
)
from pgconductor.testing import ConductorTest

app = Conductor(name="rules", context=list[str]())
Log = list[str]


class Telling(list[str]):
    """A log that says when something was written."""

    def __init__(self, event: asyncio.Event) -> None:
        super().__init__()
        self.event = event

    def append(self, line: str) -> None:
        super().append(line)
        self.event.set()


@app.task(max_attempts=2, max_crashes=2, retry=RetryPolicy(first="10s", jitter=0))
async def work(ctx: Context[Log], how: str) -> str:
    ctx.deps.append(how)
    if how == "fail":
        raise Fail("as asked")
    if how == "error":
        raise ValueError("as asked")
    return await ctx.step("say", lambda: how)


@app.task
async def wavering(ctx: Context[Log]) -> int:
    tries: list[int] = []

    def waver() -> int:
        tries.append(0)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return len(tries)

    return await ctx.step_options(max_attempts=3).step("waver", waver)


@app.task
async def parent(ctx: Context[Log], how: str, forgive: bool = False) -> str:
    try:
        return await ctx.invoke("child", work.bind(how))
    except ChildFailed as error:
        if forgive:
            return str(error)
        raise


@app.task
async def nap(ctx: Context[Log], times: int) -> None:
    for number in range(times):
        await ctx.sleep(f"nap-{number}", "1h")


@app.task(executor="process")
def crunch(ctx: SyncContext[Log], number: int) -> int:
    ctx.deps.append("crunched here")
    return ctx.step("square", lambda: number * number)


@app.task(batch=Batch(size=10, timeout="1s"))
async def shout(ctx: BatchContext[Log], words: list[str]) -> list[str]:
    return [word.upper() for word in words]


@app.task
async def stop_other(ctx: Context[Log], other: str) -> bool:
    return await ctx.cancel(UUID(other), "enough")


@app.task
async def endless(ctx: Context[Log]) -> None:
    ctx.deps.append("began")
    await asyncio.Event().wait()


# ---------------------------------------------------------------- the clock


async def test_the_clock_begins_at_the_real_time_and_stands_still(conductor_test: ConductorTest) -> None:
    before = datetime.now(UTC)
    t = await conductor_test(app)
    began = t.now

    await work.invoke("hello")
    await t.drain()

    assert before <= began <= datetime.now(UTC)
    assert t.now == began


async def test_the_engine_goes_by_the_clock_of_the_test(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    await t.advance(days=400)

    await work.invoke("hello")
    await t.drain()

    with psycopg.connect(t.dsn) as conn:
        instants = conn.execute("select created_at, started_at, finished_at from pgconductor.executions").fetchone()
    assert instants == (t.now, t.now, t.now)


async def test_what_is_caused_on_the_way_happens_at_its_own_instant(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    began = t.now

    run = await nap.invoke(3)
    await t.advance("5h")

    assert await run.state() == "completed"
    assert t.now == began + timedelta(hours=5)
    with psycopg.connect(t.dsn) as conn:
        woken = conn.execute("select finished_at from pgconductor.steps order by name").fetchall()
    assert woken == [(began + timedelta(hours=hour),) for hour in (1, 2, 3)]


async def test_without_an_instant_the_clock_jumps_to_what_is_due_next(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    began = t.now

    await nap.invoke(3)
    await t.advance()
    await t.advance()

    assert t.now == began + timedelta(hours=2)


async def test_a_jump_to_nothing_is_refused(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    await work.invoke("hello")
    with pytest.raises(AssertionError) as caught:
        await t.advance()
    assert str(caught.value) == 'nothing is scheduled or asleep; there are:\n  work {"how": "hello"} is completed'


async def test_a_delayed_execution_runs_when_it_is_due(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await work.with_options(delay="1d").invoke("late")

    await t.advance(hours=23)
    assert await run.state() == "scheduled"

    await t.advance(hours=1)
    assert await run.result() == "late"


async def test_a_step_is_tried_again_at_once(conductor_test: ConductorTest, caplog: pytest.LogCaptureFixture) -> None:
    t = await conductor_test(app)
    run = await wavering.invoke()

    await t.drain()

    assert await run.result() == 3
    tries = [line.partition("step ")[2] for line in caplog.messages if "'waver'" in line]
    assert tries == [f"'waver' failed, try {number} of 3; again in 0s" for number in (1, 2)]


# ---------------------------------------------------------------- errors


async def test_an_error_that_nobody_handles_is_raised_as_it_was(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await work.invoke("fail")

    with pytest.raises(ExceptionGroup, match="an execution failed") as caught:
        await t.drain()

    (error,) = caught.value.exceptions
    assert isinstance(error, Fail)
    assert error.__notes__ == [f"in task 'work', execution {run.id}"]


async def test_a_failed_attempt_with_another_to_come_is_not_raised(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    await work.invoke("error")
    await t.drain()
    with pytest.raises(ExceptionGroup):
        await t.advance()


async def test_the_failure_of_a_child_is_its_parents_to_handle(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await parent.invoke("fail", forgive=True)
    await t.drain()
    assert await run.result() == "Child execution failed: as asked"


async def test_a_parent_that_fails_with_its_child_shows_the_childs_error(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    await parent.invoke("fail")

    with pytest.raises(ExceptionGroup) as caught:
        await t.drain()

    (error,) = caught.value.exceptions
    assert isinstance(error, ChildFailed)
    assert isinstance(error.__cause__, Fail)


async def test_errors_may_be_left_to_the_test(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await work.invoke("fail")
    await t.drain(raise_errors=False)
    await t.drain()
    with pytest.raises(ExecutionFailed, match="as asked"):
        await run.result()


async def test_waiting_for_what_nothing_runs_is_refused(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await work.invoke("hello")
    with pytest.raises(AssertionError, match=r"is ready, and nothing runs it now: call drain\(\)"):
        await run.result()
    waiting = asyncio.create_task(run.result(timeout=30))
    await t.drain()
    assert await waiting == "hello"


# ---------------------------------------------------------------- crashes


async def test_a_crash_counts_as_one(conductor_test: ConductorTest) -> None:
    log: Log = []
    t = await conductor_test(app, deps=log)

    run = await work.invoke("hello")
    await t.crash_after(run, step="say")

    with psycopg.connect(t.dsn) as conn:
        assert conn.execute("select crashes, attempt from pgconductor.executions").fetchone() == (1, 1)
    assert log == ["hello", "hello"]


@app.task(max_crashes=1)
async def fragile(ctx: Context[Log]) -> int:
    return await ctx.step("one", lambda: 1)


async def test_the_last_crash_ends_the_execution(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await fragile.invoke()
    with pytest.raises(ExceptionGroup) as caught:
        await t.crash_after(run, step="one")
    (error,) = caught.value.exceptions
    assert isinstance(error, ExecutionFailed)
    assert error.error_type.endswith(WorkerLost.__name__)


async def test_others_do_not_crash_along(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    runs = await app.invoke_many([work.bind(f"{number}") for number in range(20)])

    await t.crash_after(runs[7], step="say")

    assert [await run.result() for run in runs] == [str(number) for number in range(20)]
    with psycopg.connect(t.dsn) as conn:
        assert conn.execute("select id from pgconductor.executions where crashes > 0").fetchall() == [(runs[7].id,)]


@app.task
async def starter(ctx: Context[Log]) -> str:
    child = await ctx.start("begin", work.bind("started"))
    return await child.result()


async def test_a_crash_after_a_start_starts_no_second_child(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await starter.invoke()

    await t.crash_after(run, step="begin")

    t.assert_invoked(work.bind("started"))
    assert await run.result() == "started"


@app.task
async def after_nap(ctx: Context[Log]) -> int:
    await ctx.sleep("nap", "1h")
    return await ctx.step("wake", lambda: 5)


async def test_a_crash_waits_for_a_step_that_is_not_due_yet(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await after_nap.invoke()
    await t.crash_after(run, step="wake")

    await t.advance(hours=1)

    assert await run.result() == 5
    with psycopg.connect(t.dsn) as conn:
        assert conn.execute("select crashes from pgconductor.executions").fetchone() == (1,)


async def test_a_crash_after_no_step_of_the_run_is_refused(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await work.invoke("hello")
    with pytest.raises(AssertionError, match="is completed, and has no step 'sya'; it has recorded:\n  step 'say' is"):
        await t.crash_after(run, step="sya")
    with pytest.raises(AssertionError, match="has been saved already: call crash_after before drain"):
        await t.crash_after(run, step="say")


# ---------------------------------------------------------------- assertions


async def test_what_was_invoked_is_listed(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    await parent.invoke("hello")
    await t.drain()

    t.assert_invoked(work.bind("hello"))
    t.assert_invoked(work.bind("bye"), times=0)
    with pytest.raises(AssertionError) as caught:
        t.assert_invoked(work.bind("bye"), times=2)
    assert str(caught.value) == (
        'work {"how":"bye"} was invoked 0 times, not 2 times; there are:\n'
        '  work {"how": "hello"} is completed\n'
        '  parent {"how": "hello"} is completed'
    )


async def test_what_was_recorded_is_listed(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await nap.invoke(2)
    await t.advance()

    t.assert_step(run, "nap-0")
    with pytest.raises(AssertionError) as caught:
        t.assert_step(run, "nap-1")
    assert str(caught.value) == (
        "nap {\"times\": 2} is waiting, and has not completed 'nap-1'; it has recorded:\n"
        "  sleep 'nap-0' is completed\n"
        "  sleep 'nap-1' is pending"
    )


async def test_a_run_of_another_database_is_unknown(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    unknown = Run[str](uuid4(), work.returns, app)
    with pytest.raises(AssertionError, match=f"there is no execution {unknown.id}"):
        t.assert_step(unknown, "say")


# ---------------------------------------------------------------- what runs


async def test_process_tasks_run_in_this_process(conductor_test: ConductorTest) -> None:
    log: Log = []
    t = await conductor_test(app, deps=log)
    run = await crunch.invoke(4)
    await t.drain()
    assert (await run.result(), log) == (16, ["crunched here"])


async def test_batches_are_run(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    runs = await app.invoke_many([shout.bind("a"), shout.bind("b")])
    await t.drain()
    assert [await run.result() for run in runs] == ["A", "B"]


async def test_other_queues_are_worked_on_and_paused_ones_are_not(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    await app.pause("night")
    run = await work.with_options(queue="night").invoke("hello")

    await t.drain()
    assert await run.state() == "ready"

    await app.resume("night")
    await t.drain()
    assert await run.result() == "hello"


async def test_a_running_execution_is_told_of_its_cancellation(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    victim = await endless.invoke()
    run = await stop_other.invoke(str(victim.id))
    await t.drain()
    assert await run.result() is True
    assert await victim.state() == "cancelled"


async def test_a_drain_that_is_cut_short_gives_back_what_runs(conductor_test: ConductorTest) -> None:
    began = asyncio.Event()
    t = await conductor_test(app, deps=Telling(began))
    run = await endless.invoke()
    drain = asyncio.create_task(t.drain())
    await began.wait()

    drain.cancel()
    await asyncio.wait([drain])

    assert await run.state() == "ready"
    assert await run.cancel() is True
    await t.drain()


async def test_threads_without_a_loop_are_served(conductor_test: ConductorTest) -> None:
    t = await conductor_test(app)
    run = await asyncio.to_thread(work.invoke_sync, "hello")
    await t.drain()
    assert await asyncio.to_thread(run.result_sync) == "hello"


async def test_a_task_that_is_registered_late_runs(conductor_test: ConductorTest) -> None:
    late = Conductor(name="late")
    t = await conductor_test(late)
    await t.drain()

    @late.task
    async def latecomer(ctx: Context) -> int:
        return 3

    run = await latecomer.invoke()
    await t.drain()
    assert await run.result() == 3


async def test_a_schema_of_another_name_has_its_own_template(conductor_test: ConductorTest) -> None:
    elsewhere = Conductor(schema="else where", name="elsewhere")

    @elsewhere.task
    async def here(ctx: Context) -> int:
        return 4

    t = await conductor_test(elsewhere)
    run = await here.invoke()
    await t.drain()
    assert await run.result() == 4
    t.assert_invoked(here.bind())


# ---------------------------------------------------------------- opening and closing

opened: list[str] = []


@asynccontextmanager
async def lifespan() -> AsyncGenerator[str]:
    opened.append("open")
    task = asyncio.current_task()
    yield "the deps"
    opened.append("closed" if asyncio.current_task() is task else "closed in another task")


lasting = Conductor(name="lasting", lifespan=lifespan)


@lasting.task
async def look(ctx: Context[str]) -> str:
    return ctx.deps


@pytest.fixture
def closes_at_the_end() -> Generator[None]:
    """Opened before the harness, so that it looks after it has gone."""
    opened.clear()
    yield
    assert opened == ["open", "closed"]


@pytest.mark.usefixtures("closes_at_the_end")
async def test_the_lifespan_is_open_from_end_to_end(conductor_test: ConductorTest) -> None:
    t = await conductor_test(lasting)
    for _ in range(2):
        run = await look.invoke()
        await t.drain()
        assert await run.result() == "the deps"
    assert opened == ["open"]


async def test_given_deps_take_the_place_of_the_lifespan(conductor_test: ConductorTest) -> None:
    opened.clear()
    t = await conductor_test(lasting, deps="mine")
    run = await look.invoke()
    await t.drain()
    assert (await run.result(), opened) == ("mine", [])


async def test_two_applications_have_a_database_each(conductor_test: ConductorTest) -> None:
    one, two = await conductor_test(app), await conductor_test(lasting)
    assert one.dsn != two.dsn
    run = await look.invoke()
    await one.drain()
    assert await run.state() == "ready"
    await two.drain()
    assert await run.result() == "the deps"


def test_the_conductor_leads_home_when_the_test_has_ended() -> None:
    elsewhere = Conductor("postgresql://nowhere")
    assert elsewhere.dsn == "postgresql://nowhere"
    assert "pgconductor_test_" not in (app.engine.schema + repr(app))
