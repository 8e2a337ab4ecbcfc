"""F3, 39 and 40: locks and snapshots that last, no vacuum, indexes made anew under load. Slower, and right."""

import asyncio
import contextlib

import psycopg
import pytest

from tests.fault.programs import Program, app, child, gate, program, sleep, step, transaction
from tests.fault.supervisor import SLOWER, World
from tests.waiting import until

REINDEX_TRIES_MAX = 20
UNHARMED = ("completed", 1, 0)
WORK: Program = [step("a"), transaction("t"), sleep("nap", 0.05), child("c", step("x")), step("b")]
BUSY = ("execution", "step", "ready", "lease", "timer", "wait")
_BLOCKED = (
    "select 1 from pg_stat_activity where datname = current_database() and application_name = %s"
    " and wait_event_type = 'Lock'"
)


@pytest.mark.covers("F39")
async def test_f3_39_a_table_locked_exclusively_holds_work_up_and_costs_nothing(world: World) -> None:
    runs = await app.invoke_many([program.bind([step("a"), gate("g"), *WORK[1:]]) for _ in range(5)])
    await world.worker().up()
    await until(lambda: len(world.ledger.of("saw", "a")) == 5)
    with psycopg.connect(world.dsn) as other:
        other.execute("lock table pgconductor.ready, pgconductor.step in access exclusive mode")
        world.open_gate("g")
        await until(lambda: bool(world.rows(_BLOCKED, "pgconductor transaction")))
    await asyncio.gather(*(run.result(60) for run in runs))
    assert {world.facts(run.id) for run in runs} == {UNHARMED}
    assert world.one("select count(*) from effect") == 5


@pytest.mark.covers("F39")
async def test_f3_39_a_lock_that_keeps_beats_away_for_a_whole_lease_is_nobody_s_crash(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), step("b")])
    worker = await world.worker().up()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    with psycopg.connect(world.dsn) as other:
        other.execute("lock table pgconductor.orchestrator in access exclusive mode")
        await until(lambda: "could not confirm its lease" in worker.log)
        world.open_gate("g")
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    assert world.ledger.runs("a") == 1


@pytest.mark.covers("F39")
async def test_f3_39_a_sweep_that_meets_a_locked_table_holds_up_no_beat(world: World) -> None:
    run = await program.invoke([step("a"), gate("g")])
    worker = await world.worker(timing=SLOWER).up()
    await world.reaches(run.id, "running")
    with psycopg.connect(world.dsn) as other:
        other.execute("lock table pgconductor.event in access exclusive mode")
        await until(lambda: worker.log.count("the sweep gave up at a lock") >= 3)
    world.open_gate("g")
    await run.result(30)
    assert "could not confirm its lease" not in worker.log
    assert world.facts(run.id) == UNHARMED


@pytest.mark.covers("F39")
async def test_f3_39_a_snapshot_that_stays_open_spoils_nothing(world: World) -> None:
    with psycopg.connect(world.dsn) as other:
        other.execute("set transaction isolation level repeatable read")
        other.execute("select count(*) from pgconductor.execution")
        runs = await app.invoke_many([program.bind(WORK) for _ in range(60)])
        world.worker()
        world.worker()
        await asyncio.gather(*(run.result(60) for run in runs))
        assert other.execute("select count(*) from pgconductor.execution").fetchone() == (0,)
    assert {world.facts(run.id) for run in runs} == {UNHARMED}


@pytest.mark.covers("F40")
async def test_f3_40_without_vacuum_and_with_indexes_made_anew_under_load_all_is_right(world: World) -> None:
    for table in BUSY:
        world.execute(f"alter table {table} set (autovacuum_enabled = off)")
    for _ in range(2):
        await world.worker().up()
    runs = await app.invoke_many([program.bind(WORK) for _ in range(60)])
    for how in ("", "concurrently"):
        for table in BUSY:
            await _reindex_until_no_deadlock_victim(world, f"{how} {table}")
    assert await asyncio.gather(*(run.result(60) for run in runs))
    assert {world.facts(run.id) for run in runs} == {UNHARMED}
    assert world.one("select count(*) from effect") == 60


async def _reindex_until_no_deadlock_victim(world: World, table: str) -> None:
    """Reindex as an operator would, who tries again.

    A transaction that has read through the index, and now wants to write to the table, holds what the reindex wants and
    wants what it holds. Postgres ends either of the two: the engine goes on by itself, the operator's command does not.
    """
    for _ in range(REINDEX_TRIES_MAX):
        with contextlib.suppress(psycopg.errors.DeadlockDetected):
            return await asyncio.to_thread(world.execute, f"reindex table {table}")
    pytest.fail(f"the reindex of {table} was the victim of {REINDEX_TRIES_MAX} deadlocks")
