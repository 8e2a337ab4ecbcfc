"""What a worker takes, how much of it, and what it leaves alone."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import Batch, BatchContext, Conductor, Context, Orchestrator, hints, scan, worker
from pgconductor.claimer import Claimer
from pgconductor.engine import Claim, Query
from pgconductor.membership import Timing
from pgconductor.scan import Start
from pgconductor.written import Names
from tests.sql.support import enqueue
from tests.waiting import until

App = Conductor[None]
Db = psycopg.Connection[DictRow]


def states(db: Db) -> Counter[str]:
    return Counter(row["state"] for row in db.execute("select state from executions"))


def claimer_of(orchestrator: Orchestrator) -> Claimer:
    assert orchestrator._process is not None
    return orchestrator._process.claimer


async def test_drain_runs_everything_and_stops(app: App, db: Db) -> None:
    @app.task
    async def double(ctx: Context, number: int) -> int:
        return 2 * number

    runs = await app.invoke_many([double.bind(i) for i in range(1500)])
    orchestrator = Orchestrator(app)
    await orchestrator.drain()

    assert orchestrator.is_stopped
    assert states(db) == {"completed": 1500}
    assert await runs[700].result() == 1400
    assert db.execute("select from orchestrator").rowcount == 0


@pytest.mark.parametrize(("seconds", "is_interrupted"), [(0.0, True), (60.0, False)])
async def test_runs_that_take_long_together_let_the_event_loop_look_in_between(
    app: App, monkeypatch: pytest.MonkeyPatch, seconds: float, is_interrupted: bool
) -> None:
    monkeypatch.setattr(worker, "PASS_SECONDS", seconds)
    seen: list[str] = []

    @app.task
    async def work(ctx: Context, number: int) -> None:
        seen.append("run")
        asyncio.get_running_loop().call_soon(seen.append, "look")

    await app.invoke_many([work.bind(number) for number in range(10)])
    await Orchestrator(app, queues={"default": 10}).drain()
    assert seen.count("run") == 10
    assert (" ".join(seen).count("run run") == 0) == is_interrupted


async def test_drain_of_nothing_ends(app: App) -> None:
    @app.task
    async def idle(ctx: Context) -> None: ...

    orchestrator = Orchestrator(app)
    await orchestrator.drain()
    assert orchestrator.is_stopped


async def test_drain_takes_due_timers_along_and_leaves_later_ones(app: App, db: Db) -> None:
    @app.task
    async def soon(ctx: Context) -> None: ...

    await soon.with_options(delay=0.05).invoke()
    await soon.with_options(delay=3600).invoke()
    until_due = db.execute("select pg_sleep(extract(epoch from min(due_at) - clock_timestamp())) from timer")
    assert until_due.rowcount == 1
    await Orchestrator(app).drain()
    assert states(db) == {"completed": 1, "scheduled": 1}


async def twice(ctx: Context, number: int) -> int:
    return 2 * number


@asynccontextmanager
async def quiet_claimer(app: App) -> AsyncGenerator[Claimer]:
    async with Orchestrator(app) as orchestrator:
        claimer = claimer_of(orchestrator)
        await until(lambda: claimer._is_listening() and claimer.is_quiet)
        yield claimer


def claims_by_name(claimer: Claimer, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    named: list[list[str]] = []
    claim_named = claimer._engine.claim_named

    def noted(orchestrator: str, token: int, names: Names) -> Query[Claim | None]:
        named.append(names.ids)
        return claim_named(orchestrator, token, names)

    monkeypatch.setattr(claimer._engine, "claim_named", noted)
    return named


async def test_calls_after_a_silence_are_claimed_by_their_names(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    double = app.create_task(twice)
    async with quiet_claimer(app) as claimer:
        named = claims_by_name(claimer, monkeypatch)
        run = await double.invoke(21)
        assert await run.result() == 42
        await until(lambda: claimer.is_quiet)
        await asyncio.sleep(2 * hints.SILENCE_SECONDS)
        runs = await app.invoke_many([double.bind(number) for number in range(5)])
        assert [await each.result() for each in runs] == [0, 2, 4, 6, 8]
        assert named == [[str(run.id)], [str(each.id) for each in runs]]


async def test_what_batches_of_another_task_can_take_is_no_slot_for_calls_by_name(app: App) -> None:
    app.create_task(twice)

    @app.task(batch=Batch(size=100, timeout=60))
    async def many(ctx: BatchContext, numbers: list[int]) -> None: ...

    async with Orchestrator(app, queues={"default": 10}) as orchestrator:
        (worker,) = orchestrator._workers
        free = {task.name: worker.free(id) for id, task in claimer_of(orchestrator)._crew.tasks.items()}
        assert free == {"twice": 10, "many": 109}
        assert worker.free() == 109


async def test_what_was_claimed_for_batches_and_is_of_other_tasks_goes_back_at_once(
    app: App, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    may_end = asyncio.Event()

    @app.task
    async def slow(ctx: Context) -> None:
        await may_end.wait()

    @app.task(batch=Batch(size=100, timeout=60))
    async def many(ctx: BatchContext, numbers: list[int]) -> None: ...

    await app.invoke_many([slow.bind() for _ in range(50)])
    with caplog.at_level(logging.DEBUG, "pgconductor.crew"):
        async with Orchestrator(app, queues={"default": 1}) as orchestrator:
            await until(lambda: claimer_of(orchestrator).claimed_count > 1)
            await until(lambda: states(db) == {"running": 1, "ready": 49})
            assert "nothing finishes" not in caplog.text
            may_end.set()
            await until(lambda: states(db) == {"completed": 50})


async def test_what_a_hint_names_twice_is_claimed_once(app: App, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    app.create_task(twice)
    async with quiet_claimer(app) as claimer:
        named = claims_by_name(claimer, monkeypatch)
        found = db.execute("select l.queue_id, l.task_id from lane l").fetchone()
        assert found is not None
        id = enqueue(db, task="twice", payload={"number": 21})
        words = f"{found['queue_id']} {found['task_id']} {id} {id}"
        db.execute("select pg_notify('pgconductor', %s)", (f"named {words}",))
        await until(lambda: states(db) == {"completed": 1})
        assert (named, claimer.claimed_count) == ([[id]], 1)


async def test_hints_at_what_is_not_there_disturb_nothing(app: App, db: Db) -> None:
    double = app.create_task(twice)
    async with quiet_claimer(app) as claimer:
        found = db.execute("select l.queue_id, l.task_id from lane l").fetchone()
        assert found is not None
        place, id = f"{found['queue_id']} {found['task_id']}", UUID(int=1)
        for words in ["", "1 1", f"{place} x", f"x 1 {id}", f"999 999 {id}", f"{place} {id} 1", f"{place} {id}"]:
            db.execute("select pg_notify('pgconductor', %s)", (f"named {words}",))

        assert await (await double.invoke(21)).result() == 42
        assert claimer.error_count == 0


async def test_a_queue_runs_no_more_than_its_concurrency(app: App) -> None:
    running: Counter[str] = Counter()
    highest: Counter[str] = Counter()

    async def work(ctx: Context) -> None:
        running[ctx.queue] += 1
        highest[ctx.queue] = max(highest[ctx.queue], running[ctx.queue])
        await asyncio.sleep(0)
        running[ctx.queue] -= 1

    narrow = app.create_task(work, name="narrow", queue="narrow")
    wide = app.create_task(work, name="wide", queue="wide")
    await app.invoke_many([task.bind() for _ in range(60) for task in (narrow, wide)])
    await Orchestrator(app, queues={"narrow": 2, "wide": 7}).drain()

    assert highest == {"narrow": 2, "wide": 7}


async def test_nothing_is_hoarded_behind_long_handlers(app: App, db: Db) -> None:
    release = asyncio.Event()

    @app.task
    async def long(ctx: Context) -> None:
        await release.wait()

    await app.invoke_many([long.bind() for _ in range(30)])
    async with Orchestrator(app, concurrency=3) as orchestrator:
        await until(lambda: states(db)["running"] == 3)
        assert states(db) == {"running": 3, "ready": 27}
        release.set()
        await orchestrator.drain()
    assert states(db) == {"completed": 30}


@pytest.mark.covers("P28")
async def test_what_was_fetched_behind_handlers_that_turn_long_goes_back(app: App, db: Db) -> None:
    release = asyncio.Event()

    @app.task
    async def quick_then_long(ctx: Context, is_long: bool) -> None:
        if is_long:
            await release.wait()

    await app.invoke_many([quick_then_long.bind(i >= 300) for i in range(600)])
    async with Orchestrator(app, concurrency=2) as orchestrator:
        await until(lambda: states(db) == {"completed": 300, "running": 2, "ready": 298})
        release.set()
        await orchestrator.drain()
    assert states(db) == {"completed": 600}


async def test_a_paused_queue_is_left_alone_until_it_is_resumed(app: App, db: Db) -> None:
    @app.task
    async def work(ctx: Context) -> None: ...

    await app.pause("default")
    await work.invoke()
    await Orchestrator(app).drain()
    assert states(db) == {"ready": 1}

    await app.resume("default")
    await Orchestrator(app).drain()
    assert states(db) == {"completed": 1}


@pytest.mark.covers("P29")
async def test_a_task_that_the_worker_does_not_know_stays_and_costs_nothing(app: App, db: Db) -> None:
    @app.task
    async def known(ctx: Context) -> None: ...

    stranger = app.define_task("stranger", dict, int)
    await app.invoke_many([stranger.bind({}), known.bind()])
    await Orchestrator(app).drain()

    rows = db.execute("select task, state, attempt, crashes from executions order by task").fetchall()
    assert [tuple(row.values()) for row in rows] == [("known", "completed", 1, 0), ("stranger", "ready", 1, 0)]


async def test_higher_priority_is_claimed_first(app: App) -> None:
    order: list[int] = []

    @app.task
    async def note(ctx: Context, number: int) -> None:
        order.append(number)

    for number in (1, 3, 2):
        await note.with_options(priority=number).invoke(number)
    await Orchestrator(app, concurrency=1).drain()
    assert order == [3, 2, 1]


@pytest.mark.covers("F47")
async def test_polling_alone_finds_work(app: App) -> None:
    @app.task
    async def work(ctx: Context) -> str:
        return "found"

    worker = app.create_worker("default", poll_interval=0.02)
    async with Orchestrator(app, workers=[worker], _listen=False):
        run = await work.invoke()
        assert await run.result(timeout=30) == "found"


async def test_what_a_long_transaction_enqueued_is_found_though_claims_have_gone_on_behind_it(
    app: App, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "EXPLAINED_SECONDS", -0.1)  # every start counts as dear, so that the next goes deeper

    @app.task
    async def work(ctx: Context, number: int) -> int:
        return number

    worker = app.create_worker("default", poll_interval=3600)
    async with (
        Orchestrator(app, workers=[worker]),
        await psycopg.AsyncConnection.connect(database) as conn,
    ):
        early = await work.with_options(conn=conn).invoke(0)
        for number in range(1, 5):
            assert await (await work.invoke(number)).result(timeout=30) == number
        await conn.commit()
        assert await (await work.invoke(5)).result(timeout=30) == 5
        assert await early.result(timeout=30) == 0


async def test_a_process_that_starts_begins_where_the_claims_of_others_have_come(
    app: App, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "EXPLAINED_SECONDS", -100.0)  # every start counts as dear, for half an hour
    monkeypatch.setattr(scan, "AGE_SECONDS", 0.0)
    monkeypatch.setattr(hints, "SILENCE_SECONDS", 600.0)  # a claim by name looks through no lane

    @app.task
    async def work(ctx: Context, number: int) -> int:
        return number

    async with Orchestrator(app, _timing=Timing(beat=0.05)):
        for number in range(3):
            assert await (await work.invoke(number)).result(timeout=30) == number
        await until(lambda: bool(db.execute("select from orchestrator where places is not null").fetchall()))
        async with Orchestrator(app) as second:
            begun = claimer_of(second).scan
            assert begun.start(time.monotonic()) is not Start.HEAD
            assert begun.ranges(Start.LAST)
            assert await (await work.invoke(3)).result(timeout=30) == 3


async def test_two_orchestrators_share_a_conductor_and_run_each_execution_once(app: App, db: Db) -> None:
    ran: Counter[int] = Counter()

    @app.task
    async def count(ctx: Context, number: int) -> None:
        ran[number] += 1

    await app.invoke_many([count.bind(i) for i in range(2000)])
    await asyncio.gather(Orchestrator(app).drain(), Orchestrator(app).drain())
    assert ran == Counter(range(2000))
    assert states(db) == {"completed": 2000}


async def test_a_run_that_waits_holds_up_none_that_is_buffered_behind_it(app: App, db: Db) -> None:
    everyone = asyncio.Barrier(5)

    @app.task
    async def meet(ctx: Context) -> None:
        await everyone.wait()

    await app.invoke_many([meet.bind() for _ in range(5)])
    await Orchestrator(app, queues={"default": 5}).drain()
    assert states(db) == {"completed": 5}


async def test_runs_that_wait_and_runs_that_do_not_all_run_once(app: App, db: Db) -> None:
    ran: Counter[int] = Counter()

    @app.task
    async def mixed(ctx: Context, number: int) -> None:
        ran[number] += 1
        for _ in range(number % 3):
            await asyncio.sleep(0)

    await app.invoke_many([mixed.bind(number) for number in range(600)])
    await Orchestrator(app, queues={"default": 7}).drain()
    assert states(db) == {"completed": 600}
    assert set(ran.values()) == {1}


async def test_a_handler_that_cancels_its_own_task_cancels_no_other_run(app: App, db: Db) -> None:
    @app.task
    async def odd(ctx: Context, number: int) -> None:
        task = asyncio.current_task()
        if number == 3 and task is not None:
            task.cancel()

    await app.invoke_many([odd.bind(number) for number in range(50)])
    await Orchestrator(app).drain()
    assert states(db) == {"completed": 50}


async def test_handlers_that_never_wait_leave_room_for_the_rest_of_the_process(app: App) -> None:
    turns = [0]
    seen: set[int] = set()

    @app.task
    async def quick(ctx: Context, number: int) -> None:
        seen.add(turns[0])

    async def count_turns() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    await app.invoke_many([quick.bind(number) for number in range(1000)])
    beside = asyncio.create_task(count_turns())
    await Orchestrator(app).drain()
    beside.cancel()
    assert len(seen) > 5
