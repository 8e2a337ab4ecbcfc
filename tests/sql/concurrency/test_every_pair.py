"""Every two of the engine's state-changing functions at once, in every order in which their locks let them.

Each case is a pair in two sessions and a *gate*: what a third session holds locked while both are called, so that each
of them stops where it first needs it, with whatever it has locked before, or goes through to its commit. Then the gate
opens. Without a gate, the first holds its transaction open until the second waits for it or has finished. Nothing may
deadlock, every invariant must hold, and nothing may be out of reach afterwards.

The suite runs a part of the cases, another one each time; `make interleavings` runs all, or with
`PYTEST_ARGS="-k 'sweep and redrive'"` some of them.
"""

import os
import random
from collections.abc import Iterator
from itertools import product

import psycopg
import pytest

from tests.sql.concurrency.trees import ACTS, Act, acts_in, drive_to_the_end, grow_garden
from tests.sql.support import Background, Db, session

GATES: dict[str, str] = {
    "none": "",
    "the process": "select from orchestrator where id = '00000000-0000-0000-0000-000000000002' for update",
    "the tree": "select from generate_series(0, 63) n, pg_advisory_xact_lock(hashtext(current_schema()), n)",
    "the deepest": "select from execution where depth = (select max(depth) from execution) for no key update",
    "the parents": "select from execution where depth = 1 for no key update",
    "the roots": "select from execution where depth = 0 for no key update",
    "the tasks": "select from task for update",
    "the timers": "select from timer for update",
    "the limits": "select from task t, pg_advisory_xact_lock(hashtext(current_schema() || '.limit'), t.id)",
}
ALL = list(product(ACTS, ACTS, GATES))
CASES = int(os.environ.get("PGCONDUCTOR_INTERLEAVINGS", "40"))
HOME = os.environ.get("PGCONDUCTOR_TEST_HOME", "")  # another in each run, the same in all of its processes


def cases() -> list[tuple[str, str, str]]:
    """Return the cases to run."""
    return ALL if len(ALL) <= CASES else random.Random(HOME).sample(ALL, CASES)  # noqa: S311


@pytest.fixture
def trio(database: str) -> Iterator[tuple[Db, Db, Db]]:
    with session(database) as first, session(database) as second, session(database) as keeper:
        yield first, second, keeper


def waits(db: Db, other: psycopg.Connection[object]) -> bool:
    found = db.execute("select cardinality(pg_blocking_pids(%s)) > 0 as blocked", (other.info.backend_pid,)).fetchone()
    return bool(found and found["blocked"])


def begin(db: Db, mine: Db, act: Act) -> Background:
    """Let a session do something; return when it waits or has finished."""
    call = Background(lambda: act(mine))
    while call.is_alive() and not waits(db, mine):
        pass
    return call


def behind_a_gate(db: Db, trio: tuple[Db, Db, Db], one: Act, two: Act, gate: str) -> None:
    first, second, keeper = trio
    keeper.execute("begin")
    keeper.execute(GATES[gate].encode())
    calls = [begin(db, first, one), begin(db, second, two)]
    keeper.execute("commit")
    for call in calls:
        call.result()


def one_holds_on(db: Db, trio: tuple[Db, Db, Db], one: Act, two: Act) -> None:
    first, second, _ = trio
    first.execute("begin")
    one(first)
    call = begin(db, second, two)
    first.execute("commit")
    call.result()


@pytest.mark.parametrize(("one", "two", "gate"), cases())
def test_no_pair_deadlocks_or_leaves_anything_out_of_reach(
    db: Db, trio: tuple[Db, Db, Db], one: str, two: str, gate: str
) -> None:
    acts = acts_in(grow_garden(db))
    if gate == "none":
        one_holds_on(db, trio, acts[one], acts[two])
    else:
        behind_a_gate(db, trio, acts[one], acts[two], gate)
    assert drive_to_the_end(db) == []
