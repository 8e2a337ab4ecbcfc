"""Limits hold for those who call functions directly, too: just below is stored, just above is refused as a whole."""

from typing import Any
from uuid import uuid4

import pytest
from psycopg import errors
from psycopg.types.json import Jsonb

from tests.sql.support import (
    WORKER,
    Db,
    Json,
    blank,
    call,
    cancel,
    claim,
    claim_one,
    count,
    enqueue,
    enqueue_many,
    fail,
    op,
    park,
    register,
    row,
    save,
    settle,
    settle_plain,
    state,
    step,
)

BYTES_MAX = 1024 * 1024
TOO_LARGE = "1048577 bytes of JSON, at most 1048576"
pytestmark = pytest.mark.covers("F59")


def text_of(size: int) -> str:
    """Return a text whose JSON has so many bytes."""
    return "x" * (size - 2)


def object_of(size: int) -> Json:
    """Return an object whose JSON, as `json.dumps` writes it, has so many bytes."""
    return {"a": "x" * (size - len('{"a": ""}'))}


def running(db: Db) -> str:
    register(db, "work", "child")
    enqueue(db)
    return claim_one(db, tasks=["work"])


def refused(db: Db, message: str = TOO_LARGE) -> Any:
    return pytest.raises(errors.DatabaseError, match=message)


def test_a_payload_of_the_limit_is_stored_and_one_byte_more_refuses_the_whole_call(db: Db) -> None:
    enqueue(db, payload=object_of(BYTES_MAX))
    with refused(db) as caught:
        enqueue_many(db, {}, {"payload": object_of(BYTES_MAX + 1)})
    assert caught.value.sqlstate == "PC003"
    assert count(db, "execution") == 1


def test_many_payloads_that_are_large_together_are_stored(db: Db) -> None:
    assert len(enqueue_many(db, *[{"payload": object_of(400_000)} for _ in range(5)])) == 5


def test_invoke_refuses_a_payload_over_the_limit(db: Db) -> None:
    db.execute("select invoke('work', %s)", (Jsonb(object_of(BYTES_MAX)),))
    with refused(db):
        db.execute("select invoke('work', %s)", (Jsonb(object_of(BYTES_MAX + 1)),))
    assert count(db, "execution") == 1


def test_a_schedule_s_payload_over_the_limit_is_refused(db: Db) -> None:
    query = "select schedule('work', 'daily', '@daily', %s)"
    db.execute(query, (Jsonb(object_of(BYTES_MAX)),))
    with refused(db):
        db.execute(query, (Jsonb(object_of(BYTES_MAX + 1)),))


@pytest.mark.parametrize("settled", ["plain", "held"])
def test_a_result_of_the_limit_is_stored_and_one_byte_more_is_not(db: Db, settled: str) -> None:
    id = running(db)

    def complete(size: int) -> None:
        if settled == "plain":
            settle_plain(db, {"id": id, "token": 1, "result": text_of(size)})
        else:
            settle(db, {"id": id, "outcome": "completed", "result": text_of(size)})

    with refused(db):
        complete(BYTES_MAX + 1)
    assert state(db, id) == "running"
    complete(BYTES_MAX)
    assert state(db, id) == "completed"


def test_an_error_over_the_limit_is_refused(db: Db) -> None:
    id = running(db)
    with refused(db, "a error is"):
        fail(db, id, "x" * BYTES_MAX)
    assert state(db, id) == "running"


def test_a_step_of_the_limit_is_stored_and_one_byte_more_is_not(db: Db) -> None:
    id = running(db)

    def record(size: int) -> None:
        recorded = {"id": id, "token": 1, "name": "a", "round": 0, "kind": "step", "value": text_of(size)}
        call(db, "save", WORKER, [recorded], [])

    with refused(db):
        record(BYTES_MAX + 1)
    assert count(db, "step") == 0
    record(BYTES_MAX)
    assert step(db, id, "a")["value"] == text_of(BYTES_MAX)


def test_a_transaction_s_value_over_the_limit_is_refused(db: Db) -> None:
    id = running(db)
    query = "select save_transaction(%s, %s, 1, 't', 0::smallint, to_json(repeat('x', %s))) as said"
    with refused(db):
        db.execute(query, (WORKER, id, BYTES_MAX - 1))
    assert db.execute(query, (WORKER, id, BYTES_MAX - 2)).fetchone() == {"said": "saved"}


@pytest.mark.parametrize("opened", ["park", "save"])
def test_a_child_s_payload_over_the_limit_is_refused(db: Db, opened: str) -> None:
    id = running(db)

    def start(size: int) -> None:
        operation = op(id, "call", "invoke" if opened == "park" else "start", {"payload": object_of(size)})
        if opened == "park":
            park(db, id, operation)
        else:
            save(db, id, ops=[operation])

    with refused(db):
        start(BYTES_MAX + 1)
    assert (count(db, "execution"), state(db, id)) == (1, "running")
    start(BYTES_MAX)
    assert count(db, "execution") == 2


@pytest.mark.covers("F72")
def test_ten_thousand_children_wake_their_parent_once_and_one_more_is_refused(db: Db) -> None:
    id = running(db)
    with refused(db, "10001 children of one operation, at most 10000"):
        save(db, id, ops=[op(id, "all", "invoke_all", *blank(10_001))])
    assert count(db, "execution") == 1
    park(db, id, op(id, "all", "invoke_all", *blank(10_000)))
    while claimed := claim(db, limit=2_000, tasks=["child"]):
        assert state(db, id) == "waiting"
        settle(db, *({"id": each["id"], "outcome": "completed", "result": 1} for each in claimed))
    assert state(db, id) == "ready"
    woken = "select 1 from audit.history where execution_id = %s and from_state = 'waiting'"
    assert db.execute(woken, (id,)).rowcount == 1


@pytest.mark.covers("F61")
@pytest.mark.parametrize("name", ["", "x" * 201, "é" * 101, "a\nb", "a\x1b[2J", "\x7f"])
@pytest.mark.parametrize("kind", ["task", "queue"])
def test_a_name_that_is_none_is_refused(db: Db, name: str, kind: str) -> None:
    with pytest.raises(errors.CheckViolation):
        enqueue_many(db, {kind: name})
    assert count(db, "execution") == 0


@pytest.mark.covers("F61", "P43")
def test_names_that_look_alike_are_distinct(db: Db) -> None:
    names = ["a-b", "a_b", "a.b", "A_B", '"a_b"', "'; drop table execution; --", "%s", "../a", "x" * 200, "é" * 100]
    for name in names:
        enqueue_many(db, {"task": name, "queue": name})
    for table in ("task", "queue"):
        stored = [each["name"] for each in db.execute(f"select name from {table} order by id".encode())]  # noqa: S608
        assert [name for name in stored if name != "default"] == names
    assert db.execute("select from lane").rowcount == len(names)


@pytest.mark.parametrize(("size", "is_stored"), [(200, True), (201, False)])
def test_a_dedupe_key_has_at_most_200_bytes(db: Db, size: int, is_stored: bool) -> None:
    if is_stored:
        enqueue(db, dedupe_key="k" * size)
    else:
        with pytest.raises(errors.CheckViolation):
            enqueue(db, dedupe_key="k" * size)
    assert count(db, "execution") == is_stored


def test_a_reason_to_cancel_is_cut(db: Db) -> None:
    id = enqueue(db)
    cancel(db, id, reason="é" * 1001)
    assert row(db, id)["cancel_reason"] == "é" * 1000


def test_an_event_of_the_limit_is_emitted_and_one_byte_more_is_not(db: Db) -> None:
    db.execute("select emit('told', %s)", (Jsonb(text_of(BYTES_MAX)),))
    with refused(db, "at most 1048576"):
        db.execute("select emit('told', %s)", (Jsonb(text_of(BYTES_MAX + 1)),))
    assert db.execute("select from event where id <> %s", (uuid4(),)).rowcount == 1
