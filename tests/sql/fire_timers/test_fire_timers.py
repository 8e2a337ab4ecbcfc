"""fire_timers: scheduled → ready, and waits that are due."""

from collections.abc import Callable

import pytest
from psycopg.rows import DictRow

from tests.sql.support import (
    Db,
    Json,
    at,
    call,
    cancel,
    claim,
    claim_one,
    count,
    enqueue,
    enqueue_many,
    fail,
    fan_out,
    finish,
    invoke,
    op,
    parent_and_child,
    park,
    register,
    retry,
    save,
    session,
    settle,
    state,
    states,
    step,
)


def fire(db: Db, now: float, limit: int = 1000) -> int:
    return int(call(db, "fire_timers", at(now), limit))


def lease(db: Db, id: str) -> list[DictRow]:
    return db.execute("select * from lease where execution_id = %s", (id,)).fetchall()


def test_due_work_becomes_ready_and_other_work_does_not(db: Db) -> None:
    ids = enqueue_many(db, {"delay": 5}, {"delay": 10})
    assert fire(db, 5) == 1
    assert states(db, ids) == ["ready", "scheduled"]


def test_nothing_due_is_nothing_fired(db: Db) -> None:
    enqueue(db, delay=5)
    assert fire(db, 4.999) == 0


def test_a_bounded_number_fires_at_a_time_the_earliest_first(db: Db) -> None:
    ids = enqueue_many(db, *[{"delay": 10 - n} for n in range(5)])
    assert fire(db, 60, limit=2) == 2
    assert states(db, ids) == ["scheduled"] * 3 + ["ready"] * 2


def test_a_back_off_ends(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    retry(db, id, delay=15)
    assert (fire(db, 14), fire(db, 15)) == (0, 1)
    assert state(db, id) == "ready"


def test_one_session_fires_at_a_time(db: Db, database: str) -> None:
    enqueue(db, delay=5)
    with session(database) as other, other.transaction():
        assert fire(other, 5) == 1
        assert fire(db, 5) == 0


@pytest.mark.covers("P22")
def test_a_timeout_cancels_the_child_and_its_subtree(db: Db) -> None:
    timeout = {"type": "ChildTimeout", "message": "timed out after 30s"}
    parent, child = parent_and_child(db, due_in=30, timeout_error=timeout)
    claim(db)
    grandchild = invoke(db, child)
    fire(db, 30)
    assert states(db, [parent, child, grandchild]) == ["ready", "cancelled", "cancelled"]
    answered = step(db, parent, "call")
    assert (answered["status"], answered["error"]) == ("timed_out", timeout)


@pytest.mark.covers("P22")
def test_a_timeout_tells_a_child_that_runs_and_wakes_the_parent_at_once(db: Db) -> None:
    parent, child = parent_and_child(db, due_in=30)
    claim(db)
    fire(db, 30)
    assert states(db, [parent, child]) == ["ready", "running"]
    assert count(db, "signal") == 1
    finish(db, child, "late")
    assert (state(db, child), step(db, parent, "call")["status"]) == ("cancelled", "timed_out")


def test_a_child_that_is_to_be_kept_goes_on_and_keeps_its_own_end(db: Db) -> None:
    parent, child = parent_and_child(db, due_in=30, keep=True)
    claim(db)
    fire(db, 30)
    claim(db, token=2, now=30)
    finish(db, parent, token=2)
    finish(db, child, 1)
    assert (states(db, [parent, child]), step(db, parent, "call")["status"]) == (["completed"] * 2, "timed_out")


@pytest.mark.covers("P18")
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("how", ["completed", "failed", "released"])
def test_a_parent_that_runs_on_after_a_timeout_keeps_its_lease_when_its_child_ends(
    db: Db, how: str, keep: bool
) -> None:
    parent, child = parent_and_child(db, due_in=30, keep=keep)
    claim(db)
    fire(db, 30)
    assert claim_one(db, tasks=["work"], token=2, now=30) == parent
    before = lease(db, parent)
    cancel(db, child)
    settle(db, {"id": child, "outcome": how, "result": 1, "error": {"type": "E", "message": "m"}})
    assert (state(db, child), state(db, parent), lease(db, parent)) == ("cancelled", "running", before)
    assert claim(db, token=3, now=31) == []


@pytest.mark.covers("P18")
@pytest.mark.parametrize("end", [finish, fail])
def test_a_parent_that_runs_on_after_a_timeout_keeps_its_lease_when_the_child_that_it_kept_ends(
    db: Db, end: Callable[[Db, str], Json]
) -> None:
    parent, child = parent_and_child(db, due_in=30, keep=True)
    claim(db)
    fire(db, 30)
    assert claim_one(db, tasks=["work"], token=2, now=30) == parent
    before = lease(db, parent)
    end(db, child)
    assert (state(db, parent), lease(db, parent)) == ("running", before)
    assert claim(db, token=3, now=31) == []


def test_a_fan_out_that_times_out_cancels_the_rest(db: Db) -> None:
    parent, children = fan_out(db, 3, due_in=30)
    claim(db, limit=2)
    finish(db, children[0])
    fire(db, 30)
    assert states(db, [parent, *children]) == ["ready", "completed", "running", "cancelled"]
    assert [step(db, parent, "all", n)["status"] for n in range(4)] == [
        "timed_out",
        "completed",
        "timed_out",
        "timed_out",
    ]
    assert count(db, "wait_item") == 0


def test_a_fan_out_with_a_window_that_times_out_leaves_nothing_held(db: Db) -> None:
    parent, children = fan_out(db, 4, due_in=30, window=1)
    fire(db, 30)
    assert states(db, [parent, *children]) == ["ready"] + ["cancelled"] * 4
    assert count(db, "timer") == 0


def test_the_first_answer_wins_over_a_deadline(db: Db) -> None:
    parent, child = parent_and_child(db, due_in=30)
    claim(db)
    finish(db, child, 1)
    assert fire(db, 30) == 0
    assert step(db, parent, "call")["status"] == "completed"


@pytest.mark.covers("P19")
def test_one_of_two_calls_times_out_and_the_other_goes_on(db: Db) -> None:
    register(db, "work", "child")
    id = enqueue(db)
    claim(db)
    park(db, id, op(id, "a", "invoke", {}, due_in=10), op(id, "b", "invoke", {}, due_in=20))
    fire(db, 10)
    assert [step(db, id, name)["status"] for name in "ab"] == ["timed_out", "pending"]
    assert str(step(db, id, "b")["child_id"]) == claim_one(db, tasks=["child"])


@pytest.mark.parametrize("running", [False, True])
def test_a_call_that_is_due_after_its_parent_moved_on_is_left_alone(db: Db, running: bool) -> None:
    register(db, "work", "child")
    id = enqueue(db)
    claim(db)
    park(db, id, op(id, "a", "invoke", {}, due_in=10), op(id, "n", "sleep", due_in=5))
    fire(db, 5)
    if running:
        claim(db, tasks=["work"], token=2)
    assert fire(db, 10) == 0
    assert step(db, id, "a")["status"] == "pending"


def test_sleeps_children_and_delays_fire_together(db: Db) -> None:
    parent, child = parent_and_child(db, due_in=5)
    scheduled = enqueue(db, delay=5)
    assert fire(db, 5) == 2
    assert states(db, [parent, child, scheduled]) == ["ready", "cancelled", "ready"]


def test_timers_pass_over_what_a_cancel_holds(db: Db, database: str) -> None:
    held, free = enqueue_many(db, {"delay": 5}, {"delay": 5})
    with session(database) as other, other.transaction():
        assert cancel(other, held) == "cancelled"
        assert fire(db, 5) == 1
    assert states(db, [held, free]) == ["cancelled", "ready"]


def test_started_children_time_out_nobody(db: Db) -> None:
    register(db, "work", "child")
    id = enqueue(db)
    claim(db)
    save(db, id, ops=[op(id, "s", "start", {})])
    park(db, id, op(id, "n", "sleep", due_in=5))
    fire(db, 5)
    assert (step(db, id, "s")["status"], state(db, id)) == ("pending", "ready")
