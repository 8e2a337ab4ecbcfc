"""What an event starts: one execution for each subscription, in the emitter's transaction, by the code of today."""

from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.types.json import Jsonb

from pgconductor.errors import ConfigurationError, engine_error
from tests.events.support import deliver, emit
from tests.sql.support import Db, call, claim, count, register, session


def subscribe(db: Db, *rows: dict[str, Any], deployment: str = "test") -> None:
    register(db, *sorted({row["task"] for row in rows}))
    full = [{"event": "order.paid", "fields": None, "where": None} | row for row in rows]
    call(db, "register_subscriptions", deployment, full)


def started(db: Db) -> list[tuple[str, object]]:
    """Return (task, payload handed over) of what events have started, oldest first."""
    found = db.execute("""
        select t.name, e.trigger_data -> 'payload' as payload from execution e join lane l on l.id = e.lane_id
        join task t on t.id = l.task_id where e.trigger_kind = 'event' order by e.ord""")
    return [(each["name"], each["payload"]) for each in found]


def test_an_event_starts_every_subscriber_once(db: Db) -> None:
    subscribe(db, {"task": "bill"}, {"task": "ship"})
    emit(db, {"n": 1})
    deliver(db)
    assert started(db) == [("bill", {"n": 1}), ("ship", {"n": 1})]
    (first, _) = claim(db)
    assert (first["payload"], first["trigger"]) == ({}, "order.paid")


def test_an_event_without_subscribers_is_recorded(db: Db) -> None:
    id = emit(db, {"n": 1})
    assert db.execute("select name, payload from events where id = %s", (id,)).fetchall() == [
        {"name": "order.paid", "payload": {"n": 1}}
    ]


def test_what_an_event_starts_is_there_with_the_emitters_commit(db: Db, database: str) -> None:
    subscribe(db, {"task": "bill"})
    with session(database) as other:
        other.execute("begin")
        emit(other)
        assert started(db) == []
        other.execute("commit")
    assert len(started(db)) == 1


def test_a_rolled_back_emit_starts_nothing(db: Db, database: str) -> None:
    subscribe(db, {"task": "bill"})
    with session(database) as other:
        other.execute("begin")
        emit(other)
        other.execute("rollback")
    assert (started(db), count(db, "event"), count(db, "ready")) == ([], 0, 0)


def test_an_emit_that_is_sent_again_is_one_event(db: Db) -> None:
    subscribe(db, {"task": "bill"})
    event = {"id": str(uuid4()), "name": "order.paid", "payload": {"n": 1}}
    for _ in range(2):
        call(db, "emit_events", [event])
    assert (len(started(db)), count(db, "event")) == (1, 1)


def test_several_events_in_one_call_start_what_each_of_them_starts_in_order(db: Db) -> None:
    subscribe(db, {"task": "bill"})
    call(db, "emit_events", [{"id": str(uuid4()), "name": "order.paid", "payload": n} for n in range(5)])
    assert [payload for _, payload in started(db)] == [0, 1, 2, 3, 4]


PAYLOAD = {"n": 1.5, "big": 10**30, "s": "ü", "null": None, "list": [1, "2"], "of": {"x": True}, "left": "out"}


def test_fields_keep_their_json_types(db: Db) -> None:
    subscribe(db, {"task": "bill", "fields": ["n", "big", "s", "null", "list", "of", "absent"]})
    emit(db, PAYLOAD)
    ((_, payload),) = started(db)
    assert payload == {name: value for name, value in PAYLOAD.items() if name != "left"}


def test_a_payload_is_handed_over_as_it_was_written(db: Db) -> None:
    subscribe(db, {"task": "bill"})
    text = f'[{{"id": "{uuid4()}", "name": "order.paid", "payload": {{"b":1.50, "a":-0.0,"x":1e2}}}}]'
    db.execute("select emit_events(cast(%s as json))", (text,))
    found = db.execute("select cast(trigger_data -> 'payload' as text) as payload from execution").fetchone()
    assert found == {"payload": '{"b":1.50, "a":-0.0,"x":1e2}'}


@pytest.mark.parametrize(
    ("where", "is_match"),
    [
        ("$.cents > 1000", True),
        ("$.cents > 2000", False),
        ('$.currency == "EUR" && $.cents > 0', True),
        ('$.currency starts with "E"', True),
        ("exists($.tags[*] ? (@ == \"new\"))", True),
        ("$.absent > 1", False),
        ("strict $.absent > 1", False),
        ("$.is_paid", True),
        ("$.cents", False),
        ('$.at.datetime() < "2031-01-01T00:00:00+00:00".datetime()', True),
        ("1 / ($.cents - 1500) > 0", False),
    ],
)  # fmt: skip
def test_where_is_a_jsonpath_predicate(db: Db, where: str, is_match: bool) -> None:
    subscribe(db, {"task": "bill", "where": where})
    emit(db, {"cents": 1500, "currency": "EUR", "tags": ["new"], "is_paid": True, "at": "2030-01-01"})
    assert len(started(db)) == is_match


def test_a_predicate_that_is_none_is_refused_with_postgres_own_words(db: Db) -> None:
    subscribe(db, {"task": "bill"})
    with pytest.raises(psycopg.Error) as refused:
        subscribe(db, {"task": "bill", "where": "$.cents >"})
    assert refused.value.sqlstate == "PC003"
    diag = refused.value.diag
    error = engine_error("PC003", diag.message_primary or "", diag.message_detail)
    assert isinstance(error, ConfigurationError)
    assert error.place == "task 'bill': event('order.paid'): where"
    assert "syntax error at end of jsonpath input" in str(error)
    assert count(db, "subscription") == 1


def test_subscriptions_follow_the_code(db: Db) -> None:
    subscribe(db, {"task": "bill"}, {"task": "ship", "where": "$.a > 1"})
    subscribe(db, {"task": "ship", "where": "$.a > 2"}, {"task": "ship", "fields": ["a"]})
    emit(db, {"a": 2, "b": 1})
    assert started(db) == [("ship", {"a": 2})]
    subscribe(db)
    emit(db, {"a": 5})
    assert len(started(db)) == 1


@pytest.mark.covers("P41")
def test_a_deployment_leaves_the_others_alone(db: Db) -> None:
    subscribe(db, {"task": "bill"}, deployment="shop")
    subscribe(db, {"task": "ship"}, deployment="depot")
    subscribe(db, deployment="depot")
    emit(db)
    assert [task for task, _ in started(db)] == ["bill"]


def test_two_deployments_that_declare_the_same_start_it_once(db: Db) -> None:
    for deployment in ("blue", "green"):
        subscribe(db, {"task": "bill"}, deployment=deployment)
    emit(db)
    assert len(started(db)) == 1


def test_declaring_again_changes_no_row(db: Db) -> None:
    for _ in range(2):
        subscribe(db, {"task": "bill", "fields": ["a"], "where": "$.a > 1"})
    assert db.execute("select id from subscription").fetchall() == [{"id": 1}]


def test_a_subscriber_of_another_queue_is_enqueued_there(db: Db) -> None:
    register(db, "bill", queue="money")
    call(db, "register_subscriptions", "test", [{"task": "bill", "event": "order.paid"}])
    emit(db)
    assert [len(claim(db, queue=queue, token=n)) for n, queue in enumerate(("default", "money"))] == [0, 1]


HOSTILE = ["a'b", 'a"b', "a%sb", "$1", "a\\b", "ü" * 100, "'; drop table event; --", "a.b c", "null", "${x}", "é́"]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_is_a_name(db: Db, name: str) -> None:
    register(db, name)
    call(db, "register_subscriptions", name, [{"task": name, "event": name, "fields": [name], "where": None}])
    emit(db, {name: name, "other": 1}, event=name)
    assert started(db) == [(name, {name: name})]


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\x1bb"])
def test_what_is_no_name_is_refused(db: Db, name: str) -> None:
    with pytest.raises(psycopg.Error) as refused:
        emit(db, {}, event=name)
    assert refused.value.sqlstate == "PC003"


def test_a_payload_over_the_limit_is_refused(db: Db) -> None:
    with pytest.raises(psycopg.Error) as refused:
        emit(db, {"x": "y" * 1_048_576})
    assert refused.value.sqlstate == "PC003"


def test_null_is_a_payload(db: Db) -> None:
    subscribe(db, {"task": "bill"})
    call(db, "emit_events", [{"id": str(uuid4()), "name": "order.paid", "payload": None}])
    emit(db, [])
    assert [payload for _, payload in started(db)] == [None, []]


@pytest.mark.covers("F63", "P42")
def test_a_payload_with_an_event_key_is_plain_data(db: Db) -> None:
    subscribe(db, {"task": "bill"})
    payload = {"event": "order.paid", "trigger_kind": "event", "name": "x"}
    call(db, "invoke", "bill", Jsonb(payload))
    (claimed,) = claim(db)
    assert (claimed["payload"], claimed["trigger"]) == (payload, None)
    assert started(db) == []


def test_the_reports_show_events_and_who_listens(db: Db) -> None:
    subscribe(db, {"task": "bill", "where": "$.a > 1"})
    id = emit(db, {"a": 2})
    (shown,) = call(db, "list_events", None, 10)
    assert (UUID(shown["id"]), shown["name"], shown["payload"]) == (id, "order.paid", {"a": 2})
    assert call(db, "list_events", "another", 10) == []
    (kind,) = call(db, "list_subscriptions")
    assert (kind["event"], kind["tasks"][0]["where"], kind["waiting_count"]) == ("order.paid", "$.a > 1", 0)


def test_events_that_come_together_are_held_to_the_same_size(db: Db) -> None:
    events = [{"id": str(uuid4()), "name": "order.paid", "payload": {"x": "y" * 1_048_576}}]
    with pytest.raises(psycopg.Error, match=r"a payload is .* bytes of JSON, at most 1048576") as refused:
        call(db, "emit_events", events)
    assert refused.value.sqlstate == "PC003"
