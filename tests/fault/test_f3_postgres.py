"""F3: Postgres is killed, or sessions are terminated, again and again under load. Nothing is lost or counted twice."""

import asyncio
import os
import random
import signal
from functools import partial
from uuid import UUID

import pytest

from pgconductor import hints
from pgconductor.transactions import LOST_MAX
from tests.fault.programs import Program, app, child, children, gate, program, sleep, step, transaction
from tests.fault.supervisor import SLOWER, World
from tests.waiting import until

WORK: Program = [step("a"), transaction("t"), sleep("nap", 0.05), children("c", [step("x")], [step("y")]), step("b")]
SESSIONS = ("claim", "settle", "save", "worker", "notify", "listener", "heartbeat", "transaction")


@pytest.mark.covers("F30")
async def test_f3_30_postgres_killed_again_and_again_under_load_loses_nothing(world: World) -> None:
    for worker in [world.worker(timing=SLOWER), world.worker(timing=SLOWER)]:
        await worker.up()
    runs = await app.invoke_many([program.bind(WORK) for _ in range(60)])
    for left in (55, 40, 20):
        await until(partial(has_at_most, world, left))
        await world.restart_postgres()
    states = [await run.state() for run in runs]
    await asyncio.gather(*(run.result(60) for run in runs))
    assert set(states) <= {"scheduled", "ready", "running", "waiting", "completed"}
    assert {world.facts(run.id)[:2] for run in runs} == {("completed", 1)}
    assert {world.facts(run.id)[2] for run in runs} == {0}  # an outage is nobody's crash
    assert world.one("select count(*) from effect") == 60


@pytest.mark.covers("F30")
async def test_f3_30_a_transaction_begun_while_postgres_is_away_waits_for_it(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), transaction("t")])
    await world.worker().up()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    await asyncio.to_thread(world.server.kill)
    world.open_gate("g")
    await asyncio.to_thread(world.server.start)
    await run.result(30)
    assert world.facts(run.id) == ("completed", 1, 0)
    assert world.one("select count(*) from effect") == 1


@pytest.mark.covers("F31")
async def test_f3_31_sessions_terminated_at_random_under_load_lose_nothing(world: World) -> None:
    choose = random.Random(31)  # noqa: S311
    for worker in [world.worker(timing=SLOWER), world.worker(timing=SLOWER)]:
        await worker.up()
    runs = await app.invoke_many([program.bind(WORK) for _ in range(60)])
    count = 0
    names = [*SESSIONS, *["transaction"] * (LOST_MAX - 2)]  # so often, and no more: a transaction that loses more fails
    while unfinished(world):
        name = choose.choice(names)
        ended = world.terminate(f"pgconductor {name}")
        count += ended
        if ended and name == "transaction":
            names.remove(name)
        await asyncio.sleep(0.01)  # not to synchronise: a pace of terminations that leaves the workers some time
    assert count >= 10
    await asyncio.gather(*(run.result(60) for run in runs))
    assert {world.facts(run.id) for run in runs} == {("completed", 1, 0)}
    assert world.one("select count(*) from effect") == 60


@pytest.mark.covers("F30")
async def test_f3_30_a_claim_that_a_crash_undoes_is_made_again_while_its_run_goes_on(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), step("b")])
    await world.worker().up()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    undo_claim(world, run.id)
    await until(lambda: world.one("select count(*) from audit.history where token is not null") == 2)
    world.open_gate("g")
    await run.result(30)
    assert world.facts(run.id) == ("completed", 1, 0)
    assert (world.ledger.runs("a"), world.ledger.runs("b")) == (1, 1)


@pytest.mark.covers("F30")
async def test_f3_30_a_park_of_a_claim_that_a_crash_undid_leaves_nothing_in_memory(world: World) -> None:
    """Claims commit asynchronously: a crash may bring back the row that a run was claimed from, and lose its park."""
    run = await program.invoke([child("c", gate("h")), gate("g"), child("d", step("x"))])
    await world.worker(through=True).up()
    await until(lambda: bool(world.rows("select from wait")))
    (kept,) = world.rows("select cached_by, cached_seq from wait")
    world.open_gate("h")
    await until(lambda: len(world.ledger.of("saw", "c")) == 1)
    refused = world.proxy.arm("refuse", "settle", again=True)
    world.open_gate("g")
    await refused.fired.wait()
    undo_claim(world, run.id, kept["cached_by"], kept["cached_seq"])
    await until(lambda: len(world.ledger.of("saw", "g")) == 2)
    world.proxy.heal()
    await run.result(30)
    assert len(world.children_of(run.id)) == 2


@pytest.mark.covers("F30")
async def test_f3_30_a_call_after_a_silence_is_there_when_postgres_is_killed_as_soon_as_it_has_returned(
    world: World,
) -> None:
    """Such a call is committed without waiting for the disk, so that a worker may begin; then it is confirmed."""
    for number in range(3):
        await program.invoke([step(f"before {number}")])  # connects
        await asyncio.sleep(20 * hints.SILENCE_SECONDS)  # its hint has gone out, too
        await until(partial(stop_idle_walwriter, world))  # nobody else brings it to the disk
        run = await program.invoke([step(f"a{number}")])
        await asyncio.to_thread(world.server.kill)
        await asyncio.to_thread(world.server.start)
        assert world.one("select count(*) from execution where id = %s", run.id) == 1
    world.worker()


def stop_idle_walwriter(world: World) -> bool:
    """Stop the process that writes the log behind commits, unless it writes: it would keep all others from it then."""
    find = "select pid, wait_event from pg_stat_activity where backend_type = 'walwriter'"
    (found,) = world.rows(find)
    os.kill(found["pid"], signal.SIGSTOP)
    (stopped,) = world.rows(find)
    if stopped["wait_event"] == "WalWriterMain":
        return True
    os.kill(found["pid"], signal.SIGCONT)
    return False


def undo_claim(world: World, id: UUID, cached_by: UUID | None = None, cached_seq: int | None = None) -> None:
    """Do as a crash of the server does that comes before an asynchronous commit of a claim is on disk."""
    world.rows(
        """
        with undone as (delete from lease where execution_id = %s returning execution_id)
        insert into ready (lane_id, priority, ord, execution_id, cached_by, cached_seq)
        select e.lane_id, e.priority, late_ord(), e.id, %s, %s
        from undone u join execution e on e.id = u.execution_id returning 1
        """,
        id, cached_by, cached_seq,
    )  # fmt: skip


def unfinished(world: World) -> int:
    """Return how many roots have not ended."""
    count: int = world.one("select count(*) from execution where outcome is null and parent_id is null")
    return count


def has_at_most(world: World, left: int) -> bool:
    """Tell whether no more roots than that are unfinished."""
    return unfinished(world) <= left
