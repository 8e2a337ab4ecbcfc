"""Windows and expiry: when work may start, and until when it must have."""

from datetime import datetime
from typing import Any

import psycopg
import pytest
from psycopg.rows import DictRow, dict_row

from tests.flow.support import concurrency, limited
from tests.sql.support import (
    WORKER,
    Db,
    Json,
    at,
    blank,
    call,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    invoke,
    op,
    park,
    register,
    release,
    row,
    save,
    settle,
    state,
)

NIGHT: Json = {"window_start": "22:00", "window_end": "06:00", "window_zone": "Europe/Berlin"}
DAY: Json = {"window_start": "09:00", "window_end": "17:00", "window_zone": "America/New_York"}


def closes_in(db: Db, window: Json, instant: str) -> float | None:
    register(db, "work", **window)
    found = db.execute(
        "select closes_in(t, %s) as seconds from task t where name = 'work'", (datetime.fromisoformat(instant),)
    ).fetchone()
    assert found is not None
    return None if found["seconds"] is None else float(found["seconds"])


@pytest.mark.covers("P30")
@pytest.mark.parametrize(
    ("instant", "hours"),
    [
        ("2040-01-10T20:59:59Z", None),  # 21:59:59 in Berlin
        ("2040-01-10T21:00:00Z", 8),
        ("2040-01-10T23:30:00Z", 5.5),  # past midnight there
        ("2040-01-11T04:59:59Z", 1 / 3600),
        ("2040-01-11T05:00:00Z", None),
        ("2030-03-30T21:00:00Z", 7),  # the night in which clocks go forward
        ("2030-10-26T20:00:00Z", 9),  # the night in which they go back
    ],
)
def test_p30_a_window_crosses_midnight_and_follows_its_zone(db: Db, instant: str, hours: float | None) -> None:
    assert closes_in(db, NIGHT, instant) == (None if hours is None else pytest.approx(hours * 3600))


@pytest.mark.parametrize(("instant", "hours"), [("2040-01-10T13:59:59Z", None), ("2040-01-10T14:00:00Z", 8)])
def test_a_window_within_a_day_follows_its_zone(db: Db, instant: str, hours: float | None) -> None:
    assert closes_in(db, DAY, instant) == (None if hours is None else hours * 3600)


def test_a_window_that_ends_in_the_doubled_hour_ends_at_its_first_occurrence(db: Db) -> None:
    window: Json = {"window_start": "22:00", "window_end": "02:30", "window_zone": "Europe/Berlin"}

    assert closes_in(db, window, "2030-10-26T23:00:00Z") == 1.5 * 3600  # 01:00 there; 02:30 comes twice


def test_a_closed_task_is_not_claimed_and_others_are(db: Db) -> None:
    register(db, "work", **NIGHT)
    register(db, "other", **DAY)
    register(db, "free")
    enqueue_many(db, {}, {"task": "other"}, {"task": "free"})
    noon = 12 * 3600.0  # in London

    assert [each["task_id"] for each in claim(db, now=noon)] == [3]
    evening = 21.5 * 3600
    assert [each["task_id"] for each in claim(db, now=evening, token=2)] == [1, 2]


@pytest.mark.covers("P30")
def test_p30_two_closed_tasks_stay_closed(db: Db) -> None:
    register(db, "work", **NIGHT)
    register(db, "second", **NIGHT)
    enqueue_many(db, {}, {"task": "second"})

    assert claim(db, now=12 * 3600) == []


def test_a_claim_says_when_the_window_closes(db: Db) -> None:
    register(db, "work", **NIGHT)
    enqueue(db)
    answer: Any = call(db, "claim", WORKER, 1, [{"queue": 1, "limit": 5}], "{1}", False, at(4 * 3600))

    assert answer["closing"] == {"1": 3600}


def test_what_was_released_when_the_window_closed_resumes_when_it_opens(db: Db) -> None:
    register(db, "work", **NIGHT)
    enqueue(db)
    id = claim_one(db, now=0)
    release(db, id, now=5 * 3600)

    assert claim(db, token=2, now=5 * 3600) == []
    assert claim_one(db, token=3, now=21 * 3600) == id


def test_a_limited_task_with_a_window_is_held_by_both(db: Db) -> None:
    limited(db, concurrency(1), **NIGHT)
    enqueue_many(db, *blank(2))

    assert claim(db, now=12 * 3600) == []
    assert len(claim(db, now=22 * 3600, token=2)) == 1


def test_closed_work_does_not_hold_up_a_drain(db: Db) -> None:
    register(db, "work", **NIGHT)
    enqueue(db)
    answer = call(db, "outstanding", WORKER, "{1}", "{1}", at(12 * 3600))

    assert answer["ready"] == 0


# ---------------------------------------------------------------- expiry


def test_what_was_not_started_in_time_fails_as_expired(db: Db) -> None:
    register(db, "work", expires=60)
    id = enqueue(db)
    call(db, "fire_timers", at(60))

    assert state(db, id) == "failed"
    assert row(db, id)["error"]["type"] == "pgconductor.errors.Expired"


def test_what_started_in_time_does_not_expire(db: Db) -> None:
    register(db, "work", expires=60)
    id = enqueue(db)
    claim_one(db)
    call(db, "fire_timers", at(60))
    assert state(db, id) == "running"
    release(db, id)
    call(db, "fire_timers", at(120))

    assert state(db, id) == "ready"


def test_what_was_claimed_and_came_back_unstarted_expires(db: Db) -> None:
    register(db, "work", expires=60)
    early, late = enqueue(db), enqueue(db)
    claim(db)
    settle(db, {"id": early, "outcome": "unstarted"})
    call(db, "fire_timers", at(60))
    assert [state(db, id) for id in (early, late)] == ["failed", "running"]
    settle(db, {"id": late, "outcome": "unstarted"})
    assert (state(db, late), count(db, "expiry")) == ("ready", 1)
    call(db, "fire_timers", at(120))
    assert (state(db, late), count(db, "expiry")) == ("failed", 0)


def test_a_replacement_that_is_not_committed_yet_is_not_waited_for_and_does_not_expire(db: Db, database: str) -> None:
    register(db, "work", expires=60)
    replaced, other = enqueue(db, dedupe_key="k"), enqueue(db)
    with psycopg.Connection[DictRow].connect(database, row_factory=dict_row) as caller:
        caller.execute("set search_path to pgconductor")
        enqueue(caller, dedupe_key="k", replace=True, delay=100)
        db.execute("set lock_timeout = '5s'")
        call(db, "fire_timers", at(60))
        assert [state(db, id) for id in (replaced, other)] == ["ready", "failed"]
    call(db, "fire_timers", at(61))
    assert state(db, replaced) == "scheduled"
    call(db, "fire_timers", at(161))
    assert state(db, replaced) == "failed"


def test_what_timers_ended_waits_for_the_disk_and_other_claims_do_not(db: Db) -> None:
    register(db, "work", expires=60)
    enqueue(db)
    found: list[str] = []
    for now in (30, 60):
        with db.transaction():
            claim(db, 0, now=now, fire=True)
            (row,) = db.execute("select current_setting('synchronous_commit') as value").fetchall()
            found.append(row["value"])
    assert found == ["off", "on"]


def test_what_goes_on_when_it_should_have_started_is_not_looked_at_for_ever(db: Db) -> None:
    register(db, "work", expires=60)
    ends, goes_on = enqueue(db), enqueue(db)
    claim(db)
    call(db, "fire_timers", at(60))
    complete(db, ends, now=70)
    release(db, goes_on)
    call(db, "fire_timers", at(120))
    assert (state(db, goes_on), count(db, "expiry")) == ("ready", 0)


def test_expiry_counts_from_the_due_instant(db: Db) -> None:
    register(db, "work", expires=60)
    id = enqueue(db, delay=100)
    call(db, "fire_timers", at(120))
    assert state(db, id) == "ready"
    call(db, "fire_timers", at(160))

    assert state(db, id) == "failed"


def test_what_waits_for_a_permit_expires_too(db: Db) -> None:
    limited(db, concurrency(1), expires=60)
    first, second = enqueue_many(db, *blank(2))
    claim_one(db)
    call(db, "fire_timers", at(61))

    assert state(db, second) == "failed"
    complete(db, first, now=62)
    assert claim(db, token=2, now=62) == []


def test_a_child_that_expires_wakes_its_parent(db: Db) -> None:
    register(db, "work")
    register(db, "child", expires=60)
    enqueue(db)
    parent = claim_one(db)
    child = invoke(db, parent)
    call(db, "fire_timers", at(61))

    assert (state(db, child), state(db, parent)) == ("failed", "ready")


def test_a_timer_that_was_not_fired_yet_does_not_save_it(db: Db) -> None:
    register(db, "work", expires=10)
    id = enqueue(db, delay=10)
    call(db, "fire_timers", at(1000))

    assert state(db, id) == "failed"


def test_a_replaced_call_expires_by_its_new_time(db: Db) -> None:
    register(db, "work", expires=60)
    id = enqueue(db, dedupe_key="k", delay=10)
    enqueue(db, dedupe_key="k", delay=1000, replace=True)
    call(db, "fire_timers", at(500))

    assert state(db, id) == "scheduled"
    assert count(db, "expiry") == 1


@pytest.mark.parametrize(
    ("window", "instant", "hours"),
    [
        ("22:00-02:30", "2030-10-27T00:29:00Z", 1 / 60),  # the first 02:29
        ("22:00-02:30", "2030-10-27T01:15:00Z", None),  # the second 02:15
        ("02:30-06:00", "2030-10-27T00:15:00Z", None),  # the first 02:15
        ("02:30-06:00", "2030-10-27T00:30:00Z", 4.5),  # the first 02:30
        ("02:30-06:00", "2030-10-27T01:15:00Z", 3.75),  # the second 02:15
        ("02:30-03:15", "2030-03-31T00:59:00Z", None),  # 01:59; then comes 03:00
        ("02:30-03:15", "2030-03-31T01:00:00Z", 0.25),
        ("02:30-04:00", "2030-03-31T01:00:00Z", 1),
        ("22:00-02:30", "2030-03-31T00:59:00Z", 31 / 60),  # 02:30 is 03:30
    ],
)
def test_where_clocks_change_a_window_begins_and_ends_once(
    db: Db, window: str, instant: str, hours: float | None
) -> None:
    start, end = window.split("-")
    seconds = closes_in(db, {"window_start": start, "window_end": end, "window_zone": "Europe/Berlin"}, instant)
    assert seconds == (None if hours is None else pytest.approx(hours * 3600))


def test_what_is_held_when_it_expires_keeps_no_sleep_waiting(db: Db, database: str) -> None:
    register(db, "work", expires=60)
    enqueue(db, dedupe_key="k")
    register(db, "sleeper")
    sleeper = enqueue(db, "sleeper")
    claim_one(db, tasks=["sleeper"])
    park(db, sleeper, op(sleeper, "nap", "sleep", due_in=61))
    with psycopg.Connection[DictRow].connect(database, row_factory=dict_row) as caller:
        caller.execute("set search_path to pgconductor")
        enqueue(caller, dedupe_key="k", replace=True)
        db.execute("set lock_timeout = '5s'")
        call(db, "fire_timers", at(62))
        assert state(db, sleeper) == "ready"


def test_a_replacement_that_comes_too_late_holds_no_lock(db: Db, database: str) -> None:
    register(db, "work")
    id = enqueue(db, dedupe_key="k")
    claim(db)
    park(db, id, op(id, "nap", "sleep", due_in=5))
    running = enqueue(db, dedupe_key="r")
    claim(db, token=2)
    with psycopg.Connection[DictRow].connect(database, row_factory=dict_row) as caller:
        caller.execute("set search_path to pgconductor")
        assert enqueue(caller, dedupe_key="k", replace=True) == id
        assert enqueue(caller, dedupe_key="r", replace=True) == running
        free = db.execute("select id from execution for update skip locked").fetchall()
        assert len(free) == 2


def test_what_a_fenced_process_gives_back_is_neither_replaced_nor_expired(db: Db) -> None:
    register(db, "work", expires=60)
    id = enqueue(db, dedupe_key="k", payload={"n": 1})
    claim(db)
    save(db, id, "done")
    call(db, "retire", WORKER, at(30))
    enqueue(db, dedupe_key="k", replace=True, payload={"n": 2}, now=40)
    call(db, "fire_timers", at(100))
    assert state(db, id) == "ready"
    register(db)
    (claimed,) = claim(db, token=2, now=100)
    assert claimed["payload"] == {"n": 1}
    assert [each[0] for each in claimed["steps"]] == ["done"]
