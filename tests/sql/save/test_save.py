"""save: record steps and open operations while a handler runs."""

from uuid import UUID, uuid4

import psycopg
import pytest

from pgconductor.id_array import IdArray
from pgconductor.ids import new_ids
from tests.sql.support import (
    WORKER,
    Db,
    Json,
    at,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    finish,
    op,
    register,
    row,
    save,
    state,
    step,
)


@pytest.fixture
def running(db: Db) -> str:
    register(db, "work", "child")
    enqueue(db)
    return claim_one(db)


def test_a_step_is_recorded_with_its_value(db: Db, running: str) -> None:
    assert save(db, running, "a", "b")["lost"] is None
    assert (step(db, running, "a")["value"], step(db, running, "b")["status"]) == ("a", "completed")


@pytest.mark.covers("F58", "P13")
@pytest.mark.parametrize("value", [0, "", False, [], None, {}])
def test_empty_values_come_back_equal(db: Db, running: str, value: object) -> None:
    steps = [{"id": running, "token": 1, "name": "a", "round": 0, "kind": "step", "value": value}]
    call(db, "save", WORKER, steps, [])
    assert step(db, running, "a")["value"] == value


def test_the_first_record_of_a_step_stays(db: Db, running: str) -> None:
    for value in (1, 2):
        steps = [{"id": running, "token": 1, "name": "a", "round": 0, "kind": "step", "value": value}]
        assert call(db, "save", WORKER, steps, [])["lost"] is None
    assert step(db, running, "a")["value"] == 1


def test_a_name_repeated_in_one_batch_is_recorded_once(db: Db, running: str) -> None:
    save(db, running, "a", "a")
    assert count(db, "step") == 1


@pytest.mark.covers("F24", "P2")
def test_a_stale_token_records_nothing(db: Db, running: str) -> None:
    assert save(db, running, "a", token=2, ops=[op(running, "s", "start", {})])["lost"] == [running]
    assert count(db, "step") == 0
    assert count(db, "execution") == 1


def test_the_loss_of_one_leaves_the_others(db: Db, running: str) -> None:
    gone = str(uuid4())
    steps = [{"id": id, "token": 1, "name": "a", "round": 0, "kind": "step", "value": 1} for id in (gone, running)]
    assert call(db, "save", WORKER, steps, [])["lost"] == [gone]
    assert step(db, running, "a")["value"] == 1


def test_a_settled_execution_records_nothing_more(db: Db, running: str) -> None:
    complete(db, running)
    assert save(db, running, "late")["lost"] == [running]


def test_a_dead_orchestrator_records_nothing(db: Db, running: str) -> None:
    assert save(db, running, "a", worker=UUID(int=9)) is None
    assert count(db, "step") == 0


@pytest.mark.parametrize("nothing", ["[]", None])
def test_nothing_to_save_is_no_error(db: Db, running: str, nothing: str | None) -> None:
    assert call(db, "save", WORKER, nothing, nothing)["lost"] is None


# ---------------------------------------------------------------- children that are started


def test_a_started_child_is_ready_one_below_its_parent(db: Db, running: str) -> None:
    start = op(running, "s", "start", {"priority": 4})
    assert len(save(db, running, ops=[start])["queues"]) == 1
    child = row(db, start["children"][0]["id"])
    assert (str(child["parent_id"]), child["depth"], child["priority"]) == (running, 1, 4)


def test_a_repeated_start_makes_one_child(db: Db, running: str) -> None:
    first, again = (op(running, "s", "start", {}) for _ in range(2))
    for each in (first, first, again):
        save(db, running, ops=[each])
    assert count(db, "execution") == 2
    assert str(step(db, running, "s")["child_id"]) == first["children"][0]["id"]


def test_a_detached_child_stands_outside_the_tree(db: Db, running: str) -> None:
    start = op(running, "s", "start", {}, detached=True)
    save(db, running, ops=[start])
    child = row(db, start["children"][0]["id"])
    assert (child["parent_id"], child["root_id"], child["depth"]) == (None, None, 0)
    assert step(db, running, "s")["status"] == "completed"
    cancel(db, running)
    assert state(db, str(child["id"])) == "ready"


def test_a_child_may_go_to_another_queue_and_start_later(db: Db, running: str) -> None:
    start = op(running, "s", "start", {"queue": "mail", "delay": 60})
    save(db, running, ops=[start])
    id = start["children"][0]["id"]
    found = db.execute("select state, queue from executions where id = %s", (id,)).fetchone()
    assert found == {"state": "scheduled", "queue": "mail"}


def test_a_parent_with_a_cancel_request_starts_nothing(db: Db, running: str) -> None:
    cancel(db, running)
    assert save(db, running, ops=[op(running, "s", "start", {})])["lost"] is None
    assert count(db, "execution") == 1


def test_operations_without_children_may_say_so_with_null(db: Db, running: str) -> None:
    nap = op(running, "nap", "sleep", due_in=5) | {"children": None}
    save(db, running, ops=[nap, op(running, "s", "start", {})])
    assert (step(db, running, "nap")["status"], count(db, "execution")) == ("pending", 2)


@pytest.mark.covers("F63")
@pytest.mark.parametrize(
    "alike",
    [
        [{"op": 1, "count": 1}],  # fewer than there are ids
        [{"op": 1, "count": 3}],
        [{"op": 1, "count": -1}, {"op": 1, "count": 3}],
        [{"op": 1, "count": -2_000_000_000}, {"op": 1, "count": 2_000_000_002}],
        [{"op": 2, "count": 1}, {"op": 1, "count": 1}],  # of the second operation first
        [{"op": 2, "count": 2}],  # two of a start
    ],
)
def test_what_is_said_of_children_has_to_fit_them(db: Db, running: str, alike: list[Json]) -> None:
    ops = [op(running, "all", "invoke_all", token=1), op(running, "one", "start", token=1)]
    called = [{"task": "child"} | each for each in alike]
    payloads: list[Json] = [{}, {}]
    with pytest.raises(psycopg.Error) as caught:
        call(db, "save", WORKER, [], ops, at(0), called, IdArray(new_ids(2)), payloads)
    assert caught.value.sqlstate in ("PC003", "22003")
    assert (count(db, "execution"), count(db, "step")) == (1, 0)


def test_children_of_what_is_there_already_are_passed_over(db: Db, running: str) -> None:
    first = op(running, "a", "start", {})
    save(db, running, ops=[first])
    second, third = op(running, "b", "start", {"priority": 5}), op(running, "c", "start", {"priority": 6})
    save(db, running, ops=[first, second, first | {"name": "a"}, third])
    assert count(db, "execution") == 4
    for each, priority in ((first, 0), (second, 5), (third, 6)):
        id = each["children"][0]["id"]
        assert row(db, id)["priority"] == priority
        assert str(step(db, running, each["name"])["child_id"]) == id


def test_no_child_deeper_than_100(db: Db, running: str) -> None:
    db.execute("update execution set depth = 100 where id = %s", (running,))
    with pytest.raises(psycopg.Error, match="a child 101 levels below its root") as refused:
        save(db, running, ops=[op(running, "s", "start", {})])
    assert refused.value.sqlstate == "PC003"
    assert count(db, "execution") == 1
    db.execute("update execution set depth = 0 where id = %s", (running,))


def test_a_child_that_ends_while_its_parent_runs_answers_the_step(db: Db, running: str) -> None:
    save(db, running, ops=[op(running, "s", "start", {})])
    child = claim(db, tasks=["child"])[0]["id"]
    finish(db, child, 5)
    assert (step(db, running, "s")["value"], state(db, running)) == (5, "running")
