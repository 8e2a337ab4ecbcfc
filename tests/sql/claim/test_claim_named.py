"""claim_named: what claim does, for executions that their enqueue named, in few statements."""

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.flow.support import concurrency
from tests.sql.support import (
    Db,
    Json,
    array,
    at,
    call,
    cancel,
    claim,
    claim_named,
    complete,
    count,
    enqueue,
    parent_and_child,
    register,
    release,
    retry,
    session,
    state,
)


@pytest.fixture(autouse=True)
def worker(db: Db) -> None:
    register(db, "work")


def test_it_gives_what_a_claim_gives_and_leaves_what_a_claim_leaves(db: Db) -> None:
    options: dict[str, Any] = {"payload": {"a": [1, None, ""]}, "priority": 7}
    named, other = enqueue(db, **options), enqueue(db, **options)
    (mine,) = claim_named(db, named)
    assert state(db, named) == "running"
    assert state(db, other) == "ready"

    (theirs,) = claim(db)
    assert mine | {"id": None} == theirs | {"id": None}
    assert (mine["id"], theirs["id"]) == (named, other)
    first, second = db.execute("select * from lease order by execution_id = %s desc", (named,)).fetchall()
    assert first | {"execution_id": second["execution_id"]} == second
    assert count(db, "ready") == 0


def test_it_gives_what_is_there_of_many_in_the_order_of_their_places(db: Db) -> None:
    ids = [enqueue(db, payload={"n": n}) for n in range(5)]
    (taken,) = claim_named(db, ids[2], token=1)
    cancel(db, ids[4])
    assert [each["payload"] for each in claim_named(db, *reversed(ids), token=2)] == [{"n": 0}, {"n": 1}, {"n": 3}]
    assert taken["id"] == ids[2]
    assert count(db, "ready") == 0
    assert claim_named(db, *ids, token=3) == []


def test_what_is_of_another_lane_than_the_hint_says_is_left(db: Db) -> None:
    here, there = enqueue(db), enqueue(db, queue="mail")
    assert [each["id"] for each in claim_named(db, here, there)] == [here]
    assert state(db, there) == "ready"


def test_what_it_gave_is_settled_as_any_other(db: Db) -> None:
    id = enqueue(db)
    claim_named(db, id, token=7)
    assert complete(db, id, 42, token=7)["lost"] == []
    assert state(db, id) == "completed"


def rows(db: Db) -> list[list[Json]]:
    queries = ["select * from ready order by ord", "select * from lease", "select * from execution order by id"]
    return [db.execute(query.encode()).fetchall() for query in queries]


def claimed_before(db: Db) -> str:
    id = enqueue(db)
    claim(db)
    return id


def delayed(db: Db) -> str:
    return enqueue(db, delay=60)


def cancelled(db: Db) -> str:
    id = enqueue(db)
    cancel(db, id)
    return id


def a_child(db: Db) -> str:
    return parent_and_child(db)[1]


def of_a_trigger(db: Db) -> str:
    return enqueue(db, trigger="invoked")


def run_before(db: Db) -> str:
    id = claimed_before(db)
    retry(db, id)
    return id


def given_back(db: Db) -> str:
    id = claimed_before(db)
    release(db, id)
    return id


def of_a_paused_queue(db: Db) -> str:
    id = enqueue(db)
    call(db, "pause_queue", "default", at(0))
    return id


def of_a_limited_task(db: Db) -> str:
    register(db, "work", limits=[concurrency(1)])
    return enqueue(db)


def of_a_task_with_a_window(db: Db) -> str:
    id = enqueue(db)
    register(db, "work", window_start="00:00", window_end="23:59", window_zone="UTC")
    return id


def unknown(_db: Db) -> str:
    return str(uuid4())


@pytest.mark.parametrize(
    "made",
    [
        claimed_before,
        delayed,
        cancelled,
        a_child,
        of_a_trigger,
        run_before,
        given_back,
        of_a_paused_queue,
        of_a_limited_task,
        of_a_task_with_a_window,
        unknown,
    ],
)
def test_what_is_not_there_to_be_taken_at_once_is_left_to_claims(db: Db, made: Callable[[Db], str]) -> None:
    id = made(db)
    before = rows(db)
    assert claim_named(db, id, token=9) == []
    assert rows(db) == before


def test_two_processes_that_are_hinted_at_the_same_time_do_not_wait_for_each_other(db: Db, database: str) -> None:
    id = enqueue(db)
    other = UUID(int=2)
    register(db, worker=other)
    with session(database) as second, db.transaction():
        assert len(claim_named(db, id)) == 1
        second.execute("set lock_timeout = '5s'")
        assert claim_named(second, id, worker=other) == []


def test_a_process_that_was_declared_dead_is_told(db: Db) -> None:
    id = enqueue(db)
    assert call(db, "claim_named", uuid4(), 1, 1, 1, array([id]), at(0)) is None
    assert state(db, id) == "ready"


def test_its_commit_waits_for_no_disk(db: Db) -> None:
    id = enqueue(db)
    with db.transaction():
        claim_named(db, id)
        assert db.execute("show synchronous_commit").fetchone() == {"synchronous_commit": "off"}
