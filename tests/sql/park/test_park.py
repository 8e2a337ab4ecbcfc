"""park: running → waiting, or ready again when an answer was faster."""

from uuid import UUID

import pytest

from tests.sql.support import (
    Db,
    Json,
    at,
    await_members,
    blank,
    call,
    claim,
    claim_one,
    count,
    enqueue,
    fail,
    fan_out,
    finish,
    invoke,
    op,
    park,
    register,
    row,
    save,
    settle,
    settle_both,
    state,
    states,
    step,
)


@pytest.fixture
def running(db: Db) -> str:
    register(db, "work", "child")
    enqueue(db)
    return claim_one(db)


def start_children(db: Db, id: str, *names: str) -> dict[str, str]:
    ops = [op(id, name, "start", {}) for name in names]
    save(db, id, ops=ops)
    return {each["name"]: each["children"][0]["id"] for each in ops}


def await_existing(name: str, kind: str) -> list[dict[str, object]]:
    return [{"name": name, "round": 0, "kind": kind, "awaited": True}]


def test_creating_the_child_and_giving_up_the_lease_are_one_commit(db: Db, running: str) -> None:
    child = invoke(db, running)
    assert states(db, [running, child]) == ["waiting", "ready"]
    assert count(db, "lease") == 0


def test_parking_is_free_of_charge(db: Db, running: str) -> None:
    for n in range(50):
        invoke(db, running, f"call {n}", token=2 * n + 1)
        finish(db, claim_one(db, tasks=["child"], token=2 * n + 2), token=2 * n + 2)
        claim(db, token=2 * n + 3)
    assert (row(db, running)["failures"], row(db, running)["crashes"]) == (0, 0)


@pytest.mark.covers("P6")
def test_a_park_that_is_repeated_makes_one_child(db: Db, running: str) -> None:
    operation = op(running, "call", "invoke", {})
    park(db, running, operation)
    assert park(db, running, operation)["lost"] == [running]
    assert (count(db, "execution"), count(db, "wait")) == (2, 1)


def test_who_awaits_what_was_answered_meanwhile_does_not_sleep(db: Db, running: str) -> None:
    child = op(running, "call", "invoke", {})
    save(db, running, ops=[child])
    finish(db, claim_one(db))
    assert park(db, running, awaits=await_existing("call", "invoke"))["queues"]
    assert (state(db, running), count(db, "wait")) == ("ready", 0)


def test_a_sleep_is_a_timer(db: Db, running: str) -> None:
    park(db, running, op(running, "nap", "sleep", due_in=60))
    call(db, "fire_timers", "2040-01-01 00:00:59+00")
    assert state(db, running) == "waiting"
    call(db, "fire_timers", "2040-01-01 00:01:00+00")
    assert (state(db, running), step(db, running, "nap")["status"]) == ("ready", "completed")


def test_the_earliest_of_several_deadlines_counts(db: Db, running: str) -> None:
    park(db, running, op(running, "a", "sleep", due_in=60), op(running, "b", "sleep", due_in=30))
    claimed = claim(db, now=30, fire=True, token=2)
    assert [each["id"] for each in claimed] == [running]
    assert [step(db, running, name)["status"] for name in "ab"] == ["pending", "completed"]


def test_a_deadline_is_kept_over_resumes(db: Db, running: str) -> None:
    park(db, running, op(running, "a", "sleep", due_in=60), op(running, "b", "sleep", due_in=30))
    claim(db, now=30, fire=True, token=2)
    park(db, running, awaits=await_existing("a", "sleep"), token=2, now=30)
    assert claim(db, now=59, fire=True, token=3) == []
    assert len(claim(db, now=60, fire=True, token=3)) == 1


def test_two_calls_wake_on_the_first_answer(db: Db, running: str) -> None:
    park(db, running, op(running, "a", "invoke", {}), op(running, "b", "invoke", {}))
    children = [each["id"] for each in claim(db)]
    finish(db, children[0])
    assert state(db, running) == "ready"
    finish(db, children[1])
    assert (state(db, running), count(db, "ready")) == ("ready", 1)


def test_a_call_of_no_children_is_answered_at_once(db: Db, running: str) -> None:
    operation: Json = op(running, "all", "invoke_all") | {"children": []}
    park(db, running, operation)
    assert (state(db, running), step(db, running, "all")["status"]) == ("ready", "completed")


# ---------------------------------------------------------------- invoke_all


def test_a_fan_out_wakes_once_when_the_last_child_ends(db: Db) -> None:
    parent, children = fan_out(db, 3)
    claim(db)
    finish(db, children[1])
    fail(db, children[0])
    assert state(db, parent) == "waiting"
    finish(db, children[2])
    assert (state(db, parent), step(db, parent, "all")["status"]) == ("ready", "completed")
    assert [step(db, parent, "all", n)["status"] for n in (1, 2, 3)] == ["failed", "completed", "completed"]


def test_a_resume_is_told_the_answers_in_order_whoever_remembers_what(db: Db) -> None:
    register(db, "work", "child", "other")
    enqueue(db)
    parent = claim_one(db, tasks=["work"])
    mixed = op(parent, "all", "invoke_all", {}, {"task": "other"}, {})
    park(db, parent, mixed, op(parent, "one", "invoke", {}))
    ids = [each["id"] for each in mixed["children"]]
    claim(db, tasks=["child", "other"])
    settle(db, *[{"id": id, "outcome": "completed", "result": n} for n, id in reversed(list(enumerate(ids)))])
    (claimed,) = claim(db, token=2)
    told = {each[0]: each for each in claimed["steps"]}
    assert [each[:2] for each in told["all"][-1]] == [[0, "completed"], [1, "completed"], [2, "completed"]]
    assert [each[3] for each in told["all"][-1]] == ids
    assert [each[4] for each in told["all"][-1]] == ["child", "other", "child"]
    assert (told["one"][4], told["one"][-1]) == ("pending", None)


def test_children_of_several_operations_and_executions_go_to_their_own(db: Db) -> None:
    register(db, "work", "child")
    first, second = enqueue(db), enqueue(db)
    claim(db)
    ops = [
        op(first, "nap", "sleep", due_in=9),
        op(second, "all", "invoke_all", *blank(2)),
        op(first, "all", "invoke_all", *blank(3)),
        op(second, "call", "invoke", {}),
    ]
    outcomes: list[Json] = []
    for id in (first, second):
        mine = [each for each in ops if each["id"] == id]
        awaits = [{"name": each["name"], "round": 0, "kind": each["kind"], "awaited": True} for each in mine]
        outcomes.append({"id": id, "outcome": "parked", "ops": mine, "awaits": awaits})
    settle(db, *outcomes)
    found = db.execute(
        "select parent_id::text, parent_step, parent_index, id::text from execution where parent_id is not null"
    ).fetchall()
    assert {tuple(each.values()) for each in found} == {
        (each["id"], each["name"], index, child["id"])
        for each in ops
        for index, child in enumerate(each.get("children", ()), each["kind"] == "invoke_all")
    }


def test_children_in_a_row_are_called_as_each_asks(db: Db) -> None:
    register(db, "work", "child", "other")
    enqueue(db)
    id = claim_one(db, tasks=["work"])
    calls: list[Json] = [
        {},
        {},
        {"priority": 7},
        {"queue": "mail"},
        {"delay": 9},
        {"delay": 9},
        {"task": "other"},
        {},
        {},
    ]
    fan_out = op(id, "all", "invoke_all", *calls, window=8)
    lone = op(id, "one", "invoke", {"priority": 3})
    park(db, id, fan_out, lone)
    ids = [each["id"] for each in fan_out["children"]]
    found = [row(db, each) for each in ids]
    assert [each["parent_index"] for each in found] == list(range(1, 10))
    assert [each["priority"] for each in found] == [0, 0, 7, 0, 0, 0, 0, 0, 0]
    assert [each["run_at"] for each in found] == [None] * 4 + [at(9)] * 2 + [None] * 3
    assert [state(db, each) for each in ids] == ["ready"] * 4 + ["scheduled"] * 2 + ["ready"] * 2 + ["scheduled"]
    lanes = db.execute(
        "select e.id::text, t.name as task, q.name as queue from execution e join lane l on l.id = e.lane_id "
        "join task t on t.id = l.task_id join queue q on q.id = l.queue_id where e.parent_step = 'all' order by e.ord"
    ).fetchall()
    tasks = ["child"] * 6 + ["other"] + ["child"] * 2
    queues = ["default"] * 3 + ["mail"] + ["default"] * 5
    assert [tuple(each.values()) for each in lanes] == list(zip(ids, tasks, queues, strict=True))
    assert row(db, lone["children"][0]["id"])["priority"] == 3
    whole = db.execute("select child_ids, child_task from step where name = 'all'").fetchone()
    assert whole == {"child_ids": [UUID(each) for each in ids], "child_task": None}


def test_children_that_ask_for_nothing_besides_are_written_as_any_others(db: Db) -> None:
    register(db, "work", "child", "other")
    left: list[list[Json]] = []
    nothing: Json = {}
    for kept in (nothing, {"run_at": str(at(-1))}):  # a time that has passed is nothing either, but is looked at
        enqueue(db)
        id = claim_one(db, tasks=["work"])
        lone = op(id, "one", "invoke", {"priority": 3} | kept)
        all_ = op(id, "all", "invoke_all", {}, {}, {"priority": 7, "queue": "mail"}, {"task": "other"}, kept)
        park(db, id, op(id, "nap", "sleep", due_in=9), lone, all_)
        ids = [each["id"] for each in (*lone["children"], *all_["children"])]
        rows = [row(db, each) for each in ids]
        assert [each["parent_id"] for each in rows] == [each["root_id"] for each in rows] == [UUID(id)] * 6
        ords = [each["ord"] for each in rows]
        assert (ords, states(db, ids)) == (sorted(ords), ["ready"] * 6)
        entered = db.execute("select execution_id::text, lane_id, priority from ready").fetchall()
        lanes = {each["execution_id"]: (each["lane_id"], each["priority"]) for each in entered}
        assert [lanes[each] for each in ids] == [(each["lane_id"], each["priority"]) for each in rows]
        mine = {"id", "parent_id", "root_id", "ord", "run_at"}
        left.append([{name: value for name, value in each.items() if name not in mine} for each in rows])
    assert left[0] == left[1]


def test_a_lost_execution_opens_nothing(db: Db) -> None:
    register(db, "work", "child")
    held, lost = enqueue(db), enqueue(db)
    claim(db)
    settle(
        db,
        *[
            {"id": id, "token": token, "outcome": "parked", "ops": [op(id, "all", "invoke_all", *blank(2))]}
            for id, token in ((lost, 9), (held, 1))
        ],
    )
    assert states(db, [lost, held]) == ["running", "waiting"]
    parents = db.execute("select distinct parent_id::text as id from execution where parent_id is not null").fetchall()
    assert [each["id"] for each in parents] == [held]


def test_a_batch_that_ends_all_children_counts_them_all(db: Db) -> None:
    parent, children = fan_out(db, 20)
    claim(db, limit=20)
    settle(db, *[{"id": child, "outcome": "completed", "result": 1} for child in children])
    assert (state(db, parent), count(db, "wait_item")) == ("ready", 0)


def test_a_window_holds_the_others_back_and_releases_one_for_one(db: Db) -> None:
    _, children = fan_out(db, 5, window=2)
    assert states(db, children) == ["ready", "ready", *["scheduled"] * 3]
    claim(db)
    finish(db, children[1])
    assert states(db, children) == ["running", "completed", "ready", "scheduled", "scheduled"]
    claim(db, token=2)
    settle(db, {"id": children[0], "outcome": "completed"}, {"id": children[2], "outcome": "completed", "token": 2})
    assert states(db, children[3:]) == ["ready", "ready"]


def test_a_window_lets_all_through_in_the_end(db: Db) -> None:
    parent, children = fan_out(db, 7, window=3)
    for n in range(1, 8):
        for claimed in claim(db, limit=1, tasks=["child"], token=n + 1):
            finish(db, claimed["id"], token=n + 1)
    assert set(states(db, children)) == {"completed"}
    assert state(db, parent) == "ready"


def test_a_held_child_may_expire_from_its_release_on(db: Db) -> None:
    _, children = fan_out(db, 2, window=1)
    db.execute("update task set expires_in = '5 seconds' where name = 'child'")
    claim(db)
    finish(db, children[0], now=100)
    call(db, "fire_timers", at(104))
    assert state(db, children[1]) == "ready"
    call(db, "fire_timers", at(106))
    assert state(db, children[1]) == "failed"


def test_children_that_a_window_held_wait_for_their_time_as_well(db: Db) -> None:
    register(db, "work", "child")
    enqueue(db)
    parent = claim_one(db, tasks=["work"])
    operation = op(parent, "all", "invoke_all", {}, {"delay": 50}, {"delay": 500}, window=1)
    park(db, parent, operation)
    first, second, third = [child["id"] for child in operation["children"]]

    claim(db)
    finish(db, first, now=100)
    assert states(db, [second, third]) == ["ready", "scheduled"]  # the time of the second has passed
    claim(db, now=101, token=2)
    finish(db, second, token=2, now=110)
    call(db, "fire_timers", at(499))
    assert state(db, third) == "scheduled"
    call(db, "fire_timers", at(500))
    assert state(db, third) == "ready"


def test_held_children_never_come_by_a_timer(db: Db) -> None:
    _, children = fan_out(db, 2, window=1)
    call(db, "fire_timers", "9999-01-01")
    assert states(db, children) == ["ready", "scheduled"]


# ---------------------------------------------------------------- wait on started children


def test_a_wait_returns_at_its_count(db: Db, running: str) -> None:
    children = start_children(db, running, "a", "b", "c")
    park(db, running, op(running, "w", "wait"), awaits=await_members("w", "a", "b", "c", count=2))
    claim(db)
    finish(db, children["c"])
    assert state(db, running) == "waiting"
    fail(db, children["a"])
    assert state(db, running) == "ready"
    assert step(db, running, "w")["value"] == ["a", "c"]


def test_a_wait_counts_what_was_done_before(db: Db, running: str) -> None:
    children = start_children(db, running, "a", "b")
    claim(db)
    finish(db, children["a"])
    park(db, running, op(running, "w", "wait"), awaits=await_members("w", "a", "b", count=1))
    assert (state(db, running), step(db, running, "w")["value"]) == ("ready", ["a"])


def test_a_wait_on_what_is_all_done_does_not_sleep(db: Db, running: str) -> None:
    children = start_children(db, running, "a", "b")
    claim(db)
    settle(db, *[{"id": child, "outcome": "completed"} for child in children.values()])
    park(db, running, op(running, "w", "wait"), awaits=await_members("w", "a", "b", count=2))
    assert (state(db, running), count(db, "wait_item"), count(db, "wait_link")) == ("ready", 0, 0)


def test_a_wait_that_times_out_returns_what_there_is_and_cancels_nobody(db: Db, running: str) -> None:
    children = start_children(db, running, "a", "b")
    park(db, running, op(running, "w", "wait", due_in=30), awaits=await_members("w", "a", "b", count=2))
    claim(db)
    finish(db, children["b"])
    call(db, "fire_timers", "2040-01-01 00:00:30+00")
    assert (state(db, running), step(db, running, "w")["value"]) == ("ready", ["b"])
    assert state(db, children["a"]) == "running"


def test_the_end_of_a_started_child_alone_wakes_nobody(db: Db, running: str) -> None:
    children = start_children(db, running, "a")
    park(db, running, op(running, "nap", "sleep", due_in=60))
    claim(db)
    finish(db, children["a"])
    assert state(db, running) == "waiting"


def test_a_wait_is_counted_again_after_another_answer_woke_its_parent(db: Db, running: str) -> None:
    children = start_children(db, running, "a", "b")
    wait, both = op(running, "w", "wait"), await_members("w", "a", "b", count=2)
    park(db, running, wait, op(running, "n", "sleep", due_in=5), awaits=both + await_existing("n", "sleep"))
    claim(db)
    finish(db, children["a"])
    claim(db, now=5, fire=True, token=2)
    park(db, running, awaits=both, token=2, now=5)
    finish(db, children["b"])
    assert (state(db, running), step(db, running, "w")["value"]) == ("ready", ["a", "b"])


def test_a_name_given_twice_counts_once(db: Db, running: str) -> None:
    children = start_children(db, running, "a", "b")
    claim(db)
    finish(db, children["a"])
    park(db, running, op(running, "w", "wait"), awaits=await_members("w", "a", "a", "b", count=2))
    assert state(db, running) == "waiting"


def test_many_park_in_one_call(db: Db) -> None:
    register(db, "work", "child")
    ids = [enqueue(db) for _ in range(3)]
    claim(db)
    outcomes = [
        {
            "id": id,
            "token": 1,
            "outcome": "parked",
            "ops": [op(id, "n", "sleep", due_in=n + 1)],
            "awaits": await_existing("n", "sleep"),
        }
        for n, id in enumerate(ids)
    ]
    settle_both(db, [], outcomes, now="2040-01-01 00:00:00+00")
    assert states(db, ids) == ["waiting"] * 3
