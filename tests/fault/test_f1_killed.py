"""F1, 1 to 15: SIGKILL at a named point of a worker; another worker finishes what it had begun.

Each armed fault must have fired. At the end of each test everything has ended, the invariants hold, and the ledger
agrees with what is recorded (`World.converges`). No test uses up an attempt: a crash is not a failure.
"""

import signal
from typing import Any

import pytest

from pgconductor.task import Task
from tests.fault.programs import child, children, plain_program, program, sleep, step, transaction
from tests.fault.supervisor import World
from tests.waiting import until

Programs = Task[[list[Any]], list[Any]]
BOTH = pytest.mark.parametrize("task", [program, plain_program], ids=["async", "plain"])
LOST_ONCE = ("completed", 1, 1)
UNHARMED = ("completed", 1, 0)
SLOW_TAKE_OVER = """
alter function take_over rename to take_over_at_once;
create function take_over(p_expiry interval, p_now timestamptz) returns json language sql as $$
  select case when pg_sleep(4) is not null then take_over_at_once(p_expiry, p_now) end
$$"""

LONG_TAKE_OVER = """
alter function take_over rename to take_over_at_once;
create function take_over(p_expiry interval, p_now timestamptz) returns json language sql as $$
  select case when answer ->> 'lost' = '0' or pg_sleep(1) is not null then answer end
  from take_over_at_once(p_expiry, p_now) answer
$$"""


@pytest.mark.covers("F1")
async def test_f1_01_killed_before_the_claim_nothing_is_claimed(world: World) -> None:
    run = await program.invoke([step("a")])
    await world.worker("before_claim:kill").struck("before_claim")
    assert world.facts(run.id) == ("ready", 1, 0)
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    assert world.ledger.runs("a") == 1


@pytest.mark.covers("F2")
async def test_f1_02_killed_after_the_claim_before_its_reply_is_read_costs_one_crash(world: World) -> None:
    run = await program.invoke([step("a")])
    claimed = world.proxy.arm("hold", "claim", 2)  # the first one opens the connection
    worker = world.worker(through=True)
    await claimed.fired.wait()
    assert world.facts(run.id) == ("running", 1, 0)
    worker.kill()
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == LOST_ONCE
    assert world.ledger.runs("a") == 1


@pytest.mark.covers("F4")
async def test_f1_04_killed_after_the_claim_before_the_handler_costs_one_crash(world: World) -> None:
    run = await program.invoke([step("a")])
    await world.worker("after_claim_reply:kill").struck("after_claim_reply")
    await world.worker("before_handler:kill").struck("before_handler")
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == ("completed", 1, 2)
    assert len(world.ledger.of("began", "")) == 1


@pytest.mark.covers("F5")
@BOTH
async def test_f1_05_killed_inside_a_step_body_runs_the_step_again(world: World, task: Programs) -> None:
    run = await task.invoke([step("a"), step("b")])
    await world.worker("inside_step:kill:2").struck("inside_step")
    world.worker()
    await run.result(30)
    assert (world.ledger.runs("a"), world.ledger.runs("b")) == (1, 2)
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F6")
@BOTH
async def test_f1_06_killed_between_body_and_record_runs_the_step_again(world: World, task: Programs) -> None:
    run = await task.invoke([step("a")])
    await world.worker("before_step_save:kill").struck("before_step_save")
    await world.worker("before_save:kill").struck("before_save")
    world.worker()
    await run.result(30)
    assert world.ledger.runs("a") == 3
    assert len(world.ledger.values("a")) == 1
    assert world.facts(run.id) == ("completed", 1, 2)


@pytest.mark.covers("F7")
async def test_f1_07_killed_before_the_record_is_confirmed_replays_its_value(world: World) -> None:
    run = await program.invoke([step("a"), step("b")])
    await world.worker("after_save_reply:kill").struck("after_save_reply")
    world.worker()
    values = await run.result(30)
    assert (world.ledger.runs("a"), world.ledger.runs("b")) == (1, 1)
    assert world.one("select value from steps where name = 'a'") == values[0]
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F8")
@BOTH
async def test_f1_08_killed_between_two_steps_does_not_repeat_the_first(world: World, task: Programs) -> None:
    run = await task.invoke([step("a"), step("b")])
    await world.worker("after_step_save:kill").struck("after_step_save")
    world.worker()
    await run.result(30)
    assert (world.ledger.runs("a"), world.ledger.runs("b")) == (1, 1)
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F9")
@BOTH
@pytest.mark.parametrize("point", ["inside_transaction", "before_transaction_commit"])
async def test_f1_09_killed_inside_a_transaction_has_no_effect_then_one(
    world: World, task: Programs, point: str
) -> None:
    run = await task.invoke([transaction("t")])
    await world.worker(f"{point}:kill").struck(point)
    assert world.rows("select * from effect") == []
    world.worker()
    await run.result(30)
    assert world.one("select count(*) from effect") == 1
    assert world.ledger.runs("t") == 2
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F10")
@BOTH
async def test_f1_10_killed_after_a_transaction_s_commit_has_one_effect(world: World, task: Programs) -> None:
    run = await task.invoke([transaction("t"), step("a")])
    await world.worker("after_transaction_commit:kill").struck("after_transaction_commit")
    world.worker()
    await run.result(30)
    assert world.one("select count(*) from effect") == 1
    assert world.ledger.runs("t") == 1
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F11")
@pytest.mark.parametrize("point", ["handler_returned", "before_settle"])
async def test_f1_11_killed_before_the_settle_replays_and_settles_once(world: World, point: str) -> None:
    run = await program.invoke([step("a"), transaction("t"), step("b")])
    await world.worker(f"{point}:kill").struck(point)
    world.worker()
    await run.result(30)
    assert [world.ledger.runs(name) for name in "atb"] == [1, 1, 1]
    assert len(world.ledger.of("began", "")) == 2
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F12")
async def test_f1_12_killed_after_the_settle_committed_ends_once(world: World) -> None:
    run = await program.invoke([step("a")])
    await world.worker("after_settle_reply:kill").struck("after_settle_reply")
    await run.result(30)
    world.worker()
    later = await program.invoke([step("b")])
    await later.result(30)
    assert world.facts(run.id) == UNHARMED
    assert len(world.ledger.of("began", "", str(run.id))) == 1


@pytest.mark.covers("F13")
@BOTH
async def test_f1_13_killed_before_the_park_commits_there_is_no_child(world: World, task: Programs) -> None:
    run = await task.invoke([step("a"), child("c", step("x"))])
    await world.worker("before_settle:kill").struck("before_settle")
    assert world.children_of(run.id) == []
    world.worker()
    await run.result(30)
    assert len(world.children_of(run.id)) == 1
    assert [world.ledger.runs(name) for name in "ax"] == [1, 1]
    assert world.facts(run.id) == LOST_ONCE


@pytest.mark.covers("F13")
@BOTH
async def test_f1_13_killed_after_the_park_committed_there_is_one_child(world: World, task: Programs) -> None:
    run = await task.invoke([child("c", step("x"))])
    await world.worker("after_settle_reply:kill", concurrency=1).struck("after_settle_reply")
    assert world.facts(run.id) == ("waiting", 1, 0)
    assert len(world.children_of(run.id)) == 1
    world.worker()
    await run.result(30)
    assert len(world.children_of(run.id)) == 1
    assert world.facts(run.id) == UNHARMED


@pytest.mark.covers("F13")
@pytest.mark.parametrize("point", ["before_save", "after_save_reply"])
async def test_f1_13_killed_around_the_record_of_a_fan_out_beside_a_step_makes_each_child_once(
    world: World, point: str
) -> None:
    run = await program.invoke([step("a"), children("c", [step("x")], [step("y")])])
    await world.worker(f"{point}:kill").struck(point)
    world.worker()
    await run.result(30)
    assert len(world.children_of(run.id)) == 2
    assert (world.ledger.runs("x"), world.ledger.runs("y")) == (1, 1)


@pytest.mark.covers("F14")
async def test_f1_14_killed_before_a_child_s_end_commits_the_child_runs_again(world: World) -> None:
    run = await program.invoke([child("c", step("x"))])
    await world.worker("before_settle:kill:2").struck("before_settle")  # the first was the park
    (made,) = world.children_of(run.id)
    assert world.facts(run.id) == ("waiting", 1, 0)
    world.worker()
    await run.result(30)
    assert world.facts(made["id"]) == LOST_ONCE
    assert world.facts(run.id) == UNHARMED
    assert world.ledger.runs("x") == 1


@pytest.mark.covers("F14")
async def test_f1_14_killed_after_a_child_s_end_committed_the_parent_is_woken_once(world: World) -> None:
    run = await program.invoke([child("c", step("x")), step("a")])
    await world.worker("after_settle_reply:kill:2").struck("after_settle_reply")
    (made,) = world.children_of(run.id)
    assert made["state"] == "completed"
    world.worker()
    values = await run.result(30)
    assert values[0] == world.one("select result from executions where id = %s", made["id"])
    assert len(world.ledger.of("began", "", str(run.id))) == 2
    assert world.facts(run.id)[:2] == ("completed", 1)
    woken = "select 1 from audit.history where execution_id = %s and from_state = 'waiting'"
    assert len(world.rows(woken, run.id)) == 1


@pytest.mark.covers("F15")
@BOTH
@pytest.mark.parametrize(("point", "crashes"), [("before_settle", 1), ("after_settle_reply", 0)])
async def test_f1_15_killed_around_a_sleep_s_registration_sleeps_once_and_long_enough(
    world: World, task: Programs, point: str, crashes: int
) -> None:
    run = await task.invoke([sleep("nap", 1.0), step("a")])
    await world.worker(f"{point}:kill").struck(point)
    world.worker()
    await run.result(30)
    (nap,) = world.rows("select finished_at - created_at >= interval '1 second' as long from steps where name = 'nap'")
    assert nap["long"]
    assert world.facts(run.id) == ("completed", 1, crashes)
    waits = "select 1 from audit.history where execution_id = %s and to_state = 'waiting'"
    assert len(world.rows(waits, run.id)) == 1


@pytest.mark.covers("F1")
async def test_f1_01_what_is_slow_to_take_over_is_taken_over_while_the_beats_go_on(world: World) -> None:
    """A sweep that the limit ends is run again apart: taking over reads all leases, and their dead rows."""
    run = await program.invoke([step("a")])
    world.execute(SLOW_TAKE_OVER)
    assert await world.worker("before_handler:kill").ended() == -signal.SIGKILL
    worker = await world.worker().up()
    boot_id = worker.boot_id
    await run.result(30)
    assert world.facts(run.id) == LOST_ONCE
    await until(lambda: "took over 1 execution of" in worker.log)
    assert worker.boot_id == boot_id  # it has not lost its own leases meanwhile


@pytest.mark.covers("F21")
async def test_f1_21_killed_while_it_takes_over_another_process_finishes_it_and_counts_one_crash(world: World) -> None:
    run = await program.invoke([step("a")])
    world.execute(LONG_TAKE_OVER)
    assert await world.worker("before_handler:kill").ended() == -signal.SIGKILL
    sweeping = world.worker()
    await until(lambda: bool(world.rows("select 1 from pg_stat_activity where wait_event = 'PgSleep'")))
    sweeping.kill()
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == LOST_ONCE
