"""settle: running → completed, failed, cancelled, ready, scheduled."""

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from pgconductor.id_array import IdArray
from tests.sql.support import (
    WORKER,
    Background,
    Db,
    Json,
    at,
    blank,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    fail,
    finish,
    op,
    parent_and_child,
    park,
    register,
    release,
    retry,
    row,
    save,
    session,
    settle,
    settle_both,
    settle_plain,
    state,
    step,
    wait_until_blocked,
)


@pytest.fixture
def running(db: Db) -> str:
    register(db, "work", "child")
    enqueue(db)
    return claim_one(db)


def end(db: Db, id: str, how: str, token: int = 1, worker: UUID = WORKER) -> Json:
    """Settle in each of the ways that there are."""
    if how == "plain":
        return complete(db, id, "done", token=token, worker=worker)
    if how == "parked":
        return park(db, id, op(id, "nap", "sleep", due_in=60), token=token, worker=worker)
    outcome = {"id": id, "outcome": how, "token": token, "error": {"type": "E", "message": "m"}}
    return settle(db, outcome | {"result": 1, "delay": 5}, worker=worker)


def everything(db: Db) -> dict[str, list[Any]]:
    """Return the rows of all tables of the engine, as text."""
    query = (
        b"select c.oid::regclass::text as name from pg_class c where relkind = 'r' and relnamespace = %s::regnamespace"
    )
    rows_of = "select t::text as all from {} t order by 1"
    return {
        each["name"]: [row["all"] for row in db.execute(rows_of.format(each["name"]).encode())]
        for each in db.execute(query, ("pgconductor",))
    }


WAYS = ["plain", "completed", "failed", "retried", "released", "unstarted", "crashed", "parked"]


@pytest.mark.parametrize(
    ("how", "becomes"),
    [
        ("plain", "completed"),
        ("completed", "completed"),
        ("failed", "failed"),
        ("retried", "scheduled"),
        ("released", "scheduled"),
        ("unstarted", "scheduled"),
        ("crashed", "scheduled"),
        ("parked", "waiting"),
    ],
)
def test_an_outcome_moves_the_execution(db: Db, running: str, how: str, becomes: str) -> None:
    assert end(db, running, how)["lost"] == []
    assert state(db, running) == becomes
    assert count(db, "lease") == 0


@pytest.mark.parametrize("how", ["retried", "released", "unstarted", "crashed"])
def test_without_a_delay_it_is_ready_at_once(db: Db, running: str, how: str) -> None:
    settle(db, {"id": running, "outcome": how})
    assert state(db, running) == "ready"


@pytest.mark.parametrize(
    ("how", "failures", "crashes"),
    [
        ("retried", 1, 0),
        ("failed", 1, 0),
        ("released", 0, 0),
        ("unstarted", 0, 0),
        ("crashed", 0, 1),
        ("parked", 0, 0),
        ("plain", 0, 0),
    ],
)
def test_what_each_outcome_costs(db: Db, running: str, how: str, failures: int, crashes: int) -> None:
    end(db, running, how)
    assert (row(db, running)["failures"], row(db, running)["crashes"]) == (failures, crashes)


@pytest.mark.parametrize("how", WAYS)
def test_all_but_those_given_back_unstarted_have_started(db: Db, running: str, how: str) -> None:
    end(db, running, how)
    assert (row(db, running)["started_at"] is None) == (how == "unstarted")


def test_what_is_given_back_unstarted_stands_where_it_stood_however_often(db: Db) -> None:
    register(db, "work")
    made = enqueue_many(db, *blank(4))
    for token, back in enumerate(([3, 1, 2], [3, 2]), 1):
        claim(db, token=token)
        settle(db, *[{"id": made[index], "outcome": "unstarted", "token": token} for index in back])
    later = enqueue(db)
    assert [each["id"] for each in claim(db, token=9)] == [made[2], made[3], later]


def test_what_had_started_and_is_given_back_unstarted_stands_before_fresh_work(db: Db, running: str) -> None:
    save(db, running, "a")
    release(db, running)
    fresh = enqueue(db)
    claim(db, limit=1, token=2)
    settle(db, {"id": running, "outcome": "unstarted", "token": 2})
    first, second = claim(db, token=3)
    assert (first["id"], second["id"]) == (running, fresh)
    assert [step[0] for step in first["steps"]] == ["a"]


@pytest.mark.covers("P14")
@pytest.mark.parametrize("value", [0, "", False, [], None, {"a": [1.5]}])
def test_a_result_comes_back_equal(db: Db, running: str, value: object) -> None:
    complete(db, running, value)
    assert row(db, running)["result"] == value


def test_a_retry_keeps_the_error_and_a_completion_clears_it(db: Db, running: str) -> None:
    retry(db, running)
    assert row(db, running)["error"]["message"] == "again"
    claim(db, token=2)
    complete(db, running, token=2)
    assert row(db, running)["error"] is None


def test_an_execution_remembers_when_it_was_first_claimed(db: Db) -> None:
    register(db, "work")
    id = enqueue(db)
    claim(db, now=3)
    retry(db, id, now=4)
    claim(db, now=9, token=2)
    complete(db, id, token=2, now=10)
    assert (row(db, id)["started_at"], row(db, id)["finished_at"]) == (at(3), at(10))


def test_a_retry_drops_what_is_to_be_done_afresh(db: Db, running: str) -> None:
    save(db, running, "a", "b")
    retry(db, running, fresh=[{"name": "a", "round": 0}])
    assert (step(db, running, "a")["dropped"], step(db, running, "b")["dropped"]) == (True, False)


def test_settle_tells_when_the_next_timer_is_due(db: Db, running: str) -> None:
    assert retry(db, running, delay=7)["next_due"] == 7


# ---------------------------------------------------------------- the fence


@pytest.mark.covers("P2")
@pytest.mark.parametrize("how", WAYS)
def test_a_stale_token_moves_nothing(db: Db, running: str, how: str) -> None:
    assert end(db, running, how, token=2)["lost"] == [running]
    assert state(db, running) == "running"
    assert (count(db, "timer"), count(db, "step")) == (0, 0)


@pytest.mark.covers("F12", "P6")
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("again", WAYS)
def test_a_repetition_after_a_lost_reply_moves_nothing(db: Db, running: str, how: str, again: str) -> None:
    end(db, running, how)
    before = (state(db, running), row(db, running), count(db, "timer"))
    assert end(db, running, again)["lost"] == [running]
    assert (state(db, running), row(db, running), count(db, "timer")) == before


@pytest.mark.covers("F23", "P2", "P12")
@pytest.mark.parametrize("how", WAYS)
def test_a_late_settle_of_an_execution_that_was_claimed_again_is_refused(db: Db, running: str, how: str) -> None:
    release(db, running)
    claim(db, token=2)
    assert end(db, running, how)["lost"] == [running]
    assert state(db, running) == "running"


@pytest.mark.covers("F29")
@pytest.mark.parametrize("how", WAYS)
def test_another_process_with_the_same_token_is_refused(db: Db, running: str, how: str) -> None:
    other = UUID(int=2)
    register(db, worker=other)
    assert end(db, running, how, worker=other)["lost"] == [running]
    assert state(db, running) == "running"
    assert (count(db, "timer"), count(db, "step")) == (0, 0)


def test_a_dead_orchestrator_settles_nothing(db: Db, running: str) -> None:
    assert settle(db, {"id": running, "outcome": "completed"}, worker=UUID(int=9)) is None
    assert state(db, running) == "running"


@pytest.mark.parametrize("how", ["plain", "completed", "retried", "parked"])
def test_a_second_try_while_the_first_still_runs_moves_nothing(db: Db, database: str, running: str, how: str) -> None:
    with session(database) as first, session(database) as second:
        first.execute("begin")
        end(first, running, how)
        again = Background(lambda: end(second, running, how))
        wait_until_blocked(db, second)
        first.execute("commit")
        again.result()
    assert (count(db, "lease"), row(db, running)["failures"]) == (0, int(how == "retried"))


# ---------------------------------------------------------------- batches


def test_one_call_settles_many_in_many_ways(db: Db) -> None:
    register(db, "work")
    ids = enqueue_many(db, *blank(5))
    claim(db)
    plain = [{"id": ids[0], "token": 1, "result": 1}, {"id": ids[1], "token": 1, "result": None}]
    error = {"type": "E", "message": "m"}
    others = [
        {"id": id, "token": 1, "outcome": how, "error": error}
        for id, how in zip(ids[2:], ("failed", "released", "completed"), strict=True)
    ]
    settle_both(db, plain, others)
    assert [state(db, id) for id in ids] == ["completed", "completed", "failed", "ready", "completed"]


def test_the_lost_of_a_batch_cost_the_others_nothing(db: Db, running: str) -> None:
    gone = [str(uuid4()) for _ in range(2)]
    plain = [{"id": gone[0], "token": 1, "result": 1}, {"id": running, "token": 1, "result": 1}]
    answer = settle_both(db, plain, [{"id": gone[1], "token": 1, "outcome": "released"}])
    assert set(answer["lost"]) == set(gone)
    assert state(db, running) == "completed"


@pytest.mark.covers("P12")
@pytest.mark.parametrize(
    ("sent", "lost"),
    [
        ([(0, 1), (1, 1), (2, 1), (3, 1)], []),
        ([(3, 1), (2, 1), (1, 1), (0, 1)], []),
        ([(0, 1), (1, 1), (1, 1), (2, 1)], []),
        ([(0, 1), (1, 7), (2, 1), (3, 1)], [1]),
        ([(0, 1), (1, 7), (1, 1), (3, 1)], []),
        ([(0, 1), (4, 1), (2, 1), (3, 1)], [4]),
    ],
    ids=["in order", "backwards", "one twice", "one of another claim", "one of two claims", "one of another process"],
)
def test_each_of_many_gets_its_own_result(db: Db, sent: list[tuple[int, int]], lost: list[int]) -> None:
    another = uuid4()
    register(db, "work")
    register(db, "other", worker=another)
    ids = sorted(enqueue_many(db, *blank(4)))
    claim(db)
    ids.append(enqueue(db, "other"))
    claim(db, worker=another, tasks=["other"])

    completed = [{"id": ids[place], "token": token, "result": {"place": place}} for place, token in sent]
    answer = settle_plain(db, *completed)

    assert sorted(set(answer["lost"])) == sorted(ids[place] for place in lost)
    settled = {ids[place] for place, token in sent if token == 1 and place not in lost}
    assert {id for id in ids if state(db, id) == "completed"} == settled
    assert {id: row(db, id)["result"]["place"] for id in settled} == {id: ids.index(id) for id in settled}


@pytest.mark.covers("P12")
def test_several_outcomes_of_one_execution_count_once(db: Db, running: str) -> None:
    settle(db, *[{"id": running, "outcome": "retried", "delay": 1}] * 2)
    assert (state(db, running), row(db, running)["failures"], count(db, "timer")) == ("scheduled", 1, 1)


@pytest.mark.parametrize("outcome", ["vanished", "failed"])
def test_an_unknown_outcome_or_a_failure_without_its_error_is_refused(db: Db, running: str, outcome: str) -> None:
    with pytest.raises(psycopg.Error, match="not one of those"):
        settle(db, {"id": running, "outcome": outcome})
    assert state(db, running) == "running"


@pytest.mark.parametrize("nothing", [("{}", "{}", "[]", "[]"), (None, None, None, None)])
def test_nothing_to_settle_is_no_error(db: Db, running: str, nothing: tuple[str | None, ...]) -> None:
    assert call(db, "settle", WORKER, *nothing)["lost"] == []


# ---------------------------------------------------------------- children


def test_an_end_cancels_the_children_that_were_not_awaited(db: Db, running: str) -> None:
    start = op(running, "s", "start", {})
    save(db, running, ops=[start])
    finish(db, running)
    assert state(db, start["children"][0]["id"]) == "cancelled"


def test_a_retry_keeps_its_children(db: Db, running: str) -> None:
    start = op(running, "s", "start", {})
    save(db, running, ops=[start])
    retry(db, running)
    assert state(db, start["children"][0]["id"]) == "ready"


def test_a_child_that_runs_is_told_when_its_parent_fails(db: Db, running: str) -> None:
    start = op(running, "s", "start", {})
    save(db, running, ops=[start])
    child = claim_one(db)
    fail(db, running)
    assert state(db, child) == "running"
    assert call(db, "beat", WORKER)["cancel"] == [child]
    finish(db, child)
    assert state(db, child) == "cancelled"


@pytest.mark.covers("F70", "P11")
@pytest.mark.parametrize("how", WAYS)
def test_a_cancel_request_wins_over_every_outcome(db: Db, running: str, how: str) -> None:
    assert cancel(db, running) == "requested"
    end(db, running, how)
    found = row(db, running)
    assert (found["outcome"], found["result"]) == ("cancelled", None)


@pytest.mark.covers("P27")
def test_a_batch_of_cancelled_and_live_settles_both(db: Db) -> None:
    register(db, "work")
    ids = enqueue_many(db, *blank(2))
    claim(db)
    cancel(db, ids[0])
    settle_plain(db, *[{"id": id, "token": 1, "result": 1} for id in ids])
    assert [state(db, id) for id in ids] == ["cancelled", "completed"]


# ---------------------------------------------------------------- who is told


@pytest.mark.parametrize("how", ["plain", "completed", "failed"])
def test_watchers_are_told_of_an_end(db: Db, running: str, how: str) -> None:
    call(db, "watch_result", UUID(running), "me")
    assert end(db, running, how)["watchers"] == ["me"]
    assert count(db, "watch") == 0


def test_watchers_are_told_when_a_completion_comes_after_a_cancel(db: Db, running: str) -> None:
    call(db, "watch_result", UUID(running), "me")
    cancel(db, running)
    assert complete(db, running)["watchers"] == ["me"]


def test_watchers_of_others_and_of_retries_are_not_told(db: Db, running: str) -> None:
    other = enqueue(db)
    call(db, "watch_result", UUID(other), "you")
    call(db, "watch_result", UUID(running), "me")
    assert retry(db, running)["watchers"] == []
    assert count(db, "watch") == 2


def test_the_lost_tell_nobody(db: Db, running: str) -> None:
    call(db, "watch_result", UUID(running), "me")
    assert complete(db, running, token=2)["watchers"] == []


def test_a_child_end_names_the_queue_of_its_parent(db: Db) -> None:
    parent, child = parent_and_child(db)
    claim(db, tasks=["child"])
    assert len(finish(db, child)["queues"]) == 1
    assert state(db, parent) == "ready"


def test_a_settle_without_outcomes_only_has_the_server_plan(db: Db, running: str) -> None:
    parent_and_child(db)
    enqueue(db)
    before = everything(db)
    assert all(before[table] for table in ("wait", "lease", "step", "ready"))
    answer = call(db, "settle", WORKER, IdArray([]), "{}", [], None, at(0))
    assert (answer["lost"], answer["queues"], everything(db)) == ([], [], before)
