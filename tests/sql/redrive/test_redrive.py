"""redrive: failed, cancelled → ready, as a new life."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.sql.support import (
    Db,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    enqueue,
    fail,
    fan_out,
    finish,
    op,
    parent_and_child,
    park,
    register,
    retry,
    row,
    save,
    state,
    states,
    step,
)


def redrive(db: Db, id: str) -> str:
    return str(call(db, "redrive", UUID(id))["result"])


def test_a_failed_execution_runs_again_over_its_recorded_steps(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    fail(db, id)
    assert redrive(db, id) == "ready"
    (claimed,) = claim(db, token=2)
    assert ([s[0] for s in claimed["steps"]], claimed["failures"]) == (["a"], 0)
    complete(db, id, 1, token=2)
    assert (row(db, id)["outcome"], row(db, id)["error"]) == ("completed", None)


def test_a_cancelled_execution_can_complete_in_its_new_life(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    cancel(db, id)
    redrive(db, id)
    complete(db, claim_one(db))
    assert state(db, id) == "completed"


@pytest.mark.parametrize("name", ["ready", "running", "completed"])
def test_what_lives_or_is_completed_is_refused(db: Db, name: str) -> None:
    register(db, "work")
    id = enqueue(db)
    if name != "ready":
        claim(db)
    if name == "completed":
        complete(db, id)
    assert redrive(db, id) == "refused"
    assert state(db, id) == name


def test_an_unknown_id_is_unknown(db: Db) -> None:
    assert redrive(db, str(uuid4())) == "unknown"


def test_a_redrive_repeated_makes_one_ready_row(db: Db) -> None:
    id = enqueue(db)
    cancel(db, id)
    assert [redrive(db, id), redrive(db, id)] == ["ready", "refused"]


def test_a_parent_keeps_the_answer_that_it_had(db: Db) -> None:
    parent, child = parent_and_child(db)
    claim(db)
    fail(db, child)
    redrive(db, child)
    finish(db, claim_one(db, tasks=["child"], token=2), token=2)
    assert (state(db, child), step(db, parent, "call")["status"]) == ("completed", "failed")


def test_a_fan_out_keeps_the_answers_of_children_that_are_redriven(db: Db) -> None:
    """They are counted once, and what they come to later is theirs alone."""
    parent, children = fan_out(db, 4)
    claim(db)
    for child in children[:2]:
        fail(db, child, "first")
        redrive(db, child)
    again = {each["id"] for each in claim(db, tasks=["child"], token=2)}
    assert again == set(children[:2])
    finish(db, children[0], "late", token=2)
    finish(db, children[2], "in time")
    assert state(db, parent) == "waiting"
    fail(db, children[3], "last")
    (claimed,) = claim(db, tasks=["work"], token=3)
    finish(db, children[1], "later", token=2)
    ((_, _, _, _, status, *_, answers),) = claimed["steps"]
    # of one that completed, the value is told alone
    told: list[list[Any]] = [each if len(each) > 1 else [*each, "completed", None] for each in answers]
    assert (status, [each[1] for each in told]) == ("completed", ["failed", "failed", "completed", "failed"])
    assert [each[2] and each[2]["message"] for each in told] == ["first", "first", None, "last"]
    assert [each[0] for each in told] == [None, None, "in time", None]
    retry(db, parent, token=3)
    (claimed,) = claim(db, tasks=["work"], token=4)
    assert claimed["steps"][0][-1] == answers


def cancelled_after_a_redrive(db: Db) -> tuple[str, list[str]]:
    """Return a cancelled parent and its two children: one was redriven before, the other is told to stop."""
    parent, children = fan_out(db, 2)
    claim(db)
    fail(db, children[0])
    redrive(db, children[0])
    cancel(db, parent)
    return parent, children


def redrive_and_park(db: Db, parent: str) -> None:
    redrive(db, parent)
    claim(db, token=2)
    park(db, parent, token=2, awaits=[{"name": "all", "round": 0, "kind": "invoke_all", "awaited": True}])


def test_a_redriven_child_is_not_cancelled_with_the_parent_that_had_its_answer(db: Db) -> None:
    parent, children = cancelled_after_a_redrive(db)
    assert states(db, [parent, children[0]]) == ["cancelled", "ready"]
    assert row(db, children[1])["cancel_requested_at"] is not None


def test_a_redriven_parent_counts_no_child_that_was_redriven_before(db: Db) -> None:
    parent, children = cancelled_after_a_redrive(db)
    finish(db, children[1])
    redrive_and_park(db, parent)
    assert state(db, parent) == "ready"
    assert [step(db, parent, "all", n)["status"] for n in (1, 2)] == ["failed", "cancelled"]


def test_a_redriven_parent_sees_its_cancelled_child(db: Db) -> None:
    parent, child = parent_and_child(db)
    cancel(db, parent)
    redrive(db, parent)
    (claimed,) = claim(db, token=2)
    assert [s[4] for s in claimed["steps"]] == ["cancelled"]
    assert state(db, child) == "cancelled"


def test_a_redriven_fan_out_does_not_wait_for_the_dead(db: Db) -> None:
    parent, _ = fan_out(db, 3)
    cancel(db, parent)
    redrive_and_park(db, parent)
    assert (state(db, parent), step(db, parent, "all")["status"]) == ("ready", "completed")


def test_a_redriven_fan_out_waits_for_those_that_still_unwind(db: Db) -> None:
    parent, children = fan_out(db, 2)
    claim(db, limit=1, tasks=["child"])
    cancel(db, parent)
    redrive_and_park(db, parent)
    assert states(db, [parent, *children]) == ["waiting", "running", "cancelled"]
    finish(db, children[0])
    assert state(db, parent) == "ready"


def test_a_sleep_that_was_due_meanwhile_is_over(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    park(db, id, op(id, "nap", "sleep", due_in=5))
    cancel(db, id)
    redrive(db, id)
    claim(db, token=2)
    park(db, id, token=2, now=9, awaits=[{"name": "nap", "round": 0, "kind": "sleep", "awaited": True}])
    assert len(claim(db, now=9, fire=True, token=3)) == 1
