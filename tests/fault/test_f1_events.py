"""F1, 15: SIGKILL around an emit and around the registration of a wait; an event is neither lost nor doubled."""

from typing import Any

import pytest

from pgconductor.task import Task
from tests.fault.programs import emit, plain_program, program, sleep, wait_for
from tests.fault.supervisor import World

Programs = Task[[list[Any]], list[Any]]
BOTH = pytest.mark.parametrize("task", [program, plain_program], ids=["async", "plain"])


@BOTH
@pytest.mark.parametrize(("point", "hit"), [("before_save", 1), ("after_save_reply", 1), ("before_settle", 1)])
async def test_f1_15_a_handler_killed_around_its_emit_emits_once(
    world: World, task: Programs, point: str, hit: int
) -> None:
    run = await task.invoke([emit("tell"), sleep("nap", 0.01)])
    await world.worker(f"{point}:kill:{hit}").struck(point)
    world.worker()
    ([id], _) = await run.result(30)
    assert world.rows("select id::text from event") == [{"id": id}]
    assert world.ledger.values("tell") == {f'["{id}"]'}
    assert world.facts(run.id) == ("completed", 1, 1)


@pytest.mark.covers("F15")
@BOTH
@pytest.mark.parametrize(("point", "crashes"), [("before_settle", 1), ("after_settle_reply", 0)])
@pytest.mark.parametrize("is_early", [True, False])
async def test_f1_15_killed_around_a_wait_s_registration_loses_no_event(
    world: World, task: Programs, point: str, crashes: int, is_early: bool
) -> None:
    run = await task.invoke([wait_for("answer")])
    if is_early:
        world.one("select emit('told', cast(%s as jsonb))", '{"to": "anybody"}')
    await world.worker(f"{point}:kill").struck(point)
    if not is_early:
        world.one("select emit('told', cast(%s as jsonb))", '{"to": "anybody"}')
    world.worker()
    assert await run.result(30) == [{"to": "anybody"}]
    assert world.facts(run.id) == ("completed", 1, crashes)


@pytest.mark.covers("F15")
async def test_f1_15_killed_before_it_delivers_the_next_one_does(world: World) -> None:
    run = await program.invoke([wait_for("answer")])
    await world.worker("after_settle_reply:kill").struck("after_settle_reply")
    world.one("select emit('told', cast(%s as jsonb))", '{"to": "anybody"}')
    await world.worker("before_claim:kill").struck("before_claim")
    world.worker()
    assert await run.result(30) == [{"to": "anybody"}]
    woken = "select 1 from audit.history where execution_id = %s and from_state = 'waiting'"
    assert len(world.rows(woken, run.id)) == 1
