"""enqueue: none → ready, or scheduled."""

from datetime import datetime
from uuid import uuid4

import psycopg
import pytest
from psycopg import errors

from tests.sql.support import (
    Background,
    Db,
    Json,
    at,
    blank,
    call,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    register,
    row,
    session,
    state,
)


def test_an_execution_is_ready_at_once(db: Db) -> None:
    assert state(db, enqueue(db)) == "ready"


@pytest.mark.parametrize("when", [{"delay": 5}, {"run_at": at(5).isoformat()}])
def test_a_time_makes_it_scheduled(db: Db, when: Json) -> None:
    id = enqueue(db, **when)
    assert state(db, id) == "scheduled"
    assert row(db, id)["run_at"] == at(5)


@pytest.mark.parametrize("when", [{"delay": 0}, {"delay": -5}, {"run_at": at(-5).isoformat()}])
def test_a_time_that_has_passed_is_now(db: Db, when: Json) -> None:
    assert state(db, enqueue(db, **when)) == "ready"


def test_a_rolled_back_enqueue_never_was(db: Db) -> None:
    db.execute("begin")
    enqueue(db)
    db.execute("rollback")
    assert count(db, "execution") == count(db, "ready") == 0


def test_a_thousand_calls_are_one_round_trip_and_keep_their_order(db: Db) -> None:
    register(db, "work")
    ids = enqueue_many(db, *blank(1000))
    assert [each["id"] for each in claim(db, limit=1000)] == ids


def test_nothing_to_enqueue_is_no_error(db: Db) -> None:
    assert enqueue_many(db) == []


@pytest.mark.covers("F45")
def test_a_repetition_after_a_lost_reply_makes_no_second_execution(db: Db) -> None:
    calls = [{"id": str(uuid4())}, {"id": str(uuid4()), "dedupe_key": "k"}]
    first = enqueue_many(db, *calls)
    assert enqueue_many(db, *calls, again=True) == first
    assert count(db, "execution") == count(db, "ready") == 2


def test_a_repetition_makes_what_is_missing(db: Db) -> None:
    known, missing = str(uuid4()), str(uuid4())
    enqueue_many(db, {"id": known})
    enqueue_many(db, {"id": known}, {"id": missing}, again=True)
    assert state(db, missing) == "ready"


def test_a_repetition_of_a_call_that_lost_its_key_gives_the_winner_again(db: Db) -> None:
    winner = enqueue(db, dedupe_key="k")
    loser = {"id": str(uuid4()), "dedupe_key": "k"}
    assert enqueue_many(db, loser) == enqueue_many(db, loser, again=True) == [winner]


def test_what_a_call_says_of_its_trigger_is_cut(db: Db) -> None:
    assert row(db, enqueue(db, trigger="€" * 501))["trigger"] == "€" * 500


def test_an_unknown_task_waits_in_the_queue_default(db: Db) -> None:
    id = enqueue(db, "nobody-knows-it")
    found = db.execute("select queue, task from executions where id = %s", (id,)).fetchone()
    assert found == {"queue": "default", "task": "nobody-knows-it"}


def test_a_call_may_name_another_queue(db: Db) -> None:
    id = enqueue(db, queue="mail")
    found = db.execute("select queue from executions where id = %s", (id,)).fetchone()
    assert found == {"queue": "mail"}


@pytest.mark.covers("F62")
@pytest.mark.parametrize("priority", [32_768, -32_769, 10**12])
def test_a_priority_out_of_range_is_refused(db: Db, priority: int) -> None:
    with pytest.raises(errors.NumericValueOutOfRange):
        enqueue(db, priority=priority)
    assert count(db, "execution") == 0


@pytest.mark.covers("F61")
@pytest.mark.parametrize("task", [None, "", "x" * 201])
def test_a_task_needs_a_name_of_at_most_200_bytes(db: Db, task: str | None) -> None:
    with pytest.raises(psycopg.IntegrityError):
        enqueue_many(db, {"task": task})


# ---------------------------------------------------------------- dedupe


def test_a_key_is_one_execution(db: Db) -> None:
    first = enqueue(db, dedupe_key="k")
    assert enqueue(db, dedupe_key="k") == first
    assert count(db, "execution") == 1


@pytest.mark.covers("P36")
def test_a_key_holds_for_what_runs_and_for_what_has_ended(db: Db) -> None:
    register(db, "work")
    id = enqueue(db, dedupe_key="k")
    claim_one(db)
    assert enqueue(db, dedupe_key="k") == id
    complete(db, id)
    assert enqueue(db, dedupe_key="k") == id


def test_a_key_belongs_to_its_task(db: Db) -> None:
    assert enqueue(db, "a", dedupe_key="k") != enqueue(db, "b", dedupe_key="k")


def test_a_key_repeated_inside_one_batch_is_one_execution(db: Db) -> None:
    first, other, again = enqueue_many(db, {"dedupe_key": "k"}, {}, {"dedupe_key": "k"})
    assert first == again != other
    assert count(db, "execution") == count(db, "ready") == 2


def test_fifty_racing_callers_get_one_execution(db: Db, database: str) -> None:
    def race() -> str:
        with session(database) as mine:
            return enqueue(mine, dedupe_key="k")

    callers = [Background(race) for _ in range(50)]
    assert len({caller.result() for caller in callers}) == 1
    assert count(db, "execution") == count(db, "ready") == 1


def test_a_caller_waits_for_the_key_of_an_open_transaction_and_takes_over_if_it_rolls_back(
    db: Db, database: str
) -> None:
    enqueue(db)
    with session(database) as other:
        other.execute("begin")
        lost = enqueue(other, dedupe_key="k")
        caller = Background(lambda: enqueue(db, dedupe_key="k"))
        other.execute("rollback")
        assert caller.result() != lost
    assert count(db, "dedupe") == 1


# ---------------------------------------------------------------- replace


def test_replace_gives_the_first_execution_the_later_payload_time_and_priority(db: Db) -> None:
    id = enqueue(db, dedupe_key="k", delay=60, payload={"a": 1})
    assert enqueue(db, dedupe_key="k", replace=True, payload={"a": 2}, priority=7) == id
    found = row(db, id)
    assert (found["payload"], found["priority"], state(db, id)) == ({"a": 2}, 7, "ready")


def test_replace_can_put_a_ready_execution_off(db: Db) -> None:
    id = enqueue(db, dedupe_key="k")
    enqueue(db, dedupe_key="k", replace=True, delay=60)
    assert state(db, id) == "scheduled"
    assert count(db, "ready") == 0


def test_replace_leaves_what_has_started_alone(db: Db) -> None:
    register(db, "work")
    id = enqueue(db, dedupe_key="k", payload={"a": 1})
    claim_one(db)
    assert enqueue(db, dedupe_key="k", replace=True, payload={"a": 2}) == id
    assert row(db, id)["payload"] == {"a": 1}


def test_the_last_of_a_batch_replaces(db: Db) -> None:
    calls = [{"dedupe_key": "k", "replace": True, "payload": {"n": n}} for n in range(3)]
    (id,) = set(enqueue_many(db, *calls))
    assert row(db, id)["payload"] == {"n": 2}
    assert count(db, "ready") == 1


def test_bulk_replaces_in_opposite_order_do_not_deadlock(db: Db, database: str) -> None:
    keys = [f"k{n}" for n in range(20)]
    enqueue_many(db, *[{"dedupe_key": key} for key in keys])

    def replace(order: list[str]) -> None:
        with session(database) as mine:
            for _ in range(10):
                enqueue_many(mine, *[{"dedupe_key": key, "replace": True} for key in order])

    for each in [Background(lambda: replace(keys)), Background(lambda: replace(keys[::-1]))]:
        each.result()
    assert count(db, "execution") == 20


# ---------------------------------------------------------------- invoke, for psql


def test_invoke_enqueues_with_a_payload(db: Db) -> None:
    id = call(db, "invoke", "work", '{"a": 1}')
    assert row(db, str(id))["payload"] == {"a": 1}


def test_invoke_gives_the_kept_execution_of_a_key(db: Db) -> None:
    query = "select invoke('work', dedupe_key => 'k') as id"
    ids = [db.execute(query).fetchone() for _ in range(2)]
    assert ids[0] == ids[1]


def test_invoke_understands_delay_and_queue(db: Db) -> None:
    db.execute("select invoke('work', queue => 'mail', delay => '1 hour')")
    found = db.execute("select state, queue from executions").fetchone()
    assert found == {"state": "scheduled", "queue": "mail"}


@pytest.mark.parametrize("payload", ["[]", "1", "null", '"x"'])
def test_invoke_refuses_a_payload_that_is_no_object(db: Db, payload: str) -> None:
    with pytest.raises(psycopg.Error, match="must be a JSON object") as refusal:
        call(db, "invoke", "work", payload)
    assert refusal.value.sqlstate == "PC003"


def test_invoke_refuses_an_unknown_word(db: Db) -> None:
    with pytest.raises(psycopg.Error, match="keep or replace"):
        db.execute("select invoke('work', on_duplicate => 'drop')")


@pytest.mark.covers("F62")
def test_invoke_refuses_a_time_that_never_comes(db: Db) -> None:
    with pytest.raises(psycopg.Error, match="finite"):
        db.execute("select invoke('work', run_at => 'infinity')")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("null", "task, queue and dedupe_key are names"),
        ("''", "task, queue and dedupe_key are names"),
        ("'work', queue => ''", "task, queue and dedupe_key are names"),
        ("'work', dedupe_key => ''", "task, queue and dedupe_key are names"),
        ("'work', delay => '-1 s'", "delay must not be negative"),
        ("'work', throttle => '0 s'", "throttle and debounce must be more than zero"),
        ("'work', debounce => '-1 s'", "throttle and debounce must be more than zero"),
        ("'work', on_duplicate => null", "on_duplicate must be keep or replace"),
        ("'work', on_duplicate => 'replace'", "replace needs a dedupe_key"),
        ("'work', on_duplicate => 'replace', dedupe_key => 'k', throttle => '1 s'", "and no throttle or debounce"),
    ],
)
def test_sql_invoke_refuses_what_the_client_refuses(db: Db, arguments: str, message: str) -> None:
    with pytest.raises(psycopg.Error, match=message) as refusal:
        db.execute(f"select invoke({arguments})".encode())
    assert (refusal.value.sqlstate, count(db, "execution")) == ("PC003", 0)


def test_the_clock_is_the_databases_unless_a_test_moves_it(db: Db) -> None:
    id = call(db, "invoke", "work")
    created: datetime = row(db, str(id))["created_at"]
    found = db.execute("select clock_timestamp() - %s < interval '1 minute' as recent", (created,)).fetchone()
    assert found == {"recent": True}


@pytest.mark.covers("F56")
@pytest.mark.parametrize("bad", [r'{"tenant": "\u0000"}', r'{"tenant": "\ud800"}'])
def test_a_payload_that_text_cannot_hold_is_refused_by_whatever_takes_it(db: Db, bad: str) -> None:
    register(db, "work")
    one = "select enqueue_one(uuid7(), 'work', null, 0::smallint, %s::json)"
    alike = "select enqueue_alike(array[uuid7()], 'work', null, 0::smallint, json_build_array(%s::json))"
    many = "select enqueue(json_build_array(json_build_object('id', uuid7(), 'task', 'work', 'payload', %s::json)))"
    for statement in (one, alike, many):
        with pytest.raises(psycopg.DataError, match=r"cannot be converted to text|low surrogate must follow"):
            db.execute(statement.encode(), (bad,))
        db.execute(statement.encode(), (r'{"tenant": "\u001f \\u0000"}',))
    assert len(db.execute("select payload from executions").fetchall()) == 3


@pytest.mark.parametrize("options", [{"dedupe_key": "k"}, {"dedupe_key": "k", "throttle": 60}])
def test_a_repetition_of_equal_calls_begins_nothing_when_the_first_has_been_removed(
    db: Db, options: dict[str, object]
) -> None:
    register(db, "work", keep_completed=0)
    calls = [{"id": str(uuid4())} | options, {"id": str(uuid4())} | options]
    first, second = enqueue_many(db, *calls)
    assert first == second == calls[0]["id"]
    claim(db)
    complete(db, first)
    assert count(db, "execution") == 0
    assert enqueue_many(db, *calls, now=1, again=True) == [first, first]
    assert count(db, "execution") == 0
