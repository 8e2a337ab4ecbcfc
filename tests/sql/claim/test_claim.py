"""claim: ready → running."""

from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.sql.support import (
    WORKER,
    Background,
    Db,
    array,
    at,
    blank,
    call,
    claim,
    claim_one,
    complete,
    count,
    enqueue,
    enqueue_many,
    invoke,
    op,
    park,
    register,
    release,
    retry,
    row,
    save,
    session,
    settle,
    state,
    wait_until_blocked,
)

OTHER = UUID(int=2)


@pytest.fixture(autouse=True)
def worker(db: Db) -> None:
    register(db, "work", "child")


def test_a_claim_gives_what_a_run_needs(db: Db) -> None:
    id = enqueue(db, payload={"a": [1, None, ""]})
    (claimed,) = claim(db)
    assert (claimed["id"], claimed["payload"], claimed["steps"]) == (id, {"a": [1, None, ""]}, None)
    assert state(db, id) == "running"


def test_nothing_ready_is_nothing_claimed(db: Db) -> None:
    assert claim(db) == []


def test_a_claim_without_wants_only_has_the_server_plan(db: Db) -> None:
    enqueue_many(db, *blank(3))
    answer = call(db, "claim", WORKER, 1, None, array([1]), False, at(0))
    assert (answer["claimed"], answer["last"]) == (None, None)
    assert (count(db, "ready"), count(db, "lease")) == (3, 0)


@pytest.mark.parametrize("limit", [0, 1, 3, 5])
def test_no_more_than_the_limit_is_claimed(db: Db, limit: int) -> None:
    enqueue_many(db, *blank(3))
    assert len(claim(db, limit=limit)) == min(limit, 3)


@pytest.mark.covers("P31")
def test_higher_priority_goes_first_and_equals_in_the_order_of_their_call(db: Db) -> None:
    priorities = [0, 5, -1, 5, 32_767, 0]
    ids = enqueue_many(db, *[{"priority": priority} for priority in priorities])
    expected = [ids[n] for n in (4, 1, 3, 0, 5, 2)]
    assert [each["id"] for each in claim(db)] == expected


def test_the_order_holds_over_lanes_and_limits(db: Db) -> None:
    calls = [{"task": task, "priority": p} for p in (1, 2, 3) for task in ("work", "child")]
    ids = enqueue_many(db, *calls)
    got = [each["id"] for n in range(1, 4) for each in claim(db, limit=2, token=n)]
    assert got == [ids[n] for n in (4, 5, 2, 3, 0, 1)]


def test_woken_goes_before_fresh_of_its_priority(db: Db) -> None:
    first = enqueue(db)
    claim(db)
    child = invoke(db, first)
    fresh, urgent = enqueue_many(db, {}, {"priority": 1})
    settle(db, {"id": claim_one(db, tasks=["child"]), "outcome": "completed", "result": 1})
    assert child not in (got := [each["id"] for each in claim(db, token=2)])
    assert got == [urgent, first, fresh]


@pytest.mark.covers("F72")
def test_future_work_is_not_claimed(db: Db) -> None:
    enqueue(db, delay=60)
    assert claim(db, now=59, fire=True) == []
    assert len(claim(db, now=60, fire=True)) == 1


def test_a_claim_says_when_the_next_timer_is_due(db: Db) -> None:
    enqueue(db, delay=60)
    answer = call(db, "claim", WORKER, 1, [], "{}", False, at(20))
    assert answer["next_due"] == 40


@pytest.mark.covers("F68", "P29")
def test_an_unknown_task_is_not_claimed_and_costs_nothing(db: Db) -> None:
    foreign, ours = enqueue(db, "foreign"), enqueue(db)
    assert claim_one(db, tasks=["work"]) == ours
    assert (state(db, foreign), row(db, foreign)["failures"]) == ("ready", 0)


def test_another_queue_is_not_claimed(db: Db) -> None:
    id = enqueue(db, queue="mail")
    assert claim(db) == []
    assert claim_one(db, queue="mail") == id


def test_a_dead_orchestrator_claims_nothing(db: Db) -> None:
    id = enqueue(db)
    assert call(db, "claim", uuid4(), 1, [], "{}") is None
    assert state(db, id) == "ready"


def test_two_claimers_never_take_the_same(db: Db, database: str) -> None:
    enqueue_many(db, *blank(200))
    register(db, worker=OTHER)

    def drain(worker: UUID) -> list[str]:
        with session(database) as mine:
            return [each["id"] for n in range(60) for each in claim(mine, limit=7, token=n, worker=worker)]

    got = [each.result() for each in [Background(partial(drain, w)) for w in (WORKER, OTHER)]]
    assert len(got[0]) + len(got[1]) == len({*got[0], *got[1]}) == 200


def test_a_claim_passes_over_what_another_is_taking(db: Db, database: str) -> None:
    ids = enqueue_many(db, *blank(4))
    register(db, worker=OTHER)
    with session(database) as other, other.transaction():
        assert [each["id"] for each in claim(other, limit=2, worker=OTHER)] == ids[:2]
        assert [each["id"] for each in claim(db)] == ids[2:]


# ---------------------------------------------------------------- what a resumed execution is given


def test_a_retry_is_given_its_recorded_steps(db: Db) -> None:
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    retry(db, id)
    (claimed,) = claim(db, token=2)
    assert [(s[0], s[4], s[5]) for s in claimed["steps"]] == [("a", "completed", "a")]
    assert claimed["failures"] == 1


def test_a_release_with_a_delay_is_given_its_recorded_steps(db: Db) -> None:
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    release(db, id, delay=5)
    (claimed,) = claim(db, token=2, now=5, fire=True)
    assert [s[0] for s in claimed["steps"]] == ["a"]


def test_who_parked_with_a_cache_is_given_only_what_changed(db: Db) -> None:
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    sleep = op(id, "nap", "sleep", due_in=5)
    awaits = [{"name": "nap", "round": 0, "kind": "sleep", "awaited": True}]
    settle(db, {"id": id, "outcome": "parked", "ops": [sleep], "awaits": awaits, "cached": True})
    (claimed,) = claim(db, token=2, now=5, fire=True)
    assert (claimed["cached"], [s[0] for s in claimed["steps"]]) == (True, ["nap"])


@pytest.mark.parametrize("count", [3, 12])
def test_who_parked_on_several_is_given_those_that_were_answered(db: Db, count: int) -> None:
    id = park_cached(db, *(op("", f"call {n}", "invoke", {}) for n in range(count)))
    names = db.execute("select cached_open from wait").fetchall()
    assert names == [{"cached_open": [f"call {n}" for n in range(count)] if count == 3 else None}]
    for child in claim(db, tasks=["child"], limit=2):
        complete(db, child["id"], parent=id)
    (claimed,) = claim(db, token=2, tasks=["work"])
    assert (claimed["cached"], [s[0] for s in claimed["steps"]]) == (True, ["call 0", "call 1"])


def test_what_has_little_recorded_is_looked_through(db: Db) -> None:
    id = park_cached(db, op("", "call", "invoke", {}), is_long=False)
    assert db.execute("select cached_open from wait").fetchall() == [{"cached_open": None}]
    (child,) = claim(db, tasks=["child"])
    complete(db, child["id"], parent=id)
    (claimed,) = claim(db, token=2, tasks=["work"])
    assert (claimed["cached"], [s[0] for s in claimed["steps"]]) == (True, ["call"])


def test_who_parked_on_a_fan_out_is_given_the_answers_of_its_children(db: Db) -> None:
    id = park_cached(db, op("", "all", "invoke_all", {}, {}))
    children = [child["id"] for child in claim(db, tasks=["child"])]
    for child in children:
        complete(db, child, result=child[:4], parent=id)
    (claimed,) = claim(db, token=2, tasks=["work"])
    answers = [[child[:4]] for child in children]
    assert [(s[0], s[4], s[10]) for s in claimed["steps"]] == [("all", "completed", answers)]


@pytest.mark.parametrize("how", ["completed", "failed", "large", "redriven"])
def test_the_answers_of_a_fan_out_are_told_alone_only_where_they_say_all(db: Db, how: str) -> None:
    id = park_cached(db, op("", "all", "invoke_all", {}, {}, {}), is_long=False)
    children = [child["id"] for child in claim(db, tasks=["child"])]
    for child in (children[2], children[0]):
        complete(db, child, result=child, parent=id)
    end: dict[str, Any] = {"outcome": "completed", "result": "x" * 5_000 if how == "large" else 1}
    if how in ("failed", "redriven"):
        end = {"outcome": "failed", "error": {"message": "boom"}}
    settle(db, {"id": children[1]} | end)
    if how == "redriven":
        db.execute("select redrive(%s)", (children[1],))
    (claimed,) = claim(db, token=2, tasks=["work"])
    if how == "large":
        assert isinstance(claimed["steps"], int)  # load what came after it
        return
    told = next(step[10] for step in claimed["steps"] if step[0] == "all")
    between = [1] if how == "completed" else [None, "failed", {"message": "boom"}, children[1], "child"]
    assert told == [[children[0]], between, [children[2]]]


def test_a_first_run_is_told_what_there_is_to_tell(db: Db) -> None:
    id = park_cached(db, op("", "call", "invoke", {}))
    enqueue(db, "child")
    found = db.execute("select id, queue_id from task where name = 'child'").fetchone()
    assert found is not None
    task, queue = found["id"], found["queue_id"]
    told = call(db, "claim", WORKER, 3, [{"queue": queue, "limit": 9}], f"{{{task}}}")["claimed"]
    assert [each[1:] for each in told] == [[task, queue, {}, 1, id, id], [task, queue, {}]]


def test_what_changed_is_found_by_name_however_the_execution_became_ready(db: Db) -> None:
    register(db, "work", limits=[{"kind": "concurrency", "max": 1}])
    id = park_cached(db, op("", "call", "invoke", {}))
    (child,) = claim(db, tasks=["child"])
    complete(db, child["id"], parent=id)
    assert db.execute("select cached_open from backlog").fetchall() == [{"cached_open": ["call"]}]
    (claimed,) = claim(db, token=2, tasks=["work"])
    assert (claimed["cached"], [s[0] for s in claimed["steps"]]) == (True, ["call"])


def park_cached(db: Db, *ops: dict[str, Any], is_long: bool = True) -> str:
    """Park an execution with a recorded step on operations, by a process that keeps its memos."""
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    opened = [each | {"id": id} for each in ops]
    awaits = [{"name": each["name"], "round": 0, "kind": each["kind"], "awaited": True} for each in ops]
    settle(db, {"id": id, "outcome": "parked", "ops": opened, "awaits": awaits, "cached": True, "long": is_long})
    return id


@pytest.mark.parametrize("is_long", [True, False])
@pytest.mark.parametrize("by", [WORKER, OTHER])
def test_what_is_recorded_is_told_in_the_order_of_the_answers(db: Db, by: UUID, is_long: bool) -> None:
    names = ("c", "b", "d")
    id = park_cached(db, *[op("", name, "invoke", {}) for name in names], is_long=is_long)
    children = {step["name"]: str(step["child_id"]) for step in db.execute("select name, child_id from step")}
    claim(db, tasks=["child"])
    for name in ("d", "c"):
        complete(db, children[name], parent=id)
    register(db, worker=OTHER)
    (claimed,) = claim(db, token=2, tasks=["work"], worker=by)
    given = [each[0] for each in claimed["steps"] if each[4] == "completed"]
    assert given == (["d", "c"] if by == WORKER else ["a", "d", "c"])


def run_that_has_not_seen_its_child_end(db: Db) -> str:
    id = enqueue(db)
    claim(db)
    save(db, id, ops=[op(id, "call", "invoke", {})])
    (child,) = claim(db, tasks=["child"])
    complete(db, child["id"], parent=id)
    save(db, id, "a")
    return id


def test_what_a_run_has_not_seen_is_told_behind_what_it_recorded(db: Db) -> None:
    id = run_that_has_not_seen_its_child_end(db)
    awaits = [{"name": "call", "round": 0, "kind": "invoke", "awaited": True}]
    settle(db, {"id": id, "outcome": "parked", "awaits": awaits, "cached": True})
    (claimed,) = claim(db, token=2, tasks=["work"])
    assert (claimed["cached"], [each[0] for each in claimed["steps"]]) == (True, ["call"])
    release(db, id, token=2)
    (claimed,) = claim(db, token=3, tasks=["work"])
    assert [each[0] for each in claimed["steps"]] == ["a", "call"]


@pytest.mark.parametrize("how", ["retried", "released", "crashed", "given back", "lost"])
def test_so_it_is_however_the_run_ended(db: Db, how: str) -> None:
    id = run_that_has_not_seen_its_child_end(db)
    if how in ("given back", "lost"):
        register(db, worker=OTHER, now=90)
        call(db, *(("retire", WORKER) if how == "given back" else ("sweep", "20 seconds")), at(90))
    else:
        settle(db, {"id": id, "outcome": how, "error": {"message": "boom"}})
    (claimed,) = claim(db, token=2, tasks=["work"], worker=OTHER if how in ("given back", "lost") else WORKER, now=90)
    assert [each[0] for each in claimed["steps"]] == ["a", "call"]


def test_another_process_is_given_everything(db: Db) -> None:
    id = enqueue(db)
    claim(db)
    save(db, id, "a")
    park(db, id, op(id, "nap", "sleep", due_in=5))
    register(db, worker=OTHER)
    (claimed,) = claim(db, token=1, now=5, fire=True, worker=OTHER)
    assert {s[0] for s in claimed["steps"]} == {"a", "nap"}


def test_a_claim_waits_for_nobody_but_the_sweep(db: Db, database: str) -> None:
    id = enqueue(db)
    with session(database) as sweeper:
        sweeper.execute("begin")
        sweeper.execute("select from orchestrator for update")
        mine = session(database)
        claimer = Background(lambda: claim(mine))
        wait_until_blocked(db, mine)
        sweeper.execute("commit")
        assert [each["id"] for each in claimer.result()] == [id]
        mine.close()


def test_array_parameters_are_written_as_postgres_reads_them() -> None:
    assert array([1, 2]) == "{1,2}"


def test_a_claim_counts_no_rows_twice(db: Db) -> None:
    enqueue_many(db, *blank(5))
    claim(db, limit=3)
    assert (count(db, "lease"), count(db, "ready")) == (3, 2)


@pytest.mark.covers("F72")
def test_a_claim_reads_no_more_beside_much_that_cannot_run(db: Db) -> None:
    enqueue_many(db, *blank(200))
    rows_read(db)  # plans are made
    alone = rows_read(db)
    enqueue_many(db, *[{"delay": 3600} for _ in range(5_000)])
    for _ in range(5):
        enqueue_many(db, {"priority": 1})
        parent = claim_one(db, limit=1)
        park(db, parent, op(parent, "all", "invoke_all", *[{"delay": 3600} for _ in range(200)]))
    db.execute("analyze")
    rows_read(db)
    assert (count(db, "timer"), count(db, "wait")) == (6_000, 5)
    assert rows_read(db) <= alone * 1.3


def rows_read(db: Db) -> int:
    """Claim ten, and return how many rows of tables and entries of indexes that read."""
    query = (
        "select sum(seq_tup_read + coalesce(idx_tup_fetch, 0)) as read from pg_stat_xact_user_tables"
        " where schemaname = 'pgconductor'"
    )
    with db.transaction():
        before = one(db, query)
        assert len(claim(db, limit=10)) == 10
        return one(db, query) - before


def one(db: Db, query: str) -> int:
    found = db.execute(query.encode()).fetchone()
    assert found is not None
    return int(found["read"])


@pytest.mark.parametrize(("first", "taken", "left"), [(2000, 2000, ["second", "third"]), (1999, 2004, ["third"])])
def test_a_claim_that_has_two_thousand_names_the_queues_that_it_did_not_come_to(
    db: Db, first: int, taken: int, left: list[str]
) -> None:
    counts = {"first": first, "second": 5, "third": 5}
    for queue in counts:
        register(db, f"in_{queue}", queue=queue)
    known = {each["name"]: each["id"] for each in db.execute("select id, name from queue")}
    for queue, number in counts.items():
        enqueue_many(db, *({"task": f"in_{queue}"} for _ in range(number)))
    wants = [{"queue": known[queue], "limit": 3000} for queue in counts]
    tasks = array([each["id"] for each in db.execute("select id from task")])
    answer = call(db, "claim", WORKER, 1, wants, tasks, False, at(0))
    assert (len(answer["claimed"]), answer["more"]) == (taken, sorted(known[queue] for queue in left))
    rest = [want for want in wants if want["queue"] in answer["more"]]
    again = call(db, "claim", WORKER, 2, rest, tasks, False, at(0))
    assert (len(again["claimed"]), again["more"]) == (5 * len(left), None)
