"""F1, 3, 7, 10 and 12 to 14, and 45: the server did what it was asked, and its reply never came; the worker lives.

The proxy forwards the request, drops the whole reply and resets the connection, so that the worker cannot know. Nothing
is done twice, nothing is lost, and nothing is counted against the execution: neither a crash nor an attempt.
"""

import asyncio
from typing import Any

import pytest

from pgconductor import hints
from pgconductor.engine import Engine
from pgconductor.task import Task
from tests.fault.programs import app, child, children, gate, plain_program, program, sleep, step, transaction
from tests.fault.supervisor import SLOWER, World
from tests.waiting import until

Programs = Task[[list[Any]], list[Any]]
BOTH = pytest.mark.parametrize("task", [program, plain_program], ids=["async", "plain"])
UNHARMED = ("completed", 1, 0)


@pytest.mark.covers("F3", "F45", "P5")
async def test_f1_03_a_claim_whose_reply_was_swallowed_goes_back_at_no_cost(world: World) -> None:
    run = await program.invoke([step("a")])
    swallowed = world.proxy.arm("swallow", "claim", 2)  # the first one opens the connection
    world.worker(through=True)
    await run.result(30)
    assert swallowed.fired.is_set()
    assert world.facts(run.id) == UNHARMED
    assert world.moves(run.id, "running") == 2
    assert world.ledger.runs("a") == 1


@pytest.mark.covers("F7", "F45")
@BOTH
async def test_f1_07_a_step_whose_record_s_reply_was_swallowed_is_not_run_again(world: World, task: Programs) -> None:
    run = await task.invoke([step("a"), step("b")])
    swallowed = world.proxy.arm("swallow", "save")
    world.worker(through=True)
    await run.result(30)
    assert swallowed.fired.is_set()
    assert world.facts(run.id) == UNHARMED
    assert (world.ledger.runs("a"), world.ledger.runs("b")) == (1, 1)


@pytest.mark.covers("F10", "F45")
@BOTH
async def test_f1_10_a_transaction_whose_commit_s_reply_was_swallowed_has_one_effect(
    world: World, task: Programs
) -> None:
    await world.worker(through=True).up()
    swallowed = world.proxy.arm("swallow", "commit")
    run = await task.invoke([transaction("t"), step("a")])
    await run.result(30)
    assert swallowed.fired.is_set()
    assert world.facts(run.id) == UNHARMED
    assert world.one("select count(*) from effect") == 1
    assert world.ledger.runs("t") == 1


@BOTH
@pytest.mark.parametrize("call", ["save_transaction", "insert", "begin"])
async def test_f1_10_a_transaction_whose_connection_breaks_is_done_again_in_place(
    world: World, task: Programs, call: str
) -> None:
    await world.worker(through=True).up()
    swallowed = world.proxy.arm("swallow", call)
    run = await task.invoke([step("a"), transaction("t")])
    await run.result(30)
    assert swallowed.fired.is_set()
    assert world.facts(run.id) == UNHARMED
    assert world.one("select count(*) from effect") == 1
    assert (world.ledger.runs("a"), len(world.ledger.of("began", ""))) == (1, 1)


@pytest.mark.covers("F12", "F45", "P6")
async def test_f1_12_a_settle_whose_reply_was_swallowed_is_settled_once(world: World) -> None:
    run = await program.invoke([step("a")])
    swallowed = world.proxy.arm("swallow", "settle", 2)
    worker = world.worker(through=True)
    await run.result(30)
    assert swallowed.fired.is_set()
    await until(lambda: "had been settled before" in worker.log)
    assert world.facts(run.id) == UNHARMED
    assert world.one("select count(*) from audit.history where op = 'end'") == 1
    assert len(world.ledger.of("began", "")) == 1


@pytest.mark.covers("F13", "F45", "P6")
@BOTH
async def test_f1_13_a_park_whose_reply_was_swallowed_makes_one_child(world: World, task: Programs) -> None:
    run = await task.invoke([child("c", step("x")), step("a")])
    swallowed = world.proxy.arm("swallow", "settle", 2)
    world.worker(through=True)
    await run.result(30)
    assert swallowed.fired.is_set()
    assert len(world.children_of(run.id)) == 1
    assert (world.ledger.runs("x"), world.ledger.runs("a")) == (1, 1)
    assert (world.facts(run.id), world.moves(run.id, "waiting")) == (UNHARMED, 1)


async def test_f1_14_a_child_s_end_whose_reply_was_swallowed_wakes_the_parent_once(world: World) -> None:
    run = await program.invoke([child("c", step("x")), step("a")])
    swallowed = world.proxy.arm("swallow", "settle", 3)
    world.worker(through=True)
    await run.result(30)
    assert swallowed.fired.is_set()
    (made,) = world.children_of(run.id)
    assert world.facts(made["id"]) == UNHARMED
    assert (world.facts(run.id), world.moves(run.id, "running")) == (UNHARMED, 2)


async def test_f1_15_a_sleep_whose_registration_s_reply_was_swallowed_is_slept_once(world: World) -> None:
    run = await program.invoke([sleep("nap", 0.5), step("a")])
    swallowed = world.proxy.arm("swallow", "settle", 2)
    world.worker(through=True)
    await run.result(30)
    assert swallowed.fired.is_set()
    assert world.one("select finished_at - created_at >= interval '0.5 seconds' from steps where name = 'nap'")
    assert (world.facts(run.id), world.moves(run.id, "waiting")) == (UNHARMED, 1)


@pytest.mark.covers("F45")
@pytest.mark.parametrize("call", ["enqueue_one", "confirm"])
async def test_f4_45_an_enqueue_whose_reply_was_swallowed_makes_one_execution(world: World, call: str) -> None:
    with app.bound_to(world.proxied_dsn, Engine("pgconductor")):
        first = await program.invoke([step("first")])
        await app.close()  # its hint has gone out
        await asyncio.sleep(2 * hints.SILENCE_SECONDS)  # the next is confirmed by a call of its own
        swallowed = world.proxy.arm("swallow", call)
        run = await program.invoke([step("a")])
        await app.close()
    assert swallowed.fired.is_set()
    assert [row["id"] for row in world.rows("select id from execution order by ord")] == [first.id, run.id]
    world.worker()
    await world.reaches(run.id, "completed")
    assert world.ledger.runs("a") == 1


@pytest.mark.covers("F45")
async def test_f4_45_a_beat_whose_reply_was_swallowed_loses_no_request_to_cancel(world: World) -> None:
    run = await program.invoke([step("a"), gate("never")])
    await world.worker(through=True).up()
    await world.reaches(run.id, "running")
    swallowed = world.proxy.arm("swallow", "beat")
    world.rows("select cancel(%s, 'enough')", run.id)  # no await between: the next beat fetches the request
    await swallowed.fired.wait()
    await world.reaches(run.id, "cancelled")


@pytest.mark.covers("F45")
@pytest.mark.parametrize("call", ["claim", "settle", "save", "commit", "beat", "sweep"])
async def test_f4_45_every_third_reply_swallowed_under_load(world: World, call: str) -> None:
    work = [step("a"), transaction("t"), sleep("nap", 0.05), children("c", [step("x")], [step("y")]), step("b")]
    runs = await app.invoke_many([program.bind(work) for _ in range(15)])
    rule = world.proxy.arm("swallow", call, nth=3, again=True)
    world.worker(through=True, timing=SLOWER)
    world.worker(through=True, timing=SLOWER)
    await asyncio.gather(*(run.result(60) for run in runs))
    await asyncio.wait_for(rule.fired.wait(), 60)  # the work may end before a third beat or sweep
    assert {world.facts(run.id) for run in runs} == {UNHARMED}
    assert world.one("select count(*) from effect") == 15
    assert [world.ledger.runs(name) for name in "abxy"] == [15] * 4
