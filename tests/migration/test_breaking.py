"""A migration that breaks the workers of other releases: asks them to stop, waits, proceeds or refuses."""

import asyncio
import logging

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor import Conductor, Context, Orchestrator, schema
from pgconductor.errors import ServerError
from pgconductor.membership import Timing
from tests.sql.support import Background, Db, session, wait_until_blocked

KNOWING = "select register_orchestrator(uuid7(), 'old', '0.0.1', 'host', 1, '{default}', p_migration => %s)"
MIGRATED = """
    insert into migration (version, name, checksum, release, breaking) values (900, '0900_next', 'c', '99.0.0', true)"""
REFUSED = "migrated by release 99.0.0, with which 0.0.1 cannot work; upgrade pgconductor"
OLD = "select register_orchestrator(uuid7(), 'old', '0.0.1', 'host', 1, '{default}')"


def asked(db: Db) -> list[bool]:
    found = db.execute("select stop_requested_at is not null as asked from orchestrator order by started_at")
    return [row["asked"] for row in found.fetchall()]


def is_applied(db: Db) -> bool:
    return bool(db.execute("select from migration where version = 900").fetchall())


def test_it_is_applied_at_once_where_nobody_works(database: str, db: Db, breaking: schema.Step) -> None:
    assert schema.plan(database) == [breaking.title + "; 0 live now"]
    assert schema.migrate(database, wait_seconds=0) == [breaking.title]


@pytest.mark.covers("F80", "P46")
def test_the_dead_and_those_of_the_same_release_do_not_hold_it_up(database: str, db: Db, breaking: schema.Step) -> None:
    db.execute(OLD.encode())
    db.execute("update orchestrator set beat_at = now() - interval '21 seconds'")
    db.execute("select register_orchestrator(uuid7(), 'new', '99.0.0', 'host', 2, '{default}')")
    assert schema.migrate(database, wait_seconds=0) == [breaking.title]


@pytest.mark.covers("P45")
def test_who_does_not_stop_in_time_is_left_to_work_and_it_is_refused(
    database: str, db: Db, breaking: schema.Step
) -> None:
    db.execute(OLD.encode())
    with pytest.raises(ServerError, match="1 workers of another release have not stopped"):
        schema.migrate(database, wait_seconds=0.3)
    assert asked(db) == [False]
    assert not is_applied(db)


def test_it_goes_on_when_the_last_one_has_stopped(database: str, db: Db, breaking: schema.Step) -> None:
    db.execute(OLD.encode())
    migrating = Background(lambda: schema.migrate(database))
    while asked(db) != [True]:
        pass
    db.execute("select retire(id) from orchestrator")
    assert migrating.result() == [breaking.title]


def test_it_asks_and_goes_on_where_the_roles_default_is_to_read_only(
    database: str, db: Db, breaking: schema.Step
) -> None:
    db.execute(OLD.encode())
    migrating = Background(
        lambda: schema.migrate(make_conninfo(database, options="-c default_transaction_read_only=on"))
    )
    while migrating.is_alive() and asked(db) != [True]:
        pass
    db.execute("select retire(id) from orchestrator")
    assert migrating.result() == [breaking.title]


def test_who_starts_while_it_waits_is_asked_too(database: str, db: Db, breaking: schema.Step) -> None:
    db.execute(OLD.encode())
    migrating = Background(lambda: schema.migrate(database))
    while asked(db) != [True]:
        pass
    db.execute(OLD.encode())
    while asked(db) != [True, True]:
        pass
    db.execute("select retire(id) from orchestrator")
    assert migrating.result() == [breaking.title]


def test_who_starts_between_the_wait_and_the_migration_is_noticed(
    database: str, db: Db, breaking: schema.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, live_others = 0, schema._live_others

    def start_behind(conn: schema.Connection, name: str) -> int:
        nonlocal count
        count, before = count + 1, live_others(conn, name)
        if count == 1:
            db.execute(OLD.encode())
        return before

    monkeypatch.setattr(schema, "_live_others", start_behind)
    with pytest.raises(ServerError, match="have not stopped"):
        schema.migrate(database, wait_seconds=0.3)
    assert not is_applied(db)


def test_who_gets_in_behind_the_migration_is_asked_to_stop(
    database: str, db: Db, breaking: schema.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply_next = schema._apply_next

    def start_behind(conn: schema.Connection, name: str) -> list[str]:
        done = apply_next(conn, name)
        db.execute(OLD.encode())
        return done

    monkeypatch.setattr(schema, "_apply_next", start_behind)
    assert schema.migrate(database) == [breaking.title]
    assert asked(db) == [True]


def test_the_script_by_hand_refuses_while_anybody_works(database: str, db: Db, breaking: schema.Step) -> None:
    db.execute(OLD.encode())
    with psycopg.connect(database, autocommit=True) as conn, pytest.raises(psycopg.errors.RaiseException):
        conn.execute(schema.sql(since=899).encode())
    assert not is_applied(db)


async def test_a_running_orchestrator_stops_gracefully_when_asked(
    database: str, db: Db, breaking: schema.Step, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "pgconductor.orchestrator")
    async with Conductor(database) as app:

        @app.task
        async def work(ctx: Context) -> str:
            return await ctx.step("slow", finish_slowly)

        started = asyncio.Event()

        async def finish_slowly() -> str:
            started.set()
            while asked(db) != [True]:  # noqa: ASYNC110 (nothing tells us but the database)
                await asyncio.sleep(0.01)
            return "done"

        app.migrate = _nothing  # type: ignore[method-assign] # it is of the release before
        orchestrator = Orchestrator(app)
        await orchestrator.start()
        run = await work.invoke()
        await started.wait()
        assert await asyncio.to_thread(schema.migrate, database) == [breaking.title]
        await orchestrator.stopped
        assert orchestrator.is_stopped
        assert await run.state() in ("completed", "ready")
    assert "asked to stop" in caplog.text


@pytest.mark.covers("F80", "P46")
def test_who_does_not_know_the_migration_is_not_registered(database: str, db: Db, breaking: schema.Step) -> None:
    schema.migrate(database)
    with pytest.raises(psycopg.Error, match=REFUSED) as refused:
        db.execute(KNOWING, (899,))
    assert refused.value.sqlstate == ServerError.sqlstate
    assert asked(db) == []
    db.execute(KNOWING, (900,))
    assert asked(db) == [False]


@pytest.mark.covers("F80", "P46")
def test_who_registers_while_it_is_applied_waits_for_it_and_is_refused(database: str, db: Db) -> None:
    with session(database) as migrating, session(database) as joining:
        migrating.execute("begin")
        migrating.execute("lock table orchestrator in share row exclusive mode")
        migrating.execute(MIGRATED)
        join = Background(lambda: joining.execute(KNOWING, (899,)))
        wait_until_blocked(db, joining)
        migrating.execute("commit")
        with pytest.raises(psycopg.Error, match=REFUSED):
            join.result()
    assert asked(db) == []


@pytest.mark.covers("F80", "P46")
async def test_who_was_cut_off_while_it_was_applied_does_not_join_again(
    database: str, db: Db, caplog: pytest.LogCaptureFixture
) -> None:
    async with Conductor(database) as app:

        @app.task
        async def work(ctx: Context) -> str:
            return "done"

        orchestrator = Orchestrator(app, _timing=Timing(beat=0.05))
        await orchestrator.start()
        await work.invoke()
        db.execute(MIGRATED)
        db.execute("select retire(id) from orchestrator")  # as a sweep does with one that does not beat
        async with asyncio.timeout(30):
            await orchestrator.stopped
    assert "cannot join again, and stops: the schema was migrated by release 99.0.0" in caplog.text
    assert asked(db) == []


async def _nothing() -> None:
    """Leave the schema as it is."""
