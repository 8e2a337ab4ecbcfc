"""How a result is waited for: told by a hint, found by the clock where none comes, never by a storm of queries."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from pgconductor import Conductor, Context, ExecutionCancelled, ExecutionFailed, ExecutionNotFound, results
from pgconductor.errors import ConductorError, DecodeError
from pgconductor.stored_error import error_to_json
from tests.integration.conftest import client_of
from tests.sql.support import Db, claim, complete, fail, register, session, settle
from tests.waiting import until_row


@dataclass
class Receipt:
    charge_id: str


async def charge(ctx: Context, order_id: int) -> Receipt:
    return Receipt(str(order_id))


def tell(db: Db, answer: dict[str, Any]) -> None:
    """Do what a worker does after a settle."""
    db.execute("select pg_notify('pgconductor', %s)", (" ".join(["told", *(answer["watchers"] or [])]),))


def claim_all(db: Db) -> list[str]:
    register(db, "charge")
    return [str(each["id"]) for each in claim(db, limit=1_000)]


async def watched(db: Db, count: int) -> None:
    """Wait until so many executions are watched; a watch row is what the client writes before it sleeps."""
    while db.execute("select count(*) as n from watch").fetchone() != {"n": count}:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


async def listening(app: Conductor) -> None:
    results_of = client_of(app).results
    while results_of._listener is None or not results_of._listener.is_live:  # noqa: ASYNC110
        await asyncio.sleep(0.005)


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a hint can wake."""
    monkeypatch.setattr(results, "POLL_SECONDS_FIRST", 3600.0)
    monkeypatch.setattr(results, "POLL_SECONDS_MAX", 3600.0)


async def test_a_result_that_is_there_needs_no_listener(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    claim_all(db)
    complete(db, str(run.id), {"charge_id": "ch_1"})

    assert await run.result() == Receipt("ch_1")
    assert client_of(app).results._listener is None


@pytest.mark.usefixtures("no_clock")
async def test_a_waiter_is_woken_by_the_hint(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    waiter = asyncio.create_task(run.result())
    await watched(db, 1)
    await listening(app)

    claim_all(db)
    tell(db, complete(db, str(run.id), {"charge_id": "ch_1"}))

    assert await waiter == Receipt("ch_1")


@pytest.mark.usefixtures("no_clock")
async def test_many_waiters_share_a_listener_and_the_queries(app: Conductor, db: Db) -> None:
    task = app.create_task(charge)
    runs = await app.invoke_many([task.bind(n) for n in range(200)])
    waiters = [asyncio.create_task(run.result()) for run in [*runs, *runs]]
    await watched(db, 200)
    await listening(app)
    before = client_of(app).pool.query_count

    ids = claim_all(db)
    done = [{"id": id, "token": 1, "result": {"charge_id": id}} for id in ids]
    tell(db, settle(db, *({"outcome": "completed"} | each for each in done)))

    assert {receipt.charge_id for receipt in await asyncio.gather(*waiters)} == set(ids)
    assert client_of(app).pool.query_count - before <= 3


@pytest.mark.covers("F47")
async def test_an_end_is_found_without_any_hint(app: Conductor, db: Db, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "POLL_SECONDS_FIRST", 0.01)
    run = await app.create_task(charge).invoke(1)
    waiter = asyncio.create_task(run.result())
    await watched(db, 1)

    claim_all(db)
    complete(db, str(run.id), {"charge_id": "ch_1"})

    assert await waiter == Receipt("ch_1")


@pytest.mark.covers("F47")
@pytest.mark.fault
@pytest.mark.usefixtures("no_clock")
async def test_an_end_while_the_listener_was_cut_off_is_found(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    waiter = asyncio.create_task(run.result())
    await watched(db, 1)
    await listening(app)
    claim_all(db)

    db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where datname = current_database() and application_name like '%listener'"
    )
    complete(db, str(run.id), {"charge_id": "ch_1"})

    assert await waiter == Receipt("ch_1")


def test_result_sync_waits_in_a_thread(database: str, db: Db) -> None:
    app = Conductor(database)
    run = app.create_task(charge).invoke_sync(1)
    claim_all(db)
    complete(db, str(run.id), {"charge_id": "ch_1"})

    assert run.result_sync(timeout=30) == Receipt("ch_1")
    asyncio.run(app.close())


async def test_a_failure_carries_its_facts(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    claim_all(db)
    try:
        raise ValueError("card declined")
    except ValueError as raised:
        stored = error_to_json(raised)
    settle(db, {"id": str(run.id), "outcome": "failed", "error": json.loads(stored)})

    with pytest.raises(ExecutionFailed) as caught:
        await run.result()

    error = caught.value
    assert (error.execution_id, error.task, error.error_type, error.message) == (
        run.id,
        "charge",
        "ValueError",
        "card declined",
    )
    assert 'raise ValueError("card declined")' in error.remote_traceback


async def test_a_failure_without_traceback_has_none(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    claim_all(db)
    fail(db, str(run.id), "boom")

    with pytest.raises(ExecutionFailed, match="task 'charge' failed: ValueError: boom") as caught:
        await run.result()
    assert caught.value.remote_traceback == ""


@pytest.mark.usefixtures("no_clock")
async def test_cancel_wakes_who_waits_and_gives_the_reason(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    waiter = asyncio.create_task(run.result())
    await watched(db, 1)
    await listening(app)

    await run.cancel("wrong order")

    with pytest.raises(ExecutionCancelled) as caught:
        await waiter
    assert (caught.value.reason, caught.value.execution_id, caught.value.task) == ("wrong order", run.id, "charge")


async def test_a_timeout_leaves_the_execution_alone(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)

    with pytest.raises(TimeoutError, match="has not ended within 10ms; it goes on"):
        await run.result(timeout=0.01)
    assert await run.state() == "ready"
    assert client_of(app).results._waiting == {}


async def test_an_unknown_execution_has_no_result(app: Conductor) -> None:
    run = await app.create_task(charge).invoke(1)
    run._id = uuid4()

    with pytest.raises(ExecutionNotFound):
        await run.result()


async def test_a_value_that_does_not_fit_is_refused(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    claim_all(db)
    complete(db, str(run.id), {"charge": 1})

    with pytest.raises(DecodeError):
        await run.result()
    assert await (await app.run(run.id)).result() == {"charge": 1}


@pytest.mark.covers("F58", "P14")
@pytest.mark.parametrize("value", [0, "", False, [], None])
async def test_empty_values_come_back_equal(app: Conductor, db: Db, value: object) -> None:
    run = await app.define_task("charge", dict, object).invoke({})
    claim_all(db)
    complete(db, str(run.id), value)

    assert await run.result() == value
    assert type(await run.result()) is type(value)


async def test_close_ends_the_waits(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    waiter = asyncio.create_task(run.result())
    await watched(db, 1)

    await app.close()

    with pytest.raises(ConductorError, match="was closed"):
        await waiter


async def test_a_cancelled_waiter_does_not_disturb_the_others(app: Conductor, db: Db) -> None:
    run = await app.create_task(charge).invoke(1)
    first, second = asyncio.create_task(run.result()), asyncio.create_task(run.result())
    await watched(db, 1)

    first.cancel()
    claim_all(db)
    tell(db, complete(db, str(run.id), {"charge_id": "ch_1"}))

    assert await second == Receipt("ch_1")
    assert first.cancelled() or await asyncio.wait([first])


@pytest.mark.fault
async def test_an_end_that_is_being_committed_is_not_missed(app: Conductor, database: str, db: Db) -> None:
    """The end is written and its watch rows were removed, but not committed, when the client begins to watch."""
    run = await app.create_task(charge).invoke(1)
    claim_all(db)
    with session(database) as worker:
        worker.execute("begin")
        complete(worker, str(run.id), {"charge_id": "ch_1"})
        waiter = asyncio.create_task(run.result())
        blocked = "select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
        await until_row(db, blocked)
        worker.execute("commit")

    assert await waiter == Receipt("ch_1")
