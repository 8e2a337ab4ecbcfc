"""migrate, plan, sql, is_current: any number of installers, killed anywhere."""

from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pgconductor import schema
from pgconductor.errors import ConfigurationError, ServerError
from tests.sql.support import Background, session, wait_until_blocked

Connection = psycopg.Connection[tuple[object, ...]]
TITLES = [step.title for step in schema.pending(None)]
NAMES = ["pgconductor", "Big Name", 'a "quoted" name', "ümlaut", "x" * 63, "select"]


@pytest.fixture
def empty(server: str) -> Iterator[str]:
    """The address of a database without an engine."""
    name = f"pgconductor_empty_{uuid4().hex[:16]}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'create database "{name}"'.encode())
        yield make_conninfo(server, dbname=name)
        admin.execute(f'drop database "{name}" with (force)'.encode())


@pytest.fixture
def conn(empty: str) -> Iterator[Connection]:
    with psycopg.connect(empty, autocommit=True) as conn:
        yield conn


def run(conn: Connection, query: str) -> list[tuple[object, ...]]:
    cursor = conn.execute(query.encode())
    return cursor.fetchall() if cursor.description else []


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_lives_in_a_schema_of_any_name(conn: Connection, name: str) -> None:
    assert schema.migrate(conn, name) == TITLES
    assert schema.is_current(conn, name)
    quoted = '"' + name.replace('"', '""') + '"'
    run(conn, f"set search_path to {quoted}; select invoke('work')")
    assert run(conn, "select state from executions") == [("ready",)]


def test_two_engines_live_beside_each_other(conn: Connection) -> None:
    schema.migrate(conn, "one")
    schema.migrate(conn, "two")
    run(conn, "select one.invoke('work')")
    assert run(conn, "select (select count(*) from one.execution), (select count(*) from two.execution)") == [(1, 0)]


@pytest.mark.parametrize("name", ["", "x" * 64, "ü" * 32, "a\0b", "\ud800", "public", "pg_mine", "$user"])
def test_a_name_that_cannot_be_is_refused(empty: str, name: str) -> None:
    with pytest.raises(ConfigurationError):
        schema.migrate(empty, name)


def test_a_second_migration_does_nothing(conn: Connection) -> None:
    schema.migrate(conn)
    assert schema.migrate(conn) == schema.plan(conn) == []


def test_the_plan_is_what_is_done(conn: Connection) -> None:
    planned = schema.plan(conn)
    assert not schema.is_current(conn)
    assert schema.migrate(conn) == planned


async def test_migrating_does_not_block_the_loop(empty: str) -> None:
    assert await schema.migrate_async(empty) == TITLES
    assert await schema.migrate_async(empty) == []


@pytest.mark.covers("F77", "P44")
def test_ten_installers_at_once_install_once(empty: str, conn: Connection) -> None:
    installers = [Background(lambda: schema.migrate(empty)) for _ in range(10)]
    done = [title for each in installers for title in each.result()]
    assert sorted(done) == sorted(TITLES)
    assert schema.is_current(conn)


@pytest.mark.covers("F78", "P44")
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_installation_that_was_killed_goes_on_where_it_was(empty: str, conn: Connection, steps: int) -> None:
    for step in range(steps):
        apply_one(empty, step)
    with psycopg.connect(empty) as victim:
        victim.execute("create table half_done ()")  # what it was doing is rolled back with its session
        run(conn, f"select pg_terminate_backend({victim.info.backend_pid})")
        victim.close()
    assert schema.migrate(conn) == TITLES[steps:]
    assert schema.is_current(conn)


def apply_one(dsn: str, number: int) -> None:
    """Do one transaction of an installation, as one that dies right after it."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        assert len(schema._apply_next(conn, "pgconductor")) == 1


def test_the_script_does_the_same_by_hand(conn: Connection) -> None:
    run(conn, schema.sql())
    assert schema.is_current(conn)
    assert schema.migrate(conn) == []


def test_the_script_can_leave_out_what_is_there(conn: Connection) -> None:
    schema.migrate(conn)
    run(conn, "update pgconductor.migration set checksum = 'older' where version = 0")
    run(conn, schema.sql(since=max(schema._recorded(conn, "pgconductor") or {})))
    assert schema.is_current(conn)


def test_changed_functions_are_applied_again(conn: Connection) -> None:
    schema.migrate(conn)
    run(conn, "create or replace function pgconductor.uuid7() returns uuid language sql as 'select null::uuid'")
    run(conn, "update pgconductor.migration set checksum = 'older' where version = 0")
    assert len(schema.migrate(conn)) == 1
    assert run(conn, "select pgconductor.uuid7() is null") == [(False,)]


@pytest.mark.parametrize(
    "change",
    [
        "create function pgconductor.gone() returns int language sql as 'select 1'",
        "create function pgconductor.uuid7(int) returns uuid language sql as 'select null::uuid'",
        """drop function pgconductor.state_of;
        create function pgconductor.state_of(other uuid) returns int language sql as 'select 1'""",
        "drop view pgconductor.steps; create view pgconductor.steps as select 1 as other",
    ],
)
def test_what_changed_its_shape_is_made_anew_and_what_is_gone_is_dropped(conn: Connection, change: str) -> None:
    schema.migrate(conn)
    before = signatures(conn)
    run(conn, f"set check_function_bodies = off; {change}")
    run(conn, "update pgconductor.migration set checksum = 'older' where version = 0")
    schema.migrate(conn)
    assert signatures(conn) == before


def signatures(conn: Connection) -> list[tuple[object, ...]]:
    return run(
        conn,
        """
        select p.oid::regprocedure::text, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid) from pg_proc p
        where p.pronamespace = 'pgconductor'::regnamespace order by 1""",
    )


def test_an_older_release_leaves_newer_functions_alone(conn: Connection) -> None:
    schema.migrate(conn)
    run(conn, "update pgconductor.migration set checksum = 'newer', release = '999.0.0' where version = 0")
    assert schema.is_current(conn)
    assert schema.migrate(conn) == []


def test_an_upgrade_drops_nothing_that_old_workers_call(conn: Connection) -> None:
    schema.migrate(conn)
    run(conn, "create function pgconductor.gone() returns int language sql as 'select 1'")
    run(conn, "update pgconductor.migration set checksum = 'older', release = '0.0.1' where version = 0")
    schema.migrate(conn)
    assert run(conn, "select pgconductor.gone()") == [(1,)]


@pytest.mark.covers("F80", "P46")
def test_an_unknown_additive_migration_is_accepted_and_a_breaking_one_refused(conn: Connection) -> None:
    schema.migrate(conn)
    run(conn, "insert into pgconductor.migration values (900, 'later', 'x', '999.0.0', false)")
    assert schema.is_current(conn)
    run(conn, "update pgconductor.migration set breaking = true where version = 900")
    with pytest.raises(ServerError, match="upgrade pgconductor"):
        schema.is_current(conn)


def test_a_migration_that_was_edited_is_refused(conn: Connection) -> None:
    schema.migrate(conn)
    run(conn, "update pgconductor.migration set checksum = 'edited' where version = 1")
    with pytest.raises(ServerError, match="differs from what was applied"):
        schema.migrate(conn)


def test_a_schema_that_others_use_is_left_alone(conn: Connection) -> None:
    run(conn, "create schema pgconductor; create table pgconductor.theirs ()")
    with pytest.raises(ServerError, match="not the engine's"):
        schema.migrate(conn)
    assert run(conn, "select count(*) from pg_class where relnamespace = 'pgconductor'::regnamespace") == [(1,)]


def test_a_schema_that_an_administrator_made_is_taken(conn: Connection) -> None:
    run(conn, "create schema pgconductor")
    assert schema.migrate(conn) == TITLES


@pytest.mark.covers("F42")
def test_a_role_that_may_not_create_schemas_can_use_its_own(conn: Connection, empty: str) -> None:
    role = f"plain_{uuid4().hex[:8]}"
    run(conn, f"create role {role}; create schema pgconductor authorization {role}; set role {role}")
    assert schema.migrate(conn) == TITLES
    run(conn, f"reset role; drop owned by {role} cascade; drop role {role}")


@pytest.mark.covers("F78")
def test_a_lock_that_is_held_is_waited_for_without_queueing(conn: Connection, empty: str) -> None:
    schema.migrate(conn)
    run(conn, "update pgconductor.migration set checksum = 'older' where version = 0")
    with psycopg.connect(empty) as reader, psycopg.connect(empty, autocommit=True) as mine:
        reader.execute("lock table pgconductor.executions in access share mode")
        installer = Background(lambda: schema.migrate(mine))
        with session(empty) as watcher:
            wait_until_blocked(watcher, mine)
        reader.execute("rollback")
        assert len(installer.result()) == 1


@pytest.mark.covers("F78")
def test_a_lock_that_is_never_released_is_reported(
    conn: Connection, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "_LOCK_SECONDS_MAX", 0)
    with psycopg.connect(empty) as other:
        other.execute("select pg_advisory_xact_lock(hashtext('pgconductor'), 1002)")
        with pytest.raises(ServerError, match="run it again"):
            schema.migrate(conn)


def test_a_transaction_of_the_callers_is_not_used(empty: str) -> None:
    with psycopg.connect(empty) as conn:
        conn.execute("select 1")
        with pytest.raises(ServerError, match="inside a transaction"):
            schema.migrate(conn)


def test_asking_whether_it_is_current_spoils_no_transaction(empty: str) -> None:
    with psycopg.connect(empty) as conn:
        conn.execute("create table mine ()")
        assert not schema.is_current(conn)
        conn.execute("select from mine")


@pytest.mark.covers("F36")
def test_strict_sessions_can_install_too(empty: str) -> None:
    with psycopg.connect(empty, options="-c default_transaction_isolation=serializable", autocommit=True) as conn:
        assert schema.migrate(conn) == TITLES


@pytest.mark.covers("F42")
def test_an_encoding_without_characters_is_refused(server: str, conn: Connection) -> None:
    name = f"pgconductor_ascii_{uuid4().hex[:8]}"
    run(conn, f"create database {name} encoding 'SQL_ASCII' locale 'C' template template0")
    with pytest.raises(ServerError, match="SQL_ASCII"):
        schema.migrate(make_conninfo(server, dbname=name))
    run(conn, f"drop database {name}")
