"""Starting and stopping a process of workers."""

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import Batch, BatchContext, Conductor, Context, Orchestrator, SyncContext
from pgconductor.claimed import Loaded, Missing
from pgconductor.errors import ConfigurationError
from pgconductor.host import ProcessHost
from pgconductor.membership import Timing
from pgconductor.notify import Listener
from pgconductor.worker import Worker
from tests.waiting import until, until_row

App = Conductor[None]
Db = psycopg.Connection[DictRow]
HOUR = 3600.0
RARE_BEATS = Timing(beat=HOUR, expiry=4 * HOUR, sweep=HOUR)
"""Beats of which, within a test, there is the first one only: what is told in time afterwards is told by signal."""


def state_of(db: Db) -> list[str]:
    return [row["state"] for row in db.execute("select state from executions order by id")]


def connections(db: Db) -> list[str]:
    """The connections that orchestrators have open."""
    rows = db.execute(
        "select application_name from pg_stat_activity where datname = current_database()"
        " and application_name ~ '^pgconductor (claim|settle|save|worker|notify|heartbeat|listener)'"
    )
    return [row["application_name"] for row in rows]


def flags(orchestrator: Orchestrator) -> tuple[bool, bool, bool]:
    return orchestrator.is_running, orchestrator.is_shutting_down, orchestrator.is_stopped


async def test_the_states_of_an_orchestrator(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> None: ...

    orchestrator = Orchestrator(app)
    assert flags(orchestrator) == (False, False, False)
    await orchestrator.start()
    assert flags(orchestrator) == (True, False, False)
    waiting = asyncio.gather(*(_await(orchestrator) for _ in range(2)))
    await orchestrator.stop()
    await waiting
    assert flags(orchestrator) == (False, False, True)
    with pytest.raises(ConfigurationError, match="stopped"):
        await orchestrator.start()


async def _await(orchestrator: Orchestrator) -> None:
    await orchestrator.stopped


async def test_stop_releases_what_has_not_ended_at_no_cost(app: App, db: Db) -> None:
    started = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        started.set()
        while True:
            await asyncio.sleep(0)
            await ctx.checkpoint()

    await app.invoke_many([work.bind() for _ in range(3)])
    orchestrator = Orchestrator(app, concurrency=1)
    await orchestrator.start()
    await started.wait()
    await orchestrator.stop()

    rows = db.execute("select state, attempt, crashes from executions").fetchall()
    assert [tuple(row.values()) for row in rows] == [("ready", 1, 0)] * 3
    assert db.execute("select from orchestrator").rowcount == 0
    await until(lambda: connections(db) == [])


@pytest.mark.covers("F16", "P7")
async def test_stop_lets_a_handler_end_within_the_grace_time(app: App, db: Db) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    @app.task
    async def work(ctx: Context) -> int:
        started.set()
        await release.wait()
        return 7

    run = await work.invoke()
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await started.wait()
    stopping = asyncio.create_task(orchestrator.stop())
    await until(lambda: orchestrator.is_shutting_down)
    release.set()
    await stopping
    assert await run.result() == 7


@pytest.mark.covers("F16", "P7")
async def test_a_handler_that_outlasts_the_grace_time_is_cut_short_at_no_cost(app: App, db: Db) -> None:
    started = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        started.set()
        await asyncio.Event().wait()

    await work.invoke()
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await started.wait()
    await orchestrator.stop(grace=0)
    rows = db.execute("select state, attempt, crashes from executions").fetchall()
    assert [tuple(row.values()) for row in rows] == [("ready", 1, 0)]


async def test_a_handler_that_raises_when_it_is_cut_short_has_not_failed(app: App, db: Db) -> None:
    started = asyncio.Event()

    @app.task(max_attempts=1)
    async def work(ctx: Context) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ConnectionError("closed") from None

    await work.invoke()
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await started.wait()
    await orchestrator.stop(grace=0)
    rows = db.execute("select state, attempt from executions").fetchall()
    assert [tuple(row.values()) for row in rows] == [("ready", 1)]


async def test_what_is_still_being_loaded_when_a_stop_is_asked_for_does_not_start(
    app: App, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_loading, may_load = asyncio.Event(), asyncio.Event()
    runs: list[str] = []
    load = ProcessHost.load

    async def load_late(host: ProcessHost, missing: Missing) -> Loaded:
        is_loading.set()
        await may_load.wait()
        return await load(host, missing)

    monkeypatch.setattr(ProcessHost, "load", load_late)

    @app.task
    async def work(ctx: Context, text: str) -> None:
        runs.append(text)

    await work.invoke("x" * 10_000)
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await is_loading.wait()
    stopping = asyncio.create_task(orchestrator.stop(grace=20))
    await until(lambda: orchestrator.is_shutting_down)
    may_load.set()
    await stopping
    rows = db.execute("select state, attempt, started_at is null as is_fresh from executions").fetchall()
    assert [tuple(row.values()) for row in rows] == [("ready", 1, True)]
    assert runs == []


async def test_a_batch_that_gathers_does_not_hold_up_a_stop(app: App, db: Db) -> None:
    @app.task(batch=Batch(100, "1h"))
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int]:
        return numbers

    await work.invoke(1)
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await until(lambda: bool(db.execute("select from lease").fetchall()))
    async with asyncio.timeout(60):
        await orchestrator.stop(grace="1h")
    assert [row["state"] for row in db.execute("select state from executions")] == ["ready"]


async def test_a_task_factory_that_starts_tasks_at_once_changes_nothing(app: App) -> None:
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        pytest.skip("this Python has no eager tasks")
    loop = asyncio.get_running_loop()

    @app.task
    async def work(ctx: Context, number: int) -> int:
        return await ctx.step("n", lambda: number)

    loop.set_task_factory(factory)
    try:
        async with Orchestrator(app):
            runs = await app.invoke_many([work.bind(number) for number in range(20)])
            assert [await run.result(20) for run in runs] == list(range(20))
    finally:
        loop.set_task_factory(None)


@pytest.mark.covers("P8")
async def test_a_result_that_cannot_be_stored_before_the_end_is_told_and_its_execution_runs_again(
    app: App, db: Db, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgconductor.orchestrator.LAST_SECONDS", 0.2)
    attempts: list[int] = []
    may_end = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> int:
        attempts.append(ctx.attempt)
        await may_end.wait()
        return 7

    run = await work.invoke()
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    db.execute("alter function settle rename to gone")
    may_end.set()
    await until(lambda: "settle: a batch of 1 failed" in caplog.text)
    await orchestrator.stop(grace=0)
    assert "1 outcomes could not be stored; the executions run again" in caplog.text
    db.execute("alter function gone rename to settle")
    rows = db.execute("select state, attempt, crashes from executions").fetchall()
    assert [tuple(row.values()) for row in rows] == [("ready", 1, 0)]
    async with Orchestrator(app):
        assert await run.result(60) == 7
    assert attempts == [1, 1]


async def test_a_step_that_cannot_be_stored_before_the_end_holds_no_handler(
    app: App, db: Db, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pgconductor.orchestrator.LAST_SECONDS", 0.2)

    @app.task
    async def work(ctx: Context) -> int:
        return await ctx.step("step", lambda: 7)

    run = await work.invoke()
    orchestrator = Orchestrator(app)
    db.execute("alter function save rename to gone")
    await orchestrator.start()
    await until(lambda: "save: a batch of 1 failed" in caplog.text)
    (worker,) = orchestrator._workers
    (handler,) = worker.tasks()
    await orchestrator.stop(grace=0)
    await until(handler.done)
    db.execute("alter function gone rename to save")
    async with Orchestrator(app):
        assert await run.result(60) == 7


async def test_sigterm_stops_and_the_handlers_before_it_are_put_back(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> None: ...

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    first, second = Orchestrator(app), Orchestrator(app)
    await first.start()
    await second.start()
    os.kill(os.getpid(), signal.SIGTERM)
    await first.stopped
    await second.stopped
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.covers("F17")
async def test_a_second_signal_stops_now(app: App, db: Db) -> None:
    started = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        started.set()
        await asyncio.Event().wait()

    await work.invoke()
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await started.wait()
    os.kill(os.getpid(), signal.SIGINT)
    await until(lambda: orchestrator.is_shutting_down)
    os.kill(os.getpid(), signal.SIGINT)
    await orchestrator.stopped
    assert state_of(db) == ["ready"]


async def test_a_start_that_raises_leaves_nothing_running(database: str, db: Db) -> None:
    closed: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncGenerator[str]:
        try:
            yield "deps"
        finally:
            closed.append("lifespan")

    async with Conductor(database, lifespan=lifespan) as app:

        @app.task
        async def work(ctx: Context[str]) -> None: ...

        db.execute("alter function register_orchestrator rename to gone")
        threads = threading.active_count()
        with pytest.raises(psycopg.errors.UndefinedFunction):
            await Orchestrator(app).start()
        db.execute("alter function gone rename to register_orchestrator")
        assert closed == ["lifespan"]
        await until(lambda: connections(db) == [])
        await until(lambda: threading.active_count() <= threads + 1)
        assert db.execute("select from orchestrator").rowcount == 0


async def test_a_start_does_not_fail_behind_a_table_that_somebody_has_locked(
    app: App, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgconductor.orchestrator.WARM_UP_SECONDS", 0.1)

    @app.task
    async def work(ctx: Context) -> str:
        return "done"

    with psycopg.connect(database) as blocker:
        blocker.execute("lock table pgconductor.ready, pgconductor.lease in exclusive mode")
        async with Orchestrator(app):
            blocker.rollback()
            assert await (await work.invoke()).result() == "done"


async def test_a_start_has_connected_what_claims_and_settles(app: App, db: Db) -> None:
    @app.task
    async def work(ctx: Context) -> None: ...

    orchestrator = Orchestrator(app, _listen=False)
    await orchestrator.start()
    connected = set(connections(db))
    await orchestrator.stop()
    assert connected >= {"pgconductor claim", "pgconductor settle"}
    assert not db.execute("select from lease").fetchall()


async def test_a_listener_that_is_stopped_while_it_connects_leaves_no_connection(database: str, db: Db) -> None:
    listeners = [Listener(database, "pgconductor", lambda _kind, _words: None) for _ in range(30)]
    gc.disable()
    try:
        for turns, listener in enumerate(listeners):
            listener.start()
            for _ in range(turns):
                await asyncio.sleep(0.001)
            await listener.stop()
        await until(lambda: not connections(db))
    finally:
        gc.enable()


async def test_an_orchestrator_without_tasks_is_refused(app: App) -> None:
    with pytest.raises(ConfigurationError, match="no task"):
        await Orchestrator(app).start()


async def test_a_queue_given_twice_is_refused(app: App) -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        Orchestrator(app, queues=["a"], workers=[app.create_worker("a")])


@pytest.mark.covers("F26")
async def test_a_handler_that_blocks_the_loop_keeps_its_lease_and_is_reported(
    app: App, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    timing = Timing(beat=0.1, expiry=1.5, sweep=0.1, stall_limit=0.3)

    @app.task
    async def block(ctx: Context) -> str:
        until_at = time.monotonic() + 3 * timing.expiry
        while time.monotonic() < until_at:
            pass
        return "kept"

    run = await block.invoke()
    async with Orchestrator(app, _timing=timing):
        assert await run.result(timeout=60) == "kept"
    rows = db.execute("select attempt, crashes from executions").fetchall()
    assert [tuple(row.values()) for row in rows] == [(1, 0)]
    reports = [record.getMessage() for record in caplog.records if "event loop has been blocked" in record.getMessage()]
    (report,) = [each for each in reports if "task 'block'" in each]  # a busy machine may stall the loop besides
    assert "in block" in report


# ---------------------------------------------------------------- how a cancel arrives


async def until_it_listens(db: Db) -> None:
    """Wait until the one orchestrator hears signals, and its first beat is over."""
    query = "select from pg_stat_activity where datname = current_database() and application_name = %s"
    await until_row(db, f"{query} and state = 'idle' and query like 'listen%%'", "pgconductor listener")
    await until_row(db, "select 1 from orchestrator where beat_at > started_at")


def keep_the_prefetch(_: Worker) -> None:
    """Stand in for the measurement of how much to fetch ahead."""


@pytest.mark.covers("P49")
async def test_a_cancel_reaches_a_running_handler_by_signal_without_a_beat(app: App, db: Db) -> None:
    started = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        started.set()
        await asyncio.Event().wait()

    run = await work.invoke()
    async with Orchestrator(app, _timing=RARE_BEATS):
        await started.wait()
        await until_it_listens(db)
        assert await run.cancel("enough")
        await until(lambda: state_of(db) == ["cancelled"])


@pytest.mark.covers("P49")
async def test_a_cancel_reaches_by_signal_what_was_fetched_and_has_not_started(
    app: App, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgconductor.claimer.STUCK_SECONDS", HOUR)  # it would go back by itself, and end so
    monkeypatch.setattr(Worker, "_measure", keep_the_prefetch)
    started, release = list[UUID](), asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        started.append(ctx.execution_id)
        await release.wait()

    worker = app.create_worker("default", concurrency=1)
    worker.prefetch_max = 1
    runs = {run.id: run for run in await app.invoke_many([work.bind() for _ in range(2)])}
    async with Orchestrator(app, workers=[worker], _timing=RARE_BEATS):
        await until(lambda: (len(started), len(worker.buffer)) == (1, 1))
        await until_it_listens(db)
        (fetched,) = runs.keys() - set(started)
        assert await runs[fetched].cancel("enough")
        await until(lambda: sorted(state_of(db)) == ["cancelled", "running"])
        release.set()
    assert (await runs[fetched].state(), len(started)) == ("cancelled", 1)


@pytest.mark.covers("P49")
@pytest.mark.parametrize("size", [1, 2], ids=["called", "gathering"])
async def test_a_cancel_reaches_a_batch_by_signal_whether_or_not_its_handler_was_called(
    app: App, db: Db, size: int
) -> None:
    called = asyncio.Event()

    @app.task(batch=Batch(size=size, timeout=HOUR))
    async def work(ctx: BatchContext, numbers: list[int]) -> list[int]:
        called.set()
        await asyncio.Event().wait()
        return numbers

    run = await work.invoke(1)
    async with Orchestrator(app, _timing=RARE_BEATS):
        await until(lambda: called.is_set() if size == 1 else state_of(db) == ["running"])
        await until_it_listens(db)
        assert await run.cancel("enough")
        await until(lambda: state_of(db) == ["cancelled"])
    assert called.is_set() == (size == 1)


@pytest.mark.covers("P49")
async def test_a_cancel_that_no_signal_tells_of_comes_with_the_next_beat(app: App, db: Db) -> None:
    started = asyncio.Event()

    @app.task
    async def work(ctx: Context) -> None:
        started.set()
        await asyncio.Event().wait()

    run = await work.invoke()
    async with Orchestrator(app, _listen=False, _timing=Timing(beat=0.1)):
        await started.wait()
        assert await run.cancel("enough")
        await until(lambda: state_of(db) == ["cancelled"])


async def test_plain_functions_run_beside_each_other_up_to_the_concurrency(app: App) -> None:
    together = threading.Barrier(4)

    @app.task
    def work(ctx: SyncContext) -> int:
        return together.wait(30)

    runs = await app.invoke_many([work.bind() for _ in range(4)])
    async with Orchestrator(app, concurrency=4):
        assert sorted([await run.result(timeout=60) for run in runs]) == [0, 1, 2, 3]


@pytest.mark.covers("F64")
async def test_an_execution_on_its_last_life_runs_alone(app: App, db: Db) -> None:
    running: set[str] = set()
    beside: list[set[str]] = []
    release = asyncio.Event()

    async def work(ctx: Context) -> None:
        running.add(ctx.task)
        if ctx.task == "risky":
            beside.append(set(running))
        elif not release.is_set():
            await release.wait()
        running.discard(ctx.task)

    plain = app.create_task(work, name="plain", max_crashes=5)
    risky = app.create_task(work, name="risky", max_crashes=2)
    await plain.invoke()
    orchestrator = Orchestrator(app)
    await orchestrator.start()
    await until(lambda: running == {"plain"})
    run = await risky.with_options(delay=3600).invoke()
    db.execute("update execution set crashes = 1 where id = %s", (run.id,))
    db.execute("update timer set due_at = clock_timestamp()")
    await plain.invoke()
    await until(
        lambda: (
            db.execute("select from lease l join executions e on e.id = l.execution_id where e.task = 'risky'").rowcount
            == 1
        )
    )
    assert beside == []
    release.set()
    await orchestrator.drain()
    assert beside == [{"risky"}]
