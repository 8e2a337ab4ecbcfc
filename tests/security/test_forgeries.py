"""Who holds no lease changes nothing with it, whatever he says he is."""

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg import errors
from psycopg.rows import DictRow

from pgconductor.notify import Listener
from tests.security.support import Town, answer
from tests.waiting import until

pytestmark = pytest.mark.covers("F86")
Session = psycopg.Connection[DictRow]


@pytest.fixture
def worker(town: Town) -> Iterator[Session]:
    with town.session("worker") as conn:
        yield conn


@pytest.fixture
def held(town: Town, worker: Session) -> tuple[UUID, str]:
    """An execution that a process runs, by claim 1: the process and the execution."""
    process = uuid4()
    rows = json.dumps([{"name": "work", "queue": "default", "max_attempts": 3, "max_crashes": 5}])
    query = "select pgconductor.register_orchestrator(%s, 'a', '1', 'host', 1, '{default}')"
    worker.execute(query, (process,))
    (task,) = answer(worker, "select pgconductor.register_tasks('test', %s::json)", rows)
    (queue,) = answer(worker, "select pgconductor.register_queues('{default}')")
    with town.session("enqueuer") as conn:
        id = str(answer(conn, "select pgconductor.invoke('work')"))
    wants = json.dumps([{"queue": queue["id"], "limit": 1}])
    claimed = answer(worker, "select pgconductor.claim(%s, 1, %s::json, %s)", process, wants, [task["id"]])
    assert claimed["claimed"][0][0] == id
    return process, id


def state(worker: Session, id: str) -> Any:
    return answer(worker, "select state from pgconductor.executions where id = %s", UUID(id))


def settle(worker: Session, process: UUID, id: str, token: int) -> Any:
    completed = "array[%s::uuid], array[%s::bigint], '[1]'"
    return answer(worker, f"select pgconductor.settle(%s, {completed}, '[]')", process, id, token)


def test_a_wrong_claim_number_is_lost(worker: Session, held: tuple[UUID, str]) -> None:
    process, id = held

    assert settle(worker, process, id, 2)["lost"] == [id]
    step = json.dumps([{"id": id, "token": 2, "name": "s", "round": 0, "kind": "step", "value": 1}])
    assert answer(worker, "select pgconductor.save(%s, %s::json, '[]')", process, step)["lost"] == [id]
    saved = "select pgconductor.save_transaction(%s, %s, 2, 's', 0::smallint, '1')"
    assert answer(worker, saved, process, UUID(id)) == "lost"
    called = "select pgconductor.cancel_as_step(%s, %s, 2, 'cancel', %s, 'no')"
    assert answer(worker, called, process, UUID(id), UUID(id)) is None

    assert state(worker, id) == "running"
    assert answer(worker, "select count(*) from pgconductor.steps") == 0
    assert not settle(worker, process, id, 1)["lost"]


def test_another_process_cannot_use_a_claim(worker: Session, held: tuple[UUID, str]) -> None:
    _, id = held
    other = uuid4()
    worker.execute("select pgconductor.register_orchestrator(%s, 'b', '1', 'host', 2, '{default}')", (other,))

    assert settle(worker, other, id, 1)["lost"] == [id]
    assert answer(worker, "select pgconductor.reconcile(%s, '{}')", other) == {"queues": []}
    assert answer(worker, "select pgconductor.retire(%s)", other) == {"queues": []}
    assert state(worker, id) == "running"


def test_a_process_that_nobody_registered_is_told_it_is_dead(worker: Session, held: tuple[UUID, str]) -> None:
    _, id = held

    assert settle(worker, uuid4(), id, 1) is None
    assert answer(worker, "select pgconductor.save(%s, '[]', '[]')", uuid4()) is None
    assert answer(worker, "select pgconductor.claim(%s, 1, '[]', '{}')", uuid4()) is None
    assert state(worker, id) == "running"


@pytest.mark.parametrize("kind", ["enqueuer", "reader"])
def test_others_cannot_touch_what_runs(town: Town, worker: Session, held: tuple[UUID, str], kind: str) -> None:
    process, id = held
    attempts = [
        f"select pgconductor.settle('{process}', '{{}}', '{{}}', '[]', '[]')",
        f"select pgconductor.claim('{process}', 1, '[]', '{{}}')",
        f"select pgconductor.save('{process}', '[]', '[]')",
        f"select pgconductor.cancel('{id}', 'mine now')",
        "select pgconductor.cancel_by_key('work', 'key', 'mine now')",
        f"select pgconductor.redrive('{id}')",
        f"select pgconductor.retire('{process}')",
        "select pgconductor.sweep('0 seconds')",
        "delete from pgconductor.lease",
    ]
    with town.session(kind) as conn:
        for attempt in attempts:
            with pytest.raises(errors.InsufficientPrivilege):
                conn.execute(attempt.encode())
    assert state(worker, id) == "running"


FORGED = {
    "parent_id": str(uuid4()),
    "root_id": str(uuid4()),
    "parent_step": "charge",
    "depth": 5,
    "ord": -1,
    "outcome": "completed",
    "result": 1,
    "trigger_kind": "schedule",
    "trigger_data": {"name": "x", "scheduled_at": "2020-01-01T00:00:00Z"},
    "lane_id": 1,
    "failures": -5,
    "created_at": "1999-01-01T00:00:00Z",
}


@pytest.mark.covers("F63", "P42")
def test_what_a_call_says_beyond_what_it_may_is_not_heard(town: Town, worker: Session) -> None:
    call = json.dumps([{"id": str(uuid4()), "task": "work", "payload": FORGED, **FORGED}])
    with town.session("enqueuer") as conn:
        answer(conn, "select pgconductor.enqueue(%s::json)", call)

    made = worker.execute("select * from pgconductor.executions").fetchone()
    assert made is not None
    assert (made["state"], made["parent_id"], made["depth"], made["attempt"]) == ("ready", None, 0, 1)
    assert made["root_id"] == made["id"]
    assert made["created_at"].year > 2020
    assert made["payload"] == FORGED


def test_an_id_that_is_taken_is_neither_shown_nor_changed(town: Town, worker: Session, held: tuple[UUID, str]) -> None:
    _, id = held
    call = json.dumps([{"id": id, "task": "work", "payload": {"forged": True}}])
    with town.session("enqueuer") as conn:
        with pytest.raises(errors.UniqueViolation):
            conn.execute("select pgconductor.enqueue(%s::json)", (call,))
        answer(conn, "select pgconductor.enqueue(%s::json, p_again => true)", call)

    assert answer(worker, "select payload from pgconductor.executions") == {}


def test_a_key_replaces_nothing_that_has_started(town: Town, worker: Session, held: tuple[UUID, str]) -> None:
    query = "select pgconductor.invoke('other', %s::jsonb, dedupe_key => 'k', on_duplicate => 'replace')"
    with town.session("enqueuer") as conn:
        first = answer(conn, query, '{"n": 1}')
        assert answer(conn, query, '{"n": 2}') == first
    assert answer(worker, "select payload from pgconductor.executions where id = %s", first) == {"n": 2}


HINTS = ["", " ", "ready x -1 99999999999999999999", "told", "\x1b[31m ready", "nothing", "x" * 7999]


async def test_anybody_may_send_hints_and_nobody_falls_over_them(town: Town) -> None:
    heard: list[str] = []
    listener = Listener(town.dsn("worker"), "pgconductor", lambda kind, _: heard.append(kind))
    listener.start()
    await until(lambda: listener.is_live)

    with town.session("outsider") as conn:
        for payload in [*HINTS, "last"]:
            conn.execute("select pg_notify('pgconductor', %s)", (payload,))
    await until(lambda: "last" in heard)

    assert listener.error_count == 0
    await listener.stop()
