"""finish and wake: every end of a child reaches its parent, at any depth."""

from typing import Any
from uuid import uuid4

import pytest

from tests.sql.support import (
    Db,
    cancel,
    chain,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    fail,
    finish,
    invoke,
    op,
    parent_and_child,
    row,
    save,
    settle,
    settle_plain,
    state,
    states,
    step,
)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_value_goes_up_one_level_at_a_time(db: Db, depth: int) -> None:
    ids = chain(db, depth)
    for level in range(depth, 0, -1):
        token = 1 if level == depth else 100 + level
        finish(db, ids[level], level, token=token)
        assert (state(db, ids[level - 1]), step(db, ids[level - 1], "call")["value"]) == ("ready", level)
        claim(db, token=100 + level - 1)
    assert [row(db, id)["depth"] for id in ids] == list(range(depth + 1))


def test_a_plain_completion_of_a_child_leaves_the_rows_that_any_other_leaves(db: Db) -> None:
    mine = {"id", "execution_id", "parent_id", "root_id", "child_id", "ord", "seq", "cached_seq"}
    left: list[list[dict[str, Any]]] = []
    for is_plain in (True, False):
        parent, child = parent_and_child(db)
        claim(db)
        answer = complete(db, child, 7, parent=parent) if is_plain else finish(db, child, 7)
        assert (answer["lost"], len(answer["queues"])) == ([], 1)
        ready = db.execute("select * from ready where execution_id = %s", (parent,)).fetchone() or {}
        found = [row(db, parent), row(db, child), step(db, parent, "call"), ready]
        left.append([{name: value for name, value in each.items() if name not in mine} for each in found])
        claim(db, token=9)  # the parent, so that the next round does not
    assert left[0] == left[1]
    assert all(left[0])
    assert count(db, "wait") == 0


def test_plain_completions_of_a_batch_end_cancelled_what_is_to_be_cancelled_and_answer_each_parent(db: Db) -> None:
    families = [parent_and_child(db) for _ in range(3)]
    claim(db)
    cancel(db, families[1][1], reason="because")
    completed = [{"id": child, "token": 1, "result": 5, "parent": parent} for parent, child in families]
    settle_plain(db, *completed, {"id": str(uuid4()), "token": 1, "result": 5, "parent": families[0][0]})
    settle_plain(db, *completed)
    assert [step(db, parent, "call")["status"] for parent, _ in families] == ["completed", "cancelled", "completed"]
    assert [state(db, parent) for parent, _ in families] == ["ready"] * 3
    assert [row(db, child)["result"] for _, child in families] == [5, None, 5]
    assert count(db, "ready") == 3
    assert count(db, "lease") == count(db, "wait") == 0


@pytest.mark.covers("P15")
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_failure_goes_up_one_level_at_a_time(db: Db, depth: int) -> None:
    ids = chain(db, depth)
    for level in range(depth, 0, -1):
        fail(db, ids[level], f"level {level}", token=1 if level == depth else 100 + level)
        answered = step(db, ids[level - 1], "call")
        assert (answered["status"], answered["error"]["message"]) == ("failed", f"level {level}")
        claim(db, token=100 + level - 1)


@pytest.mark.covers("P16")
def test_a_cancelled_child_answers_its_parent(db: Db) -> None:
    parent, child = parent_and_child(db)
    assert cancel(db, child, reason="because") == "cancelled"
    answered = step(db, parent, "call")
    assert (state(db, parent), answered["status"], answered["error"]["message"]) == ("ready", "cancelled", "because")


def test_a_cancelled_running_child_answers_when_it_has_unwound(db: Db) -> None:
    parent, child = parent_and_child(db)
    claim(db)
    assert cancel(db, child) == "requested"
    assert state(db, parent) == "waiting"
    finish(db, child, "too late")
    assert (state(db, parent), step(db, parent, "call")["status"]) == ("ready", "cancelled")


def test_an_answer_is_written_once(db: Db) -> None:
    parent, child = parent_and_child(db)
    claim(db)
    finish(db, child, 1)
    fail(db, child)
    assert (step(db, parent, "call")["value"], count(db, "ready")) == (1, 1)


def test_a_completed_call_shows_no_error_of_the_timeout_that_did_not_come(db: Db) -> None:
    timeout = {"type": "ChildTimeout", "message": "timed out"}
    parent, child = parent_and_child(db, due_in=60, timeout_error=timeout)
    claim(db)
    finish(db, child, 1)
    assert step(db, parent, "call")["error"] is None
    assert count(db, "timer") == 0


def test_a_child_and_its_parent_may_end_in_one_batch(db: Db) -> None:
    parent, child = parent_and_child(db)
    claim(db)
    finish(db, child)
    claim(db, token=2)
    start = op(parent, "s", "start", {})
    save(db, parent, token=2, ops=[start])
    grandchild = start["children"][0]["id"]
    claim(db, token=3)
    settle(
        db, {"id": parent, "outcome": "completed", "token": 2}, {"id": grandchild, "outcome": "completed", "token": 3}
    )
    assert states(db, [parent, grandchild])[0] == "completed"
    assert count(db, "lease") <= 1


@pytest.mark.covers("P17")
def test_the_children_of_a_failed_parent_are_cancelled_to_any_depth(db: Db) -> None:
    ids = chain(db, 3)
    assert cancel(db, ids[0]) == "cancelled"
    assert states(db, ids) == ["cancelled", "cancelled", "cancelled", "running"]
    finish(db, ids[3])
    assert state(db, ids[3]) == "cancelled"


def test_an_answer_reads_no_steps_of_others_whatever_was_planned(db: Db) -> None:
    """The statements of a session are planned while there are few steps, and stay as they are."""
    ids = chain(db, 2)
    db.execute("vacuum analyze step")
    finish(db, ids[2])
    save(db, ids[1], *[f"step {n}" for n in range(500)], token=1)
    enqueue(db)
    invoke(db, claim_one(db, tasks=["work"], token=2), token=2)
    child = claim_one(db, tasks=["child"], limit=1, token=3)
    with db.transaction():
        before = steps_read(db)
        finish(db, child, token=3)
        assert steps_read(db) - before < 20


def steps_read(db: Db) -> int:
    """Return how many rows of steps this transaction has read."""
    found = db.execute(
        "select seq_tup_read + coalesce(idx_tup_fetch, 0) as read from pg_stat_xact_user_tables"
        " where schemaname = 'pgconductor' and relname = 'step'"
    ).fetchone()
    return int(found["read"]) if found else 0
