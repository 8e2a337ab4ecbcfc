"""Each invariant catches its own corruption, and none of them cries wolf."""

import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.invariants import ALWAYS, check_invariants, check_quiescent
from tests.sql.support import (
    Db,
    at,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    enqueue,
    fan_out,
    finish,
    op,
    parent_and_child,
    park,
    register,
    save,
    session,
)

# The corruption of each, planted into a database with a parent that waits for a running child, a fan-out with a window,
# and an ended execution with a key.
CORRUPTIONS = {
    "1": "insert into lease select id, gen_random_uuid(), 1, now(), 1 from execution where outcome is not null",
    "2": "insert into ready select lane_id, priority, ord, id from execution where outcome is not null",
    "3": "update execution set outcome = 'failed', error = '{}' where outcome = 'completed'",
    "4": """insert into audit.history (execution_id, op, to_state)
            select id, 'end', 'completed' from execution where outcome is not null""",
    "5": """insert into audit.history (execution_id, op, from_state, to_state)
            select id, 'move', 'ready', 'waiting' from execution where outcome is null limit 1""",
    "5b": """insert into audit.history (execution_id, op, from_state, to_state)
             select id, 'move', 'ready', 'failed' from execution where outcome is not null""",
    "6": """set session_replication_role = replica; update execution set outcome = 'completed', finished_at = now()
            where task_of(lane_id) = 'lonely'; delete from ready where lane_id = (
            select lane_id from execution where task_of(lane_id) = 'lonely')""",
    "7": """insert into step (execution_id, name, kind, status, created_at, finished_at)
            select id, 'late', 'step', 'completed', now(), now() from execution where outcome is not null""",
    "8": "update step set status = 'timed_out', finished_at = now() where kind = 'invoke'",
    "9": "update step set child_id = gen_random_uuid() where kind = 'invoke'",
    "9b": """set session_replication_role = replica; insert into step (execution_id, name, kind, status, created_at)
             select execution_id, 'deaf', 'wait_for', 'pending', now() from wait limit 1""",
    "9c": "update step set child_ids[1] = child_ids[2] where kind = 'invoke_all'",
    "10": """insert into execution (id, created_at, lane_id, depth, parent_id, parent_step, parent_round, parent_index,
             root_id, payload, outcome, finished_at)
             select gen_random_uuid(), now(), lane_id, depth, parent_id, parent_step, parent_round, parent_index,
             root_id, payload, 'completed', now() from execution where parent_id is not null""",
    "11": """insert into execution (id, created_at, lane_id, depth, parent_id, parent_step, parent_round, parent_index,
             root_id, payload) select gen_random_uuid(), now(), lane_id, 1, id, 'x', 0, 0, id, '{}'
             from execution where outcome = 'completed';
             insert into ready select lane_id, priority, ord, id from execution where parent_step = 'x'""",
    "12": """with l as (insert into task_limit (task_id, kind, declared_max)
                       select task_id, 'concurrency', 1 from lane limit 1 returning id)
             insert into permit select gen_random_uuid(), l.id, '' from l, generate_series(1, 2)""",
    "13": "insert into permit values (gen_random_uuid(), 1, '')",
    "14": "update execution set failures = 3 where outcome is null",
    "15": "delete from execution where outcome is not null",
    "16": "delete from ready where lane_id in (select lane_id from execution where task_of(lane_id) = 'lonely')",
    "17": "update execution set depth = depth + 1 where parent_id is not null",
}


@pytest.fixture
def spoilt(server: str, template: str) -> Iterator[Db]:
    """A database of its own: at the end of this one, nobody checks the invariants."""
    name = "pgconductor_spoilt_" + re.sub(r"\W", "", template)[-8:] + str(id(object()))
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'create database "{name}" template "{template}"'.encode())
        try:
            with session(make_conninfo(server, dbname=name)) as db:
                populate(db)
                yield db
        finally:
            admin.execute(f'drop database "{name}" with (force)'.encode())


def populate(db: Db) -> None:
    db.execute("""create function task_of(p_lane int) returns text language sql as
               'select name from pgconductor.task t join pgconductor.lane l on l.task_id = t.id where l.id = p_lane'""")
    parent_and_child(db)
    fan_out(db, 3, window=1)
    register(db, "lonely")
    complete(db, enqueue_and_claim(db, dedupe_key="k"))
    enqueue(db, "lonely")


def enqueue_and_claim(db: Db, **options: Any) -> str:
    id = enqueue(db, **options)
    assert id in [each["id"] for each in claim(db, tasks=["work"])]
    return id


def test_a_sound_state_breaks_nothing(spoilt: Db) -> None:
    check_invariants(spoilt)


@pytest.mark.parametrize("number", [name.partition(" ")[0] for name in ALWAYS])
def test_an_invariant_catches_its_own_corruption(spoilt: Db, number: str) -> None:
    spoilt.execute(CORRUPTIONS[number].encode())
    with pytest.raises(AssertionError) as caught:
        check_only(spoilt, number)
    assert str(caught.value).startswith(f"invariant '{number} ")


def check_only(db: Db, number: str) -> None:
    """Run one invariant: a corruption may break others as well."""
    for name, query in ALWAYS.items():
        if name.startswith(f"{number} "):
            rows = db.execute(query.encode()).fetchall()
            assert not rows, f"invariant {name!r} does not hold for {rows}"


def test_a_corruption_is_found_by_the_whole_check(spoilt: Db) -> None:
    spoilt.execute(CORRUPTIONS["16"].encode())
    with pytest.raises(AssertionError, match="invariant '"):
        check_invariants(spoilt)


def test_at_rest_nothing_runs(db: Db) -> None:
    register(db, "work")
    enqueue(db)
    id = claim_one(db)
    with pytest.raises(AssertionError, match="nothing runs"):
        check_quiescent(db)
    complete(db, id)
    check_quiescent(db)


def test_a_busy_life_breaks_nothing(db: Db) -> None:
    parent, child = parent_and_child(db, due_in=30)
    claim(db)
    save(db, child, "a", ops=[op(child, "s", "start", {})])
    park(db, child, op(child, "nap", "sleep", due_in=5))
    check_invariants(db)
    claim(db, now=5, fire=True, token=2)
    finish(db, child, token=2)
    check_invariants(db)
    cancel(db, parent)
    call(db, "redrive", parent)
    call(db, "sweep", "20 seconds", at(60))
    check_invariants(db)
