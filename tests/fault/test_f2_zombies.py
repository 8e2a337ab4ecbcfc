"""F2, and P18: a process that stands still for longer than its lease and then goes on; beats that do not get through.

A zombie's late writes are refused: it changes no row. Two runs of a body overlap only from the lease's end to the old
process' next call.
"""

import asyncio
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from pgconductor.task import Task
from tests.fault.programs import app, block, caught, gate, plain_program, program, step, timed, transaction
from tests.fault.supervisor import World
from tests.waiting import until

Programs = Task[[list[Any]], list[Any]]
BOTH = pytest.mark.parametrize("task", [program, plain_program], ids=["async", "plain"])
UNHARMED = ("completed", 1, 0)
LOST_ONCE = ("completed", 1, 1)
POINTS = (
    *("inside_step", "before_save", "inside_transaction", "before_transaction_commit"),
    *("handler_returned", "before_settle"),
)
_ROWS = "select to_json(t)::text as row from {} t order by 1"


def everything(world: World) -> list[str]:
    """Return the rows that tell of executions, as text."""
    tables = ("execution", "step", "ready", "lease", "wait", "timer", "public.effect")
    return [row["row"] for table in tables for row in world.rows(_ROWS.format(table))]


@pytest.mark.covers("F23", "P2")
@BOTH
@pytest.mark.parametrize(
    "point",
    [
        "inside_step",
        "before_save",
        "inside_transaction",
        "before_transaction_commit",
        "handler_returned",
        "before_settle",
    ],
)
async def test_f2_23_a_zombie_whose_work_is_done_is_refused_whatever_it_writes(
    world: World, task: Programs, point: str
) -> None:
    run = await task.invoke([step("a"), transaction("t")])
    zombie = world.worker(f"{point}:stop")
    await zombie.halted(point)
    old_id = zombie.boot_id
    world.worker()
    await run.result(30)
    before = everything(world)
    zombie.go_on()
    await zombie.rejoined(old_id)
    assert everything(world) == before
    assert world.facts(run.id) == LOST_ONCE
    assert world.one("select count(*) from effect") == 1


@pytest.mark.covers("F23", "P3")
async def test_f2_23_a_zombie_begins_nothing_once_it_goes_on(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), step("b")])
    zombie = await world.worker().up()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    await zombie.halt()
    old_id = zombie.boot_id
    other = world.worker()
    await until(lambda: len(world.ledger.of("began", "")) == 2)
    world.open_gate("g")
    await run.result(30)
    zombie.go_on()
    await zombie.rejoined(old_id)
    assert [line.pid for line in world.ledger.of("ran", "b")] == [other.pid]
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F24", "P2")
@BOTH
async def test_f2_24_a_zombie_is_refused_while_its_successor_still_runs(world: World, task: Programs) -> None:
    run = await task.invoke([step("a"), step("b")])
    zombie = world.worker("before_save:stop")
    await zombie.halted("before_save")
    old_id = zombie.boot_id
    successor = world.worker("inside_step:stop:2")
    await successor.halted("inside_step")
    holder = world.one("select orchestrator_id::text from lease")
    assert holder not in (None, old_id)
    zombie.go_on()
    successor.go_on()
    await run.result(30)
    await zombie.rejoined(old_id)
    first, second = world.ledger.of("ran", "a")
    assert (first.pid, second.pid) == (zombie.pid, successor.pid)
    assert [line.pid for line in world.ledger.of("ran", "b")] == [successor.pid]
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F25")
async def test_f2_25_a_zombie_that_nobody_replaced_gives_its_work_back_at_no_cost(world: World) -> None:
    runs = await app.invoke_many([program.bind([step("a"), gate(name), step("b")]) for name in ("g", "h")])
    zombie = await world.worker().up()
    await until(lambda: len(world.ledger.of("saw", "a")) == 2)
    await zombie.halt()
    old_id = zombie.boot_id
    query = "select 1 from orchestrator where beat_at < clock_timestamp() - interval '2.5 seconds'"
    await until(lambda: bool(world.rows(query)))
    world.open_gate("g")
    zombie.go_on()
    await zombie.rejoined(old_id)
    await runs[0].result(30)  # though the other execution of the same claim still stands at its gate
    world.open_gate("h")
    await runs[1].result(30)
    assert [world.facts(run.id) for run in runs] == [UNHARMED] * 2
    assert len(world.ledger.of("began", "")) == 4
    assert world.ledger.runs("a") == world.ledger.runs("b") == 2


@pytest.mark.covers("F26")
async def test_f2_26_a_handler_that_blocks_the_loop_for_longer_than_its_lease_keeps_it(world: World) -> None:
    run = await program.invoke([step("a"), block("long", 4.0), step("b")])
    worker = await world.worker().up()
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    assert len(world.ledger.of("began", "")) == 1
    assert "the event loop has been blocked" in worker.log or "blocked" in world.workers[1].log


@pytest.mark.covers("F28")
async def test_f2_28_a_process_that_cannot_beat_gives_its_work_back_and_takes_none(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), step("b")])
    mute = await world.worker(through=True).up()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    old_id = mute.boot_id
    world.proxy.silence("heartbeat")
    await until(lambda: world.facts(run.id) == ("ready", 1, 0))
    other = world.worker()
    world.open_gate("g")
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    assert [line.pid for line in world.ledger.of("began", "")] == [mute.pid, other.pid]
    world.proxy.heal()
    await mute.rejoined(old_id)


@pytest.mark.covers("F28", "F44")
async def test_f2_28_half_open_work_connections_are_given_up_in_time_by_the_only_worker(world: World) -> None:
    worker = await world.worker(dsn=make_conninfo(world.proxied_dsn, tcp_user_timeout=1000)).up()
    await (await program.invoke([step("first")])).result(30)  # which opens them all
    run = await program.invoke([step("a"), gate("g"), step("b"), transaction("t")])
    await until(lambda: bool(world.ledger.of("saw", "a")))
    half_open = [link for name in ("claim", "save", "settle") for link in world.proxy.chosen(name)]
    assert len(half_open) == 3
    for link in half_open:
        link.half_open()
    second = await program.invoke([step("c")])
    world.open_gate("g")
    await asyncio.gather(run.result(60), second.result(60))
    assert [world.facts(each.id) for each in (run, second)] == [UNHARMED] * 2
    assert {line.pid for line in world.ledger.of("began", "")} == {worker.pid}
    assert len(world.ledger.of("began", "")) == 3


@pytest.mark.covers("F29")
async def test_f2_29_the_beats_of_a_process_keep_nothing_that_another_of_its_name_holds(world: World) -> None:
    halted, beating = [await world.worker(concurrency=1).up() for _ in range(2)]
    runs = await app.invoke_many([program.bind([step("a"), gate("g"), step("b")]) for _ in range(2)])
    await until(lambda: len(world.ledger.of("saw", "a")) == 2)
    held_by = {line.pid: line.execution for line in world.ledger.of("began", "")}
    assert len(world.rows("select distinct name, host from workers")) == 1
    old_ids = halted.boot_id, beating.boot_id
    await halted.halt()
    await until(lambda: halted.boot_id is None)
    halted.go_on()
    await halted.rejoined(old_ids[0])
    world.open_gate("g")
    await asyncio.gather(*(run.result(30) for run in runs))
    facts = {str(run.id): world.facts(run.id) for run in runs}
    assert facts == {held_by[halted.pid]: LOST_ONCE, held_by[beating.pid]: UNHARMED}
    assert beating.boot_id == old_ids[1]


@pytest.mark.covers("P18")
async def test_p18_a_parent_that_runs_on_after_a_timeout_is_given_to_nobody_when_its_child_ends(world: World) -> None:
    late = timed("late", 0.1, "keep", gate("child"), step("x"))
    run = await program.invoke([caught(late), gate("parent"), step("b")])
    for _ in range(2):
        world.worker()
    await until(lambda: world.ledger.values("late") == {'["ChildTimeout"]'})
    holder = world.one("select orchestrator_id from lease where execution_id = %s", run.id)
    world.open_gate("child")
    (child,) = world.children_of(run.id)
    await world.reaches(child["id"], "completed")
    assert world.one("select orchestrator_id from lease where execution_id = %s", run.id) == holder
    assert world.rows("select 1 from ready where execution_id = %s", run.id) == []
    world.open_gate("parent")
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    assert len(world.ledger.of("began", "", str(run.id))) == 2  # at first, and when the timeout had woken it
