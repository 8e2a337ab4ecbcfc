"""Two releases of the package on one database, under load: nothing fails because of an upgrade, or of its undoing."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest

from tests.migration.releases import BREAK, EXPAND, Release, next_release, rows
from tests.waiting import until

AHEAD = 100


@pytest.fixture
def now(database: str, tmp_path: Path) -> Iterator[Release]:
    """This release."""
    release = Release(None, database, tmp_path)
    yield release
    release.end()


@pytest.fixture
def later(request: pytest.FixtureRequest, database: str, tmp_path: Path) -> Iterator[Release]:
    """The next release, with the migration that the test names."""
    release = Release(next_release(tmp_path, request.param), database, tmp_path)
    yield release
    release.end()


@asynccontextmanager
async def load(dsn: str) -> AsyncGenerator[None]:
    """Keep work waiting, then let it run dry."""

    is_over = asyncio.Event()

    async def feed() -> None:
        while not is_over.is_set():
            if await asyncio.to_thread(left, dsn) < AHEAD:
                await asyncio.to_thread(enqueue, dsn, AHEAD)
            await asyncio.sleep(0.01)

    enqueue(dsn, AHEAD)
    feeding = asyncio.create_task(feed())
    yield
    is_over.set()
    await feeding
    await until(lambda: not left(dsn))


def enqueue(dsn: str, count: int) -> None:
    """Enqueue trees of executions."""
    rows(dsn, "select invoke('tree', jsonb_build_object('n', n)) from generate_series(1, %s) n", count)


def left(dsn: str) -> int:
    return int(rows(dsn, "select count(*) from execution where outcome is null")[0]["count"])


def troubles(dsn: str) -> list[dict[str, object]]:
    """Return every execution that did anything but complete at its first attempt with the right value."""
    return rows(
        dsn,
        """select id, task, state, error, crashes, result from executions
        where state <> 'completed' or attempt <> 1 or crashes > 0
           or task = 'tree' and result <> to_jsonb(6 * (payload ->> 'n')::int + 6)""",
    )


async def completes(dsn: str, count: int = 50) -> None:
    """Wait until so many more trees have completed."""
    query = "select count(*) from execution where outcome = 'completed' and parent_id is null"
    before = rows(dsn, query)[0]["count"]
    await until(lambda: rows(dsn, query)[0]["count"] >= before + count)


async def run(release: Release, *arguments: str) -> str:
    """Run a command of a release while the load goes on; return what it printed."""
    done = await asyncio.to_thread(release.command, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.covers("F79")
@pytest.mark.parametrize("later", [EXPAND], indirect=True, ids=["expand"])
async def test_an_expand_migration_up_and_down_under_load(database: str, now: Release, later: Release) -> None:
    old = await now.worker().up()
    async with load(database):
        await completes(database)
        assert "apply migration 0900_next" in await run(later, "migrate", "--plan")
        await run(later, "migrate")
        await completes(database)
        new = await later.worker().up()
        await completes(database)
        assert await old.stopped() == 0
        await completes(database)
        older = await now.worker().up()
        assert await new.stopped() == 0
        await completes(database)
    assert await older.stopped() == 0
    assert troubles(database) == []


@pytest.mark.covers("F78")
@pytest.mark.parametrize("later", [EXPAND], indirect=True, ids=["expand"])
async def test_a_migration_gives_way_to_a_call_that_holds_one_table_and_needs_another(
    database: str, later: Release
) -> None:
    with psycopg.connect(database) as call:
        call.execute("lock table pgconductor.task in access share mode")
        migrating = asyncio.create_task(asyncio.to_thread(later.command, "migrate"))
        waiting = """
            select from pg_locks l join pg_database d on d.oid = l.database
            where d.datname = current_database() and l.relation = 'task'::regclass and not l.granted"""
        await until(lambda: bool(rows(database, waiting)))
        call.execute("select from pgconductor.execution")
        call.commit()
    assert (await migrating).returncode == 0


@pytest.mark.covers("F79", "P45")
@pytest.mark.parametrize("later", [BREAK], indirect=True, ids=["break"])
async def test_a_breaking_migration_stops_the_old_workers_and_goes_on(
    database: str, now: Release, later: Release
) -> None:
    old = await now.worker().up()
    async with load(database):
        await completes(database)
        planned = await run(later, "migrate", "--plan")
        assert "after workers of other releases have stopped; 1 live now" in planned
        await run(later, "migrate")
        assert await old.ended() == 0
        new = await later.worker().up()
        await completes(database)
    assert await new.stopped() == 0
    assert troubles(database) == []


@pytest.mark.covers("F80", "P46")
@pytest.mark.parametrize("later", [BREAK], indirect=True, ids=["break"])
async def test_an_old_process_refuses_a_schema_that_it_would_break_on(
    database: str, now: Release, later: Release
) -> None:
    assert later.command("migrate").returncode == 0
    refused = now.worker()
    assert await refused.ended() == 1
    assert "upgrade pgconductor in this process" in refused.log
    assert "upgrade pgconductor" in now.command("migrate").stderr


@pytest.mark.covers("F80")
@pytest.mark.parametrize("later", [EXPAND], indirect=True, ids=["expand"])
async def test_new_commands_work_on_the_old_schema_and_a_new_worker_migrates_it(database: str, later: Release) -> None:
    enqueue(database, 3)
    status = later.command("status", "--json")
    assert status.returncode == 0, status.stderr
    new = await later.worker().up()
    await until(lambda: not left(database))
    assert await new.stopped() == 0
    assert rows(database, "select name from migration where version = 900") == [{"name": "0900_next"}]
    assert troubles(database) == []
