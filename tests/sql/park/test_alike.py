"""Fan-outs whose children are sent as arrays leave what they leave when each child is an object of its own."""

from typing import Any

import psycopg
import pytest

from tests.flow.support import concurrency
from tests.sql.support import (
    Db,
    Json,
    at,
    blank,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    op,
    park,
    register,
    release,
)

PAYLOADS = [{"n": 1}, {}, {"text": 'a "quoted" \\ ü'}, {"list": [None, {"alike": 1}]}]
IGNORED = {"id", "ord", "execution_id", "parent_id", "root_id", "child_id", "seq", "cached_seq"}


@pytest.fixture
def parent(db: Db) -> str:
    register(db, "work", "child")
    return parent_of(db)


def parent_of(db: Db) -> str:
    enqueue(db)
    return claim_one(db, tasks=["work"])


def as_arrays(operation: Json, **options: Any) -> Json:
    """Write an operation's children as arrays."""
    children = operation.pop("children")
    ids, payloads = [child["id"] for child in children], [child["payload"] for child in children]
    return operation | {
        "alike": {"ids": ids, "task": "child", "queue": None, "priority": 0, "payloads": payloads} | options
    }


def fan_out(parent: str, **options: Any) -> Json:
    return op(parent, "all", "invoke_all", *({"payload": payload} for payload in PAYLOADS), **options)


def left_by(db: Db, parent: str) -> dict[str, list[Json]]:
    """Return the rows that a fan-out has left, without what differs from one to the next."""
    theirs = (
        "select x.* from {0} x join execution e on e.id = x.execution_id where e.parent_id = %s order by e.parent_index"
    )
    queries = {
        "execution": "select * from execution where parent_id = %s order by parent_index",
        "step": "select * from step where execution_id = %s order by index",
        "wait_item": "select * from wait_item where execution_id = %s",
        "wait": "select * from wait where execution_id = %s",
        "timer": "select * from timer where execution_id = %s",
    } | {table: theirs.format(table) for table in ("ready", "backlog", "expiry")}
    found = {table: db.execute(query.encode(), (parent,)).fetchall() for table, query in queries.items()}
    return {
        table: [{k: v for k, v in row.items() if k not in IGNORED} for row in rows] for table, rows in found.items()
    }


@pytest.mark.parametrize(
    ("task", "options", "child"),
    [
        ({}, {}, {}),
        ({}, {"due_in": 60, "keep": True, "timeout_error": {"type": "T", "message": "m", "timeout": 60}}, {}),
        ({}, {}, {"queue": "other", "priority": 7}),
        ({"expires": 30}, {}, {}),
        ({"limits": [concurrency(1)]}, {}, {}),
    ],
    ids=["plain", "with a timeout", "elsewhere", "expiring", "limited"],
)
def test_arrays_leave_what_objects_leave(
    db: Db, parent: str, task: dict[str, Any], options: dict[str, Any], child: dict[str, Any]
) -> None:
    register(db, "child", **task)
    one_by_one = fan_out(parent, **options)
    one_by_one["children"] = [each | child for each in one_by_one["children"]]
    other = parent_of(db)
    answers = [park(db, parent, one_by_one), park(db, other, as_arrays(fan_out(other, **options), **child))]
    assert answers[0] == answers[1]
    assert left_by(db, parent) == left_by(db, other)
    assert len(left_by(db, other)["execution"]) == len(PAYLOADS)


def test_the_children_run_and_answer_their_parent(db: Db, parent: str) -> None:
    park(db, parent, as_arrays(fan_out(parent)))
    children = claim(db, token=2)
    assert [child["payload"] for child in children] == PAYLOADS
    for number, child in enumerate(children):
        complete(db, child["id"], number, token=2, parent=parent)
    (resumed,) = claim(db, token=3)
    assert [(step[2], step[5]) for step in resumed["steps"][1:]] == [
        (index + 1, index) for index in range(len(PAYLOADS))
    ]


def test_children_of_a_child_know_their_root_and_depth(db: Db, parent: str) -> None:
    park(db, parent, as_arrays(fan_out(parent)))
    (middle,) = claim(db, limit=1, token=2)
    park(db, middle["id"], as_arrays(fan_out(middle["id"])), token=2)
    query = "select distinct depth, root_id::text as root from execution where parent_id = %s"
    assert db.execute(query, (middle["id"],)).fetchall() == [{"depth": 2, "root": parent}]


def test_a_fan_out_that_is_there_is_not_opened_again(db: Db, parent: str) -> None:
    operation = as_arrays(fan_out(parent))
    park(db, parent, operation)
    before = count(db, "execution")
    db.execute("update wait set parked_at = %s", (at(0),))
    park(db, parent, operation)  # its lease is gone
    assert count(db, "execution") == before


def test_beside_other_operations_all_are_opened(db: Db, parent: str) -> None:
    single, nap = op(parent, "one", "invoke", {"payload": {}}), op(parent, "nap", "sleep", due_in=60)
    park(db, parent, single, as_arrays(fan_out(parent)), nap)
    names = db.execute("select name, count(*) as rows from step group by name order by name").fetchall()
    assert names == [{"name": "all", "rows": 5}, {"name": "nap", "rows": 1}, {"name": "one", "rows": 1}]


def test_a_payload_that_is_too_large_is_refused_and_many_that_are_large_together_are_not(db: Db, parent: str) -> None:
    large = op(parent, "all", "invoke_all", {"payload": {"x": "x" * 1_048_576}}, {"payload": {}})
    with pytest.raises(psycopg.Error, match="a payload is 10485"):
        park(db, parent, as_arrays(large))
    assert count(db, "execution") == 1
    park(db, parent, as_arrays(op(parent, "all", "invoke_all", *[{"payload": {"x": "x" * 700_000}}] * 3)))
    assert count(db, "execution") == 4


def test_more_children_than_allowed_are_refused(db: Db, parent: str) -> None:
    many = as_arrays(op(parent, "all", "invoke_all", *blank(10_001)))
    with pytest.raises(psycopg.Error, match="10001 children"):
        park(db, parent, many)
    assert count(db, "execution") == 1


@pytest.mark.parametrize("payloads", [PAYLOADS[:-1], [*PAYLOADS, {}]])
def test_ids_and_payloads_that_do_not_match_are_refused(db: Db, parent: str, payloads: list[Json]) -> None:
    operation = as_arrays(fan_out(parent))
    operation["alike"]["payloads"] = payloads
    with pytest.raises(psycopg.errors.NotNullViolation):
        park(db, parent, operation)
    release(db, parent)
    assert count(db, "execution") == 1
