"""The SQL of schedules, a test playing the processes: who fires what, once, whatever changes in between (F5 50 to 54).

The clock is an argument and stands at `START` unless a test moves it; schedules fire every ten seconds.
"""

import json
import threading
from typing import Any

import msgspec
import psycopg
import pytest

from pgconductor import schema
from pgconductor.schedules import DueSchedule, FiredSchedule, plan
from tests.sql.support import START, Db, Json, array, at, call, claim, enqueue, register, session

EVERY_TEN = "*/10 * * * * *"
_due = msgspec.json.Decoder(list[DueSchedule])


def declare(db: Db, *schedules: Json, deployment: str = "app", now: float = 0) -> None:
    full = [{"task": "work", "name": "tens", "expr": EVERY_TEN, "zone": "UTC", "catch_up": "latest"} | each
            for each in schedules]  # fmt: skip
    call(db, "register_schedules", deployment, full, at(now))


def due(db: Db, now: float) -> list[DueSchedule]:
    """What a claim brings."""
    return _due.decode(json.dumps(call(db, "due_schedules", at(now)) or []))


def fire(db: Db, planned: list[FiredSchedule], now: float) -> Json:
    answer = call(db, "fire_schedules", msgspec.to_builtins(planned), at(now))
    return dict(answer)


def look(db: Db, now: float) -> None:
    """Do what a process does at an instant."""
    fire(db, [plan(each) for each in due(db, now)], now)


def ticks(db: Db) -> list[float]:
    """The ticks of all executions, in seconds."""
    rows = db.execute(
        """
        select extract(epoch from (trigger_data ->> 'scheduled_at')::timestamptz - %s) as tick from execution
        where trigger_kind = 'schedule' order by 1""",
        (START,),
    )
    return [float(row["tick"]) for row in rows]


def row(db: Db, query: str = "select * from schedules") -> Json:
    found = db.execute(query.encode()).fetchone()
    assert found is not None
    return found


# ---------------------------------------------------------------- one execution a tick


def test_a_tick_becomes_an_execution_that_carries_it_beside_its_payload(db: Db) -> None:
    declare(db, {"payload": {"event": "looks like one"}, "priority": 4})
    look(db, 0)
    look(db, 10)
    register(db, "work")
    (claimed,) = claim(db, now=10)
    stored = row(db, "select trigger, trigger_kind, trigger_data, priority, payload from execution")
    assert claimed["payload"] == stored["payload"] == {"event": "looks like one"}
    assert (stored["trigger"], stored["trigger_kind"], stored["priority"]) == ("tens", "schedule", 4)
    assert stored["trigger_data"]["name"] == "tens"
    assert ticks(db) == [10]


def test_the_next_tick_is_known_to_claims(db: Db) -> None:
    declare(db, {})
    look(db, 3)
    register(db, "work")
    worker = row(db, "select id from orchestrator")["id"]
    answer = call(db, "claim", worker, 1, [], array([]), True, at(4))
    assert (answer["next_due"], answer["schedules"]) == (6, None)
    brought = call(db, "claim", worker, 2, [], array([]), True, at(10))["schedules"]
    assert [each["expr"] for each in brought] == [EVERY_TEN]
    assert call(db, "claim", worker, 3, [], array([]), False, at(10))["schedules"] is None


@pytest.mark.covers("F50", "P32")
def test_p32_the_ticks_are_those_of_the_clock_that_the_database_hands_out(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    (told,) = due(db, 10)
    assert told.now == at(10)
    late = plan(told)
    fire(db, [late], 14)
    assert ticks(db) == [10]
    assert row(db)["next_at"] == at(20)


@pytest.mark.covers("F53")
def test_53_of_two_who_fire_a_tick_one_does(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    first, second = [plan(each) for each in due(db, 10)], [plan(each) for each in due(db, 10)]
    fire(db, first, 10)
    fire(db, second, 10)
    assert ticks(db) == [10]


@pytest.mark.covers("F53")
def test_53_of_many_at_the_same_time_one_does(db: Db, database: str) -> None:
    declare(db, {}, {"name": "others"})
    look(db, 0)
    planned = [plan(each) for each in due(db, 10)]
    barrier = threading.Barrier(4)

    def race() -> None:
        with session(database) as other:
            barrier.wait()
            fire(other, planned, 10)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert ticks(db) == [10, 10]


@pytest.mark.covers("F53")
def test_the_key_of_a_tick_holds_by_itself(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    look(db, 10)
    db.execute("update schedule set decided_at = %s, next_at = %s", (at(5), at(10)))
    look(db, 11)
    assert ticks(db) == [10]
    assert db.execute("select from tick").rowcount == 1


@pytest.mark.covers("F41")
def test_41_a_clock_that_is_put_back_an_hour_fires_nothing_twice(db: Db) -> None:
    declare(db, {})
    for now in (0, 10, 20):
        look(db, now)
    declare(db, {}, now=-3600)
    look(db, -3600)
    assert row(db)["next_at"] == at(30)
    look(db, 30)
    assert ticks(db) == [10, 20, 30]


def test_the_ticks_of_earlier_days_are_forgotten(db: Db) -> None:
    declare(db, {"catch_up": "all"})
    for now in (0, 10, 3 * 86_400):
        look(db, now)
    look(db, 3 * 86_400 + 10)
    look(db, 3 * 86_400 + 20)
    assert row(db, "select min(slot_at) as oldest from tick")["oldest"] > at(2 * 86_400)


@pytest.mark.covers("F52")
def test_52_all_ticks_of_an_outage_run_in_order(db: Db) -> None:
    declare(db, {"catch_up": "all", "expr": "*/10 * * * *"})
    look(db, 0)
    look(db, 3601)
    register(db, "work")
    assert ticks(db) == [600.0 * n for n in range(1, 7)]
    claimed = [each["id"] for each in claim(db, now=3601)]
    stored = db.execute("select id::text from execution order by trigger_data ->> 'scheduled_at'").fetchall()
    assert claimed == [each["id"] for each in stored]


# ---------------------------------------------------------------- changed while firing


@pytest.mark.covers("F54", "P34")
@pytest.mark.parametrize("change", [{"expr": "*/7 * * * * *"}, {"zone": "Asia/Tokyo"}])
def test_54_p34_a_changed_expression_or_zone_leaves_no_old_chain(db: Db, change: Json) -> None:
    declare(db, {})
    look(db, 0)
    old = [plan(each) for each in due(db, 10)]
    declare(db, change, now=10.5)
    fire(db, old, 11)
    assert ticks(db) == []
    look(db, 11)
    assert db.execute("select from schedule where next_at is not null").rowcount == 1
    assert row(db)["next_at"] > at(11)


@pytest.mark.covers("F54", "P35")
def test_54_p35_a_changed_payload_is_that_of_the_next_tick(db: Db) -> None:
    declare(db, {"payload": {"n": 1}})
    look(db, 0)
    old = [plan(each) for each in due(db, 10)]
    declare(db, {"payload": {"n": 2}}, now=10)
    fire(db, old, 10)
    look(db, 10)
    look(db, 20)
    payloads = [each["payload"] for each in db.execute("select payload from execution order by ord")]
    assert (ticks(db), payloads) == ([10, 20], [{"n": 2}, {"n": 2}])


@pytest.mark.covers("F54")
def test_54_a_schedule_paused_while_firing_does_not_fire(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    old = [plan(each) for each in due(db, 10)]
    assert call(db, "pause_schedules", "work", "tens", True, at(10)) == 1
    fire(db, old, 10)
    look(db, 60)
    assert ticks(db) == []
    assert row(db)["paused_at"] == at(10)


@pytest.mark.covers("F54")
def test_54_a_schedule_removed_while_firing_does_not_fire(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    old = [plan(each) for each in due(db, 10)]
    declare(db)
    fire(db, old, 10)
    assert ticks(db) == []
    assert db.execute("select from schedules").rowcount == 0


def test_a_resumed_schedule_goes_on_from_then(db: Db) -> None:
    declare(db, {"catch_up": "all"})
    look(db, 0)
    call(db, "pause_schedules", "work", None, True, at(5))
    assert call(db, "pause_schedules", "work", None, False, at(35)) == 1
    assert call(db, "pause_schedules", "work", None, False, at(35)) == 0
    look(db, 35)
    look(db, 40)
    assert ticks(db) == [40]


def test_a_pause_outlives_a_deploy(db: Db) -> None:
    declare(db, {})
    call(db, "pause_schedules", "work", None, True, at(5))
    declare(db, {"expr": "*/5 * * * * *"}, now=6)
    look(db, 60)
    assert ticks(db) == []
    assert row(db)["cron"] == "*/5 * * * * *"


def test_an_unchanged_schedule_goes_on_over_a_start(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    declare(db, {}, now=12)
    look(db, 12)
    assert ticks(db) == [10]


@pytest.mark.covers("P35")
def test_the_end_of_its_executions_does_not_end_a_schedule(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    look(db, 10)
    (id,) = [each["id"] for each in db.execute("select id from execution")]
    call(db, "cancel", id, "not wanted", at(11))
    look(db, 20)
    assert ticks(db) == [10, 20]


# ---------------------------------------------------------------- whose schedules


@pytest.mark.covers("F68", "P33", "P41")
def test_p33_p41_a_start_replaces_only_what_its_own_deployment_declared(db: Db) -> None:
    declare(db, {}, {"name": "mine"}, deployment="one")
    declare(db, {}, deployment="two")
    db.execute("select schedule('work', 'made', %s)", (EVERY_TEN,))
    declare(db, {"name": "mine"}, deployment="one")
    left = db.execute("select deployment, name from schedules order by 1 nulls first").fetchall()
    assert [(each["deployment"], each["name"]) for each in left] == [(None, "made"), ("one", "mine"), ("two", "tens")]
    declare(db, deployment="one")
    assert db.execute("select from schedules where deployment = 'one'").rowcount == 0


def test_schedules_of_one_name_are_apart_by_task_and_maker(db: Db) -> None:
    declare(db, {}, {"task": "other"}, deployment="one")
    declare(db, {}, deployment="two")
    look(db, 0)
    look(db, 10)
    assert ticks(db) == [10, 10, 10]


def test_sql_makes_changes_and_removes_a_schedule(db: Db) -> None:
    db.execute(
        "select schedule('report', 'weekly', '@weekly', '{\"to\": \"all\"}', 'Europe/Berlin', 'skip', 'slow', 3)"
    )
    db.execute("select schedule('report', 'weekly', '@daily')")
    found = row(db)
    assert (found["task"], found["cron"], found["tz"], found["payload"]) == ("report", "@daily", "UTC", {})
    assert row(db, "select unschedule('report', 'weekly') as gone")["gone"]
    assert not row(db, "select unschedule('report', 'weekly') as gone")["gone"]
    assert db.execute("select from schedules").rowcount == 0


@pytest.mark.parametrize("values", ["'work', 'n', '* * * * *', '[]'", "'work', 'n', '* * * * *', '{}', 'UTC', 'often'"])
def test_sql_refuses_what_no_schedule_can_be(db: Db, values: str) -> None:
    with pytest.raises(psycopg.Error) as refusal:
        db.execute(f"select schedule({values})".encode())
    assert refusal.value.sqlstate == "PC003"


def test_an_expression_that_nobody_can_read_shows_and_is_not_hunted(db: Db) -> None:
    db.execute("select schedule('work', 'bad', 'now and then')")
    later: Any = row(db, "select extract(epoch from next_at - %s) as s from schedule".replace("%s", f"'{START}'"))["s"]
    look(db, float(later) + 1)
    found = row(db)
    assert "now and then" in found["error"]
    assert found["next_at"] == at(float(later) + 61)
    db.execute("select schedule('work', 'bad', '* * * * *')")
    assert row(db)["error"] is None


def test_a_schedule_of_a_task_that_nobody_registered_waits_for_it(db: Db) -> None:
    declare(db, {"task": "later", "queue": "slow"})
    look(db, 0)
    look(db, 10)
    assert row(db, "select task, queue, state from executions") == {"task": "later", "queue": "slow", "state": "ready"}


def test_a_tick_started_by_hand_changes_nothing_about_the_others(db: Db) -> None:
    declare(db, {})
    look(db, 0)
    call(db, "pause_schedules", "work", None, True, at(5))
    assert len(call(db, "fire_now", "work", "tens", at(7))["ids"]) == 1
    assert call(db, "fire_now", "work", "unknown", at(7))["ids"] == []
    assert ticks(db) == [7]
    assert db.execute("select from tick").rowcount == 0


def test_nothing_is_looked_at_without_schedules(db: Db) -> None:
    enqueue(db)
    assert due(db, 100) == []
    assert call(db, "fire_schedules", [], at(100)) == {"queues": [], "next_due": None, "due": None}


def test_registering_at_the_same_time_does_not_collide(db: Db, database: str) -> None:
    schedules = [{"name": str(n), "task": f"task {n % 7}"} for n in range(20)]
    barrier = threading.Barrier(4)

    def start(turn: int) -> None:
        with session(database) as other:
            barrier.wait()
            declare(other, *(schedules if turn % 2 else schedules[::-1]), now=turn)
            look(other, turn)

    threads = [threading.Thread(target=start, args=(turn,)) for turn in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert db.execute("select from schedules").rowcount == 20


def test_a_process_that_registers_and_an_installer_do_not_wait_for_each_other(database: str, db: Db) -> None:
    db.execute("begin")
    declare(db, {})
    with session(database) as installer:
        free = "select pg_try_advisory_lock(hashtext('pgconductor'), %s) as free"
        assert installer.execute(free, (schema._LOCK_KEY,)).fetchone() == {"free": True}
    db.execute("commit")
