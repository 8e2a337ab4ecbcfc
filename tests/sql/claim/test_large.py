"""claim leaves out what is large, and load_executions brings it."""

import json
import random
from typing import Any
from uuid import UUID

import pytest

from tests.sql.claim.test_claim import park_cached
from tests.sql.support import (
    START,
    WORKER,
    Db,
    Json,
    array,
    blank,
    call,
    claim,
    claim_named,
    claimed_of,
    complete,
    enqueue,
    enqueue_many,
    op,
    register,
    retry,
    save,
    settle_plain,
)

MIB = 1024 * 1024
ALIKE, VARIED = "x" * 100_000, random.Random(1).randbytes(50_000).hex()  # noqa: S311


@pytest.fixture(autouse=True)
def worker(db: Db) -> None:
    register(db, "work", "child")


def load(db: Db, *missing: Json) -> dict[str, Json]:
    """Return what was missing, by execution: its input, and its operations' values by name."""
    found: dict[str, Json] = {}
    for row in db.execute("select * from load_executions(%s)", (json.dumps(missing),)):
        one = found.setdefault(str(row["execution_id"]), {"steps": {}})
        if row["step"] is None:
            one |= {"payload": row["payload"], "trigger_data": row["trigger_data"]}
        else:
            one["steps"][row["step"][0], row["step"][2]] = row["step"][5]
    return found


def save_value(db: Db, id: str, name: str, value: Any) -> None:
    call(
        db,
        "save",
        WORKER,
        [{"id": id, "token": 1, "name": name, "round": 0, "kind": "step", "value": value}],
        [],
        START,
    )


@pytest.mark.parametrize("value", [ALIKE, VARIED])
@pytest.mark.parametrize("name", [False, True])
def test_a_large_payload_is_loaded_and_not_claimed(db: Db, name: bool, value: str) -> None:
    id, small = enqueue(db, payload={"a": value}), enqueue(db, payload={"a": 1})
    rows = claim_named(db, id, small) if name else claim(db)
    assert {row["id"]: row["payload"] for row in rows} == {id: None, small: {"a": 1}}
    assert load(db, {"id": id, "with_input": True}) == {
        id: {"payload": {"a": value}, "trigger_data": None, "steps": {}}
    }


def test_what_a_trigger_handed_over_goes_with_the_payload(db: Db) -> None:
    id = enqueue(db, payload={"a": 1})
    db.execute("update execution set trigger_kind = 'event', trigger_data = to_json(%s::text)", (ALIKE,))
    (claimed,) = claim(db)
    assert (claimed["payload"], claimed["trigger_data"]) == (None, None)
    assert load(db, {"id": id, "with_input": True})[id] == {"payload": {"a": 1}, "trigger_data": ALIKE, "steps": {}}


@pytest.mark.parametrize("value", [ALIKE, VARIED])
def test_large_recorded_values_are_loaded_and_not_claimed(db: Db, value: str) -> None:
    id = enqueue(db)
    claim(db)
    save(db, id, "small")
    save_value(db, id, "large", value)
    retry(db, id)
    (claimed,) = claim(db, token=2)
    assert (claimed["payload"], claimed["steps"]) == ({}, 0)
    assert load(db, {"id": id, "with_input": False, "since": 0})[id]["steps"] == {
        ("small", 0): "small",
        ("large", 0): value,
    }


@pytest.mark.parametrize("is_long", [False, True])
def test_who_parked_with_a_cache_loads_only_what_changed(db: Db, is_long: bool) -> None:
    id = park_cached(db, op("", "call", "invoke", {}), is_long=is_long)
    (child,) = claim(db, tasks=["child"])
    complete(db, child["id"], result=ALIKE, parent=id)
    (claimed,) = claim(db, token=2, tasks=["work"])
    assert (claimed["cached"], claimed["payload"]) == (True, None)
    assert load(db, {"id": id, "with_input": False, "since": claimed["steps"]}) == {id: {"steps": {("call", 0): ALIKE}}}


def test_who_parked_with_a_cache_has_the_input(db: Db) -> None:
    id = park_cached(db, op("", "call", "invoke", {}))
    (child,) = claim(db, tasks=["child"])
    complete(db, child["id"], result=1, parent=id)
    (claimed,) = claim(db, token=2, tasks=["work"])
    assert (claimed["payload"], [step[5] for step in claimed["steps"]]) == (None, [1])


def test_many_small_values_are_loaded_where_they_are_more_than_the_share_of_a_claim(db: Db) -> None:
    ids = [enqueue(db) for _ in range(80)]
    claim(db, limit=80)
    for id in ids[:2]:
        save_value(db, id, "first", 1)
    db.execute(
        """
        insert into step (execution_id, name, kind, status, value, created_at, finished_at)
        select execution_id, 'many ' || n, 'step', 'completed', to_json(repeat('x', 1500)), created_at, finished_at
        from step, generate_series(1, 600) n where execution_id = %s""",
        (ids[0],),
    )
    for id in ids:
        retry(db, id)
    steps = {each["id"]: each["steps"] for each in claim(db, token=2, limit=80)}
    assert steps[ids[0]] == 0
    assert [step[5] for step in steps[ids[1]]] == [1]
    assert len(load(db, {"id": ids[0], "with_input": False, "since": 0})[ids[0]]["steps"]) == 601


def test_a_claim_of_more_than_one_value_can_hold(db: Db) -> None:
    """Postgres refuses a value of a gigabyte: a claim that was refused would be refused for ever."""
    small = enqueue(db, priority=-1)
    large = enqueue_many(db, *({"payload": {"a": "x" * (MIB - 100)}} for _ in range(2)))
    db.execute(
        """
        with more as (
          insert into execution
          select (json_populate_record(e, json_build_object('id', gen_random_uuid(), 'ord', e.ord + n))).*
          from execution e, generate_series(1, 1100) n where id = %s returning *)
        insert into ready (lane_id, priority, ord, execution_id) select lane_id, priority, ord, id from more""",
        (large[1],),
    )
    tasks = [each["id"] for each in db.execute("select id from task")]
    query = "select claim(%s, 1, json_build_array(json_build_object('queue', id, 'limit', 2000)), %s)::text from queue"
    answer = db.execute(query, (WORKER, array(tasks))).fetchone()
    assert answer is not None
    assert len(answer["claim"]) < MIB
    rows = claimed_of(json.loads(answer["claim"]))
    assert len(rows) == 1_103
    assert (rows[-1]["id"], rows[-1]["payload"]) == (small, {})


def test_what_is_loaded_is_what_was_asked_for(db: Db) -> None:
    ids = enqueue_many(db, {"payload": {"n": 1}}, {"payload": {"n": 2}}, {"payload": {"n": 3}})
    claim(db)
    for id in ids:
        save(db, id, "a", "b")
    seqs = {
        row["name"]: row["seq"] for row in db.execute("select name, seq from step where execution_id = %s", (ids[1],))
    }
    found = load(
        db,
        {"id": ids[0], "with_input": True},
        {"id": ids[1], "with_input": False, "since": seqs["a"]},
        {"id": str(UUID(int=7)), "with_input": True, "since": 0},
    )
    assert found == {
        ids[0]: {"payload": {"n": 1}, "trigger_data": None, "steps": {}},
        ids[1]: {"steps": {("b", 0): "b"}},
    }


def test_results_of_more_than_one_value_can_hold(db: Db) -> None:
    ids = enqueue_many(db, *blank(1_100))
    settle_plain(db, *({"id": each["id"], "token": 1, "result": 1} for each in claim(db, limit=2_000)))
    db.execute("update execution set result = to_json(repeat('x', %s))", (MIB - 100,))
    found = db.execute("select count(*) from watch_results(%s::uuid[])", (array(ids),)).fetchone()
    assert found == {"count": 1_100}
