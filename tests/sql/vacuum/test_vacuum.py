"""hold_off_vacuum: autovacuum is kept from what it could not remove, and from nothing else."""

from collections.abc import Generator
from datetime import timedelta

import psycopg
import pytest

from tests.sql.support import Db, Json, call, enqueue, session

LEAST = 1_000


@pytest.fixture(autouse=True)
def nothing_dead(db: Db) -> Generator[None]:
    """The database had other tests before this one; and no vacuum comes to the table but those of the test."""
    db.execute("alter table timer set (autovacuum_enabled = off)")
    db.execute("select pg_stat_force_next_flush()")
    db.execute("vacuum timer")
    yield
    db.execute("alter table timer reset (autovacuum_enabled)")


@pytest.fixture
def snapshot(db: Db, database: str) -> Generator[Db]:
    """Held open from before the rows die."""
    with session(database) as conn:
        conn.execute("begin isolation level repeatable read")
        conn.execute("select from task")
        yield conn


def bury(db: Db, count: int) -> None:
    """Leave so many dead rows in timer, and let the statistics know."""
    db.execute("insert into timer select gen_random_uuid(), 'infinity' from generate_series(1, %s)", (count,))
    db.execute("delete from timer")
    db.execute("select pg_stat_force_next_flush()")


def vacuum_in_vain(db: Db, count: int = 2 * LEAST) -> None:
    bury(db, count)
    assert not note(db)  # the mark from which the next vacuum is told
    db.execute("vacuum timer")


def note(db: Db, longest: str = "1 hour") -> bool:
    noted: bool = call(db, "note_vacuums", LEAST, longest)
    return noted


def hold(db: Db, longest: str = "1 hour") -> list[str] | None:
    held: list[str] | None = call(db, "hold_off_vacuum", LEAST, longest)
    return held


def one(db: Db, query: str, *parameters: object) -> Json:
    found = db.execute(query.encode(), parameters).fetchone()
    assert found is not None
    return found


def vacuum_count(db: Db) -> int:
    counted: int = one(db, "select pg_stat_get_vacuum_count('timer'::regclass) as count")["count"]
    return counted


def skipping_vacuum(db: Db) -> bool:
    """Vacuum as autovacuum does, where the lock can be had at once; tell whether it was passed by."""
    before = vacuum_count(db)
    db.execute("vacuum (skip_locked) timer")
    return vacuum_count(db) == before


def test_a_vacuum_that_could_remove_nothing_is_held_off_while_the_transaction_lasts(
    db: Db, database: str, snapshot: Db
) -> None:
    vacuum_in_vain(db)
    assert note(db)
    with session(database) as holder:
        with holder.transaction():
            assert hold(holder) == ["timer"]
            assert skipping_vacuum(db)
        assert not skipping_vacuum(db)


def test_what_runs_is_not_held_up(db: Db, database: str, snapshot: Db) -> None:
    vacuum_in_vain(db)
    note(db)
    with session(database) as holder, holder.transaction():
        hold(holder)
        db.execute("set lock_timeout = '1s'")
        enqueue(db, delay=60)
        db.execute("update timer set due_at = due_at")


def test_the_transaction_that_holds_it_off_keeps_no_row_alive_itself(db: Db, database: str, snapshot: Db) -> None:
    vacuum_in_vain(db)
    note(db)
    with session(database) as holder, holder.transaction():
        holder.execute(f"select hold_off_vacuum({LEAST})".encode())  # parameters keep a portal open
        query = "select backend_xmin, backend_xid from pg_stat_activity where pid = %s"
        assert one(db, query, holder.info.backend_pid) == {"backend_xmin": None, "backend_xid": None}


def test_a_holder_that_is_not_heard_of_loses_the_lock(db: Db, database: str, snapshot: Db) -> None:
    vacuum_in_vain(db)
    note(db)
    with session(database) as holder, holder.transaction():
        holder.execute("set local idle_in_transaction_session_timeout = 0")
        hold(holder)
        assert one(holder, "show idle_in_transaction_session_timeout").popitem()[1] == "5s"


def test_one_process_holds_it_off_at_a_time(db: Db, database: str, snapshot: Db) -> None:
    vacuum_in_vain(db)
    with session(database) as first, session(database) as second:
        note(db)
        with first.transaction():
            assert hold(first) == ["timer"]
            assert hold(second) is None
            assert not note(db)  # the sweep need not say so again
        assert hold(second) == ["timer"]


def test_a_vacuum_that_removes_what_is_dead_is_not_held_off(db: Db, database: str) -> None:
    bury(db, 2 * LEAST)
    assert not note(db)
    db.execute("vacuum timer")
    assert not note(db)
    assert hold(db) is None


def test_dead_rows_that_no_vacuum_has_looked_at_are_not_kept_from_it(db: Db, snapshot: Db) -> None:
    bury(db, 2 * LEAST)
    assert not note(db)
    bury(db, 2 * LEAST)
    assert not note(db)
    assert hold(db) is None


def test_what_dies_after_a_vacuum_that_left_little_is_not_taken_for_what_it_left(db: Db, snapshot: Db) -> None:
    vacuum_in_vain(db)
    assert note(db)
    snapshot.execute("rollback")
    db.execute("vacuum timer")
    assert not note(db)
    bury(db, 2 * LEAST)
    assert not note(db)
    assert hold(db) is None


def test_when_half_as_many_have_died_again_it_may_come(db: Db, snapshot: Db) -> None:
    vacuum_in_vain(db)
    assert note(db)
    bury(db, LEAST - 100)
    assert note(db)
    bury(db, 200)
    assert not note(db)
    assert hold(db) is None


def test_it_may_come_when_the_latest_one_was_long_ago(db: Db, snapshot: Db) -> None:
    vacuum_in_vain(db)
    assert note(db)
    assert not note(db, longest="0 seconds")
    assert hold(db, longest="0 seconds") is None


@pytest.mark.parametrize(("millions", "minutes"), [(0.25, 10), (5, 10), (6, 12), (28, 56)])
def test_the_more_it_left_the_longer_it_is_not_repeated(db: Db, millions: float, minutes: int) -> None:
    assert call(db, "vacuum_rest", int(millions * 1_000_000)) == timedelta(minutes=minutes)


def test_a_few_dead_rows_are_nobodys_concern(db: Db, snapshot: Db) -> None:
    vacuum_in_vain(db, LEAST - 1)
    assert not note(db)
    assert one(db, "select json_agg(m) as marks from vacuum_mark m") == {"marks": None}


def test_a_table_whose_lock_somebody_has_is_named_and_left_alone(db: Db, database: str, snapshot: Db) -> None:
    vacuum_in_vain(db)
    note(db)
    with session(database) as other, session(database) as holder:
        with other.transaction():
            other.execute("lock table timer in share update exclusive mode")
            with holder.transaction():
                assert hold(holder) == ["timer"]
                assert holder.info.transaction_status == psycopg.pq.TransactionStatus.INTRANS
        with holder.transaction():
            assert hold(holder) == ["timer"]
            assert skipping_vacuum(db)
