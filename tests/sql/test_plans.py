"""No statement of the engine goes through a whole table, whatever its plan was made for.

Plans are kept. One that was made while the tables were nearly empty is used when they have grown, until they are
analyzed again: a settle whose plan began with all executions took seconds where there were ten thousand.
"""

import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psycopg
import pytest

from tests.events.support import deliver, emit, running, wait_op
from tests.retention.support import completed, completed_tree, prune
from tests.sql.support import (
    Db,
    at,
    await_members,
    call,
    cancel,
    claim,
    claim_one,
    enqueue,
    enqueue_many,
    fail,
    fan_out,
    finish,
    op,
    park,
    register,
    release,
    retry,
    save,
    session,
    settle_plain,
    state,
)

GROW = {
    "execution",
    "lease",
    "ready",
    "step",
    "timer",
    "wait",
    "wait_item",
    "wait_link",
    "child_link",
    "backlog",
    "permit",
    "event",
    "event_wait",
}
SETTINGS = {"log_min_duration": "0", "log_nested_statements": "on", "log_level": "notice", "log_format": "json"}
Plan = dict[str, Any]


class Plans:
    """Hears which plans a session executes."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Plan]] = []

    def hear(self, notice: psycopg.errors.Diagnostic) -> None:
        message, context = notice.message_primary or "", notice.context or ""
        if "plan:" in message and "function " in context:  # not what the test itself asks
            self.heard.append((context, json.loads(message[message.index("{") :])))

    def through_all(self) -> set[str]:
        """Return what goes through a whole table that grows: function, table, and the statement's beginning."""
        found: set[str] = set()
        for context, plan in self.heard:
            statement = re.sub(r"\s+", " ", plan["Query Text"])
            for node in _without_condition(plan["Plan"], under_limit=False):
                functions = re.findall(r'function "?(\w+)', context)
                if not {"audit", "state_of"} & set(functions):  # those of the tests, and for people
                    found.add(f"{functions[0]}: {node['Relation Name']}: {statement[:120]}")
        return found


def _without_condition(node: Plan, *, under_limit: bool) -> Iterator[Plan]:
    is_scan = node["Node Type"] in {"Seq Scan", "Index Scan", "Index Only Scan"}
    if is_scan and "Index Cond" not in node and node["Relation Name"] in GROW and not under_limit:
        yield node
    for inner in node.get("Plans", ()):
        # the first row of an order; and `exists` without a condition, which asks whether there is any
        is_first = node["Node Type"] in {"Limit", "LockRows"} or inner.get("Parent Relationship") == "InitPlan"
        yield from _without_condition(inner, under_limit=is_first)


@pytest.fixture
def plans(db: Db) -> Plans:
    db.execute("vacuum analyze")  # the tables are as empty as a plan can find them
    try:
        db.execute("load 'auto_explain'")
    except psycopg.Error as error:
        pytest.skip(f"this server has no auto_explain, or it may not be loaded: {error}")
    for name, value in SETTINGS.items():
        db.execute(f"set auto_explain.{name} = '{value}'".encode())
    plans = Plans()
    db.add_notice_handler(plans.hear)
    return plans


def test_what_runs_and_ends_goes_by_keys(db: Db, plans: Plans) -> None:
    register(db, "work")
    ids = enqueue_many(db, {}, {}, {}, {}, {})
    enqueue_many(db, {"id": ids[0]}, again=True)
    assert call(db, "confirm", ids[0]) is True
    claim(db, tasks=["work"])
    settle_plain(db, *({"id": each, "token": 1, "result": 1} for each in ids[:2]))
    fail(db, ids[2])
    retry(db, ids[3], delay=1)
    release(db, ids[4])
    cancel(db, ids[4])
    call(db, "fire_timers", None, 10)
    assert len(plans.heard) > 50
    assert plans.through_all() == set()


def test_steps_children_and_waits_go_by_keys(db: Db, plans: Plans) -> None:
    parent, children = fan_out(db, 3)
    claim(db, tasks=["child"])
    for each in children:
        finish(db, each, 1)
    claim(db, token=2)
    finish(db, parent, 1, token=2)
    enqueue(db)
    sleeper = claim_one(db, token=3)
    save(db, sleeper, "a", "b", token=3)
    started = op(sleeper, "s", "start", {})
    save(db, sleeper, token=3, ops=[started])
    child = started["children"][0]["id"]
    wait = op(sleeper, "w", "wait")
    park(db, sleeper, wait, token=3, awaits=await_members("w", "s", count=1))
    claim(db, token=4)
    finish(db, child, 1, token=4)
    claim(db, token=5)
    park(db, sleeper, op(sleeper, "nap", "sleep", due_in=1), token=5)
    assert call(db, "fire_timers", at(2), 10) == 1
    assert len(plans.heard) > 50
    assert plans.through_all() == set()


def test_events_and_what_waits_for_them_go_by_keys(db: Db, plans: Plans, database: str) -> None:
    late, early, timed, last = running(db, 4)
    with closing(session(database)) as other:
        other.execute("begin")
        emit(other, {"n": 1})  # open while the first wait parks
        park(db, late, wait_op(late))
        other.execute("commit")
        other.execute("begin")
        park(other, last, wait_op(last, where={"n": 2}))  # open while its event is delivered
        park(db, early, wait_op(early, where={"n": 2}))
        park(db, timed, wait_op(timed, where={"n": 9}, due_in=1))
        emit(db, {"n": 2})
        deliver(db)
        other.execute("commit")
    call(db, "fire_timers", at(2), 10)
    call(db, "sweep", "20 seconds", at(2))
    call(db, "sweep", "20 seconds", at(10**7))
    assert [state(db, each) for each in (late, early, timed, last)] == ["ready"] * 4
    assert len(plans.heard) > 50
    assert plans.through_all() == set()


def test_a_prune_and_a_sweep_go_by_keys(db: Db, plans: Plans) -> None:
    register(db, "work", "child")
    completed_tree(db, 3)
    completed(db, number=9)
    enqueue(db)
    claim_one(db, token=9)
    call(db, "sweep", "20 seconds", at(1_000))
    assert prune(db, 10**8) > 0
    assert len(plans.heard) > 50
    assert plans.through_all() == set()
