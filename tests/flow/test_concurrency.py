"""Concurrency limits: how much of a task, or of each value of its payload, runs at once."""

from uuid import UUID

import pytest

from tests.flow.support import concurrency, let_limits_be_lowered, limited, set_limit
from tests.sql.support import (
    Background,
    Db,
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
    invoke,
    register,
    release,
    retry,
    session,
    settle,
    state,
    states,
)

OTHER = UUID(int=2)


def tenant(name: str) -> dict[str, object]:
    return {"payload": {"tenant": {"id": name}}}


def tenants(claimed: list[dict[str, object]]) -> list[str]:
    return [each["payload"]["tenant"]["id"] for each in claimed]  # type: ignore[index]


def test_no_more_run_than_the_limit(db: Db) -> None:
    limited(db, concurrency(2))
    ids = enqueue_many(db, *blank(5))

    assert len(claim(db)) == 2
    assert states(db, ids).count("ready") == 3
    assert claim(db, token=2) == []


def test_the_limit_holds_over_all_workers(db: Db) -> None:
    limited(db, concurrency(2))
    register(db, worker=OTHER)
    enqueue_many(db, *blank(5))

    assert len(claim(db, limit=1)) == 1
    assert len(claim(db, worker=OTHER)) == 1


def test_what_completes_makes_room(db: Db) -> None:
    limited(db, concurrency(1))
    first, second = enqueue_many(db, *blank(2))

    assert claim_one(db) == first
    complete(db, first)
    assert claim_one(db) == second


def test_each_key_has_its_own_limit(db: Db) -> None:
    limited(db, concurrency(1, "tenant.id"))
    enqueue_many(db, tenant("a"), tenant("a"), tenant("b"), tenant("c"))

    assert tenants(claim(db)) == ["a", "b", "c"]
    assert claim(db, token=2) == []


def test_several_limits_hold_at_once(db: Db) -> None:
    limited(db, concurrency(3), concurrency(2, "tenant.id"))
    enqueue_many(db, *[tenant("a")] * 4, *[tenant("b")] * 4)

    assert sorted(tenants(claim(db))) in (["a", "a", "b"], ["a", "b", "b"])


def test_limits_of_two_keys_hold_at_once(db: Db) -> None:
    limited(db, concurrency(1, "user"), concurrency(2, "region"))
    calls = [{"payload": {"user": user, "region": region}} for user in "abc" for region in "xy"]
    enqueue_many(db, *calls)

    running = [each["payload"] for token in range(1, 5) for each in claim(db, token=token)]
    assert len(running) == 3
    assert sorted(each["user"] for each in running) == ["a", "b", "c"]


def test_keys_take_turns(db: Db) -> None:
    limited(db, concurrency(1))
    limited(db, concurrency(4, "tenant.id"), concurrency(1))
    enqueue_many(db, *[tenant("a")] * 3, *[tenant("b")] * 2, tenant("c"))
    served: list[str] = []
    for token in range(1, 7):
        (claimed,) = claim(db, token=token)
        served += tenants([claimed])
        complete(db, claimed["id"], token=token)

    assert served == ["a", "b", "c", "a", "b", "a"]


def test_a_payload_without_the_key_counts_as_one_value(db: Db) -> None:
    limited(db, concurrency(1, "tenant.id"))
    enqueue_many(db, *blank(2))

    assert len(claim(db)) == 1


def test_a_long_key_is_told_apart_from_another(db: Db) -> None:
    limited(db, concurrency(1, "tenant.id"))
    enqueue_many(db, tenant("é" * 5000), tenant("é" * 5000), tenant("é" * 4999))

    assert len(claim(db)) == 2


def test_priority_decides_within_a_limit(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue(db)
    urgent = enqueue(db, priority=5)

    assert claim_one(db) == urgent


def test_priority_decides_between_limited_and_unlimited_tasks(db: Db) -> None:
    limited(db, concurrency(5))
    register(db, "free")
    enqueue_many(db, *[{"priority": 1}] * 2, {"task": "free", "priority": 2}, {"task": "free"})

    assert [each["payload"] for each in claim(db, limit=3)] == [{}] * 3
    assert {state(db, str(each["id"])) for each in db.execute("select id from execution where priority > 0")} == {
        "running"
    }


def test_a_full_task_holds_up_nobody_else(db: Db) -> None:
    limited(db, concurrency(1))
    register(db, "free")
    enqueue_many(db, *blank(5), {"task": "free"})
    claim_one(db, tasks=["work"])

    assert len(claim(db, token=2)) == 1
    assert count(db, "look") == 0


def test_retry_release_and_failure_give_the_permit_back(db: Db) -> None:
    limited(db, concurrency(1))
    ids = enqueue_many(db, *blank(4))
    retry(db, claim_one(db), delay=60)
    release(db, claim_one(db, token=2), token=2, delay=60)
    failed = claim_one(db, token=3)
    settle(db, {"id": failed, "outcome": "failed", "error": {"type": "E", "message": "m"}, "token": 3})

    assert claim_one(db, token=4) == ids[3]


def test_a_cancelled_run_gives_the_permit_back(db: Db) -> None:
    limited(db, concurrency(1))
    first, second = enqueue_many(db, *blank(2))
    claim_one(db)
    cancel(db, first)
    release(db, first)

    assert state(db, first) == "cancelled"
    assert claim_one(db, token=2) == second


def test_waiting_work_can_be_cancelled(db: Db) -> None:
    limited(db, concurrency(1))
    first, second, third = enqueue_many(db, *blank(3))
    claim_one(db)

    assert cancel(db, second) == "cancelled"
    complete(db, first)
    assert claim_one(db, token=2) == third


@pytest.mark.covers("F19", "P24")
def test_p24_a_crashed_workers_permits_come_back_with_the_sweep(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue_many(db, *blank(2))
    first = claim_one(db)
    register(db, worker=OTHER, now=100)
    call(db, "sweep", "20 seconds", at(100))

    assert claim_one(db, worker=OTHER, token=7, now=100) == first
    assert count(db, "permit") == 1


@pytest.mark.covers("P24")
def test_p24_a_permit_without_a_lease_is_swept(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue(db)
    db.execute("insert into permit select gen_random_uuid(), id, '' from task_limit")
    assert claim(db) == []

    call(db, "sweep", "20 seconds", at(1))
    assert len(claim(db, token=2, now=1)) == 1


@pytest.mark.covers("F24", "P25")
def test_p25_a_zombie_frees_no_permit(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue_many(db, *blank(2))
    first = claim_one(db)
    register(db, worker=OTHER, now=100)
    call(db, "sweep", "20 seconds", at(100))
    claim_one(db, worker=OTHER, token=7, now=100)

    assert complete(db, first) is None
    assert claim(db, worker=OTHER, token=8, now=100) == []


@pytest.mark.covers("P25")
def test_p25_a_limit_lowered_and_raised_counts_what_runs(db: Db) -> None:
    limited(db, concurrency(3))
    let_limits_be_lowered(db)
    enqueue_many(db, *blank(6))
    assert len(claim(db)) == 3
    set_limit(db, 1)
    set_limit(db, 4)

    assert len(claim(db, token=2)) == 1


@pytest.mark.covers("P26")
def test_p26_the_database_holds_the_limit_whatever_a_worker_knows_of_it(db: Db) -> None:
    limited(db, concurrency(1))
    register(db, worker=OTHER)
    enqueue_many(db, *blank(3))
    claim_one(db)

    assert claim(db, worker=OTHER, token=2) == []


@pytest.mark.covers("F74")
def test_a_parked_parent_holds_no_permit_and_a_child_of_the_same_limit_runs(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue(db)
    parent = claim_one(db)
    child = invoke(db, parent)
    limited(db, concurrency(1), task="child")

    assert claim_one(db, token=2) == child
    settle(db, {"id": child, "outcome": "completed", "result": 1, "token": 2})
    assert claim_one(db, token=3) == parent


def test_a_raised_limit_admits_at_once_and_a_lowered_one_lets_the_running_finish(db: Db) -> None:
    limited(db, concurrency(2))
    let_limits_be_lowered(db)
    enqueue_many(db, *blank(6))
    first, second = (str(each["id"]) for each in claim(db))
    assert set_limit(db, 3)
    third = claim_one(db, token=2)
    set_limit(db, 1)
    complete(db, first)
    complete(db, second)
    assert claim(db, token=3) == []
    complete(db, third, token=2)

    assert len(claim(db, token=4)) == 1


def test_an_operators_limit_beats_the_codes_until_it_is_given_back(db: Db) -> None:
    limited(db, concurrency(1))
    set_limit(db, 2)
    limited(db, concurrency(1))
    enqueue_many(db, *blank(3))
    one, two = (str(each["id"]) for each in claim(db))
    complete(db, one)
    complete(db, two)
    set_limit(db, None)

    assert len(claim(db, token=2)) == 1


def test_zero_stops_the_starts(db: Db) -> None:
    register(db, "work")
    set_limit(db, 0)
    enqueue(db)
    assert claim(db) == []
    set_limit(db, None)

    assert len(claim(db)) == 1


def test_an_unknown_task_has_no_limit_to_set(db: Db) -> None:
    assert not set_limit(db, 1, task="nobody")
    register(db, "work")
    assert not set_limit(db, None)


def test_a_task_that_becomes_limited_takes_its_waiting_and_running_work_along(db: Db) -> None:
    register(db, "work")
    enqueue_many(db, *blank(4))
    running = claim(db, limit=1)
    limited(db, concurrency(2))

    assert len(claim(db, token=2)) == 1
    complete(db, str(running[0]["id"]))
    assert len(claim(db, token=3)) == 1


def test_a_task_that_becomes_unlimited_runs_what_waited(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue_many(db, *blank(4))
    claim(db)
    register(db, "work")

    assert len(claim(db, token=2)) == 3
    assert count(db, "permit") == count(db, "backlog") == 0


def test_a_second_limit_counts_what_runs_already(db: Db) -> None:
    limited(db, concurrency(5))
    enqueue_many(db, *[tenant("a")] * 2, tenant("b"))
    claim(db, limit=1)
    limited(db, concurrency(5), concurrency(1, "tenant.id"))

    assert tenants(claim(db, token=2)) == ["b"]


def test_another_deployments_registration_of_other_tasks_leaves_limits_alone(db: Db) -> None:
    limited(db, concurrency(1))
    call(db, "register_tasks", "other", [{"name": "free", "queue": "default", "max_attempts": 1, "max_crashes": 1}])
    enqueue_many(db, *blank(2))

    assert len(claim(db)) == 1


def test_two_claims_at_once_keep_the_limit(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    register(db, worker=OTHER)
    enqueue_many(db, *blank(3))
    with session(database) as one, session(database) as two:
        with one.transaction():
            assert len(claim(one)) == 1
            other = Background(lambda: claim(two, worker=OTHER, token=2))
            # the second found a reason to look before the first took it away, or none at all
            one.execute("select 1")
        assert other.result() == []


def test_an_open_transaction_that_enqueues_holds_nobody_up(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    first = enqueue(db)
    with session(database) as user, user.transaction():
        enqueue(user)
        assert claim_one(db) == first
        complete(db, first)
    assert len(claim(db, token=2)) == 1


def test_a_late_enqueue_that_did_not_know_of_the_limit_is_put_right_by_the_sweep(database: str, db: Db) -> None:
    register(db, "work")
    with session(database) as user, user.transaction():
        enqueue_many(user, *blank(2))
        limited(db, concurrency(1))
    assert claim(db) == []
    call(db, "sweep", "20 seconds", at(1))

    assert len(claim(db, now=1)) == 1


def test_a_cancel_under_way_is_passed_over(database: str, db: Db) -> None:
    limited(db, concurrency(2))
    first, second = enqueue_many(db, *blank(2))
    with session(database) as user, user.transaction():
        cancel(user, first)
        assert claim_one(db) == second
    assert state(db, first) == "cancelled"


def test_two_queues_of_a_task_share_its_limit_and_a_paused_one_holds_nothing(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue_many(db, {"queue": "other"}, {})
    call(db, "pause_queue", "default")
    assert claim(db) == []

    assert len(claim(db, queue="other")) == 1


def test_a_thousand_keyed_executions_are_admitted_by_few_claims(db: Db) -> None:
    limited(db, concurrency(1, "tenant.id"))
    enqueue_many(db, *[tenant(str(number % 500)) for number in range(1000)])
    claims = [len(claim(db, limit=250, token=token)) for token in range(1, 5)]

    assert sum(claims) == 500


@pytest.mark.covers("F74")
def test_74_parent_and_children_of_one_limit_make_progress(db: Db) -> None:
    limited(db, concurrency(1))
    enqueue(db)
    chain = [claim_one(db)]
    for token in range(2, 6):
        child = invoke(db, chain[-1], token=token - 1)
        db.execute("select 1")
        if token == 2:
            limited(db, concurrency(1), task="child")
        assert claim_one(db, token=token) == child
        chain.append(child)
    assert states(db, chain) == ["waiting"] * 4 + ["running"]


@pytest.mark.covers("P29")
def test_p29_a_worker_takes_no_task_that_it_does_not_know(db: Db) -> None:
    limited(db, concurrency(1))
    ids = enqueue_many(db, {}, {"task": "unheard of"})

    assert claim(db, tasks=["another"]) == []
    assert states(db, ids) == ["ready", "ready"]
    assert claim_one(db, tasks=["work"]) == ids[0]


@pytest.mark.covers("P31")
def test_p31_a_higher_priority_runs_first(db: Db) -> None:
    limited(db, concurrency(1))
    low, high, middle = enqueue_many(db, {"priority": -1}, {"priority": 2}, {"priority": 1})
    served: list[str] = []
    for token in range(1, 4):
        served.append(claim_one(db, token=token))
        complete(db, served[-1], token=token)

    assert served == [high, middle, low]


@pytest.mark.covers("F68")
def test_68_a_task_that_this_code_no_longer_has_keeps_its_limit_for_others(db: Db) -> None:
    limited(db, concurrency(1))
    register(db, "another")
    enqueue_many(db, *blank(2))

    assert len(claim(db)) == 1


@pytest.mark.covers("F75")
def test_75_a_paused_queue_starts_nothing_and_lets_limited_work_end(db: Db) -> None:
    limited(db, concurrency(1))
    first, second = enqueue_many(db, *blank(2))
    claim_one(db)
    call(db, "pause_queue", "default")
    complete(db, first)
    assert claim(db, token=2) == []
    call(db, "resume_queue", "default")

    assert claim_one(db, token=3) == second
