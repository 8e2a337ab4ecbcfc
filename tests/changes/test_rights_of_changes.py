"""A role with rights on its table alone gains nothing by the triggers on it."""

from collections.abc import Iterator

import pytest
from psycopg import errors as pg

from pgconductor.errors import ConfigurationError
from tests.changes.support import CONTACT, as_role, changes, errors, follow, new_rows, on, role, session_of, triggers
from tests.sql.support import Db

OWNS_CONTACT = ("alter table public.contact owner to {role}", "grant create on schema public to {role}")


@pytest.fixture(autouse=True)
def contact(db: Db) -> None:
    db.execute(CONTACT)


@pytest.fixture
def writer(db: Db) -> Iterator[str]:
    with role(db, "grant select, insert, update, delete on public.contact to {role}") as name:
        yield name


@pytest.fixture
def owner(db: Db) -> Iterator[str]:
    """A role that owns its table and may make types and functions, and has no rights in the engine."""
    with role(db, *OWNS_CONTACT) as name:
        yield name


def test_a_writer_without_rights_in_the_engine_starts_executions(database: str, db: Db, writer: str) -> None:
    follow(database, on("insert"), on("update", when="new.active"), on("delete"))

    with session_of(database, writer) as session:
        session.execute("insert into public.contact values (1), (2)")
        session.execute("update public.contact set email = 'x'")
        session.execute("delete from public.contact where id = 1")

    assert [change["op"] for change in changes(db)] == ["insert", "insert", "update", "update", "delete"]
    assert errors(db) == []


@pytest.mark.parametrize(
    "attempt",
    [
        "select pgconductor.invoke('sync', '{}')",
        "select * from pgconductor.execution",
        "select * from pgconductor.trigger_errors",
        "insert into pgconductor.row_trigger select * from pgconductor.row_trigger",
        "select pgconductor.start_by_changes(null, array['{}'])",
        "select pgconductor.next_trigger('default', '[]', true)",
        "create table public.mine (id int)",
        """create temp table mine (id int);
           create trigger t after insert on mine for each row execute function pgconductor.note_row_change('x')""",
    ],
)
def test_a_writer_can_neither_enqueue_nor_read_nor_use_the_functions(
    database: str, db: Db, writer: str, attempt: str
) -> None:
    follow(database, on("insert"))

    with session_of(database, writer) as session, pytest.raises(pg.InsufficientPrivilege):
        session.execute(attempt.encode())


def test_the_condition_has_the_rights_of_the_writer(database: str, db: Db, writer: str) -> None:
    db.execute("create table public.secret (id int)")
    db.execute("""create function public.peek() returns boolean language sql return exists (select from public.secret)
                  or session_user = current_user""")
    db.execute("""create function public.who() returns boolean language plpgsql as
                  $$ begin insert into public.seen values (current_user); return true; end $$""")
    db.execute("create table public.seen (who text)")
    db.execute("grant insert on public.seen to public")
    follow(database, on("insert", when="public.who()"))

    with session_of(database, writer) as session:
        session.execute("insert into public.contact values (1)")
        assert db.execute("select * from public.seen").fetchall() == [{"who": writer}]
        db.execute("drop function public.who() cascade")
        follow(database, on("insert", when="public.peek()"))
        with pytest.raises(pg.InsufficientPrivilege):
            session.execute("insert into public.contact values (2)")


SHADOWS = """
    create temp table row_trigger (name text, deployment text, task_id int, table_name text, op text, columns text[],
      condition text, is_set_based boolean, expression text, definition text, created_at timestamptz);
    insert into pg_temp.row_trigger values
      ('x', 'd', 1, 't', 'insert', '{id}', null, true, 'pg_temp.steal()', 'x', now());
    create temp table execution (id int);
    create temp table task (id int, name text, queue_id int);
    create temp table lane (id int, queue_id int, task_id int);
    create temp table ready (id int);
    create function pg_temp.steal() returns text language plpgsql as
      'begin create role should_not_exist superuser; return ''{}''; end';
    create function pg_temp.to_json(text) returns json language sql as 'select pg_temp.steal()::text::json';
    create function pg_temp.format(text, text) returns text language sql as 'select pg_temp.steal()::text';
    create function pg_temp.glue(text, text) returns text language sql as 'select pg_temp.steal()';
    create operator pg_temp.|| (leftarg = text, rightarg = text, function = pg_temp.glue);
    set search_path to pg_temp, public, pg_catalog;
"""


def test_nothing_that_a_session_shadows_is_run(database: str, db: Db, owner: str) -> None:
    follow(database, on("insert", "id", "email"), on("update", "email"), on("delete", "email"))

    with session_of(database, owner) as session:
        session.execute(SHADOWS)
        session.execute("insert into public.contact values (1, 'a')")
        session.execute("update public.contact set email = 'b'")
        session.execute("delete from public.contact")

    assert [change["op"] for change in changes(db)] == ["insert", "update", "delete"]
    assert db.execute("select from pg_roles where rolname = 'should_not_exist'").fetchall() == []


EVIL_TYPE = """
    create type public.evil as enum ('x');
    create table public.seen (who text);
    grant insert on public.seen to public;
    create function public.evil_json(public.evil) returns json language plpgsql as
      $$ begin insert into public.seen values (current_user); return '"stolen"'; end $$;
    create function public.evil_text(public.evil) returns text language plpgsql as
      $$ begin insert into public.seen values (current_user); return 'stolen'; end $$;
    create cast (public.evil as json) with function public.evil_json(public.evil) as implicit;
    create cast (public.evil as text) with function public.evil_text(public.evil) as implicit;
    create type public.evil_pair as (a public.evil);
    create domain public.evil_domain as public.evil;
"""


@pytest.mark.parametrize("kind", ["evil", "evil[]", "evil_pair", "evil_domain", "evil_domain[]", "evil_pair[]"])
@pytest.mark.parametrize("when", [None, "new.id is not null"])
def test_casts_of_the_types_of_a_table_are_not_run_with_our_rights(
    database: str, db: Db, owner: str, kind: str, when: str | None
) -> None:
    value = {"evil": "x", "evil_domain": "x", "evil_pair": "(x)", "evil_pair[]": '{"(x)"}'}.get(kind, "{x}")
    with session_of(database, owner) as session:
        session.execute(EVIL_TYPE)
        session.execute(f"alter table public.contact add column mood public.{kind}".encode())
        follow(database, on("insert", "mood", when=when))
        session.execute("insert into public.contact values (1, 'a', true, %s)", (value,))

    assert db.execute("select * from public.seen").fetchall() == []
    expected = {"{x}": ["x"], '{"(x)"}': ["(x)"]}.get(value, value)
    assert new_rows(db) == [{"mood": expected}]


def test_a_column_that_gets_an_evil_type_later_is_not_cast_either(database: str, db: Db, owner: str) -> None:
    follow(database, on("insert", "email"), on("update", "email", when="true"))

    with session_of(database, owner) as session:
        session.execute(EVIL_TYPE)
        session.execute("alter table public.contact alter column email type public.evil using 'x'")
        session.execute("insert into public.contact values (1, 'x')")
        session.execute("update public.contact set email = 'x'")

        assert db.execute("select * from public.seen").fetchall() == []
        session.execute("select to_json(email) from public.contact")
    assert db.execute("select * from public.seen").fetchall() == [{"who": owner}]  # what the trigger did not run
    assert [change["new"] for change in changes(db)] == [{"email": "x"}, {"email": "x"}]


# ---------------------------------------------------------------- the role that registers


@pytest.fixture
def registrar(db: Db) -> Iterator[str]:
    """A role that owns the engine and nothing else."""
    with role(db) as name:
        db.execute(f"grant all on schema pgconductor to {name}".encode())
        db.execute(f"grant all on all tables in schema pgconductor to {name}".encode())
        db.execute(f"grant all on all sequences in schema pgconductor to {name}".encode())
        db.execute(f"grant all on all functions in schema pgconductor to {name}".encode())
        yield name


def test_a_missing_right_is_named_with_the_grant(database: str, db: Db, registrar: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        follow(as_role(database, registrar), on("insert"))

    assert refused.value.remedy == f"its owner can say: grant trigger on table public.contact to {registrar}"


def test_a_schema_without_usage_is_named_with_the_grant(database: str, db: Db, registrar: str) -> None:
    db.execute("create schema hidden")
    db.execute("create table hidden.contact (id int)")

    with pytest.raises(ConfigurationError, match=f"grant usage on schema hidden to {registrar}"):
        follow(as_role(database, registrar), on("insert", table="hidden.contact"))


def test_the_right_to_make_triggers_is_enough(database: str, db: Db, registrar: str) -> None:
    db.execute(f"grant trigger on public.contact to {registrar}".encode())
    dsn = as_role(database, registrar)

    follow(dsn, on("insert"), on("delete"))
    db.execute("insert into public.contact values (1)")
    follow(dsn, on("delete"))
    db.execute("insert into public.contact values (2)")
    assert new_rows(db) == [{"id": 1}]
    assert len(triggers(db)) == 2  # it may not drop one: the trigger stays and never fires

    follow(dsn, on("insert"), on("delete"))
    db.execute("insert into public.contact values (3)")
    assert new_rows(db) == [{"id": 1}, {"id": 3}]


def test_every_function_here_has_a_fixed_path_and_no_grant_to_public(db: Db) -> None:
    rows = db.execute("""
        select p.proname, p.proconfig, has_function_privilege('public', p.oid, 'execute') as is_public
        from pg_proc p where p.pronamespace = 'pgconductor'::regnamespace and p.prosecdef""").fetchall()

    assert {row["proname"] for row in rows} >= {"note_row_change", "note_row_changes"}
    for row in rows:
        assert not row["is_public"]
        assert any(setting.startswith("search_path=pgconductor, pg_temp") for setting in row["proconfig"])
