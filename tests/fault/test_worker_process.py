"""A worker process dies or stops: at each point, its work goes on elsewhere, each recorded step once."""

import signal

import psycopg
import pytest
from psycopg.rows import DictRow

from pgconductor import Conductor
from tests.fault.conftest import Ledger, Spawn
from tests.waiting import until

Db = psycopg.Connection[DictRow]
pytestmark = pytest.mark.fault


def ends(db: Db) -> list[tuple[object, ...]]:
    """The state, attempt and crashes of every execution."""
    return [tuple(row.values()) for row in db.execute("select state, attempt, crashes from executions")]


def orchestrators(db: Db) -> set[str]:
    return {str(row["id"]) for row in db.execute("select id from orchestrator")}


@pytest.mark.covers("P1")
async def test_a_killed_worker_is_replaced_without_using_up_an_attempt(
    workload: Conductor[None], spawn: Spawn, ledger: Ledger, db: Db
) -> None:
    run = await workload.tasks["held"].invoke()
    first = spawn()
    await until(lambda: ledger.has("before", 0, first.pid))
    await until(lambda: db.execute("select from step").rowcount == 1)
    first.send(signal.SIGKILL)
    second = spawn()
    ledger.release()
    assert await run.result(timeout=60) == str(second.pid)
    assert ends(db) == [("completed", 1, 1)]
    assert ledger.count("before", 0) == 1
    await workload.close()


@pytest.mark.covers("F19", "P24")
async def test_f1_19_a_killed_worker_gives_back_the_only_permit_of_its_task(
    workload: Conductor[None], spawn: Spawn, ledger: Ledger, db: Db
) -> None:
    runs = await workload.invoke_many([workload.tasks["alone"].bind(number) for number in (1, 2)])
    first = spawn()
    await until(lambda: ledger.has("alone", 1, first.pid))
    second = spawn()
    await until(lambda: len(orchestrators(db)) == 2)
    assert db.execute("select from permit").rowcount == 1
    first.send(signal.SIGKILL)
    await until(lambda: ledger.count("alone") == 2)  # the permit is back, and again there is one holder only
    assert db.execute("select from permit").rowcount == 1
    ledger.release()
    assert [await run.result(timeout=60) for run in runs] == [1, 2]
    assert ledger.count("alone", 1, second.pid) + ledger.count("alone", 2, second.pid) == 2
    await workload.close()


@pytest.mark.parametrize(
    ("point", "crashes", "firsts", "seconds"),
    [
        ("before_claim", 0, {1}, {1}),
        ("after_claim_reply", 1, {1}, {1}),
        ("before_handler", 1, {1}, {1}),
        ("before_step", 1, {1}, {1}),
        ("before_step_save", 1, {2}, {1}),
        ("before_save", 1, {2}, {1}),
        ("after_save_reply", 1, {1}, {1}),
        ("after_step_save", 1, {1}, {1}),
        ("handler_returned", 1, {1}, {1}),
        ("before_settle", 1, {1}, {1}),
        ("after_settle_reply", 0, {1}, {1}),
    ],
)
async def test_a_worker_killed_at_a_point(
    point: str,
    crashes: int,
    firsts: set[int],
    seconds: set[int],
    workload: Conductor[None],
    spawn: Spawn,
    ledger: Ledger,
    db: Db,
) -> None:
    run = await workload.tasks["two_steps"].invoke(1)
    first = spawn(f"{point}:kill")
    assert first.wait() == -signal.SIGKILL
    assert first.fired() == [point]
    spawn()
    assert await run.result(timeout=60) == 3
    assert ends(db) == [("completed", 1, crashes)]
    assert {ledger.count("first", 1)} == firsts
    assert {ledger.count("second", 2)} == seconds
    await workload.close()


@pytest.mark.parametrize("point", ["after_settle_reply", "after_save_reply"])
async def test_a_lost_reply_is_asked_for_again_and_nothing_happens_twice(
    point: str, workload: Conductor[None], spawn: Spawn, ledger: Ledger, db: Db
) -> None:
    run = await workload.tasks["two_steps"].invoke(1)
    worker = spawn(f"{point}:raise")
    assert await run.result(timeout=60) == 3
    await until(lambda: worker.fired() == [point])
    assert ends(db) == [("completed", 1, 0)]
    assert ledger.count("first", 1) == ledger.count("second", 2) == ledger.count("run", 1) == 1
    await workload.close()


async def test_a_claim_whose_reply_was_lost_goes_back_at_no_cost(
    workload: Conductor[None], spawn: Spawn, ledger: Ledger, db: Db
) -> None:
    run = await workload.tasks["two_steps"].invoke(1)
    worker = spawn("after_claim_reply:raise")
    assert await run.result(timeout=60) == 3
    assert worker.fired() == ["after_claim_reply"]
    assert ends(db) == [("completed", 1, 0)]
    await workload.close()


@pytest.mark.covers("F23")
async def test_a_stopped_process_that_wakes_after_its_lease_changes_nothing(
    workload: Conductor[None], spawn: Spawn, ledger: Ledger, db: Db
) -> None:
    run = await workload.tasks["held"].invoke()
    zombie = spawn()
    await until(lambda: ledger.has("before", 0, zombie.pid))
    await until(lambda: db.execute("select from step").rowcount == 1)
    (old_id,) = orchestrators(db)
    zombie.send(signal.SIGSTOP)
    second = spawn()
    await until(lambda: ledger.has("begin", second.pid))
    ledger.release()
    assert await run.result(timeout=60) == str(second.pid)
    before = db.execute("select * from execution, step order by name").fetchall()

    zombie.send(signal.SIGCONT)
    await until(lambda: len(orchestrators(db)) == 2)  # it has noticed, and joined under another id
    assert old_id not in orchestrators(db)
    assert db.execute("select * from execution, step order by name").fetchall() == before
    assert not ledger.has("after", 0, zombie.pid)
    assert not ledger.has("end", zombie.pid)

    second.end()
    again = await workload.tasks["two_steps"].invoke(5)
    assert await again.result(timeout=60) == 7
    assert ledger.has("run", 5, zombie.pid)
    await workload.close()


async def test_a_stopped_process_is_refused_while_its_successor_still_runs(
    workload: Conductor[None], spawn: Spawn, ledger: Ledger, db: Db
) -> None:
    run = await workload.tasks["held"].invoke()
    zombie = spawn()
    await until(lambda: ledger.has("before", 0, zombie.pid))
    await until(lambda: db.execute("select from step").rowcount == 1)
    zombie.send(signal.SIGSTOP)
    second = spawn()
    await until(lambda: ledger.has("begin", second.pid))
    zombie.send(signal.SIGCONT)
    await until(lambda: len(orchestrators(db)) == 2)
    assert db.execute("select from lease").rowcount == 1
    ledger.release()
    assert await run.result(timeout=60) == str(second.pid)
    assert ends(db) == [("completed", 1, 1)]
    await workload.close()


async def test_sigterm_ends_the_process_and_gives_the_work_back(
    workload: Conductor[None], spawn: Spawn, ledger: Ledger, db: Db
) -> None:
    await workload.tasks["held"].invoke()
    worker = spawn()
    await until(lambda: ledger.has("begin", worker.pid))
    worker.send(signal.SIGTERM)
    await until(lambda: db.execute("select from orchestrator where stopping_at is not null").rowcount == 1)
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    assert ends(db) == [("ready", 1, 0)]
    await workload.close()
