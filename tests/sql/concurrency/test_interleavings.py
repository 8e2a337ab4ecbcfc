"""Pairs of functions in two sessions: nothing deadlocks, nothing is lost, whoever comes first.

The first session holds its transaction open until the second waits for it or has finished, so each order of the pair
is met, and the wait is real.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import permutations

import psycopg
import pytest

from tests.sql.concurrency.trees import TREE_ACTS, Act, acts_on, grow
from tests.sql.support import (
    Background,
    Db,
    at,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    fail,
    fan_out,
    finish,
    op,
    park,
    register,
    release,
    retry,
    save,
    session,
    settle,
    state,
    states,
    step,
    wait_until_blocked,
)


@pytest.fixture
def pair(database: str) -> Iterator[tuple[Db, Db]]:
    with session(database) as first, session(database) as second:
        yield first, second


def overlap(db: Db, pair: tuple[Db, Db], one: Act, two: Act) -> tuple[object, object]:
    """Run both, the second one while the first has not committed."""
    first, second = pair
    first.execute("begin")
    answer = one(first)
    other = Background(lambda: two(second))
    wait_for_a_lock_or_the_end(db, second, other)
    first.execute("commit")
    return answer, other.result()


def wait_for_a_lock_or_the_end(db: Db, other: Db, thread: Background) -> None:
    query = "select cardinality(pg_blocking_pids(%s)) > 0 as blocked"
    while thread.is_alive():
        found = db.execute(query, (other.info.backend_pid,)).fetchone()
        if found and found["blocked"]:
            return


# ---------------------------------------------------------------- cancel against what moves the execution


MOVES: dict[str, Act] = {
    "complete": lambda db: complete(db, only(db)),
    "finish": lambda db: finish(db, only(db)),
    "fail": lambda db: fail(db, only(db)),
    "retry": lambda db: retry(db, only(db), delay=5),
    "release": lambda db: release(db, only(db)),
    "park on a sleep": lambda db: park(db, only(db), op(only(db), "nap", "sleep", due_in=5)),
    "park on a child": lambda db: park(db, only(db), op(only(db), "call", "invoke", {})),
    "start a child": lambda db: save(db, only(db), ops=[op(only(db), "s", "start", {})]),
}


def only(db: Db) -> str:
    found = db.execute("select id from execution where parent_id is null").fetchone()
    assert found is not None
    return str(found["id"])


@pytest.mark.covers("F70", "P23")
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_cancel_never_misses_what_moves(db: Db, pair: tuple[Db, Db], move: str, cancel_first: bool) -> None:
    register(db, "work", "child")
    id = enqueue(db)
    claim(db)
    acts: list[Act] = [lambda db: cancel(db, id), MOVES[move]]
    overlap(db, pair, *(acts if cancel_first else acts[::-1]))
    if state(db, id) == "running":
        release(db, id)
    ended = "completed" if move in {"complete", "finish"} else "failed" if move == "fail" else "cancelled"
    assert state(db, id) == ("cancelled" if cancel_first else ended)
    assert db.execute("select from execution where outcome is null").fetchone() is None


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_cancel_never_misses_a_claim(db: Db, pair: tuple[Db, Db], cancel_first: bool) -> None:
    register(db, "work")
    id = enqueue(db)
    acts: list[Act] = [lambda db: cancel(db, id), claim]
    overlap(db, pair, *(acts if cancel_first else acts[::-1]))
    assert state(db, id) == ("cancelled" if cancel_first else "running")
    assert count(db, "signal") == (not cancel_first)


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_cancel_never_misses_a_timer(db: Db, pair: tuple[Db, Db], cancel_first: bool) -> None:
    register(db, "work")
    id = enqueue(db, delay=5)
    acts: list[Act] = [lambda db: cancel(db, id), lambda db: call(db, "fire_timers", at(5))]
    overlap(db, pair, *(acts if cancel_first else acts[::-1]))
    assert state(db, id) == "cancelled"


@pytest.mark.parametrize("cancel_first", [True, False])
def test_a_cancel_never_misses_a_replace(db: Db, pair: tuple[Db, Db], cancel_first: bool) -> None:
    id = enqueue(db, dedupe_key="k")
    acts: list[Act] = [lambda db: cancel(db, id), lambda db: enqueue(db, dedupe_key="k", replace=True, delay=9)]
    overlap(db, pair, *(acts if cancel_first else acts[::-1]))
    assert state(db, id) == "cancelled"


@pytest.mark.parametrize("claim_first", [True, False])
def test_a_replace_never_meets_a_claim_halfway(db: Db, pair: tuple[Db, Db], claim_first: bool) -> None:
    register(db, "work")
    id = enqueue(db, dedupe_key="k")
    acts: list[Act] = [claim, lambda db: enqueue(db, dedupe_key="k", replace=True, delay=9)]
    overlap(db, pair, *(acts if claim_first else acts[::-1]))
    assert state(db, id) == ("running" if claim_first else "scheduled")


# ---------------------------------------------------------------- a parent and its child


@pytest.mark.parametrize("child_first", [True, False])
def test_a_child_that_ends_while_its_parent_parks_wakes_it(db: Db, pair: tuple[Db, Db], child_first: bool) -> None:
    register(db, "work", "child")
    parent = enqueue(db)
    claim(db)
    operation = op(parent, "call", "invoke", {})
    save(db, parent, ops=[operation])
    child = claim_one(db)
    awaits = [{"name": "call", "round": 0, "kind": "invoke", "awaited": True}]
    acts: list[Act] = [lambda db: finish(db, child), lambda db: park(db, parent, awaits=awaits)]
    overlap(db, pair, *(acts if child_first else acts[::-1]))
    assert (state(db, parent), count(db, "ready")) == ("ready", 1)


def test_two_children_that_end_together_wake_their_parent_once(db: Db, pair: tuple[Db, Db]) -> None:
    parent, children = fan_out(db, 2)
    claim(db)
    overlap(db, pair, lambda db: finish(db, children[0]), lambda db: finish(db, children[1]))
    assert (state(db, parent), count(db, "ready")) == ("ready", 1)


@pytest.mark.parametrize("child_first", [True, False])
def test_a_deadline_and_an_answer_make_one_outcome(db: Db, pair: tuple[Db, Db], child_first: bool) -> None:
    register(db, "work", "child")
    parent = enqueue(db)
    claim(db)
    operation = op(parent, "call", "invoke", {}, due_in=5)
    park(db, parent, operation)
    child = claim_one(db)
    acts: list[Act] = [lambda db: finish(db, child), lambda db: call(db, "fire_timers", at(5))]
    overlap(db, pair, *(acts if child_first else acts[::-1]))
    assert step(db, parent, "call")["status"] == ("completed" if child_first else "timed_out")
    assert state(db, child) == ("completed" if child_first else "cancelled")


# ---------------------------------------------------------------- what is declared, and what operators say


def test_a_limit_is_set_while_a_task_with_one_is_registered_for_the_first_time(
    db: Db, pair: tuple[Db, Db], database: str
) -> None:
    registering, setting = pair
    register(db, "known")
    enqueue(db, "late")
    assert call(db, "set_limit", "late", 5) is True
    known = {"name": "known", "queue": "mail", "max_attempts": 3, "max_crashes": 5}
    declared = [known, known | {"name": "late", "limits": [{"kind": "concurrency", "key_path": None, "max": 2}]}]
    with session(database) as blocker:
        blocker.execute("begin")
        blocker.execute("select from task where name = 'known' for update")
        first = Background(lambda: call(registering, "register_tasks", "d", declared))
        wait_until_blocked(db, registering)
        second = Background(lambda: call(setting, "set_limit", "late", 1))
        wait_until_blocked(db, setting)
        blocker.execute("commit")
        assert (len(first.result()), second.result()) == (2, True)
    found = db.execute("select declared_max, operator_max from task_limit").fetchone()
    assert found == {"declared_max": 2, "operator_max": 1}


# ---------------------------------------------------------------- every pair of functions over one tree


@pytest.mark.covers("F35", "F70")
@pytest.mark.parametrize(("one", "two"), list(permutations(TREE_ACTS, 2)))
def test_no_pair_deadlocks_or_loses_anything(db: Db, pair: tuple[Db, Db], one: str, two: str) -> None:
    tree = grow(db)
    acts = acts_on(tree)
    overlap(db, pair, acts[one], acts[two])
    live = [id for id in tree.values() if state(db, id) not in {"completed", "failed", "cancelled"}]
    assert "nowhere" not in states(db, live)


@pytest.mark.covers("F35")
def test_three_sessions_at_once_do_not_deadlock(db: Db, database: str) -> None:
    trees = [grow_small(db, n) for n in range(12)]

    def work(acts: list[Act]) -> None:
        with session(database) as mine:
            for act in acts:
                act(mine)

    cancels: list[Act] = [partial(cancel, id=t[0], now=30) for t in trees[::2]]
    settles: list[Act] = [
        lambda db: settle(db, *[{"id": t[1], "token": t[2], "outcome": "completed"} for t in trees], now=30)
    ]
    timers: list[Act] = [lambda db: call(db, "fire_timers", at(30), 3) for _ in range(8)]
    for each in [Background(partial(work, acts)) for acts in (cancels, settles, timers)]:
        each.result()
    assert {state(db, t[0]) for t in trees} <= {"ready", "cancelled"}


def grow_small(db: Db, n: int) -> tuple[str, str, int]:
    register(db, "work", "child")
    id = enqueue(db)
    claim(db, token=2 * n + 1, tasks=["work"])
    park(db, id, op(id, "call", "invoke", {}, due_in=5 + n), op(id, "nap", "sleep", due_in=60), token=2 * n + 1)
    enqueue_many(db, *[{"task": "later", "delay": 5}] * 2)
    return id, claim_one(db, tasks=["child"], token=2 * n + 2), 2 * n + 2


def test_the_test_would_see_a_deadlock(db: Db, pair: tuple[Db, Db]) -> None:
    first, second = pair
    first.execute("begin; select pg_advisory_xact_lock(1)")
    second.execute("begin; select pg_advisory_xact_lock(2)")
    blocked = Background(lambda: second.execute("select pg_advisory_xact_lock(1)"))
    wait_for_a_lock_or_the_end(db, second, blocked)
    refusals = [refused(lambda: first.execute("select pg_advisory_xact_lock(2)"))]
    first.rollback()
    refusals.append(refused(blocked.result))
    second.rollback()
    assert sorted(refusals) == [False, True]


def refused(body: Callable[[], object]) -> bool:
    try:
        body()
    except psycopg.errors.DeadlockDetected:
        return True
    return False
