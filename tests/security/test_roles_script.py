"""`pgconductor roles --sql`: the script makes the roles, whoever may run it, and they hold over the releases."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import errors
from psycopg.conninfo import make_conninfo

from pgconductor import schema
from pgconductor.cli import main
from pgconductor.errors import ConfigurationError, ServerError
from pgconductor.queries import quote
from pgconductor.roles import Names, names_for, roles_sql
from tests.changes.support import as_role, role
from tests.conftest import connect
from tests.security.support import Town, answer, build, demolish
from tests.sql.support import Db

pytestmark = pytest.mark.covers("F84", "P48")


def test_the_script_may_be_run_again(town: Town) -> None:
    with connect(town.admin) as conn:
        conn.execute(roles_sql(names_for(town.prefix)).encode())
        listed = answer(conn, "select list_roles()")

    assert [each["kind"] for each in listed] == ["owner", "worker", "enqueuer", "reader"]


@contextmanager
def engine_of(db: Db, *grants: str) -> Generator[tuple[str, str]]:
    """Make a role, and an engine in a schema of its own that it owns."""
    with role(db, *grants) as name:
        engine = f"engine_{uuid4().hex[:8]}"
        db.execute(f'create schema "{engine}" authorization {name}'.encode())
        yield name, engine


def test_a_role_that_may_create_roles_and_owns_the_schema_can_run_it(database: str, db: Db) -> None:
    grants = ("alter role {role} createrole", "grant create on database :db to {role}".replace(":db", db.info.dbname))
    with engine_of(db, *grants) as (name, engine):
        schema.migrate(as_role(database, name), engine)
        names = names_for(db.info.dbname, owner=f"{engine}_owner")
        with psycopg.connect(as_role(database, name), autocommit=True) as conn:
            conn.execute(roles_sql(names, engine).encode())
            conn.execute(roles_sql(names, engine).encode())
            assert schema.migrate(conn, engine) == []
            owner = answer(
                conn, "select relowner::regrole::text from pg_class where oid = %s::regclass", f"{engine}.task"
            )

        assert owner == f"{engine}_owner"
        for each in (names.owner, names.worker, names.enqueuer, names.reader):
            db.execute(f"drop owned by {each} cascade".encode())
            db.execute(f"drop role {each}".encode())


def test_what_a_member_of_the_owner_installs_belongs_to_the_owner(database: str, db: Db) -> None:
    with role(db) as owner, role(db, f"grant {owner} to {{role}}") as member:
        db.execute(f"create schema other authorization {owner}".encode())
        schema.migrate(as_role(database, member), "other")

        owners = db.execute("select distinct proowner::regrole::text as name from pg_proc"
                            " where pronamespace = 'other'::regnamespace").fetchall()  # fmt: skip
        assert owners == [{"name": owner}]
        assert schema.migrate(database, "other") == []


def _as_an_older_release(conn: psycopg.Connection[Any]) -> None:
    """Take away what this release is to bring: a function, a view's right, and the record of the functions."""
    conn.execute("drop function pgconductor.list_events(text, int)")
    conn.execute("drop view pgconductor.trigger_errors")
    conn.execute("update pgconductor.migration set release = '0.0.0', checksum = 'older' where version = 0")


@pytest.mark.parametrize("who", ["admin", "owner"])
def test_what_a_newer_release_brings_is_granted_too(town: Town, who: str) -> None:
    with psycopg.connect(town.admin, autocommit=True) as conn:
        _as_an_older_release(conn)

    schema.migrate(town.admin if who == "admin" else town.dsn("owner"))

    with town.session("reader") as conn:
        assert answer(conn, "select pgconductor.list_events(null, 1)") == []
        assert conn.execute("select * from pgconductor.trigger_errors").fetchall() == []
        assert not answer(conn, "select exists (select from pg_proc where pronamespace = 'pgconductor'::regnamespace"
                                " and proowner <> %s::regrole)", town.role("owner"))  # fmt: skip
    with town.session("enqueuer") as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute("select pgconductor.list_events(null, 1)")


def test_functions_that_are_made_anew_in_development_are_granted_again(town: Town) -> None:
    with town.session("owner") as conn:
        conn.execute("set search_path to pgconductor, pg_temp")
        conn.execute(f"set role {town.role('owner')}".encode())
        conn.execute("drop function uuid7(); create function uuid7() returns text language sql return 'older'")
        conn.execute("update migration set checksum = 'older' where version = 0")

    schema.migrate(town.dsn("owner"))

    with town.session("enqueuer") as conn:
        assert answer(conn, "select pgconductor.invoke('work')")
    with town.session("worker") as conn:
        assert answer(conn, "select pgconductor.register_queues('{default}')")


def test_the_script_by_hand_leaves_everything_with_the_owner(town: Town) -> None:
    with psycopg.connect(town.admin, autocommit=True) as conn:
        _as_an_older_release(conn)
        newest = max(step.record.version for step in schema.pending({}) if step.record)
        conn.execute(schema.sql(since=newest).encode())

    with town.session("reader") as conn:
        assert answer(conn, "select pgconductor.list_events(null, 1)") == []
        assert answer(conn, "select proowner::regrole::text from pg_proc where proname = 'list_events'") == town.role(
            "owner"
        )


def test_only_the_owner_may_let_others_in(town: Town) -> None:
    with town.session("worker") as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute("select pgconductor.grant_rights('worker', current_user)")
    with town.session("owner") as conn:
        conn.execute("select pgconductor.grant_rights('reader', %s)", (town.login("outsider"),))
    with town.session("outsider") as conn:
        assert conn.execute("select * from pgconductor.executions").fetchall() == []


@pytest.mark.parametrize(("kind", "name"), [("admin", "x"), ("worker", "nobody at all"), ("worker", "public")])
def test_a_kind_or_role_that_does_not_exist_is_refused(db: Db, kind: str, name: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        db.execute("select grant_rights(%s, %s)", (kind, name))
    assert refused.value.sqlstate == "PC003"


HOSTILE_NAMES = ["a'b", 'a"b', "a\\'b", "$r$", "a; drop table x", "Ünïcode 😀", "user", "a-b", "%s {owner}"]


@pytest.mark.covers("F81")
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_role_may_have_any_printable_name(database: str, db: Db, name: str) -> None:
    prefix = uuid4().hex[:8]
    names = names_for(f"{prefix}{name}")
    engine = f"{name}{prefix}"
    schema.migrate(database, engine)
    db.execute(roles_sql(names, engine).encode())

    listed = {each["kind"]: each["role"] for each in answer(db, f"select {quote(engine)}.list_roles()")}
    assert listed == {"owner": names.owner, "worker": names.worker, "enqueuer": names.enqueuer, "reader": names.reader}
    for each in listed.values():
        db.execute(f"drop owned by {quote(each)} cascade".encode())
        db.execute(f"drop role {quote(each)}".encode())


@pytest.mark.parametrize("name", ["", "x" * 64, "a\nb", "a\0b", "public", "pg_monitor", "none"])
def test_a_name_that_postgres_does_not_take_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="--worker"):
        Names("o", name, "e", "r")


def test_two_roles_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="two roles"):
        names_for("pgconductor", reader="same", worker="same")


def test_the_command_prints_the_script_and_lists_the_roles(town: Town) -> None:
    printed = CliRunner().invoke(main, ["roles", "--sql", "--worker", "crew"])
    listed = CliRunner().invoke(main, ["--dsn", town.dsn("reader"), "roles"])

    assert printed.output == roles_sql(names_for("pgconductor", worker="crew"))
    assert listed.exit_code == 0
    assert town.role("enqueuer") in listed.output


# ---------------------------------------------------------------- those who may not migrate


def test_who_may_not_migrate_is_told_who_may(town: Town) -> None:
    assert schema.migrate(town.dsn("worker")) == []
    with psycopg.connect(town.admin, autocommit=True) as conn:
        _as_an_older_release(conn)

    with pytest.raises(ServerError, match="not at this release") as refused:
        schema.migrate(town.dsn("worker"))
    assert "pgconductor migrate" in str(refused.value)
    assert town.login("worker") in str(refused.value)


def test_who_may_not_even_look_is_told_so(town: Town) -> None:
    with pytest.raises(ServerError, match="not open to role"):
        schema.migrate(town.dsn("outsider"))


def test_no_engine_and_no_right_to_make_one_is_told_so(database: str, db: Db) -> None:
    with role(db) as name, pytest.raises(ServerError, match="run `pgconductor migrate` as a role that owns"):
        schema.migrate(as_role(database, name), "elsewhere")


def test_everything_can_be_handed_back(database: str, db: Db) -> None:
    demolish(build(database))
    assert schema.migrate(make_conninfo(database)) == []
    assert answer(db, "select invoke('work')")
