"""An event and a wait meet once, in whatever order they are made, committed and looked at."""

from collections.abc import Iterator
from itertools import permutations

import pytest

from tests.events.support import answer, deliver, emit, running, wait_op, waiting
from tests.sql.support import (
    Background,
    Db,
    at,
    call,
    cancel,
    claim,
    count,
    enqueue,
    fail,
    finish,
    park,
    register,
    retry,
    save,
    session,
    settle,
    state,
    step,
    wait_until_blocked,
)


@pytest.fixture
def other(database: str) -> Iterator[Db]:
    with session(database) as other:
        yield other


def rest(db: Db) -> None:
    """Check that nothing pending, and no wait that an event could answer, is left."""
    for _ in range(2):  # a full delivery is followed by another
        deliver(db)
    assert count(db, "event_pending") == 0
    missed = db.execute("select w.name from event_wait w cross join lateral event_since(w) e where e.id is not null")
    assert missed.fetchall() == []


# ---------------------------------------------------------------- orders


def test_an_event_wakes_who_waits_for_it(db: Db) -> None:
    id = waiting(db)
    emit(db, {"order_id": 7})
    assert state(db, id) == "waiting"
    deliver(db)
    assert (state(db, id), answer(db, id)) == ("ready", {"order_id": 7})
    assert (count(db, "event_wait"), count(db, "ready")) == (0, 1)


def test_an_event_before_the_wait_answers_it_at_once(db: Db) -> None:
    (id,) = running(db)
    emit(db, {"n": 1})
    deliver(db)
    park(db, id, wait_op(id))
    assert (state(db, id), answer(db, id)) == ("ready", {"n": 1})


def test_an_event_before_the_execution_is_not_seen(db: Db) -> None:
    emit(db, {"n": 1})
    id = waiting(db)
    rest(db)
    assert state(db, id) == "waiting"


def test_an_event_that_was_restored_from_a_server_with_more_transactions_is_not_new(db: Db) -> None:
    emit(db)
    db.execute("update event set xact = (pg_current_xact_id()::text::bigint + 1000000)::text::xid8")
    deliver(db)
    id = waiting(db)
    rest(db)
    assert state(db, id) == "waiting"
    emit(db, {"order_id": 8})
    rest(db)
    assert answer(db, id) == {"order_id": 8}


def test_a_rolled_back_event_never_was(db: Db, other: Db) -> None:
    id = waiting(db)
    other.execute("begin")
    emit(other)
    other.execute("rollback")
    rest(db)
    assert (state(db, id), count(db, "event")) == ("waiting", 0)


def test_an_open_emit_holds_up_nobody(db: Db, other: Db) -> None:
    id = waiting(db)
    other.execute("begin")
    emit(other, {"n": 1})
    deliver(db)
    assert cancel(db, id) == "cancelled"
    other.execute("commit")
    rest(db)
    assert state(db, id) == "cancelled"


def test_an_emit_that_is_open_while_the_wait_parks_is_seen_when_it_commits(db: Db, other: Db) -> None:
    (id,) = running(db)
    other.execute("begin")
    emit(other, {"n": 1})
    park(db, id, wait_op(id))
    deliver(db)
    assert (state(db, id), count(db, "event_pending")) == ("waiting", 0)
    other.execute("commit")
    deliver(db)
    assert (state(db, id), answer(db, id)) == ("ready", {"n": 1})


def test_an_emit_that_was_open_before_the_execution_began_is_seen_when_it_commits(db: Db, other: Db) -> None:
    other.execute("begin")
    emit(other, {"n": 1})
    id = waiting(db)
    deliver(db)
    other.execute("commit")
    deliver(db)
    assert answer(db, id) == {"n": 1}


def test_an_event_that_is_delivered_while_the_wait_is_uncommitted_is_found_by_the_second_look(
    db: Db, other: Db
) -> None:
    (id,) = running(db)
    other.execute("begin")
    park(other, id, wait_op(id))
    emit(db, {"n": 1})
    deliver(db)
    assert count(db, "event_pending") == 0
    other.execute("commit")
    assert state(db, id) == "waiting"
    rest(db)
    assert (state(db, id), answer(db, id)) == ("ready", {"n": 1})


STEPS = ("emit", "commit the emit", "park", "commit the park", "deliver", "deliver again")
ORDERS = [
    order
    for order in permutations(STEPS)
    if order.index("emit") < order.index("commit the emit")
    and order.index("park") < order.index("commit the park")
    and order.index("deliver") < order.index("deliver again")
]


def test_every_order_of_emit_wait_and_delivery_ends_in_one_wake_up(db: Db, other: Db, database: str) -> None:
    with session(database) as third:
        for order in ORDERS:
            (id,) = running(db)
            for name in order:
                act(name, id, db, other, third)
            rest(db)
            assert (state(db, id), answer(db, id)) == ("ready", {"of": id}), order
            assert count(db, "ready") == 1
            claim(db, token=9)
            settle(db, {"id": id, "outcome": "completed", "token": 9})


def act(name: str, id: str, deliverer: Db, emitter: Db, worker: Db) -> None:
    match name:
        case "emit":
            emitter.execute("begin")
            emit(emitter, {"of": id})
        case "commit the emit":
            emitter.execute("commit")
        case "park":
            worker.execute("begin")
            park(worker, id, wait_op(id))
        case "commit the park":
            worker.execute("commit")
        case _:
            deliver(deliverer)


def test_a_delivery_passes_over_a_held_execution_and_comes_back(db: Db, other: Db) -> None:
    id = waiting(db)
    other.execute("begin")
    other.execute("select from execution where id = %s for update", (id,))
    emit(db, {"n": 1})
    deliver(db)
    assert state(db, id) == "waiting"
    other.execute("commit")
    rest(db)
    assert answer(db, id) == {"n": 1}


def test_two_deliveries_at_once_make_one_wake_up(db: Db, other: Db) -> None:
    id = waiting(db)
    emit(db)
    other.execute("begin")
    deliver(other)
    deliver(db)
    other.execute("commit")
    rest(db)
    assert (state(db, id), count(db, "ready")) == ("ready", 1)


def test_cancel_and_delivery_do_not_deadlock(db: Db, other: Db, database: str) -> None:
    id = waiting(db)
    emit(db)
    other.execute("begin")
    deliver(other)
    cancelling = Background(lambda: cancel(db, id))
    with session(database) as watcher:
        wait_until_blocked(watcher, db)
    other.execute("commit")
    assert cancelling.result() == "cancelled"
    assert count(db, "event_wait") == 0


# ---------------------------------------------------------------- which event, which wait


def test_successive_waits_get_successive_events(db: Db) -> None:
    (id,) = running(db)
    for n in (1, 2):
        emit(db, {"n": n})
    park(db, id, wait_op(id, "first"))
    claim(db, token=2)
    park(db, id, wait_op(id, "second"), token=2)
    claim(db, token=3)
    park(db, id, wait_op(id, "third"), token=3)
    rest(db)
    assert [answer(db, id, name) for name in ("first", "second", "third")] == [{"n": 1}, {"n": 2}, None]


def test_waits_side_by_side_get_an_event_each(db: Db) -> None:
    (id,) = running(db)
    park(db, id, wait_op(id, "a"), wait_op(id, "b"))
    emit(db, {"n": 1})
    deliver(db)
    assert [answer(db, id, name) for name in "ab"] == [{"n": 1}, None]
    emit(db, {"n": 2})
    rest(db)
    assert (answer(db, id, "b"), count(db, "ready")) == ({"n": 2}, 1)


def test_one_event_answers_a_wait_of_each_execution(db: Db) -> None:
    ids = [waiting(db) for _ in range(3)]
    emit(db, {"n": 1})
    rest(db)
    assert [answer(db, id) for id in ids] == [{"n": 1}] * 3


@pytest.mark.parametrize(
    ("where", "payload", "is_match"),
    [
        ({"id": 7}, {"id": 7, "x": 1}, True),
        ({"id": 7}, {"id": 7.0}, True),
        ({"id": 7}, {"id": "7"}, False),
        ({"id": 7}, {"id": 8}, False),
        ({"id": 7}, [7], False),
        ({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, True),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, False),
        ({"tags": ["x"]}, {"tags": ["y", "x"]}, True),
        ({"a": None}, {"a": None}, True),
        ({"a": None}, {}, False),
        ({"a": 1, "b": {"c": 1}}, {"b": {"c": 1}, "a": 1}, True),
        ({}, {"anything": 1}, True),
        ({"ä'\"\\": "ü%s"}, {"ä'\"\\": "ü%s"}, True),
    ],
)
@pytest.mark.parametrize("is_early", [True, False])
def test_where_is_containment(
    db: Db, where: dict[str, object], payload: object, is_match: bool, is_early: bool
) -> None:
    (id,) = running(db)
    if is_early:
        emit(db, payload)
    park(db, id, wait_op(id, where=where))
    if not is_early:
        emit(db, payload)
    rest(db)
    assert (answer(db, id) is not None) == is_match


def test_another_event_of_the_same_payload_does_not_answer(db: Db) -> None:
    id = waiting(db)
    emit(db, {"n": 1}, event="order.shipped")
    rest(db)
    assert state(db, id) == "waiting"


def test_a_thousand_waiters_hear_of_one_event(db: Db) -> None:
    ids = running(db, 1000)
    outcomes = [
        {"id": id, "outcome": "parked", "ops": [wait_op(id)], "token": 1,
         "awaits": [{"name": "paid", "round": 0, "kind": "wait_for", "awaited": True}]}
        for id in ids
    ]  # fmt: skip
    settle(db, *outcomes)
    emit(db, {"n": 1})
    rest(db)
    assert (count(db, "ready"), count(db, "wait"), count(db, "event_wait")) == (1000, 0, 0)


def test_more_waiters_than_one_delivery_takes_are_all_reached(db: Db) -> None:
    ids = [waiting(db) for _ in range(5)]
    emit(db)
    for _ in range(3):
        call(db, "fire_timers", None, 2)
    assert {state(db, id) for id in ids} == {"ready"}
    rest(db)


# ---------------------------------------------------------------- a wait that an execution leaves


def test_a_wait_that_is_opened_while_the_handler_runs_is_answered_at_the_next_park(db: Db) -> None:
    (id,) = running(db)
    save(db, id, ops=[wait_op(id)])
    emit(db, {"n": 1})
    deliver(db)
    park(db, id, awaits=[{"name": "paid", "round": 0, "kind": "wait_for", "awaited": True}])
    assert (state(db, id), answer(db, id)) == ("ready", {"n": 1})


@pytest.mark.parametrize("end", [cancel, finish, fail])
def test_an_ended_execution_listens_no_more(db: Db, end: object) -> None:
    id = waiting(db) if end is cancel else running(db)[0]
    if end is not cancel:
        save(db, id, ops=[wait_op(id)])
    end(db, id)  # type: ignore[operator]
    emit(db)
    rest(db)
    assert (count(db, "event_wait"), step(db, id, "paid")["status"]) == (0, "pending")


def test_a_redriven_execution_waits_on_and_sees_what_came_meanwhile(db: Db) -> None:
    id = waiting(db)
    cancel(db, id)
    emit(db, {"n": 1})
    rest(db)
    call(db, "redrive", id)
    assert answer(db, id) == {"n": 1}


def test_a_redriven_execution_hears_what_comes_later(db: Db) -> None:
    id = waiting(db)
    cancel(db, id)
    call(db, "redrive", id)
    claim(db, token=2)
    park(db, id, awaits=[{"name": "paid", "round": 0, "kind": "wait_for", "awaited": True}], token=2)
    emit(db, {"n": 2})
    rest(db)
    assert (state(db, id), answer(db, id)) == ("ready", {"n": 2})


def test_a_failed_attempt_keeps_its_open_wait(db: Db) -> None:
    (id,) = running(db)
    save(db, id, ops=[wait_op(id)])
    retry(db, id)
    emit(db, {"n": 1})
    rest(db)
    assert answer(db, id) == {"n": 1}


# ---------------------------------------------------------------- timeouts


def timeout_error() -> dict[str, object]:
    return {"type": "pgconductor.errors.WaitTimeout", "message": "late", "timeout": 5.0}


def test_a_timeout_answers_the_wait_and_later_events_do_not(db: Db) -> None:
    id = waiting(db, due_in=5, timeout_error=timeout_error())
    call(db, "fire_timers", at(5))
    emit(db)
    rest(db)
    assert (state(db, id), step(db, id, "paid")["status"], count(db, "event_wait")) == ("ready", "timed_out", 0)


def test_an_event_that_is_there_at_the_deadline_comes_first(db: Db) -> None:
    id = waiting(db, due_in=5, timeout_error=timeout_error())
    emit(db, {"n": 1})
    call(db, "fire_timers", at(5))
    assert (state(db, id), answer(db, id), count(db, "ready")) == ("ready", {"n": 1}, 1)


def test_an_emit_that_was_open_when_the_wait_began_beats_the_deadline_if_it_commits_before(db: Db, other: Db) -> None:
    other.execute("begin")
    emit(other, {"n": 1})
    id = waiting(db, due_in=5, timeout_error=timeout_error())
    deliver(db)
    other.execute("commit")
    call(db, "fire_timers", at(5))
    assert answer(db, id) == {"n": 1}


def test_a_retry_after_a_timeout_waits_afresh(db: Db) -> None:
    id = waiting(db, due_in=5, timeout_error=timeout_error())
    call(db, "fire_timers", at(5))
    claim(db, token=2, now=5)
    retry(db, id, token=2, now=5, fresh=[{"name": "paid", "round": 0}])
    claim(db, token=3, now=5)
    park(db, id, wait_op(id) | {"round": 1}, token=3, now=5)
    emit(db, {"n": 1})
    rest(db)
    assert (answer(db, id), answer(db, id, round_=1)) == (None, {"n": 1})


# ---------------------------------------------------------------- upkeep


def test_the_next_look_is_due_as_soon_as_something_is_pending(db: Db) -> None:
    (id,) = running(db)
    answered = park(db, id, wait_op(id))
    assert answered["next_due"] == 0
    deliver(db)
    assert call(db, "next_due", at(0)) is None


def test_the_sweep_delivers_too(db: Db) -> None:
    id = waiting(db)
    emit(db)
    swept = call(db, "sweep", "20 seconds", at(0))
    assert (state(db, id), len(swept["queues"])) == ("ready", 1)


def test_events_are_kept_seven_days_unless_told_otherwise(db: Db) -> None:
    register(db, "work")
    for n in range(3):
        call(db, "emit_events", [{"id": f"{n:032}", "name": "x", "payload": None}], False, at(n * 86400))
    deliver(db)
    call(db, "prune_events", at(8 * 86400 + 1))
    assert count(db, "event") == 1
    db.execute("select keep_events('1 day')")
    call(db, "prune_events", at(8 * 86400))
    assert count(db, "event") == 0


def test_an_event_that_has_not_been_delivered_is_not_pruned(db: Db) -> None:
    call(db, "emit_events", [{"id": f"{1:032}", "name": "x", "payload": None}], False, at(0))
    call(db, "prune_events", at(30 * 86400))
    assert count(db, "event") == 1


def test_a_wait_leaves_nothing_behind(db: Db) -> None:
    id = waiting(db)
    emit(db)
    deliver(db)
    claim(db, token=2)
    settle(db, {"id": id, "outcome": "completed", "token": 2})
    enqueue(db)
    assert [count(db, table) for table in ("event_wait", "event_pending", "wait", "timer")] == [0, 0, 0, 0]
