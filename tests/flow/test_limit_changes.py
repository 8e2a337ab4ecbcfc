"""Limits that change while transactions are open which know only the old ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg
import pytest

from tests.flow.support import concurrency, limited, rate, set_limit
from tests.sql.support import (
    Background,
    Db,
    Json,
    at,
    blank,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    count,
    enqueue_many,
    register,
    release,
    retry,
    session,
    state,
    states,
    wait_until_blocked,
)

COMES_BACK: dict[str, Callable[[Db, str], object]] = {"retry": retry, "release": release}


def calls(*users: str, region: str = "x") -> list[Json]:
    return [{"payload": {"user": user, "region": region}} for user in users]


def users(claimed: list[dict[str, Any]]) -> list[str]:
    return [each["payload"]["user"] for each in claimed]


def sweep(db: Db, now: float = 1) -> dict[str, Any]:
    answer: dict[str, Any] = call(db, "sweep", "20 seconds", at(now))
    return answer


def lanes(db: Db) -> list[bool]:
    """Say of each lane whether it is limited."""
    return [each["is_limited"] for each in db.execute("select is_limited from lane order by id")]


# ---------------------------------------------------------------- work that was made ready under other limits


@pytest.mark.parametrize("more", [concurrency(1, "user"), concurrency(1), rate(1, 60), rate(1, 60, "user")])
def test_work_that_was_enqueued_while_a_limit_was_added_counts_for_it(database: str, db: Db, more: Json) -> None:
    first = concurrency(5, "region")
    limited(db, first)
    with session(database) as user, user.transaction():
        enqueue_many(user, *calls("a", "a", "a"))
        limited(db, first, more)

    assert users(claim(db)) == ["a"]
    assert claim(db, token=2) == []


@pytest.mark.parametrize("move", COMES_BACK)
def test_work_that_came_back_while_a_limit_was_added_counts_for_it(database: str, db: Db, move: str) -> None:
    limited(db, concurrency(5))
    enqueue_many(db, *calls("a", "a", "b"))
    claimed = [str(each["id"]) for each in claim(db)]
    with session(database) as user, user.transaction():
        for id in claimed:
            COMES_BACK[move](user, id)
        limited(db, concurrency(5), concurrency(1, "user"))
    sweep(db)  # what seemed to run when the limit came has a permit

    assert users(claim(db, token=2)) == ["a", "b"]


def test_work_that_was_enqueued_while_a_limit_was_replaced_counts_under_its_own_key(database: str, db: Db) -> None:
    limited(db, concurrency(1, "region"))
    with session(database) as user, user.transaction():
        enqueue_many(user, *calls("a", "b", "b"))
        limited(db, concurrency(1, "user"))

    assert users(claim(db)) == ["a", "b"]
    assert {each["key"] for each in db.execute("select key from permit")} == {"a", "b"}


def test_work_that_was_enqueued_while_one_of_two_limits_was_removed_counts_for_the_other(database: str, db: Db) -> None:
    limited(db, concurrency(1, "region"), concurrency(1, "user"))
    with session(database) as user, user.transaction():
        enqueue_many(user, *calls("a", "b", "b"))
        limited(db, concurrency(1, "user"))

    assert users(claim(db)) == ["a", "b"]


def test_work_that_knows_older_limits_takes_turns_with_the_rest(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    with session(database) as user, user.transaction():
        enqueue_many(user, *calls("a", "a", "b"))
        limited(db, concurrency(1), concurrency(1, "user"))
        enqueue_many(db, *calls("c"))
    served: list[str] = []
    for token in range(1, 5):
        (claimed,) = claim(db, token=token)
        served += users([claimed])
        complete(db, str(claimed["id"]), token=token)

    assert served == ["a", "b", "c", "a"]


def test_what_an_open_transaction_moves_holds_no_change_of_limits_up_and_is_found_afterwards(
    database: str, db: Db
) -> None:
    limited(db, concurrency(5))
    moved, other = enqueue_many(db, *calls("a", "b"))
    db.execute("set lock_timeout = '5s'")
    with session(database) as user:
        user.execute("begin")
        cancel(user, moved)
        limited(db, concurrency(5), concurrency(1, "user"))
        assert claim_one(db) == other
        assert claim(db, token=2) == []
        user.execute("rollback")

    assert claim_one(db, token=3) == moved
    assert {each["key"] for each in db.execute("select key from permit")} == {"", "a", "b"}


def test_a_claim_that_is_taking_notice_of_work_is_waited_for_by_a_change_of_limits(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    enqueue_many(db, *calls("a", "a", "b"))
    with session(database) as claimer, session(database) as changer:
        with claimer.transaction():
            assert users(claim(claimer)) == ["a"]
            change = Background(partial(limited, changer, concurrency(5), concurrency(1, "user")))
            wait_until_blocked(db, changer)
        change.result()

    assert users(claim(db, token=2)) == ["b"]


def test_limits_change_in_no_transaction_that_is_blind_to_what_others_commit(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    with session(database) as user:
        user.execute("set default_transaction_isolation to 'repeatable read'")
        with pytest.raises(psycopg.Error, match="read committed") as refused:
            set_limit(user, 2)

    assert refused.value.sqlstate == "PC003"


# ---------------------------------------------------------------- lanes that were made under other limits


def test_a_lane_that_was_made_while_its_task_became_limited_is_limited_by_the_sweep(database: str, db: Db) -> None:
    register(db, "work")
    with session(database) as user, user.transaction():
        enqueue_many(user, *[{"queue": "other"}] * 3)
        limited(db, concurrency(2))
    claim_one(db, limit=1, queue="other")
    sweep(db)

    assert lanes(db) == [True, True]
    claim_one(db, token=2, queue="other", now=1)
    assert count(db, "permit") == 2


def test_a_claim_from_a_lane_that_becomes_limited_meanwhile_counts(database: str, db: Db) -> None:
    register(db, "work")
    with session(database) as user, user.transaction():
        enqueue_many(user, *[{"queue": "other"}] * 2)
        limited(db, concurrency(1))
    with session(database) as claimer, claimer.transaction():
        claim_one(claimer, limit=1, queue="other")
        sweep(db)
    sweep(db, now=2)

    assert claim(db, token=2, queue="other", now=2) == []
    assert count(db, "permit") == 1


def test_a_lane_that_was_made_while_its_task_became_unlimited_is_free_by_the_sweep(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    with session(database) as user, user.transaction():
        enqueue_many(user, *[{"queue": "other"}] * 3)
        register(db, "work")
    sweep(db)

    assert lanes(db) == [False, False]
    assert len(claim(db, queue="other", now=1)) == 3
    assert count(db, "backlog") == count(db, "look") == 0


def test_work_that_was_enqueued_while_its_task_became_unlimited_runs_after_the_sweep(database: str, db: Db) -> None:
    limited(db, concurrency(1))
    with session(database) as user, user.transaction():
        ids = enqueue_many(user, *blank(3))
        register(db, "work")
    sweep(db)

    assert len(claim(db, now=1)) == 3
    assert states(db, ids) == ["running"] * 3
    assert count(db, "look") == 0


# ---------------------------------------------------------------- changes of limits beside each other


def test_a_registration_and_an_operator_change_limits_of_a_task_at_once(database: str, db: Db) -> None:
    limited(db, concurrency(3), concurrency(1, "user"))
    with session(database) as operator, session(database) as deploy, session(database) as keeper:
        keeper.execute("begin")
        keeper.execute("select lock_limits(array(select id from task))")
        setting = Background(partial(set_limit, operator, 2))
        wait_until_blocked(db, operator)
        deploying = Background(partial(limited, deploy, concurrency(3), concurrency(2, "user")))
        wait_until_blocked(db, deploy)
        keeper.execute("commit")
        assert setting.result()
        deploying.result()
    enqueue_many(db, *calls("a", "a", "a"))

    assert users(claim(db)) == ["a", "a"]


def test_two_operators_who_add_the_same_limit_at_once_make_one(database: str, db: Db) -> None:
    limited(db, concurrency(3))
    with session(database) as one, session(database) as two:
        with one.transaction():
            set_limit(one, 2, key="user")
            other = Background(partial(set_limit, two, 1, key="user"))
            wait_until_blocked(db, two)
        assert other.result()
    enqueue_many(db, *calls("a", "a", "b"))

    assert users(claim(db)) == ["a", "b"]


def test_a_task_that_lost_its_limits_is_limited_again(db: Db) -> None:
    limited(db, concurrency(1))
    ids = enqueue_many(db, *blank(3))
    claim_one(db)
    register(db, "work")
    assert count(db, "look") == 0
    limited(db, concurrency(2))

    assert len(claim(db, token=2)) == 1
    assert sorted(states(db, ids)) == ["ready", "running", "running"]
    assert state(db, ids[2]) == "ready"
