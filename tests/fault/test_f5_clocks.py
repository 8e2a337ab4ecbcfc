"""F5, 50: processes whose clocks are wrong, each in another way. No lease, retry, sleep or deadline goes by them."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from tests.fault.clocks import FAST, SLOW, STOOD_STILL, JumpingClock, needs_faketime, wrong_clock
from tests.fault.programs import Program, app, caught, child, fail, gate, program, sleep, step, timed
from tests.fault.supervisor import SLOWER, World
from tests.waiting import until

WORK: Program = [
    step("a"),
    gate("g"),
    fail("f", 1),
    sleep("nap", 0.05),
    caught(timed("late", 0.05, "cancel", sleep("hours", 7200))),
    timed("in time", 3600, "cancel", sleep("moment", 0.05)),
    child("c", step("x")),
]


def made_at(id: UUID) -> datetime:
    """Return what the clock of the process said that made an id."""
    return datetime.fromtimestamp((id.int >> 80) / 1000, UTC)


@needs_faketime
@pytest.mark.covers("F50")
async def test_f5_50_wrong_clocks_move_no_lease_retry_sleep_or_deadline(world: World, tmp_path: Path) -> None:
    jumping = JumpingClock(tmp_path / "clock")
    clocks = [wrong_clock(FAST), wrong_clock(SLOW), wrong_clock(STOOD_STILL), jumping.environment]
    workers = [world.worker(timing=SLOWER, environment=clock, concurrency=1) for clock in clocks]
    runs = await app.invoke_many([program.bind(WORK) for _ in workers])
    await until(lambda: len(world.ledger.of("saw", "a")) == len(workers))  # each holds one
    held_by = {line.pid: line.execution for line in world.ledger.of("began", "")}
    old_ids = [worker.boot_id for worker in workers]
    jumping.jump(SLOW)
    workers[0].kill()
    lost = UUID(held_by[workers[0].pid])
    await until(lambda: world.execution(lost)["crashes"] == 1)  # by the lease's end and a sweep of the others
    jumping.jump(FAST)
    world.open_gate("g")
    await asyncio.gather(*(run.result(60) for run in runs))
    assert [world.facts(run.id) for run in runs] == [("completed", 2, int(run.id == lost)) for run in runs]
    assert [worker.boot_id for worker in workers[1:]] == old_ids[1:]
    assert world.ledger.values("late") == {'["ChildTimeout"]'}
    children = [each for run in runs for each in world.children_of(run.id)]
    assert all(abs((made_at(each["id"]) - each["created_at"]).total_seconds()) > 1800 for each in children)
