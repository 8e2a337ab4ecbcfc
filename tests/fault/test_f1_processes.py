"""F1, 17 and 22, and P8 and P50: signals and pipes, children without their parent, calls that fail for a while."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pgconductor import Task
from pgconductor.engine import Engine
from tests.fault import pool_app
from tests.fault.programs import gate, program, step
from tests.fault.supervisor import ROOT, World
from tests.waiting import until

UNHARMED = ("completed", 1, 0)


@pytest.mark.covers("F17")
async def test_f1_17_a_hang_up_ends_a_worker_and_costs_one_crash(world: World) -> None:
    run = await program.invoke([step("a"), gate("g"), step("b")])
    worker = world.worker()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    worker.send(signal.SIGHUP)
    assert await worker.ended() == -signal.SIGHUP
    world.open_gate("g")
    world.worker()
    await run.result(30)
    assert world.facts(run.id) == ("completed", 1, 1)


@pytest.mark.covers("F17")
async def test_f1_17_a_worker_whose_output_nobody_reads_goes_on(world: World, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PGCONDUCTOR_URL": world.dsn, "PGCONDUCTOR_TEST_LEDGER": str(tmp_path / "ledger")}
    command = [sys.executable, "-m", "pgconductor", "worker", "tests.fault.programs:app"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=writer, stderr=writer)  # noqa: ASYNC220
    os.close(writer)
    try:
        run = await program.invoke([step("a")])
        await run.result(30)
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.poll() is not None)
    finally:
        process.kill()
    assert process.returncode == 0
    assert world.facts(run.id) == UNHARMED


@pytest.fixture
async def parent(world: World) -> AsyncIterator["subprocess.Popen[bytes]"]:
    """A worker of the app whose handlers have processes of their own, while the app leads to the world."""
    environment = os.environ | {"PGCONDUCTOR_URL": world.dsn}
    command = [sys.executable, "-m", "tests.fault.pool_app"]
    with pool_app.app.bound_to(world.dsn, Engine("pgconductor")):
        process = subprocess.Popen(command, cwd=ROOT, env=environment)  # noqa: ASYNC220
        yield process
        process.kill()
        process.wait()
        await pool_app.app.close()


@pytest.mark.covers("F22")
@pytest.mark.parametrize("task", [pool_app.held, pool_app.held_on_its_loop, pool_app.held_beside_its_loop])
async def test_f1_22_a_child_process_whose_parent_was_killed_ends_though_its_handler_does_not(
    world: World, parent: "subprocess.Popen[bytes]", tmp_path: Path, task: Task[[str], None]
) -> None:
    run = await task.invoke(str(tmp_path))
    await until((tmp_path / "pid").exists)
    parent.kill()
    parent.wait()
    child = int((tmp_path / "pid").read_text())
    await until(lambda: not is_alive(child))
    await world.declared_dead(parent.pid)
    assert world.execution(run.id)["error"]["type"] == "pgconductor.errors.WorkerLost"


@pytest.mark.covers("F22")
async def test_f1_22_a_copy_of_the_parent_that_outlives_it_keeps_no_child_alive(
    world: World, parent: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    await pool_app.held_on_its_loop.invoke(str(tmp_path))
    await until((tmp_path / "pid").exists)
    copy = await (await pool_app.copy.invoke()).result(30)
    try:
        parent.kill()
        parent.wait()
        child = int((tmp_path / "pid").read_text())
        await until(lambda: not is_alive(child))
        assert is_alive(copy)
    finally:
        os.kill(copy, signal.SIGKILL)
    await world.declared_dead(parent.pid)


@pytest.mark.covers("P8")
async def test_p8_results_that_cannot_be_stored_for_a_while_are_kept(world: World) -> None:
    run = await program.invoke([step("a")])
    await world.worker(through=True).up()
    await run.result(30)
    refused = [world.proxy.arm("refuse", "settle", nth) for nth in (1, 2, 3, 4)]
    again = await program.invoke([step("b")])
    await again.result(30)
    assert all(rule.fired.is_set() for rule in refused)
    assert world.facts(again.id) == UNHARMED
    assert len(world.ledger.of("began", "", str(again.id))) == 1


@pytest.mark.covers("F16", "P8")
async def test_p8_a_last_flush_that_fails_goes_on_until_it_is_stored(world: World) -> None:
    worker = await world.worker(through=True).up()
    refusal = world.proxy.arm("refuse", "settle", again=True)
    run = await program.invoke([step("a")])
    await refusal.fired.wait()
    worker.terminate()
    await until(lambda: bool(world.rows("select 1 from workers where stopping_at is not null")))
    refusal.fired.clear()
    await refusal.fired.wait()  # while the worker stops
    world.proxy.heal()
    assert await worker.ended() == 0
    assert world.facts(run.id) == UNHARMED  # stored, not given back: there is no other worker
    assert len(world.ledger.of("began", "")) == 1


@pytest.mark.covers("P50")
async def test_p50_a_claim_that_fails_is_told_and_tried_again(world: World) -> None:
    worker = await world.worker().up()
    world.execute("alter function claim rename to claim_away")
    run = await program.invoke([step("a")])
    await until(lambda: worker.log.count("claim") >= 2 and "does not exist" in worker.log)
    world.execute("alter function claim_away rename to claim")
    await run.result(30)
    assert world.facts(run.id) == UNHARMED


def is_alive(pid: int) -> bool:
    """Tell whether a process is there and not merely waiting to be reaped."""
    found = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return found.stdout.strip()[:1] not in ("", "Z")
