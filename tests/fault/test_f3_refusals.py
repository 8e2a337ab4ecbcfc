"""F3, 34 to 38: Postgres lives and refuses: timeouts, deadlocks, isolation, a full disk, no connection to be had.

What it refuses has not happened, so it is tried again until it does; nothing is counted against the execution.
"""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor.binaries import server_account
from pgconductor.embedded import EmbeddedServer
from tests.fault.programs import Program, app, child, gate, program, sleep, step, tag, transaction
from tests.fault.supervisor import World
from tests.waiting import until

UNHARMED = ("completed", 1, 0)
WORK: Program = [step("a"), transaction("t"), sleep("nap", 0.05), child("c", step("x")), step("b")]
_BLOCKED = (
    "select 1 from pg_stat_activity where datname = current_database() and application_name = %s"
    " and wait_event_type = 'Lock'"
)


def setting(world: World, name: str, value: str) -> None:
    """Give the database a default for new sessions."""
    world.execute(f"alter database {world.one('select current_database()')} set {name} = '{value}'")


@contextmanager
def role_with_few_connections(world: World, count: int) -> Generator[tuple[str, str]]:
    """A role without privileges but those on the engine; yields its name and the address that it uses."""
    role = f"worker_{uuid4().hex[:12]}"
    world.execute(
        f"""create role {role} login password 'secret' connection limit {count};
        grant usage on schema pgconductor, audit to {role};
        grant all on all tables in schema pgconductor, audit, public to {role};
        grant all on all sequences in schema pgconductor, audit to {role};
        grant execute on all functions in schema pgconductor, audit to {role}"""
    )
    yield role, make_conninfo(world.dsn, user=role, password="secret")
    world.execute(f"alter role {role} connection limit -1")


# ---------------------------------------------------------------- timeouts, deadlocks, isolation


@pytest.mark.covers("F34")
@pytest.mark.parametrize("timeout", ["statement_timeout", "lock_timeout"])
async def test_f3_34_a_settle_that_times_out_is_tried_again_and_done_once(world: World, timeout: str) -> None:
    setting(world, timeout, "100ms")
    run = await program.invoke([step("a"), gate("g"), child("c", step("x"))])
    worker = world.worker()
    await until(lambda: bool(world.ledger.of("saw", "a")))
    with psycopg.connect(world.dsn) as other:
        other.execute("set statement_timeout = 0; set lock_timeout = 0")
        other.execute("select from pgconductor.execution where id = %s for update", (run.id,))
        world.open_gate("g")
        await until(lambda: "settle: try 1 failed" in worker.log and "timeout" in worker.log)
        assert world.children_of(run.id) == []
        assert world.execution(run.id)["state"] == "running"
    await run.result(30)
    assert len(world.children_of(run.id)) == 1
    assert world.facts(run.id) == UNHARMED


@pytest.mark.covers("F34")
async def test_f3_34_short_timeouts_all_round_do_not_keep_work_from_being_done(world: World) -> None:
    for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
        setting(world, name, "500ms")
    runs = await app.invoke_many([program.bind(WORK) for _ in range(20)])
    world.worker()
    world.worker()
    await asyncio.gather(*(run.result(60) for run in runs))
    assert {world.facts(run.id) for run in runs} == {UNHARMED}
    assert world.one("select count(*) from effect") == 20


@pytest.mark.covers("F35")
async def test_f3_35_a_settle_that_loses_a_deadlock_is_tried_again_and_done_once(world: World) -> None:
    setting(world, "deadlock_timeout", "1s")
    run = await program.invoke([gate("g"), child("c", step("x"))])
    worker = world.worker()
    await world.reaches(run.id, "running")
    with psycopg.connect(world.dsn) as other:
        other.execute("set deadlock_timeout = '1h'")  # so that the worker is the one to find it, and to lose
        other.execute("select from pgconductor.execution where id = %s for update", (run.id,))
        world.open_gate("g")
        await until(lambda: bool(world.rows(_BLOCKED, "pgconductor settle")))
        await asyncio.to_thread(other.execute, "select from pgconductor.orchestrator for update")
    await run.result(30)
    assert "deadlock detected" in worker.log
    assert world.facts(run.id) == UNHARMED
    assert len(world.children_of(run.id)) == 1


@pytest.mark.covers("F36")
@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
async def test_f3_36_every_kind_of_operation_works_under_any_default_isolation(world: World, isolation: str) -> None:
    setting(world, "default_transaction_isolation", isolation)
    runs = await app.invoke_many([program.bind(WORK) for _ in range(20)])
    for _ in range(2):
        world.worker()
    await asyncio.gather(*(run.result(60) for run in runs))
    assert {world.facts(run.id) for run in runs} == {UNHARMED}
    assert world.one("select count(*) from effect") == 20


# ---------------------------------------------------------------- no space, no connections


@pytest.fixture
def small_disk(mortal_server: EmbeddedServer) -> Iterator[Path]:
    """A file system of 48 MiB, which the server has as tablespace `small`; to be asked for before the world."""
    with tempfile.TemporaryDirectory(prefix="pgconductor-disk-") as place:
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small file system takes root")
        Path(place).chmod(0o755)
        data = Path(place, "data")
        data.mkdir()
        server_account().own(data)
        with psycopg.connect(mortal_server.dsn, autocommit=True) as admin:
            admin.execute(f"create tablespace small location '{data}'".encode())
            yield Path(place)
            admin.execute("drop tablespace small")
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> Path:
    """Leave no byte free; return the file to remove."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1024 * 1024, 4096):
            try:
                while True:
                    file.write(b"\1" * size)
            except OSError:
                continue
    return filler


@pytest.mark.covers("F37")
async def test_f3_37_a_full_disk_acknowledges_nothing_and_work_goes_on_once_there_is_space(
    small_disk: Path, world: World
) -> None:
    for table in ("execution", "step", "ready"):
        world.execute(f"alter table {table} set tablespace small")
    run = await program.invoke([gate("g"), *WORK])
    worker = world.worker()
    await until(lambda: bool(world.ledger.of("began", "")))
    filler = fill(small_disk)
    with pytest.raises(psycopg.errors.DiskFull):
        world.execute("select count(invoke('program', '{}')) from generate_series(1, 10000)")
    asked = app._clients.here().pool.query_count
    big = [program.bind([tag("x" * 7000)]) for _ in range(1000)]
    invoking: asyncio.Task[list[Any]] = asyncio.create_task(app.invoke_many(big))
    await until(lambda: app._clients.here().pool.query_count >= asked + 3)
    assert (invoking.done(), world.one("select count(*) from execution")) == (False, 1)
    world.open_gate("g")
    filler.unlink()
    runs = [run, *await invoking]
    await asyncio.gather(*(each.result(60) for each in runs))
    assert {world.facts(each.id) for each in runs} == {UNHARMED}, worker.log[-2000:]
    assert world.one("select count(*) from effect") == 1


@pytest.mark.covers("F38")
async def test_f3_38_a_worker_that_gets_no_more_connections_keeps_its_leases_and_goes_on(world: World) -> None:
    with role_with_few_connections(world, 20) as (role, dsn):
        run = await program.invoke([step("a"), gate("g"), transaction("t")])
        worker = world.worker(dsn=dsn)
        await until(lambda: bool(world.ledger.of("saw", "a")))
        world.execute(f"alter role {role} connection limit 0")
        for session in ("claim", "save"):
            assert world.terminate(f"pgconductor {session}") == 1
        world.open_gate("g")
        await until(lambda: "too many connections for role" in worker.log)
        beat_at = world.one("select beat_at from orchestrator")
        await until(lambda: world.one("select beat_at from orchestrator") > beat_at)
        assert world.facts(run.id) == ("running", 1, 0)
    await run.result(30)
    assert world.facts(run.id) == UNHARMED
    assert len(world.ledger.of("began", "")) == 1


@pytest.mark.covers("F38")
async def test_f3_38_a_worker_without_a_connection_to_beat_with_claims_nothing(world: World) -> None:
    with role_with_few_connections(world, 20) as (role, dsn):
        first = await program.invoke([step("a"), gate("g")])
        worker = world.worker(dsn=dsn)
        await until(lambda: bool(world.ledger.of("saw", "a")))
        world.execute(f"alter role {role} connection limit 0")
        assert world.terminate("pgconductor heartbeat") == 1
        await until(lambda: world.facts(first.id) == ("ready", 1, 0))
        second = await program.invoke([step("b")])
        told = worker.log.count("no answer from Postgres")
        await until(lambda: worker.log.count("no answer from Postgres") > told)
        assert [world.facts(run.id) for run in (first, second)] == [("ready", 1, 0)] * 2
    world.open_gate("g")
    for run in (first, second):
        await run.result(30)
        assert world.facts(run.id) == UNHARMED
