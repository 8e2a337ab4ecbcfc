"""reconcile and retire: running → ready at no cost."""

from uuid import UUID

import pytest

from tests.sql.support import (
    WORKER,
    Db,
    array,
    at,
    blank,
    call,
    cancel,
    claim,
    complete,
    count,
    enqueue,
    enqueue_many,
    op,
    parent_and_child,
    register,
    row,
    save,
    state,
    states,
    step,
)


def reconcile(db: Db, *known: int) -> object:
    return call(db, "reconcile", WORKER, array(known), at(0))


@pytest.mark.covers("P5")
def test_a_claim_whose_reply_was_lost_is_given_back(db: Db) -> None:
    register(db, "work")
    ids = enqueue_many(db, *blank(2))
    claim(db, limit=1, token=1)
    claim(db, limit=1, token=2)
    reconcile(db, 1)
    assert states(db, ids) == ["running", "ready"]
    assert (row(db, ids[1])["failures"], row(db, ids[1])["crashes"]) == (0, 0)


def test_all_known_gives_nothing_back(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    assert reconcile(db, 1) == {"queues": []}
    assert state(db, id) == "running"


def test_another_process_keeps_what_it_holds(db: Db) -> None:
    register(db, "work")
    register(db, worker=UUID(int=2))
    id = enqueue(db)
    claim(db, worker=UUID(int=2), token=7)
    reconcile(db)
    assert state(db, id) == "running"


def test_a_dead_process_gives_nothing_back(db: Db) -> None:
    assert reconcile(db) is None


@pytest.mark.parametrize("how", ["reconcile", "retire"])
def test_what_is_given_back_keeps_its_steps(db: Db, how: str) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    call(db, "reconcile", WORKER, "{}") if how == "reconcile" else call(db, "retire", WORKER)
    register(db)
    (claimed,) = claim(db, token=2)
    assert (claimed["id"], [s[0] for s in claimed["steps"]]) == (id, ["a"])


@pytest.mark.parametrize("how", ["reconcile", "retire"])
def test_what_was_cancelled_ends(db: Db, how: str) -> None:
    parent, child = parent_and_child(db)
    claim(db)
    cancel(db, child)
    call(db, "reconcile", WORKER, "{}", at(0)) if how == "reconcile" else call(db, "retire", WORKER, at(0))
    assert states(db, [parent, child]) == ["ready", "cancelled"]
    assert step(db, parent, "call")["status"] == "cancelled"


def test_a_cancelled_one_with_running_children_ends_and_they_unwind(db: Db) -> None:
    register(db, "work", "child")
    register(db, worker=UUID(int=2))
    id = enqueue(db)
    claim(db, tasks=["work"])
    start = op(id, "s", "start", {})
    save(db, id, ops=[start])
    claim(db, worker=UUID(int=2), tasks=["child"])
    cancel(db, id)
    call(db, "retire", WORKER, at(0))
    assert states(db, [id, start["children"][0]["id"]]) == ["cancelled", "running"]


def test_a_retired_process_is_gone(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    cancel(db, enqueue(db))
    call(db, "retire", WORKER, at(0))
    assert (count(db, "orchestrator"), count(db, "lease"), count(db, "signal")) == (0, 0, 0)
    assert complete(db, id) is None
    assert row(db, id)["crashes"] == 0


def test_retiring_twice_is_no_error(db: Db) -> None:
    register(db, "work")
    assert call(db, "retire", WORKER) == call(db, "retire", WORKER) == {"queues": []}


def test_what_was_settled_stays_settled(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db)
    complete(db, id)
    call(db, "retire", WORKER)
    assert state(db, id) == "completed"
