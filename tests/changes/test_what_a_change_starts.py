"""A committed change of a row makes one execution a subscription, in the writer's transaction, however it was made."""

from typing import Any

import pytest

from tests.changes.support import CONTACT, changes, errors, follow, lead_to_contact, new_rows, on
from tests.sql.support import Db, claim, enqueue, register, session

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def contact(db: Db) -> None:
    db.execute(CONTACT)


def test_a_committed_insert_starts_one_execution_and_tells_it_the_row(database: str, db: Db) -> None:
    follow(database, on("insert", "id", "email"))

    db.execute("insert into public.contact values (7, 'a@example.org')")

    (row,) = db.execute("select trigger, trigger_kind, trigger_data, payload from execution").fetchall()
    assert (row["trigger"], row["trigger_kind"], row["payload"]) == ("public.contact.insert", "change", {})
    assert row["trigger_data"] == {
        "name": "public.contact.insert",
        "op": "insert",
        "old": None,
        "new": {"id": 7, "email": "a@example.org"},
    }
    register(db)
    assert len(claim(db)) == 1


def test_an_insert_that_is_rolled_back_starts_nothing(database: str, db: Db) -> None:
    follow(database, on("insert"))

    with db.transaction(force_rollback=True):
        db.execute("insert into public.contact values (1)")
        assert len(changes(db)) == 1
    with db.transaction():
        db.execute("savepoint a")
        db.execute("insert into public.contact values (2)")
        db.execute("rollback to a")

    assert changes(db) == []


def test_an_update_tells_both_rows_and_counts_only_where_a_chosen_column_changed(database: str, db: Db) -> None:
    follow(database, on("update", "id", "email"))
    db.execute("insert into public.contact values (1, 'a'), (2, 'b')")

    db.execute("update public.contact set email = 'c' where id = 1")
    db.execute("update public.contact set active = false")
    db.execute("update public.contact set email = email")

    (change,) = changes(db)
    assert (change["op"], change["old"], change["new"]) == (
        "update",
        {"id": 1, "email": "a"},
        {"id": 1, "email": "c"},
    )


def test_a_condition_alone_decides_which_updates_count(database: str, db: Db) -> None:
    follow(database, on("update", when="old.active and not new.active"))
    db.execute("insert into public.contact values (1), (2)")

    db.execute("update public.contact set email = 'x'")
    db.execute("update public.contact set active = false where id = 2")

    assert new_rows(db) == [{"id": 2}]


def test_a_delete_tells_the_old_row(database: str, db: Db) -> None:
    follow(database, on("delete", "email"))
    db.execute("insert into public.contact values (1, 'a')")

    db.execute("delete from public.contact")

    (change,) = changes(db)
    assert (change["old"], change["new"]) == ({"email": "a"}, None)


@pytest.mark.covers("F83")
@pytest.mark.parametrize("when", [None, "new.id % 2 = 0 -- even ones"])
def test_every_row_of_a_statement_or_copy_counts_once(database: str, db: Db, when: str | None) -> None:
    follow(database, on("insert", when=when))

    db.execute("insert into public.contact select i from generate_series(1, 1000) i")
    with db.cursor().copy("copy public.contact (id) from stdin") as copy:
        copy.write("".join(f"{i}\n" for i in range(1001, 2001)))

    expected = range(1, 2001) if when is None else range(2, 2001, 2)
    assert [row["id"] for row in new_rows(db)] == list(expected)
    assert db.execute("select count(*) as count from ready").fetchall() == [{"count": len(expected)}]


@pytest.mark.covers("F83")
def test_an_insert_that_becomes_an_update_counts_as_that(database: str, db: Db) -> None:
    follow(database, on("insert"), on("update", "id", "email"))
    db.execute("insert into public.contact values (1, 'a')")

    db.execute("""
        insert into public.contact values (1, 'b'), (2, 'c')
        on conflict (id) do update set email = excluded.email""")
    db.execute("insert into public.contact values (1, 'z') on conflict do nothing")

    assert sorted((change["op"], change["new"]["id"]) for change in changes(db)) == [
        ("insert", 1),
        ("insert", 2),
        ("update", 1),
    ]


def test_a_merge_counts_each_row_by_what_became_of_it(database: str, db: Db) -> None:
    follow(database, on("insert"), on("update", "email"), on("delete"))
    db.execute("insert into public.contact values (1, 'a'), (2, 'b')")

    db.execute("""
        merge into public.contact c using (values (1, 'x'), (2, null), (3, 'y')) v (id, email) on c.id = v.id
        when matched and v.email is null then delete
        when matched then update set email = v.email
        when not matched then insert values (v.id, v.email)""")

    assert sorted(change["op"] for change in changes(db)) == ["delete", "insert", "insert", "insert", "update"]


@pytest.mark.covers("F83")
def test_truncate_starts_nothing(database: str, db: Db) -> None:
    follow(database, on("delete"))
    db.execute("insert into public.contact values (1)")

    db.execute("truncate public.contact")

    assert changes(db) == []


@pytest.mark.covers("F83")
@pytest.mark.parametrize("target", ["event_log", "event_log_1"])
def test_rows_of_partitions_count_whichever_way_they_come(database: str, db: Db, target: str) -> None:
    db.execute("create table public.event_log (id int, at date) partition by range (id)")
    db.execute("create table public.event_log_1 partition of public.event_log for values from (0) to (10)")
    db.execute("create table public.event_log_2 partition of public.event_log for values from (10) to (20)")
    follow(database, *(on(op, table="public.event_log") for op in ("insert", "delete", "update")))

    db.execute(f"insert into public.{target} values (1)".encode())  # noqa: S608 - names of this test
    db.execute("create table public.event_log_3 partition of public.event_log for values from (20) to (30)")
    db.execute("insert into public.event_log values (25)")

    assert new_rows(db, "public.event_log") == [{"id": 1}, {"id": 25}]


@pytest.mark.covers("F83")
def test_a_row_that_moves_to_another_partition_counts_as_a_delete_and_an_insert(database: str, db: Db) -> None:
    db.execute("create table public.event_log (id int) partition by range (id)")
    db.execute("create table public.event_log_1 partition of public.event_log for values from (0) to (10)")
    db.execute("create table public.event_log_2 partition of public.event_log for values from (10) to (20)")
    db.execute("insert into public.event_log values (1)")
    follow(database, *(on(op, table="public.event_log") for op in ("insert", "update", "delete")))

    db.execute("update public.event_log set id = 11")

    assert sorted(change["op"] for change in changes(db, "public.event_log")) == ["delete", "insert"]


def test_deletes_by_a_foreign_key_count(database: str, db: Db) -> None:
    db.execute("create table public.address (contact_id int references public.contact on delete cascade)")
    db.execute("insert into public.contact values (1), (2)")
    db.execute("insert into public.address values (1), (1), (2)")
    follow(database, on("delete", "contact_id", table="public.address"))

    db.execute("delete from public.contact where id = 1")

    assert len(changes(db, "public.address")) == 2


@pytest.mark.covers("F83")
def test_a_partition_itself_can_be_watched(database: str, db: Db) -> None:
    db.execute("create table public.event_log (id int) partition by range (id)")
    db.execute("create table public.event_log_1 partition of public.event_log for values from (0) to (10)")
    follow(database, on("insert", table="public.event_log_1"))

    db.execute("insert into public.event_log values (1)")

    assert new_rows(db, "public.event_log_1") == [{"id": 1}]


@pytest.mark.covers("F83")
@pytest.mark.parametrize("when", [None, "true"])
def test_rows_of_a_foreign_table_count(database: str, db: Db, when: str | None) -> None:
    lead_to_contact(db, database, "public.far")
    table = "public.far"
    follow(database, *(on(op, "id", "email", table=table, when=when) for op in ("insert", "update", "delete")))

    db.execute("insert into public.far values (1, 'a'), (2, 'b')")
    db.execute("update public.far set email = 'c' where id = 2")
    db.execute("delete from public.far where id = 1")

    told = [(change["op"], change["old"], change["new"]) for change in changes(db, table)]
    first, second, changed = {"id": 1, "email": "a"}, {"id": 2, "email": "b"}, {"id": 2, "email": "c"}
    assert told == [
        ("insert", None, first),
        ("insert", None, second),
        ("update", second, changed),
        ("delete", first, None),
    ]
    assert errors(db) == []


def test_several_subscriptions_of_one_change_start_one_execution_each(database: str, db: Db) -> None:
    follow(database, on("insert"), on("insert", task="greet"), on("insert", "email", when="new.email is not null"))

    db.execute("insert into public.contact values (1, 'a')")

    started = db.execute("select task from executions order by task").fetchall()
    assert [row["task"] for row in started] == ["greet", "sync", "sync"]


@pytest.mark.covers("F61", "P40")
def test_names_that_need_quotes_are_distinct_and_served(database: str, db: Db) -> None:
    long = "x" * 63
    tables = ['"a.b_c"."d"', '"a"."b_c.d"', '"a"."B c"', f'"a"."{long}"', '"a".""" quoted %s ; --"']
    db.execute('create schema "a"')
    db.execute('create schema "a.b_c"')
    for table in tables:
        db.execute(f'create table {table} ("Odd ""name" int, "{long}" int)'.encode())
    follow(database, *(on("insert", 'Odd "name', long, table=table) for table in tables))

    for number, table in enumerate(tables):
        db.execute(f"insert into {table} values ({number}, 9)".encode())  # noqa: S608 - names of this test

    for number, table in enumerate(tables):
        assert new_rows(db, table) == [{'Odd "name': number, long: 9}]


def test_more_columns_than_a_function_has_arguments(database: str, db: Db) -> None:
    names = [f"c{i}" for i in range(150)]
    db.execute(f"create table public.wide ({', '.join(f'{n} int default {n[1:]}' for n in names)})".encode())
    follow(database, on("insert", *names, table="public.wide"))

    db.execute("insert into public.wide default values")

    assert new_rows(db, "public.wide") == [{name: int(name[1:]) for name in names}]


VALUES = {
    "int": ("7", 7),
    "bigint": ("9223372036854775807", 9223372036854775807),
    "numeric": ("1.50", 1.5),
    "float8": ("0.1", 0.1),
    "boolean": ("true", True),
    "text": ("'a\"\\b'", 'a"\\b'),
    "json": ("'{\"a\": [1, null]}'", {"a": [1, None]}),
    "jsonb": ("'{\"a\": [1, null]}'", {"a": [1, None]}),
    "uuid": ("'00000000-0000-0000-0000-000000000001'", "00000000-0000-0000-0000-000000000001"),
    "date": ("'2024-02-29'", "2024-02-29"),
    "timestamptz": ("'2024-02-29 12:00+02'", "2024-02-29T10:00:00+00:00"),
    "timestamp": ("'2024-02-29 12:00'", "2024-02-29T12:00:00"),
    "interval": ("'1 day 2 hours'", "1 day 02:00:00"),
    "bytea": ("'\\x01ff'", "\\x01ff"),
    "daterange": ("'[2024-01-02,2024-01-03)'", "[2024-01-02,2024-01-03)"),
    "int[]": ("'{1,null,3}'", [1, None, 3]),
    "text[]": ("'{{a,b},{c,d}}'", [["a", "b"], ["c", "d"]]),
    "public.positive": ("5", 5),
    "public.positive[]": ("'{5,null}'", [5, None]),
    "public.mood": ("'so so'", "so so"),
    "public.mood[]": ("'{\"so so\",glad}'", ["so so", "glad"]),
    "public.pair": ("row(1, 'x y')", '(1,"x y")'),
}


def test_values_keep_their_json_types_whatever_the_session_prints(database: str, db: Db) -> None:
    db.execute("create domain public.positive as int check (value > 0)")
    db.execute("create type public.mood as enum ('so so', 'glad')")
    db.execute("create type public.pair as (a int, b text)")
    columns = {f"c{i}": kind for i, kind in enumerate(VALUES)}
    db.execute(f"create table public.kinds ({', '.join(f'{n} {k}' for n, k in columns.items())})".encode())
    follow(database, *(on(op, *columns, table="public.kinds") for op in ("insert", "update")))
    db.execute("set timezone = 'Asia/Tokyo'; set datestyle = 'SQL, DMY'; set intervalstyle = 'iso_8601'")
    db.execute("set bytea_output = 'escape'; set extra_float_digits = -5")

    values, nulls = ", ".join(value for value, _ in VALUES.values()), ", ".join(f"{name} = null" for name in columns)
    db.execute(f"insert into public.kinds values ({values})".encode())  # noqa: S608 - written above
    db.execute(f"update public.kinds set {nulls}".encode())  # noqa: S608 - written above

    inserted, updated = changes(db, "public.kinds")
    expected = {name: json for name, (_, json) in zip(columns, VALUES.values(), strict=True)}
    assert inserted["new"] == updated["old"] == expected
    assert updated["new"] == dict.fromkeys(columns)
    assert errors(db) == []


def test_writers_of_changes_for_a_limited_task_do_not_wait_for_each_other(database: str, db: Db) -> None:
    follow(database, on("insert"))
    db.execute("insert into task_limit (task_id, kind, declared_max) select id, 'concurrency', 1 from task")
    db.execute("update lane set is_limited = true")

    with session(database) as other, db.transaction():
        other.execute("set lock_timeout = '5s'")
        db.execute("insert into public.contact values (1)")
        other.execute("insert into public.contact values (2)")

    assert len(changes(db)) == 2
    assert errors(db) == []


def test_a_change_is_started_in_the_queue_that_its_task_has_now(database: str, db: Db) -> None:
    follow(database, on("insert"))
    register(db, "sync", queue="other")

    db.execute("insert into public.contact values (1)")

    assert db.execute("select queue from executions").fetchall() == [{"queue": "other"}]
    assert enqueue(db, "sync")
