"""F1, 16 to 20, and 64: many at once, in the middle of a batch, while stopping, and handlers that end their process."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pgconductor import ExecutionFailed
from pgconductor.engine import Engine
from tests.fault.programs import LIMIT, app, child, gate, leave, limited_program, program, sleep, step, transaction
from tests.fault.supervisor import ROOT, World
from tests.integration import isolated_app
from tests.waiting import until

UNHARMED = ("completed", 1, 0)
StartGroup = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
async def gates(world: World, tmp_path: Path) -> AsyncIterator[Path]:
    """The directory of the gates, while the app whose handlers have processes of their own leads to the world."""
    directory = tmp_path / "gates"
    directory.mkdir()
    with isolated_app.app.bound_to(world.dsn, Engine("pgconductor")):
        yield directory
        await isolated_app.app.close()


@pytest.fixture
def start_group(world: World) -> Iterator[StartGroup]:
    """`start_group()` starts a worker of that app, whose processes are a group, as they are in a terminal."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "tests.integration.isolated_app"]
        environment = os.environ | {"PGCONDUCTOR_URL": world.dsn}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def told(gates: Path) -> list[int]:
    """Return the processes that have come to the gate."""
    return [int(path.stem) for path in gates.glob("*.pid")]


async def ended(process: "subprocess.Popen[bytes]") -> int:
    """Wait until a process has ended; return its exit code."""
    await until(lambda: process.poll() is not None)
    return process.returncode


@pytest.mark.covers("F16", "P7")
async def test_f1_16_a_graceful_stop_gives_unfinished_work_back_at_no_cost(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), step("b")])
    worker = world.worker()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    worker.send(signal.SIGTERM)
    await until(lambda: bool(world.rows("select 1 from workers where stopping_at is not null")))
    assert world.facts(run.id) == ("running", 1, 0)  # it has the grace time to come to its next operation
    world.open_gate("g")
    assert await worker.ended() == 0
    assert world.facts(run.id) == ("ready", 1, 0)
    assert world.ledger.runs("b") == 0
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    assert (world.ledger.runs("a"), world.ledger.runs("b")) == (1, 1)


@pytest.mark.covers("F16")
async def test_f1_16_killed_during_its_graceful_stop_costs_one_crash(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), step("b")])
    worker = world.worker()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    worker.send(signal.SIGTERM)
    await until(lambda: bool(world.rows("select 1 from workers where stopping_at is not null")))
    worker.kill()
    world.open_gate("g")
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == ("completed", 1, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_f1_16_a_stop_that_reaches_the_processes_of_handlers_too_leaves_their_runs_the_grace_time(
    world: World, gates: Path, start_group: StartGroup, number: signal.Signals
) -> None:
    run = await isolated_app.gated.invoke(str(gates))
    worker = start_group()
    await until(lambda: bool(told(gates)))
    os.killpg(worker.pid, number)
    await until(lambda: bool(world.rows("select 1 from workers where stopping_at is not null")))
    (gates / "open").touch()
    assert await ended(worker) == 0
    assert world.facts(run.id) == UNHARMED
    assert told(gates) == [await run.result(10)]


async def test_f1_16_a_handler_whose_process_is_killed_during_the_stop_goes_back_at_no_cost(
    world: World, gates: Path, start_group: StartGroup
) -> None:
    run = await isolated_app.gated.invoke(str(gates))
    worker = start_group()
    await until(lambda: bool(told(gates)))
    worker.send_signal(signal.SIGTERM)
    await until(lambda: bool(world.rows("select 1 from workers where stopping_at is not null")))
    os.kill(told(gates)[0], signal.SIGKILL)
    assert await ended(worker) == 0
    assert world.facts(run.id) == ("ready", 1, 0)
    (gates / "open").touch()
    start_group()
    await run.result(30)
    assert world.facts(run.id) == UNHARMED


@pytest.mark.covers("F18")
async def test_f1_18_all_workers_killed_at_once_and_started_again_resume_everything(world: World) -> None:
    work = [step("a"), transaction("t"), sleep("nap", 0.2), child("c", step("x")), gate("g"), step("b")]
    runs = await app.invoke_many([program.bind(work) for _ in range(20)])
    limited = await app.invoke_many([limited_program.bind([step("l"), gate("g"), step("m")]) for _ in range(5)])
    workers = [world.worker(concurrency=20) for _ in range(2)]
    await until(lambda: len(world.ledger.of("saw", "c")) >= 10 and len(world.ledger.of("saw", "l")) == LIMIT)
    for worker in workers:
        worker.kill()
    assert world.one("select count(*) from permit") == LIMIT  # held by the dead
    world.open_gate("g")
    world.worker()
    await asyncio.gather(*(run.result(60) for run in [*runs, *limited]))
    assert sorted(world.facts(run.id) for run in limited) == [UNHARMED] * 3 + [("completed", 1, 1)] * LIMIT
    assert world.one("select count(*) from permit") == 0
    assert world.one("select count(*) from effect") == 20
    facts = [world.facts(run.id) for run in runs]
    assert {fact[:2] for fact in facts} == {("completed", 1)}
    assert sum(fact[2] for fact in facts) >= 10


@pytest.mark.covers("F20")
@pytest.mark.parametrize("point", ["before_settle", "after_settle_reply", "before_save", "after_save_reply"])
async def test_f1_20_killed_in_the_middle_of_a_batch_keeps_what_is_stored(world: World, point: str) -> None:
    runs = await app.invoke_many([program.bind([step("a"), step("b")]) for _ in range(40)])
    await world.worker(f"{point}:kill:2", concurrency=5).struck(point)
    done = {row["id"] for row in world.rows("select id from executions where state = 'completed'")}
    began_at = max(line.at for line in world.ledger.lines)
    world.worker()
    await asyncio.gather(*(run.result(60) for run in runs))
    again = {line.execution for line in world.ledger.of("began", "") if line.at > began_at}
    assert not again & {str(id) for id in done}
    assert all(world.facts(run.id)[:2] == ("completed", 1) for run in runs)


@pytest.mark.covers("F64", "P4")
async def test_f7_64_a_handler_that_ends_its_process_uses_up_its_crashes_and_spares_its_neighbours(
    world: World,
) -> None:
    culprit = await program.invoke([step("a"), leave("now")])
    neighbours = await app.invoke_many([program.bind([step("b"), gate("g"), step("c")]) for _ in range(3)])
    for _ in range(5):
        worker = world.worker()
        assert await worker.ended() == 9
        await world.declared_dead(worker.pid)
    assert world.facts(culprit.id) == ("failed", 1, 5)
    with pytest.raises(ExecutionFailed, match="lost 5 times"):
        await culprit.result(10)
    crashes = [world.facts(run.id)[2] for run in neighbours]
    assert max(crashes) <= 4
    world.open_gate("g")
    world.worker()
    await asyncio.gather(*(run.result(30) for run in neighbours))
    assert world.ledger.runs("a") == 1
    assert {world.facts(run.id)[:2] for run in neighbours} == {("completed", 1)}
