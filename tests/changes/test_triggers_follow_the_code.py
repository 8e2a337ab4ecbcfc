"""Triggers are made, changed and removed to match the code of one deployment, and of that one alone."""

import psycopg
import pytest

from pgconductor import changes as registration
from pgconductor import schema
from pgconductor.changes import apply_changes
from pgconductor.engine import Engine
from pgconductor.errors import ConfigurationError, ServerError
from tests.changes.support import CONTACT, changes, follow, new_rows, on, triggers
from tests.sql.support import Background, Db, session


@pytest.fixture(autouse=True)
def contact(db: Db) -> None:
    db.execute(CONTACT)


def test_what_matches_already_is_not_touched(database: str, db: Db) -> None:
    rows = [on("insert"), on("update", when="new.active"), on("delete", "email")]
    assert len(follow(database, *rows)) == 3

    with session(database) as writer, writer.transaction():
        writer.execute("insert into public.contact values (1)")  # its lock would hold up any statement on the triggers
        assert follow(database, *rows) == []


def test_another_condition_replaces_the_trigger(database: str, db: Db) -> None:
    follow(database, on("insert", when="new.id > 10"))

    follow(database, on("insert", when="new.id > 20"))

    (trigger,) = triggers(db)
    assert "WHEN ((new.id > 20))" in trigger
    db.execute("insert into public.contact values (15), (25)")
    assert new_rows(db) == [{"id": 25}]


def test_other_columns_need_no_statement_on_the_table(database: str, db: Db) -> None:
    follow(database, on("insert", "id"))

    (step,) = follow(database, on("insert", "id", "email"))

    assert step.statements == []
    db.execute("insert into public.contact values (1, 'a')")
    assert new_rows(db) == [{"id": 1, "email": "a"}]


@pytest.mark.covers("P41")
def test_what_is_gone_from_the_code_is_removed_of_its_own_deployment_only(database: str, db: Db) -> None:
    follow(database, on("insert"), on("delete"), deployment="a")
    follow(database, on("insert", task="other"), deployment="b")

    follow(database, on("delete"), deployment="a")
    db.execute("insert into public.contact values (1)")
    assert [row["task"] for row in db.execute("select task from executions")] == ["other"]

    follow(database, deployment="a")
    assert len(triggers(db)) == 1


def test_a_trigger_that_was_dropped_renamed_or_lost_with_its_table_is_made_again(database: str, db: Db) -> None:
    follow(database, on("insert"))
    name = triggers(db)[0].split()[2]

    db.execute(f"alter trigger {name} on public.contact rename to theirs".encode())
    follow(database, on("insert"))
    db.execute(f"drop trigger {name} on public.contact".encode())
    follow(database, on("insert"))
    db.execute("drop table public.contact")
    db.execute(CONTACT)
    follow(database, on("insert"))

    db.execute("insert into public.contact values (1)")
    assert len(changes(db)) == 1


def test_a_trigger_goes_along_when_tables_change_places(database: str, db: Db) -> None:
    follow(database, on("insert"))
    db.execute("alter table public.contact rename to contact_old")
    db.execute(CONTACT)

    follow(database, on("insert"))

    db.execute("insert into public.contact_old values (1)")
    db.execute("insert into public.contact values (2)")
    assert new_rows(db) == [{"id": 2}]


def test_a_table_that_became_a_partition_gets_a_trigger_for_its_rows(database: str, db: Db) -> None:
    follow(database, on("insert"))
    db.execute("create table public.everyone (like public.contact including defaults) partition by range (id)")
    db.execute("alter table public.everyone attach partition public.contact for values from (0) to (10)")

    follow(database, on("insert"))

    db.execute("insert into public.everyone values (1)")
    assert new_rows(db) == [{"id": 1}]


def test_a_comment_says_whose_the_trigger_is(database: str, db: Db) -> None:
    follow(database, on("insert"), deployment="shop")

    (row,) = db.execute("select obj_description(oid, 'pg_trigger') as text from pg_trigger where not tgisinternal "
                        "and tgname like 'pgconductor%%'").fetchall()  # fmt: skip

    assert row["text"] == "pgconductor: starts task sync of deployment shop; its workers make, change and remove it"


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("new.nothing", "column new.nothing does not exist"),
        ("new.id +", "syntax error"),
        ("exists (select 1)", "cannot use subquery"),
        ("old.id = 1", "INSERT trigger's WHEN condition cannot reference OLD values"),
        ("true) execute function f(); drop table public.contact; --", "syntax error"),
        (
            """true) execute function pgconductor.note_row_change('');
               create trigger a after insert on public.contact for each row when (true""",
            "cannot insert multiple commands",
        ),
    ],
)
def test_an_invalid_condition_is_refused_in_the_words_of_postgres(database: str, db: Db, when: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=r"task 'sync': table\('public.contact', 'insert'\): when=") as refused:
        follow(database, on("insert", when=when))

    assert words in str(refused.value)
    assert "pgconductor_" in str(refused.value)
    assert triggers(db) == []
    assert db.execute("select from row_trigger").fetchall() == []


@pytest.mark.parametrize(
    ("table", "columns", "words"),
    [
        ("public.nothing", ["id"], "there is no such table"),
        ("contact", ["id"], "there is no such table"),
        ("public.contact; drop table x", ["id"], "there is no such table"),
        ("public.contact", ["nothing"], "the table has no column 'nothing'"),
        ("public.contact", ["ctid"], "the table has no column 'ctid'"),
        ("public.contact_view", ["id"], "it is not a table"),
        ("pgconductor.execution", ["id"], "it is a table of the engine"),
    ],
)
def test_what_cannot_have_a_trigger_is_refused(
    database: str, db: Db, table: str, columns: list[str], words: str
) -> None:
    db.execute("create view public.contact_view as select * from public.contact")

    with pytest.raises(ConfigurationError) as refused:
        follow(database, on("insert", *columns, table=table))

    assert words in str(refused.value)
    assert refused.value.remedy


def test_a_table_in_use_is_waited_for(database: str, db: Db) -> None:
    with session(database) as writer:
        with writer.transaction():
            writer.execute("insert into public.contact values (1)")
            start = Background(lambda: follow(database, on("insert")))
            wait_until_blocked_by(db, writer)
        assert len(start.result()) == 1
    assert len(triggers(db)) == 1


def wait_until_blocked_by(db: Db, writer: psycopg.Connection[dict[str, object]]) -> None:
    query = "select from pg_stat_activity where %s = any(pg_blocking_pids(pid))"
    for _ in range(100_000):
        if db.execute(query, (writer.info.backend_pid,)).fetchall():
            return
    raise AssertionError("nobody waited")


def test_a_lock_that_stays_is_given_up_with_nothing_half_done(
    database: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "_LOCK_SECONDS_MAX", 0.0)
    with session(database) as writer, writer.transaction():
        writer.execute("insert into public.contact values (1)")
        with pytest.raises(ServerError, match="no lock"):
            follow(database, on("insert"))

    assert db.execute("select from row_trigger").fetchall() == []


def test_workers_that_start_at_once_make_each_trigger_once(database: str, db: Db) -> None:
    rows = [on("insert"), on("update"), on("delete")]
    follow(database, rows[0])
    starts = [Background(lambda: follow(database, *rows)) for _ in range(4)]

    done = [len(each.result()) for each in starts]

    assert len(triggers(db)) == 3
    assert sum(done) == 2


def test_two_engines_in_one_database_serve_one_table_each(database: str, db: Db) -> None:
    schema.migrate(database, "other engine")
    db.execute("""select "other engine".register_tasks('default',
        '[{"name": "sync", "queue": "default", "max_attempts": 3, "max_crashes": 5}]')""")
    follow(database, on("insert"))
    apply_changes(database, Engine("other engine"), "default", [on("insert")])

    db.execute("insert into public.contact values (1)")

    assert len(changes(db)) == 1
    (row,) = db.execute('select count(*) as count from "other engine".execution').fetchall()
    assert row["count"] == 1
    db.execute('drop schema "other engine" cascade')
