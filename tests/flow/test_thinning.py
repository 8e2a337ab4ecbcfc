"""Throttle, debounce and dedupe: calls that share one execution."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.flow.support import concurrency, limited
from tests.sql.support import (
    Db,
    at,
    blank,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    register,
    row,
    session,
    state,
)


def run_at(db: Db, id: str) -> float:
    found = db.execute(
        "select extract(epoch from due_at - '2040-01-01 00:00Z') as at from timer where execution_id = %s", (id,)
    ).fetchone()
    assert found is not None
    return float(found["at"])


def test_the_first_call_of_a_period_wins_and_the_others_get_its_handle(db: Db) -> None:
    first = enqueue(db, throttle=10, payload={"n": 1}, now=0)
    second = enqueue(db, throttle=10, payload={"n": 2}, now=9)

    assert second == first
    assert row(db, first)["payload"] == {"n": 1}
    assert count(db, "execution") == 1


@pytest.mark.covers("P37")
def test_p37_a_throttle_counts_from_the_accepted_call_whatever_has_ended_meanwhile(db: Db) -> None:
    register(db, "work")
    first = enqueue(db, throttle=10, now=0)
    complete(db, claim_one(db))

    assert enqueue(db, throttle=10, now=9) == first
    second = enqueue(db, throttle=10, now=10)
    assert second != first
    assert enqueue(db, throttle=10, now=19) == second


@pytest.mark.covers("P37")
def test_p37_a_throttle_with_a_key_goes_on_in_the_next_period(db: Db) -> None:
    first = enqueue(db, throttle=10, dedupe_key="k", now=0)
    other = enqueue(db, throttle=10, dedupe_key="l", now=0)
    again = enqueue(db, throttle=10, dedupe_key="k", now=11)

    assert len({first, other, again}) == 3


@pytest.mark.covers("P37")
def test_p37_calls_of_one_batch_are_throttled_together(db: Db) -> None:
    ids = enqueue_many(db, *[{"throttle": 10, "payload": {"n": n}} for n in range(3)], {"throttle": 10, "task": "t"})

    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert row(db, ids[0])["payload"] == {"n": 0}
    assert count(db, "execution") == 2


def test_a_throttled_call_whose_reply_was_lost_is_the_accepted_one(db: Db) -> None:
    (first,) = enqueue_many(db, {"throttle": 10})
    (again,) = enqueue_many(db, {"throttle": 10, "id": first}, now=1, again=True)

    assert again == first
    assert count(db, "execution") == 1


def test_the_last_payload_of_a_debounce_runs_once_when_the_period_ends(db: Db) -> None:
    register(db, "work")
    first = enqueue(db, debounce=10, payload={"n": 1}, now=0)
    second = enqueue(db, debounce=10, payload={"n": 2}, now=9)

    assert second == first
    assert run_at(db, first) == 10
    assert claim(db, now=9, fire=True) == []
    (claimed,) = claim(db, now=10, token=2, fire=True)
    assert claimed["payload"] == {"n": 2}


def test_a_debounce_after_the_period_begins_another(db: Db) -> None:
    first = enqueue(db, debounce=10, now=0)
    second = enqueue(db, debounce=10, now=10)

    assert second != first
    assert run_at(db, second) == 20


def test_a_debounce_whose_execution_was_cancelled_begins_anew(db: Db) -> None:
    first = enqueue(db, debounce=10, now=0)
    cancel(db, first)
    second = enqueue(db, debounce=10, now=5)

    assert second != first
    assert run_at(db, second) == 15


def test_calls_of_one_batch_are_debounced_to_the_last(db: Db) -> None:
    ids = enqueue_many(db, *[{"debounce": 10, "payload": {"n": n}} for n in range(3)])
    again = enqueue_many(db, *[{"debounce": 10, "payload": {"n": n}} for n in range(5, 8)], now=3)

    assert set(ids) == set(again) == {ids[2]}
    assert row(db, ids[0])["payload"] == {"n": 7}


@pytest.mark.parametrize("thinning", ["throttle", "debounce"])
def test_racing_callers_share_one_execution(database: str, db: Db, thinning: str) -> None:
    register(db, "work")

    def one(number: int) -> str:
        with session(database) as caller:
            options: dict[str, Any] = {thinning: 60, "payload": {"n": number}}
            return enqueue(caller, **options)

    with ThreadPoolExecutor(12) as pool:
        assert len(set(pool.map(one, range(24)))) == 1
    assert count(db, "execution") == 1


def test_fifty_callers_racing_on_one_key_make_one_execution(database: str, db: Db) -> None:
    register(db, "work")

    def one(number: int) -> str:
        with session(database) as caller:
            return enqueue(caller, dedupe_key="k", payload={"n": number}, replace=bool(number % 2))

    with ThreadPoolExecutor(10) as pool:
        assert len(set(pool.map(one, range(50)))) == 1
    assert count(db, "execution") == 1


@pytest.mark.covers("P36")
def test_p36_a_key_of_a_completed_execution_keeps_its_result(db: Db) -> None:
    register(db, "work")
    first = enqueue(db, dedupe_key="k", payload={"n": 1})
    complete(db, claim_one(db), result="done")

    assert enqueue(db, dedupe_key="k", payload={"n": 2}, replace=True) == first
    assert row(db, first)["payload"] == {"n": 1}
    assert row(db, first)["result"] == "done"


@pytest.mark.covers("P36")
def test_p36_a_key_of_a_running_execution_leaves_it_alone(db: Db) -> None:
    register(db, "work")
    first = enqueue(db, dedupe_key="k", payload={"n": 1})
    claim_one(db)

    assert enqueue(db, dedupe_key="k", payload={"n": 2}, replace=True) == first
    assert state(db, first) == "running"
    assert row(db, first)["payload"] == {"n": 1}


@pytest.mark.parametrize("delay", [None, 60])
def test_replace_changes_what_is_scheduled_or_ready(db: Db, delay: float | None) -> None:
    register(db, "work")
    first = enqueue(db, dedupe_key="k", payload={"n": 1}, delay=delay)
    assert enqueue(db, dedupe_key="k", payload={"n": 2}, priority=3, replace=True) == first

    (claimed,) = claim(db)
    assert claimed["payload"] == {"n": 2}


def test_replace_changes_what_waits_for_a_permit_and_its_key(db: Db) -> None:
    limited(db, concurrency(1, "tenant"))
    enqueue(db, payload={"tenant": "a"})
    claim_one(db)
    waiting = enqueue(db, dedupe_key="k", payload={"tenant": "a"})
    assert claim(db, token=2) == []
    enqueue(db, dedupe_key="k", payload={"tenant": "b"}, replace=True)

    assert claim_one(db, token=3) == waiting


def test_sql_callers_throttle_and_debounce(db: Db) -> None:
    query = "select invoke('work', throttle => '1 minute', dedupe_key => 'k') as id"
    ids = {row["id"] for _ in range(2) for row in db.execute(query.encode())}
    query = "select invoke('work', debounce => '1 minute') as id"
    ids |= {row["id"] for _ in range(2) for row in db.execute(query.encode())}

    assert len(ids) == count(db, "execution") == 2


def test_ended_periods_are_swept(db: Db) -> None:
    enqueue_many(db, *[{"throttle": 10, **each} for each in blank(1)])
    call(db, "sweep", "20 seconds", "2040-01-01 00:00:11Z")

    assert count(db, "throttle") == 0


def test_a_call_that_is_throttled_in_an_open_transaction_holds_no_sweep_up(database: str, db: Db) -> None:
    enqueue_many(db, {"throttle": 10}, {"throttle": 10, "task": "other"})
    with session(database) as user, user.transaction():
        enqueue(user, throttle=10, now=5)
        answer = call(db, "sweep", "20 seconds", at(11))
        assert "gave_up" not in answer
        assert count(db, "throttle") == 1
    call(db, "sweep", "20 seconds", at(11))

    assert count(db, "throttle") == 0


def test_a_period_that_an_open_transaction_begins_anew_outlives_the_sweep(database: str, db: Db) -> None:
    enqueue(db, throttle=10)
    with session(database) as user, user.transaction():
        again = enqueue(user, throttle=10, now=10)
        assert "gave_up" not in call(db, "sweep", "20 seconds", at(11))
    call(db, "sweep", "20 seconds", at(12))

    assert enqueue(db, throttle=10, now=13) == again
