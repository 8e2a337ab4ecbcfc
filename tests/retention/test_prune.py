"""prune: what has been kept long enough goes, whole trees at a time; nothing else does."""

from uuid import UUID, uuid4

import psycopg
import pytest

from tests.retention.support import (
    DAY,
    FOR_EVER,
    completed,
    completed_tree,
    exists,
    id_at,
    keep,
    prune,
    ready,
)
from tests.sql.support import (
    Background,
    Db,
    at,
    call,
    cancel,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    fail,
    finish,
    invoke,
    save,
    session,
    state,
    states,
    wait_until_blocked,
)


def test_a_completed_execution_goes_after_its_time_and_not_before(db: Db) -> None:
    keep(db)
    id = completed(db)
    assert prune(db, 7 * DAY - 60) == 0
    assert state(db, id) == "completed"
    assert prune(db, 7 * DAY + 60) == 1
    assert exists(db, id) == [False]


def test_a_prune_gives_up_at_a_lock_that_others_hold_on_to_and_removes_nothing(db: Db, database: str) -> None:
    keep(db)
    id = completed(db)
    with session(database) as other, other.transaction():
        other.execute(b"lock table execution in share mode")
        answer = call(db, "prune", 1000, 10001, at(8 * DAY))
        assert (answer["removed"], answer["more"]) == (0, False)
        assert "gave_up" in answer
        assert exists(db, id) == [True]
    assert prune(db, 8 * DAY) == 1


def test_a_prune_does_not_wait_for_the_disk(db: Db) -> None:
    keep(db)
    with db.transaction():
        db.execute("set local synchronous_commit = on")
        assert prune(db, 0) == 0
        assert db.execute("show synchronous_commit").fetchall() == [{"synchronous_commit": "off"}]


@pytest.mark.parametrize("ending", ["failed", "cancelled"])
def test_what_failed_or_was_cancelled_goes_by_keep_failed(db: Db, ending: str) -> None:
    keep(db)
    id = ready(db)
    if ending == "failed":
        fail(db, claim_one(db))
    else:
        cancel(db, id)
    assert prune(db, 29 * DAY) == 0
    assert state(db, id) == ending
    assert prune(db, 31 * DAY) == 1


def test_everything_that_belongs_to_an_execution_goes_with_it(db: Db) -> None:
    keep(db)
    id = ready(db, dedupe_key="once")
    save(db, claim_one(db), "a", "b")
    complete(db, id)
    prune(db, 8 * DAY)
    tables = ("execution", "step", "dedupe", "watch", "wait_item", "wait_link", "expiry", "prune_later")
    assert {table: count(db, table) for table in tables} == dict.fromkeys(tables, 0)


def test_a_key_is_free_again_when_its_execution_is_gone(db: Db) -> None:
    keep(db)
    first = completed(db, dedupe_key="once")
    assert enqueue(db, dedupe_key="once") == first
    prune(db, 8 * DAY)
    assert enqueue(db, dedupe_key="once") != first


def test_true_keeps_for_ever(db: Db) -> None:
    keep(db, FOR_EVER, FOR_EVER)
    id = completed(db)
    assert prune(db, 10_000 * DAY) == 0
    assert state(db, id) == "completed"


def test_what_was_kept_for_ever_goes_when_the_code_says_otherwise(db: Db) -> None:
    keep(db, FOR_EVER, FOR_EVER)
    completed(db)
    prune(db, 10 * DAY)
    keep(db, 7 * DAY)
    assert prune(db, 10 * DAY) == 1


def test_registering_without_lengths_keeps_for_the_default_ones(db: Db) -> None:
    call(db, "register_tasks", "test", [{"name": "work", "queue": "default", "max_attempts": 3, "max_crashes": 5}])
    row = db.execute("select keep_completed_for, keep_failed_for from task where name = 'work'").fetchone()
    assert row is not None
    assert [each.days for each in row.values()] == [7, 30]


def test_what_has_not_ended_stays_and_goes_by_its_end(db: Db) -> None:
    keep(db)
    waiting = ready(db)
    assert prune(db, 8 * DAY) == 0
    claim_one(db, now=9 * DAY)
    complete(db, waiting, now=9 * DAY)
    assert prune(db, 15 * DAY) == 0
    assert prune(db, 16 * DAY + 60) == 1


def test_a_child_goes_with_its_root_and_not_before(db: Db) -> None:
    keep(db)
    register_child_for = 60.0
    keep(db, register_child_for, register_child_for, "child")
    parent, children = completed_tree(db, 3)
    assert prune(db, 6 * DAY) == 0
    assert prune(db, 8 * DAY) == 4
    assert exists(db, parent, *children) == [False] * 4


@pytest.mark.covers("F76")
def test_a_waiting_parent_keeps_its_ended_children(db: Db) -> None:
    keep(db)
    parent = ready(db)
    child = invoke(db, claim_one(db))
    complete_child = claim_one(db)
    assert complete_child == child
    finish(db, child, 1, worker=UUID(int=1))
    assert prune(db, 400 * DAY) == 0
    assert states(db, [parent, child]) == ["ready", "completed"]


@pytest.mark.covers("F76")
def test_a_redriven_child_keeps_its_whole_tree(db: Db) -> None:
    keep(db)
    parent = ready(db)
    child = invoke(db, claim_one(db))
    fail(db, claim_one(db))
    fail(db, claim_one(db, token=2), token=2)
    assert call(db, "redrive", UUID(child))["result"] == "ready"
    assert prune(db, 31 * DAY) == 0
    assert states(db, [parent, child]) == ["failed", "ready"]


def test_a_redriven_execution_is_found_again_after_its_second_life(db: Db) -> None:
    keep(db, 7 * DAY, FOR_EVER)
    id = ready(db)
    fail(db, claim_one(db))
    prune(db, 8 * DAY)
    call(db, "redrive", UUID(id))
    complete(db, claim_one(db, token=2, now=8 * DAY), token=2, now=8 * DAY)
    assert prune(db, 14 * DAY) == 0
    assert prune(db, 15 * DAY + 60) == 1


def test_a_detached_child_is_a_root_of_its_own(db: Db) -> None:
    keep(db)
    keep(db, FOR_EVER, FOR_EVER, "child")
    parent = ready(db)
    started: dict[str, object] = {"id": id_at(0, 5), "task": "child", "payload": {}}
    detached = {"name": "start", "round": 0, "kind": "start", "detached": True, "children": [started]}
    save(db, claim_one(db), ops=[detached])
    complete(db, parent)
    claim_one(db)
    complete(db, id_at(0, 5))
    assert prune(db, 8 * DAY) == 1
    assert exists(db, parent, id_at(0, 5)) == [False, True]


def test_a_tree_too_large_for_one_transaction_goes_in_steps_root_first(db: Db) -> None:
    keep(db)
    parent, children = completed_tree(db, 5)
    assert call(db, "prune", 2, 3, at(8 * DAY)) == {"removed": 1, "more": True}
    assert exists(db, parent, *children) == [False] + [True] * 5
    assert call(db, "prune", 2, 3, at(8 * DAY)) == {"removed": 2, "more": True}
    assert call(db, "redrive", UUID(children[-1]))["result"] == "unknown"
    assert prune(db, 8 * DAY, limit=2, size_max=3) == 3
    assert count(db, "execution") == count(db, "step") == count(db, "prune_rest") == 0


def test_a_sweep_says_whether_there_is_something_to_prune(db: Db) -> None:
    keep(db)
    completed(db, now=DAY)
    prune(db, DAY)
    due = [call(db, "sweep", "20 seconds", at(now))["prune"] for now in (DAY + 60, 8 * DAY + 60)]
    assert due == [False, True]
    prune(db, 8 * DAY + 60)
    prune(db, 8 * DAY + 60)  # the cursors begin their daily pass
    assert call(db, "sweep", "20 seconds", at(8 * DAY + 120))["prune"] is False


def test_small_batches_come_to_the_same_end(db: Db) -> None:
    keep(db)
    for number in range(7):
        completed(db, number=number)
    completed_tree(db, 2, number=10)
    kept = ready(db, number=99)
    assert prune(db, 8 * DAY, limit=2) == 10
    assert count(db, "execution") == 1
    assert state(db, kept) == "ready"


def test_a_cursor_passes_over_what_is_kept_for_other_lengths_ten_times_as_fast(db: Db) -> None:
    keep(db, FOR_EVER, FOR_EVER, "work")
    keep(db, 7 * DAY, FOR_EVER, "child")
    ids = [completed(db, number=number, task="child") for number in (30, 31, 32)]
    for number in range(25):
        ready(db, number=number)
    removed = [call(db, "prune", 2, 10_001, at(8 * DAY))["removed"] for _ in range(4)]
    assert removed == [0, 1, 2, 0]  # after 20; after five more
    assert exists(db, *ids) == [False] * 3
    assert count(db, "execution") == 25


def test_a_cursor_begins_anew_each_day_whatever_comes_to_its_end_meanwhile(db: Db) -> None:
    keep(db)
    completed(db, number=1)
    assert prune(db, 8 * DAY) == 1
    late = enqueue(db, id=id_at(-300 * DAY), now=8 * DAY)
    complete(db, claim_one(db, now=8 * DAY), now=8 * DAY)
    removed = 0
    for number in range(20):
        day = 15.5 + number / 2
        completed(db, now=(day - 7.1) * DAY, number=100 + number)
        removed += prune(db, day * DAY)
    assert exists(db, late) == [False]
    assert removed == 21


def test_what_was_made_by_a_clock_far_behind_is_found_a_day_later(db: Db) -> None:
    keep(db)
    completed(db, number=1)
    assert prune(db, 8 * DAY) == 1
    late = enqueue(db, id=id_at(-300 * DAY), now=8 * DAY)
    complete(db, claim_one(db, now=8 * DAY), now=8 * DAY)
    assert prune(db, 15.5 * DAY) == 0
    assert prune(db, 16.6 * DAY) + prune(db, 16.7 * DAY) == 1
    assert exists(db, late) == [False]


# ---------------------------------------------------------------- beside others


def test_a_second_prune_does_not_wait_for_the_first(db: Db, database: str) -> None:
    keep(db)
    completed(db)
    with session(database) as other, other.transaction():
        call(other, "prune", 10, 10, at(8 * DAY))
        assert call(db, "prune", 10, 10, at(8 * DAY)) == {"removed": 0, "more": False}


def test_an_execution_that_somebody_holds_is_passed_over_and_goes_later(db: Db, database: str) -> None:
    keep(db)
    held, free = completed(db, number=1), completed(db, number=2)
    with session(database) as other, other.transaction():
        other.execute("select from execution where id = %s for update", (held,))
        assert prune(db, 8 * DAY) == 1
    assert exists(db, held, free) == [True, False]
    assert prune(db, 8 * DAY + 61) == 1


def test_claiming_does_not_wait_for_a_prune(db: Db, database: str) -> None:
    keep(db)
    completed(db)
    next_one = ready(db, 8 * DAY)
    with session(database) as other, other.transaction():
        assert call(other, "prune", 10, 10, at(8 * DAY))["removed"] == 1
        assert claim_one(db, now=8 * DAY) == next_one


def test_who_enqueues_with_a_key_that_is_being_pruned_gets_a_new_execution(db: Db, database: str) -> None:
    keep(db)
    old = completed(db, dedupe_key="once")
    with session(database) as pruner, session(database) as caller:
        with pruner.transaction():
            call(pruner, "prune", 10, 10, at(8 * DAY))
            call_again = Background(lambda: enqueue(caller, dedupe_key="once", now=8 * DAY))
            wait_until_blocked(db, caller)
        new = call_again.result()
    assert new != old
    assert state(db, new) == "ready"


def test_who_redrives_what_is_being_pruned_is_told_that_it_is_gone(db: Db, database: str) -> None:
    keep(db)
    parent = ready(db)
    child = invoke(db, claim_one(db))
    fail(db, claim_one(db))
    fail(db, claim_one(db, token=2), token=2)
    with session(database) as pruner, session(database) as caller:
        with pruner.transaction():
            assert call(pruner, "prune", 10, 10, at(31 * DAY))["removed"] == 2
            redriven = Background(lambda: call(caller, "redrive", UUID(child)))
            wait_until_blocked(db, caller)
        assert redriven.result() == {"result": "unknown"}
    assert exists(db, parent, child) == [False, False]


@pytest.mark.covers("F76")
def test_a_prune_that_is_killed_leaves_every_tree_whole_or_gone(db: Db, database: str) -> None:
    keep(db)
    parent, children = completed_tree(db, 3)
    with session(database) as victim:
        victim.execute("begin")
        assert call(victim, "prune", 10, 100, at(8 * DAY))["removed"] == 4
        db.execute("select pg_terminate_backend(%s)", (victim.info.backend_pid,))
        with pytest.raises(psycopg.OperationalError):
            victim.execute("commit")
    assert exists(db, parent, *children) == [True] * 4
    assert prune(db, 8 * DAY) == 4


# ---------------------------------------------------------------- nothing is kept


def test_false_removes_at_once(db: Db) -> None:
    keep(db, 0, 0)
    id = ready(db, dedupe_key="once")
    save(db, claim_one(db), "a")
    complete(db, id)
    assert exists(db, id) == [False]
    assert count(db, "step") == count(db, "dedupe") == 0


def test_a_failure_of_a_task_that_keeps_nothing_goes_with_the_next_prune(db: Db) -> None:
    keep(db, FOR_EVER, 0)
    id = ready(db)
    fail(db, claim_one(db))
    assert prune(db, 0) == 1
    assert exists(db, id) == [False]


def test_a_tree_of_a_task_that_keeps_nothing_goes_with_the_next_prune(db: Db) -> None:
    keep(db, 0, 0)
    parent, children = completed_tree(db, 2)
    assert prune(db, 0) == 3
    assert exists(db, parent, *children) == [False] * 3


def test_a_root_that_ends_plainly_takes_its_answered_child_along_at_the_next_prune(db: Db) -> None:
    keep(db, 0, 0)
    parent = ready(db)
    child = invoke(db, claim_one(db))
    finish(db, claim_one(db, token=2), token=2)
    assert claim_one(db, token=3) == parent
    complete(db, parent, token=3)
    assert exists(db, parent, child) == [True, True]
    assert prune(db, 0) == 2
    assert exists(db, parent, child) == [False, False]


def test_what_somebody_waits_for_stays_until_its_value_has_arrived(db: Db) -> None:
    keep(db, 0, 0)
    id = ready(db)
    call(db, "watch_result", UUID(id), "somebody")
    complete(db, claim_one(db), 7)
    assert prune(db, 1) == 0
    assert call(db, "watch_result", UUID(id), None)["result"] == 7
    assert prune(db, 61) == 1


def test_an_enqueue_that_is_repeated_does_not_bring_back_what_was_removed(db: Db) -> None:
    keep(db, 0, 0)
    call_ = {"id": str(uuid4())}
    enqueue_many(db, call_)
    complete(db, claim_one(db))
    enqueue_many(db, call_, again=True)
    assert count(db, "execution") == 0


def test_what_was_removed_is_forgotten_after_an_hour(db: Db) -> None:
    keep(db, 0, 0)
    completed(db)
    assert count(db, "removed") == 1
    prune(db, 3_599)
    assert count(db, "removed") == 1
    prune(db, 3_602)
    assert count(db, "removed") == 0


def test_a_tree_of_which_somebody_holds_a_member_is_not_waited_for(db: Db, database: str) -> None:
    keep(db)
    parent, children = completed_tree(db, 2)
    with session(database) as holder:
        holder.execute("begin")
        holder.execute("select from execution where id = %s for update", (children[0],))
        db.execute("set lock_timeout = '5s'")
        prune(db, 8 * DAY)
        assert exists(db, parent, *children) == [True] * 3
        holder.execute("commit")
    prune(db, 9 * DAY)
    assert exists(db, parent, *children) == [False] * 3
