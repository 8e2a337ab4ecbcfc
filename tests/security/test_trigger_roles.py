"""Row triggers between roles: a worker makes them, anybody writes the table, and nobody gains a right by it."""

from typing import Final

import psycopg
import pytest
from psycopg import errors

from pgconductor.changes import apply_changes
from pgconductor.errors import ConfigurationError
from tests.changes.support import CONTACT, ENGINE, changes, on
from tests.security.support import Town, answer
from tests.sql.support import Db

pytestmark = pytest.mark.covers("F82", "P38")
WRITERS: Final = ["enqueuer", "reader", "outsider"]
_STEAL: Final = """
    create table public.seen (who text);
    create function public.steal() returns boolean language plpgsql as
      $$ begin insert into public.seen values (current_user); return true; end $$;"""


@pytest.fixture(autouse=True)
def contact(town: Town) -> None:
    """A table where the worker may make triggers and everybody may write."""
    with psycopg.connect(town.admin, autocommit=True) as conn:
        conn.execute(CONTACT)
        conn.execute(_STEAL)
        conn.execute("grant all on public.contact, public.seen to public")
        conn.execute("select pgconductor.invoke('sync')")


def follow(town: Town, when: str | None) -> None:
    apply_changes(town.dsn("worker"), ENGINE, "d", [on("insert", when=when)])


def seen(town: Town) -> list[str]:
    with psycopg.connect(town.admin) as conn:
        return [row[0] for row in conn.execute("select who from public.seen")]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_condition_has_the_rights_of_the_writer(town: Town, db: Db, kind: str) -> None:
    follow(town, "public.steal()")
    with town.session(kind) as conn:
        conn.execute("insert into public.contact values (1)")

    assert seen(town) == [town.login(kind)]
    assert [change["new"] for change in changes(db)] == [{"id": 1}]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_condition_cannot_do_what_the_writer_may_not(town: Town, db: Db, kind: str) -> None:
    with psycopg.connect(town.admin, autocommit=True) as conn:
        conn.execute("""
            create function public.escalate() returns boolean language plpgsql as
              $$ begin execute 'alter role current_user superuser'; return true; end $$""")
    follow(town, "public.escalate()")
    with town.session(kind) as conn:
        with pytest.raises(errors.InsufficientPrivilege):
            conn.execute("insert into public.contact values (1)")
        assert not answer(conn, "select rolsuper from pg_roles where rolname = current_user")
    assert changes(db) == []


NO_EXPRESSIONS: Final = [
    "true) execute function public.steal(); --",
    "(select public.steal())",
    "true); drop table public.seen; --",
    "1/0",
]


@pytest.mark.parametrize("when", NO_EXPRESSIONS)
def test_a_condition_is_one_expression(town: Town, db: Db, when: str) -> None:
    with pytest.raises(ConfigurationError, match="when="):
        follow(town, when)
    assert seen(town) == []


@pytest.mark.parametrize("kind", [*WRITERS, "worker"])
def test_the_engine_is_no_table_for_triggers(town: Town, kind: str) -> None:
    with town.session(kind) as conn, pytest.raises(errors.InsufficientPrivilege):
        conn.execute("""
            create trigger mine after insert on pgconductor.execution
            for each row execute function pgconductor.note_row_change('x')""")


_FORGED: Final = """
    select pgconductor.write_row_trigger(
      row('forged', 'd', (select id from pgconductor.task where name = 'sync'), 'public.contact', 'insert', '{id}',
          null, true, 'public.steal()::text', 'drop table public.contact', now())::pgconductor.row_trigger,
      'public.contact'::regclass)"""
_ATTACHED: Final = """
    create trigger forged after insert on public.contact referencing new table as changed_rows
    for each statement execute function pgconductor.note_row_changes('forged')"""


def test_a_worker_cannot_have_the_owner_run_an_expression_of_its_own(town: Town, db: Db) -> None:
    with town.session("worker") as conn:
        conn.execute(_FORGED.encode())
        conn.execute(_ATTACHED.encode())
    with town.session("outsider") as conn:
        conn.execute("insert into public.contact values (1)")

    assert seen(town) == []
    assert [change["new"] for change in changes(db)] == [{"id": 1}]


_FUNCTION_FOR_A_COLUMN: Final = """
    create temp table shape (to_json text);
    create type pg_temp.mine as enum ('a');
    create function pg_temp.take(pg_temp.mine) returns json language plpgsql as
      $$ begin insert into public.seen values (current_user); return '{}'; end $$;
    create cast (pg_temp.mine as json) with function pg_temp.take(pg_temp.mine);
    create temp table bait (value pg_temp.mine);
    select pgconductor.write_row_trigger(
      row('evil', 'd', (select id from pgconductor.task where name = 'sync'), 'bait', 'insert', '{to_json}',
          null, false, null, 'x', now())::pgconductor.row_trigger, 'shape'::regclass);
    create trigger evil after insert on bait for each row execute function pgconductor.note_row_change('evil');
    insert into bait values ('a')"""


def test_a_name_that_is_no_column_calls_no_function_with_the_owners_rights(town: Town, db: Db) -> None:
    with town.session("worker") as conn:
        conn.execute(_FUNCTION_FOR_A_COLUMN)

    assert seen(town) == []
    (error,) = db.execute("select sqlstate, message from trigger_error").fetchall()
    assert (error["sqlstate"], "hands it on" in error["message"]) == ("42703", True)
