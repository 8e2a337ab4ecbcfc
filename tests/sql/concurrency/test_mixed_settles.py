"""One settle with plain completions and other outcomes takes its locks in one look: crossing ones do not deadlock."""

from functools import partial
from uuid import UUID

import psycopg
import pytest

from tests.sql.support import (
    WORKER,
    Background,
    Db,
    blank,
    cancel,
    claim,
    claim_one,
    enqueue,
    op,
    park,
    register,
    session,
    settle_both,
    settle_plain,
    state,
    wait_until_blocked,
)

OTHER = UUID(int=2)
BOOM = {"type": "ValueError", "message": "boom"}


def family(db: Db, token: int) -> tuple[str, list[str]]:
    """Return a parent that waits for two children, and them."""
    enqueue(db)
    parent = claim_one(db, tasks=["work"], token=token)
    children = op(parent, "all", "invoke_all", {}, {})
    park(db, parent, children, token=token)
    return parent, [each["id"] for each in children["children"]]


def release_when_blocked(db: Db, blocker: psycopg.Connection[object], *waiting: psycopg.Connection[object]) -> None:
    for each in waiting:
        wait_until_blocked(db, each)
    blocker.rollback()


def test_two_workers_that_complete_and_fail_children_of_each_other_s_parents(db: Db, database: str) -> None:
    register(db, "work", "child")
    register(db, worker=OTHER)
    (one, of_one), (two, of_two) = family(db, 1), family(db, 2)
    for place, child in enumerate([*of_one, *of_two]):
        assert claim_one(db, worker=(WORKER, OTHER)[place % 2], token=10 + place, limit=1, tasks=["child"]) == child
    with session(database) as first, session(database) as second, session(database) as blocker:
        blocker.autocommit = False
        blocker.execute("select from execution where id in (%s, %s) for update", (of_two[0], of_one[1]))
        mine = {"id": of_one[0], "token": 10, "result": 1, "parent": one}, {"id": of_two[0], "token": 12}
        theirs = {"id": of_two[1], "token": 13, "result": 1, "parent": two}, {"id": of_one[1], "token": 11}
        failed = {"outcome": "failed", "error": BOOM}
        settles = [
            Background(partial(settle_both, first, [mine[0]], [mine[1] | failed], worker=WORKER)),
            Background(partial(settle_both, second, [theirs[0]], [theirs[1] | failed], worker=OTHER)),
        ]
        release_when_blocked(db, blocker, first, second)
        assert [each.result()["lost"] for each in settles] == [[], []]
    assert [state(db, id) for id in (one, two)] == ["ready", "ready"]
    assert [state(db, id) for id in (*of_one, *of_two)] == ["completed", "failed", "failed", "completed"]


def test_a_cancel_of_the_parent_beside_a_completion_and_a_park_of_its_children(db: Db, database: str) -> None:
    register(db, "work", "child")
    parent, (done, napping) = family(db, 1)
    for place, child in enumerate((done, napping)):
        assert claim_one(db, token=10 + place, limit=1, tasks=["child"]) == child
    with session(database) as first, session(database) as second, session(database) as blocker:
        blocker.autocommit = False
        blocker.execute("select lock_trees(array[cast(%s as uuid)], '{}')", (parent,))
        cancelling = Background(partial(cancel, first, parent))
        wait_until_blocked(db, first)
        nap = {
            "id": napping,
            "token": 11,
            "outcome": "parked",
            "ops": [op(napping, "nap", "sleep", due_in=60)],
            "awaits": [{"name": "nap", "round": 0, "kind": "sleep", "awaited": True}],
        }
        completed = {"id": done, "token": 10, "result": 1, "parent": parent}
        settling = Background(partial(settle_both, second, [completed], [nap], worker=WORKER))
        release_when_blocked(db, blocker, second)
        assert cancelling.result() == "cancelled"
        settling.result()
    assert [state(db, id) for id in (parent, napping)] == ["cancelled", "cancelled"]


def test_plain_completions_lock_their_executions_in_the_order_of_their_ids(db: Db, database: str) -> None:
    register(db, "work")
    ids = [str(UUID(int=number)) for number in (5, 3, 6, 1, 4, 2)]  # so they lie in the table
    for id in ids:
        enqueue(db, id=id)
        assert claim_one(db) == id
    with session(database) as settling, session(database) as blocker:
        blocker.autocommit = False
        blocker.execute("select from execution where id = %s for update", (ids[4],))
        settle = Background(partial(settle_plain, settling, *({"id": id, "token": 1, "result": 1} for id in ids)))
        wait_until_blocked(db, settling)
        free = db.execute("select id from execution order by id for update skip locked").fetchall()
        assert [str(row["id"]) for row in free] == sorted(ids)[4:]
        blocker.rollback()
        assert settle.result()["lost"] == []
    assert {state(db, id) for id in ids} == {"completed"}


@pytest.mark.parametrize("held", [2, 4])
def test_plain_completions_of_one_depth_are_locked_before_their_parents(db: Db, database: str, held: int) -> None:
    register(db, "work", "child")
    parent, _ = family(db, 1)
    enqueue(db)
    other = claim_one(db, tasks=["work"], token=2)
    children = op(other, "all", "invoke_all", *blank(6))
    park(db, other, children, token=2)
    ids = sorted(each["id"] for each in children["children"])
    claim(db, tasks=["child"], token=3)
    cancel(db, ids[3])  # it is locked with the others, and ends cancelled
    completed = [{"id": id, "token": 3, "result": 1, "parent": other} for id in ids]
    with session(database) as settling, session(database) as blocker:
        blocker.autocommit = False
        blocker.execute("select from execution where id = %s for update", (ids[held],))
        settle = Background(partial(settle_plain, settling, *completed))
        wait_until_blocked(db, settling)
        free = db.execute(
            "select id::text from execution where id = any(cast(%s as uuid[])) for update skip locked",
            ([other, *ids],),
        ).fetchall()
        assert {row["id"] for row in free} == {other, *ids[held + 1 :]}
        blocker.rollback()
        assert settle.result()["lost"] == []
    assert [state(db, id) for id in ids] == ["completed"] * 3 + ["cancelled"] + ["completed"] * 2
    assert (state(db, other), state(db, parent)) == ("ready", "waiting")


def test_plain_completions_of_several_depths_are_locked_child_before_root(db: Db, database: str) -> None:
    register(db, "work", "child")
    root = str(UUID(int=1))  # before any other id
    enqueue(db, id=root)
    assert claim_one(db, tasks=["work"], token=9) == root
    parent, (child, _) = family(db, 1)
    claim(db, tasks=["child"], token=2)
    completed = {"id": root, "token": 9, "result": 1}, {"id": child, "token": 2, "result": 1, "parent": parent}
    with session(database) as settling, session(database) as blocker:
        blocker.autocommit = False
        blocker.execute("select from execution where id = %s for update", (child,))
        settle = Background(partial(settle_plain, settling, *completed))
        wait_until_blocked(db, settling)
        free = db.execute("select id::text from execution where depth = 0 for update skip locked").fetchall()
        assert {row["id"] for row in free} == {root, parent}
        blocker.rollback()
        assert settle.result()["lost"] == []
    assert [state(db, id) for id in (root, child)] == ["completed"] * 2


def test_other_outcomes_and_plain_completions_are_locked_in_one_order(db: Db, database: str) -> None:
    register(db, "work")
    plain, failing = str(UUID(int=1)), str(UUID(int=2))
    for id in (plain, failing):
        enqueue(db, id=id)
        assert claim_one(db) == id
    failed = {"id": failing, "token": 1, "outcome": "failed", "error": BOOM}
    with session(database) as settling, session(database) as blocker:
        blocker.autocommit = False
        blocker.execute("select from execution where id = %s for update", (plain,))
        completed = [{"id": plain, "token": 1, "result": 1}]
        settle = Background(partial(settle_both, settling, completed, [failed]))
        wait_until_blocked(db, settling)
        free = db.execute("select id from execution for update skip locked").fetchall()
        assert [str(row["id"]) for row in free] == [failing]
        blocker.rollback()
        assert settle.result()["lost"] == []
    assert [state(db, id) for id in (plain, failing)] == ["completed", "failed"]
