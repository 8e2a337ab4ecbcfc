"""F2: a process that stands still for longer than its lease and then goes on; and beats that do not get through.

A zombie's late writes are refused: it changes no row. Two runs of a body overlap only from the lease's end to the old
process' next call.
"""

from typing import Any

import pytest

from pgconductor.task import Task
from tests.fault.programs import app, block, gate, plain_program, program, step, step_behind, transaction
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
async def test_f2_28_a_half_open_work_connection_is_given_up_in_time(world: World) -> None:
    await world.worker(through=True).up()
    for link in world.proxy.chosen("claim"):
        link.half_open()
    run = await program.invoke([step_behind("a")])
    world.open_gate("a")
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
