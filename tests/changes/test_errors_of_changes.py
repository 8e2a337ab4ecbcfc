"""What goes wrong with a subscription is recorded, and never the writer's trouble."""

import pytest
from psycopg import errors as pg

from tests.changes.support import CONTACT, changes, errors, follow, lead_to_contact, new_rows, on
from tests.sql.support import Db

pytestmark = pytest.mark.covers("F83", "P39")
CONDITIONS = [None, "new.id is not null"]


@pytest.fixture(autouse=True)
def contact(db: Db) -> None:
    db.execute(CONTACT)


def emails(db: Db) -> int:
    return len(db.execute("select from public.contact").fetchall())


@pytest.mark.parametrize("when", CONDITIONS)
@pytest.mark.parametrize(
    "ddl", ["rename column email to address", "drop column email"], ids=["renamed column", "dropped column"]
)
def test_a_column_that_is_gone_is_recorded_and_the_write_goes_on(
    database: str, db: Db, when: str | None, ddl: str
) -> None:
    follow(database, on("insert", "id", "email", when=when))
    db.execute(f"alter table public.contact {ddl}".encode())

    db.execute("insert into public.contact (id) select i from generate_series(1, 50) i")

    assert emails(db) == 50
    assert changes(db) == []
    (error,) = errors(db)
    assert (error["task"], error["table"], error["op"]) == ("sync", "public.contact", "insert")
    assert '"email"' in error["message"] or "email" in error["message"]


@pytest.mark.parametrize("when", CONDITIONS)
def test_a_column_of_another_type_goes_on_as_that(database: str, db: Db, when: str | None) -> None:
    follow(database, on("insert", "email", when=when))
    db.execute("insert into public.contact values (1, '5')")

    db.execute("alter table public.contact alter column email type int using email::int")
    db.execute("insert into public.contact values (2, 6)")

    assert new_rows(db) == [{"email": "5"}, {"email": 6}]
    assert errors(db) == []


def test_columns_can_be_dropped_and_changed_under_an_update_trigger(database: str, db: Db) -> None:
    follow(database, on("update", "id", "email"))
    db.execute("insert into public.contact values (1)")

    db.execute("alter table public.contact alter column id type bigint")
    db.execute("alter table public.contact drop column email")
    db.execute("update public.contact set id = 2")

    (error,) = errors(db)
    assert error["op"] == "update"


def test_a_renamed_table_goes_on_and_a_dropped_one_takes_its_trigger_along(database: str, db: Db) -> None:
    follow(database, on("insert"))

    db.execute("alter table public.contact rename to person")
    db.execute("insert into public.person values (1)")
    assert new_rows(db) == [{"id": 1}]

    db.execute("drop table public.person")
    assert errors(db) == []


@pytest.mark.parametrize("when", CONDITIONS)
def test_a_column_that_a_foreign_table_lost_is_recorded_and_the_write_goes_on(
    database: str, db: Db, when: str | None
) -> None:
    lead_to_contact(db, database, "public.far")
    follow(database, on("insert", "id", "email", table="public.far", when=when))
    db.execute("alter foreign table public.far drop column email")

    db.execute("insert into public.far values (1), (2)")

    assert emails(db) == 2
    assert changes(db, "public.far") == []
    (error,) = errors(db)
    assert (error["table"], error["op"]) == ("public.far", "insert")


@pytest.mark.parametrize("when", CONDITIONS)
def test_a_row_that_is_too_large_is_refused_alone(database: str, db: Db, when: str | None) -> None:
    follow(database, on("insert", "id", "email", when=when))

    db.execute("""
        insert into public.contact
        select i, repeat('x', case i when 2 then 1048576 else 10 end) from generate_series(1, 3) i""")

    assert [row["id"] for row in new_rows(db)] == [1, 3]
    (error,) = errors(db)
    assert error["sqlstate"] == "54000"
    assert "at most 1048576 are allowed" in error["message"]


def test_a_large_statement_is_stored_in_parts(database: str, db: Db) -> None:
    follow(database, on("insert", "id", "email"))

    db.execute("insert into public.contact select i, repeat('x', 500000) from generate_series(1, 40) i")

    assert [row["id"] for row in new_rows(db)] == list(range(1, 41))


def test_a_condition_that_raises_fails_the_write_as_with_any_trigger(database: str, db: Db) -> None:
    follow(database, on("insert", when="1 / new.id > 0"))

    with pytest.raises(pg.DivisionByZero):
        db.execute("insert into public.contact values (0)")

    assert emails(db) == 0
    assert errors(db) == []


@pytest.mark.parametrize("when", CONDITIONS)
def test_a_broken_engine_is_no_trouble_of_the_writer(database: str, db: Db, when: str | None) -> None:
    follow(database, on("insert", when=when))
    with db.transaction(force_rollback=True):
        db.execute("alter table execution add constraint broken check (false) not valid")
        db.execute("insert into public.contact values (1)")
        assert emails(db) == 1
        (error,) = errors(db)
        assert error["sqlstate"] == "23514"


def test_even_what_cannot_be_recorded_is_no_trouble_of_the_writer(database: str, db: Db) -> None:
    follow(database, on("insert"))
    with db.transaction(force_rollback=True):
        db.execute("alter table execution add constraint broken check (false) not valid")
        db.execute("alter table trigger_error add constraint broken check (false) not valid")
        db.execute("insert into public.contact values (1)")
        assert emails(db) == 1


def test_the_record_of_errors_is_bounded(database: str, db: Db) -> None:
    follow(database, on("insert", "email"))
    db.execute("alter table public.contact drop column email")
    db.execute("""
        insert into trigger_error (at, transaction_id, trigger_name, table_name, op, sqlstate, message)
        select now(), '3', 'x', 'x', 'insert', '00000', '' from generate_series(1, 1010)""")

    for number in range(3):
        db.execute("insert into public.contact values (%s)", (number,))

    assert len(errors(db)) == 1000


def test_two_writers_with_errors_do_not_wait_for_each_other(database: str, db: Db) -> None:
    from tests.sql.support import session

    follow(database, on("insert", "email"))
    db.execute("alter table public.contact drop column email")
    db.execute("""
        insert into trigger_error (at, transaction_id, trigger_name, table_name, op, sqlstate, message)
        select now(), '3', 'x', 'x', 'insert', '00000', '' from generate_series(1, 1010)""")
    with session(database) as other:
        other.execute("set lock_timeout = '5s'")
        with db.transaction():
            db.execute("insert into public.contact values (1)")
            other.execute("insert into public.contact values (2)")

    assert emails(db) == 2
