"""cancel: any live state → cancelled, at once or as soon as the handler has unwound."""

from uuid import UUID, uuid4

import pytest

from tests.sql.support import (
    WORKER,
    Background,
    Db,
    call,
    cancel,
    chain,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    fan_out,
    finish,
    op,
    parent_and_child,
    park,
    register,
    retry,
    row,
    save,
    session,
    state,
    states,
    step,
    wait_until_blocked,
)


@pytest.fixture(autouse=True)
def worker(db: Db) -> None:
    register(db, "work", "child")


def in_state(db: Db, name: str) -> str:
    id = enqueue(db, delay=60 if name == "scheduled" else None)
    if name in {"running", "backing off", "waiting"}:
        claim(db)
    if name == "backing off":
        retry(db, id, delay=60)
    if name == "waiting":
        park(db, id, op(id, "nap", "sleep", due_in=60))
    return id


@pytest.mark.covers("F70")
@pytest.mark.parametrize("name", ["scheduled", "ready", "backing off", "waiting"])
def test_what_does_not_run_ends_at_once(db: Db, name: str) -> None:
    id = in_state(db, name)
    assert cancel(db, id, reason="why not") == "cancelled"
    found = row(db, id)
    assert (found["outcome"], found["cancel_reason"]) == ("cancelled", "why not")
    assert count(db, "timer") == count(db, "ready") == count(db, "wait") == 0


def test_what_runs_is_told_and_ends_when_it_has_unwound(db: Db) -> None:
    id = in_state(db, "running")
    assert cancel(db, id) == "requested"
    assert state(db, id) == "running"
    assert call(db, "beat", WORKER)["cancel"] == [id]
    complete(db, id)
    assert state(db, id) == "cancelled"


def test_a_cancel_says_whom_to_notify(db: Db) -> None:
    id = in_state(db, "running")
    assert call(db, "cancel", UUID(id), "x")["watchers"] == [str(WORKER)]


@pytest.mark.covers("F70")
@pytest.mark.parametrize("name", ["ready", "running"])
def test_a_second_cancel_changes_nothing(db: Db, name: str) -> None:
    id = in_state(db, name)
    cancel(db, id, reason="first")
    assert cancel(db, id, reason="second") == {"ready": "ended", "running": "requested"}[name]
    assert row(db, id)["cancel_reason"] == "first"
    assert count(db, "signal") == (name == "running")


@pytest.mark.covers("F70")
def test_what_has_ended_stays_as_it_is(db: Db) -> None:
    id = in_state(db, "running")
    complete(db, id, 1)
    assert cancel(db, id) == "ended"
    assert (row(db, id)["outcome"], row(db, id)["cancel_requested_at"]) == ("completed", None)


def test_an_unknown_id_is_unknown(db: Db) -> None:
    assert cancel(db, str(uuid4())) == "unknown"


@pytest.mark.covers("F70", "P17")
def test_the_whole_tree_is_cancelled(db: Db) -> None:
    ids = chain(db, 3)
    finish(db, ids[3])
    assert cancel(db, ids[0]) == "cancelled"
    assert states(db, ids) == ["cancelled"] * 3 + ["completed"]


@pytest.mark.covers("F70", "P16")
def test_the_middle_of_a_tree_answers_upwards_and_cancels_downwards(db: Db) -> None:
    ids = chain(db, 3)
    cancel(db, ids[1])
    assert states(db, ids) == ["ready", "cancelled", "cancelled", "running"]
    assert step(db, ids[0], "call")["status"] == "cancelled"


def test_a_fan_out_goes_with_its_parent_held_children_too(db: Db) -> None:
    parent, children = fan_out(db, 5, window=2)
    claim(db, limit=1, tasks=["child"], token=2)
    cancel(db, parent)
    assert states(db, [parent, *children]) == ["cancelled", "running", *["cancelled"] * 4]
    finish(db, children[0], token=2)
    assert count(db, "wait_item") == 0


def test_a_held_child_can_be_cancelled_and_releases_nobody(db: Db) -> None:
    parent, children = fan_out(db, 3, window=1)
    cancel(db, children[1])
    assert states(db, children) == ["ready", "cancelled", "scheduled"]
    finish(db, claim_one(db))
    finish(db, claim_one(db, token=2), token=2)
    assert states(db, [parent, *children]) == ["ready", "completed", "cancelled", "completed"]


def test_a_cancelled_child_in_the_window_releases_the_next(db: Db) -> None:
    _, children = fan_out(db, 2, window=1)
    cancel(db, children[0])
    assert states(db, children) == ["cancelled", "ready"]


def test_all_children_cancelled_one_by_one_answer_the_fan_out(db: Db) -> None:
    parent, children = fan_out(db, 4, window=2)
    for child in reversed(children):
        cancel(db, child)
    assert (state(db, parent), step(db, parent, "all")["status"]) == ("ready", "completed")


@pytest.mark.covers("P18")
def test_a_running_parent_keeps_running_while_its_children_end(db: Db) -> None:
    id = in_state(db, "running")
    start = op(id, "s", "start", {})
    save(db, id, ops=[start])
    assert cancel(db, id) == "requested"
    assert states(db, [id, start["children"][0]["id"]]) == ["running", "cancelled"]


def test_a_key_names_what_to_cancel(db: Db) -> None:
    id = enqueue(db, dedupe_key="k")
    assert call(db, "cancel_by_key", "work", "other", "x")["result"] == "unknown"
    assert call(db, "cancel_by_key", "work", "k", "x")["result"] == "cancelled"
    assert state(db, id) == "cancelled"


def test_a_handler_cancels_once_and_records_it(db: Db) -> None:
    target = enqueue(db, delay=60)
    id = in_state(db, "running")
    for _ in range(2):
        call(db, "cancel_as_step", WORKER, UUID(id), 1, "cancel#1", UUID(target), "x")
    assert (state(db, target), step(db, id, "cancel#1")["value"]) == ("cancelled", True)


def test_a_handler_without_a_lease_cancels_nobody(db: Db) -> None:
    target, id = enqueue(db, delay=60), in_state(db, "running")
    assert call(db, "cancel_as_step", WORKER, UUID(id), 9, "cancel#1", UUID(target), "x") is None
    assert state(db, target) == "scheduled"


def test_a_cancel_as_step_that_outlasts_its_lease_has_not_happened(db: Db, database: str) -> None:
    target, id = enqueue(db, delay=60), in_state(db, "running")
    with session(database) as holder, session(database) as late:
        holder.execute("begin")
        holder.execute("select from execution where id = %s for update", (target,))
        asked = Background(lambda: call(late, "cancel_as_step", WORKER, UUID(id), 1, "cancel#1", UUID(target), "x"))
        wait_until_blocked(db, late)
        finish(db, id)
        holder.execute("commit")
        assert asked.result() is None
    assert (state(db, target), count(db, "step")) == ("scheduled", 0)


def test_watchers_of_the_whole_tree_are_told(db: Db) -> None:
    parent, child = parent_and_child(db)
    call(db, "watch_result", UUID(child), "you")
    call(db, "watch_result", UUID(parent), "me")
    assert set(call(db, "cancel", UUID(parent), "x")["watchers"]) == {"me", "you"}
