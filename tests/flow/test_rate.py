"""Rate limits: how many executions of a task, or of each value of its payload, start within a period."""

from datetime import datetime, timedelta
from functools import partial

from tests.flow.support import concurrency, limited, rate
from tests.sql.support import (
    WORKER,
    Background,
    Db,
    at,
    blank,
    call,
    claim,
    claim_one,
    complete,
    count,
    enqueue_many,
    invoke,
    register,
    retry,
    session,
    settle,
    wait_until_blocked,
)


def tenant(name: str) -> dict[str, object]:
    return {"payload": {"tenant": name}}


def next_due(db: Db, now: float) -> float | None:
    found = db.execute("select next_due(%s) as due", (at(now),)).fetchone()
    assert found is not None
    return None if found["due"] is None else float(found["due"])


def test_no_more_start_within_a_period(db: Db) -> None:
    limited(db, rate(2, 60))
    enqueue_many(db, *blank(5))

    assert len(claim(db, now=0)) == 2
    assert claim(db, now=59, token=2, fire=True) == []


def test_the_period_slides(db: Db) -> None:
    limited(db, rate(2, 60))
    enqueue_many(db, *blank(5))
    claim(db, limit=1, now=0)
    claim(db, limit=1, now=30, token=2)

    assert next_due(db, 30) == 30
    assert len(claim(db, now=60, token=3, fire=True)) == 1
    assert next_due(db, 60) == 30
    assert len(claim(db, now=90, token=4, fire=True)) == 1


def test_what_is_given_back_unstarted_has_not_started_and_counts_when_it_does(db: Db) -> None:
    limited(db, rate(2, 60))
    made = enqueue_many(db, *blank(6))
    assert len(claim(db, now=0)) == 2
    settle(db, *[{"id": id, "outcome": "unstarted"} for id in made[:2]], now=1)

    assert [each["id"] for each in claim(db, now=2, token=2)] == made[:2]
    assert claim(db, now=61, token=3, fire=True) == []
    assert len(claim(db, now=62, token=4, fire=True)) == 2


def test_what_is_given_back_unstarted_for_a_while_has_not_started(db: Db) -> None:
    limited(db, rate(1, 600))
    (id,) = enqueue_many(db, *blank(1))
    assert len(claim(db, now=0)) == 1
    error = {"type": "builtins.OSError", "message": "no process"}
    settle(db, {"id": id, "outcome": "unstarted", "delay": 5, "error": error}, now=1)

    row = db.execute("select state, attempt, started_at, error ->> 'message' as error from executions").fetchone()
    assert row == {"state": "scheduled", "attempt": 1, "started_at": None, "error": "no process"}
    assert [each["id"] for each in claim(db, now=7, token=2, fire=True)] == [id]


def test_what_has_started_counts_even_when_it_ended(db: Db) -> None:
    limited(db, rate(1, 60))
    enqueue_many(db, *blank(2))
    complete(db, claim_one(db), now=1)

    assert claim(db, now=2, token=2) == []


def test_unused_starts_do_not_pile_up(db: Db) -> None:
    limited(db, rate(2, 60))
    enqueue_many(db, *blank(10))
    call(db, "sweep", "20 seconds", at(600))
    register(db, now=600)

    assert len(claim(db, now=600, fire=True)) == 2


def test_each_key_has_its_own_rate(db: Db) -> None:
    limited(db, rate(1, 60, "tenant"))
    enqueue_many(db, *[tenant("a")] * 3, tenant("b"))

    assert [each["payload"]["tenant"] for each in claim(db)] == ["a", "b"]
    assert [each["payload"]["tenant"] for each in claim(db, now=60, token=2, fire=True)] == ["a"]


def test_a_resume_is_free(db: Db) -> None:
    limited(db, rate(1, 60))
    enqueue_many(db, *blank(2))
    register(db, "child")
    parent = claim_one(db, now=0)
    child = invoke(db, parent)
    assert claim_one(db, token=2, now=1) == child
    settle(db, {"id": child, "outcome": "completed", "result": 1, "token": 2}, now=1)

    assert claim_one(db, token=3, now=2) == parent


def test_a_resume_passes_a_start_of_higher_priority_that_must_wait(db: Db) -> None:
    limited(db, rate(1, 60))
    register(db, "child")
    (parent,) = enqueue_many(db, {})
    claim_one(db)
    child = invoke(db, parent)
    enqueue_many(db, {"priority": 9})
    claim_one(db, token=2, now=1)
    settle(db, {"id": child, "outcome": "completed", "result": 1, "token": 2}, now=1)

    assert claim_one(db, token=3, now=2) == parent


def test_a_retry_after_its_delay_is_a_start(db: Db) -> None:
    limited(db, rate(1, 60))
    enqueue_many(db, {})
    retry(db, claim_one(db), delay=10)

    assert claim(db, now=11, token=2, fire=True) == []
    assert len(claim(db, now=60, token=3, fire=True)) == 1


def test_rate_and_concurrency_hold_together(db: Db) -> None:
    limited(db, rate(3, 60), concurrency(2))
    enqueue_many(db, *blank(6))
    one, two = (str(each["id"]) for each in claim(db))
    complete(db, one)
    complete(db, two)

    assert len(claim(db, token=2)) == 1
    assert claim(db, token=3) == []


def test_without_waiting_work_no_gate_is_due(db: Db) -> None:
    limited(db, rate(5, 60))
    enqueue_many(db, *blank(2))
    claim(db)

    assert next_due(db, 0) is None
    call(db, "sweep", "20 seconds", datetime.fromisoformat("2040-01-01T00:02:00Z"))
    assert count(db, "rate_use") == 0


def test_a_claim_and_a_sweep_that_both_open_a_gate_do_not_wait_for_each_other(database: str, db: Db) -> None:
    limited(db, rate(1, 60))
    enqueue_many(db, *blank(3))
    claim_one(db)
    call(db, "beat", WORKER, False, at(60))
    with session(database) as keeper, session(database) as sweeper, session(database) as claimer:
        keeper.execute("begin")
        keeper.execute("select lock_limits(array(select id from task))")
        sweep = Background(partial(call, sweeper, "sweep", "20 seconds", at(60)))
        wait_until_blocked(db, sweeper)
        claimed = Background(partial(claim, claimer, now=60, token=2, fire=True))
        wait_until_blocked(db, claimer)
        keeper.execute("commit")
        assert "gave_up" not in sweep.result()
        assert len(claimed.result()) == 1


# ---------------------------------------------------------------- an operator's rate


def period(db: Db) -> float:
    found = db.execute("select extract(epoch from period) as seconds from task_limit").fetchone()
    assert found is not None
    return float(found["seconds"])


def operate(db: Db, limit: int | None, seconds: float | None = None) -> None:
    wanted = None if seconds is None else timedelta(seconds=seconds)
    assert call(db, "set_limit", "work", limit, "rate", None, wanted)


def test_an_operators_period_holds_when_the_task_is_registered_again(db: Db) -> None:
    limited(db, rate(2, 60))
    operate(db, 1, 30)
    limited(db, rate(2, 60))
    assert period(db) == 30
    limited(db, rate(3, 90))
    enqueue_many(db, *blank(4))

    assert period(db) == 30
    assert len(claim(db)) == 1
    assert len(claim(db, now=30, token=2, fire=True)) == 1


def test_a_limit_that_is_given_back_has_the_codes_max_and_period(db: Db) -> None:
    limited(db, rate(2, 60))
    operate(db, 1, 30)
    limited(db, rate(2, 90))
    operate(db, None)
    enqueue_many(db, *blank(4))

    assert period(db) == 90
    assert len(claim(db)) == 2
    assert claim(db, now=89, token=2, fire=True) == []
    assert len(claim(db, now=90, token=3, fire=True)) == 2


def test_an_operators_max_leaves_the_codes_period(db: Db) -> None:
    limited(db, rate(2, 60))
    operate(db, 1)
    limited(db, rate(2, 90))

    assert period(db) == 90


def test_an_operators_next_max_leaves_the_operators_period(db: Db) -> None:
    limited(db, rate(2, 60))
    operate(db, 1, 30)
    operate(db, 3)

    assert period(db) == 30
