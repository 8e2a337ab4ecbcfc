"""The engine's functions as a test calls them, and what it asks of the tables afterwards.

A test plays the worker itself: it claims, and settles with the token that it claimed with. Instants are given as
seconds after `START`, a time that never comes by itself, so the clock stands still unless a test moves it.
"""

import json
import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, TypeVar
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import DictRow, dict_row

from pgconductor.id_array import IdArray

Db = psycopg.Connection[DictRow]
Json = dict[str, Any]
T = TypeVar("T")

START = datetime(2040, 1, 1, tzinfo=UTC)
WORKER = UUID(int=1)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def call(db: Db, function: str, *values: object) -> Any:
    """Call a function of the engine with parameters in order; lists and dicts of JSON go as text."""
    is_json = [isinstance(value, list) and not isinstance(value, IdArray) for value in values]
    marks = ", ".join("cast(%s as json)" if each else "%s" for each in is_json)
    given = [json.dumps(value, default=str) if each else value for value, each in zip(values, is_json, strict=True)]
    row = db.execute(f"select {function}({marks}) as answer".encode(), given).fetchone()
    assert row is not None
    return row["answer"]


def session(database: str) -> Db:
    options = "-c search_path=pgconductor,pg_temp"
    return psycopg.Connection[DictRow].connect(database, autocommit=True, row_factory=dict_row, options=options)


# ---------------------------------------------------------------- what clients do


def blank(count: int) -> list[Json]:
    """Return so many calls or children with nothing to say of themselves."""
    return [{} for _ in range(count)]


def enqueue_many(db: Db, *calls: Json, now: float = 0, again: bool = False) -> list[str]:
    """Enqueue calls of `{task: "work", payload: {}}` and what each adds; returns the ids that hold."""
    full: list[Json] = [{"id": str(uuid4()), "task": "work", "payload": {}} | each for each in calls]
    answer = call(db, "enqueue", full, None, None, again, at(now))
    kept: list[str] | None = answer["ids"]
    return kept or [each["id"] for each in full]


def enqueue(db: Db, task: str = "work", now: float = 0, **options: Any) -> str:
    return enqueue_many(db, {"task": task} | options, now=now)[0]


def cancel(db: Db, id: str, now: float = 0, reason: str = "no longer needed") -> str:
    return str(call(db, "cancel", UUID(id), reason, at(now))["result"])


# ---------------------------------------------------------------- what a worker does


def register(db: Db, *tasks: str, worker: UUID = WORKER, now: float = 0, **options: Any) -> None:
    """Register a process, queue default, and tasks in it."""
    call(db, "register_orchestrator", worker, "test", "1", "host", 1, "{default}", at(now))
    rows = [{"name": name, "queue": "default", "max_attempts": 3, "max_crashes": 5} | options for name in tasks]
    if rows:
        call(db, "register_tasks", "test", rows, at(now))


def array(values: Sequence[object]) -> str:
    return "{" + ",".join(str(value) for value in values) + "}"


def claim(
    db: Db,
    limit: int = 10,
    token: int = 1,
    worker: UUID = WORKER,
    now: float = 0,
    tasks: Sequence[str] | None = None,
    queue: str = "default",
    fire: bool = False,
) -> list[Json]:
    """Claim from a queue what these tasks, or all of them, have ready."""
    known = [each["id"] for each in db.execute("select id, name from task") if tasks is None or each["name"] in tasks]
    wants = [
        {"queue": each["id"], "limit": limit} for each in db.execute("select * from queue") if each["name"] == queue
    ]
    answer = call(db, "claim", worker, token, wants, array(known), fire, at(now))
    assert answer is not None, "the worker was declared dead"
    return claimed_of(answer)


def claim_named(db: Db, *ids: str, token: int = 1, worker: UUID = WORKER, now: float = 0) -> list[Json]:
    """Claim executions of one lane by their ids, and return what was claimed."""
    found = db.execute(
        "select queue_id, task_id from lane where id = (select lane_id from execution where id = %s)", (ids[0],)
    ).fetchone()
    lane = (found["queue_id"], found["task_id"]) if found else (1, 1)
    answer = call(db, "claim_named", worker, token, *lane, array(ids), at(now))
    assert answer is not None, "the worker was declared dead"
    return claimed_of(answer)


def claimed_of(answer: Json) -> list[Json]:
    """Return what a claim brought, by name."""
    names = (
        "id",
        "task_id",
        "queue_id",
        "payload",
        "depth",
        "parent_id",
        "root_id",
        "failures",
        "crashes",
        "trigger",
        "cached",
        "steps",
        "trigger_kind",
        "trigger_data",
    )
    rows: list[list[Any]] = answer.get("claimed") or []
    fresh = [0, None, None, 0, 0, *[None] * 5]  # of a call that has not run yet, only what comes before is told
    return [dict(zip(names, row + fresh[len(row) - 4 :], strict=True)) for row in rows]


def claim_one(db: Db, **options: Any) -> str:
    """Claim, and return the id of the one execution that was ready."""
    (claimed,) = claim(db, **options)
    return str(claimed["id"])


def complete(
    db: Db,
    id: str,
    result: Any = None,
    token: int = 1,
    worker: UUID = WORKER,
    now: float = 0,
    parent: str | None = None,
) -> Json:
    """Settle as a worker does what has no open children."""
    return settle_plain(db, {"id": id, "token": token, "result": result, "parent": parent}, worker=worker, now=now)


def settle_plain(db: Db, *completed: Json, worker: UUID = WORKER, now: float = 0) -> Json:
    answer: Json = settle_both(db, list(completed), [], worker=worker, now=now)
    return answer


def settle(db: Db, *outcomes: Json, worker: UUID = WORKER, now: float = 0) -> Json:
    answer: Json = settle_both(db, [], [{"token": 1} | outcome for outcome in outcomes], worker=worker, now=now)
    return answer


def settle_both(
    db: Db, completed: list[Json], outcomes: list[Json], *, worker: UUID = WORKER, now: float | str = 0
) -> Any:
    """Settle as a worker does: what parks has its operations in `ops`, what completes its `parent`."""
    operations = [operation for each in outcomes for operation in each.get("ops") or ()]
    bare = [{key: value for key, value in each.items() if key != "ops"} for each in outcomes]
    parents = IdArray({each["parent"] for each in completed if each.get("parent")})
    level = len({each.get("depth", each.get("parent") is not None) for each in completed}) <= 1
    when = now if isinstance(now, str) else at(now)
    return call(db, "settle", worker, *columns(completed), bare, when, *apart(operations), parents, level)


def columns(completed: list[Json]) -> tuple[IdArray, str, list[Json]]:
    """Write completions as settle takes them: ids, tokens, results."""
    tokens = ",".join(str(each["token"]) for each in completed)
    return IdArray([each["id"] for each in completed]), f"{{{tokens}}}", [each["result"] for each in completed]


def call_of_child(child: Json) -> Json:
    return {key: value for key, value in child.items() if key not in ("id", "payload")}


def apart(operations: list[Json]) -> tuple[list[Json], list[Json], IdArray, list[Json]]:
    """Take the children out of operations: how those in a row are called, their ids and their payloads."""
    bare = [{key: value for key, value in each.items() if key != "children"} for each in operations]
    alike: list[Json] = []
    children: list[Json] = []
    for place, each in enumerate(operations, 1):
        for call, group in groupby(each.get("children") or (), call_of_child):
            some = list(group)
            alike.append({"op": place, "count": len(some)} | call)
            children += some
    return bare, alike, IdArray([child["id"] for child in children]), [child["payload"] for child in children]


def finish(db: Db, id: str, result: Any = None, token: int = 1, now: float = 0, worker: UUID = WORKER) -> Json:
    """Complete an execution that may have open children."""
    return settle(db, {"id": id, "outcome": "completed", "result": result, "token": token}, now=now, worker=worker)


def fail(db: Db, id: str, message: str = "boom", token: int = 1, now: float = 0, worker: UUID = WORKER) -> Json:
    error = {"type": "ValueError", "message": message}
    return settle(db, {"id": id, "outcome": "failed", "error": error, "token": token}, now=now, worker=worker)


def retry(db: Db, id: str, delay: float | None = None, token: int = 1, now: float = 0, **more: Any) -> Json:
    error = {"type": "ValueError", "message": "again"}
    return settle(db, {"id": id, "outcome": "retried", "error": error, "delay": delay, "token": token} | more, now=now)


def release(db: Db, id: str, token: int = 1, now: float = 0, delay: float | None = None) -> Json:
    return settle(db, {"id": id, "outcome": "released", "token": token, "delay": delay}, now=now)


def save(db: Db, id: str, *names: str, token: int = 1, worker: UUID = WORKER, ops: list[Json] | None = None) -> Any:
    """Record steps whose values are their own names; `ops` are opened for the same execution."""
    steps = [{"id": id, "token": token, "name": n, "round": 0, "kind": "step", "value": n} for n in names]
    opened, *children = apart([{"id": id, "token": token} | op for op in ops or []])
    return call(db, "save", worker, steps, opened, at(0), *children)


# ---------------------------------------------------------------- operations of a handler


def op(id: str, name: str, kind: str, *children: Json, **options: Any) -> Json:
    rows: list[Json] = [{"id": str(uuid4()), "task": "child", "payload": {}} | child for child in children]
    return {"id": id, "name": name, "round": 0, "kind": kind} | ({"children": rows} if rows else {}) | options


def park(
    db: Db,
    id: str,
    *ops: Json,
    token: int = 1,
    now: float = 0,
    awaits: list[Json] | None = None,
    worker: UUID = WORKER,
) -> Json:
    """Park on operations; those that are not awaited by name are awaited all."""
    waits = awaits or [{"name": o["name"], "round": o["round"], "kind": o["kind"], "awaited": True} for o in ops]
    outcome = {"id": id, "outcome": "parked", "ops": list(ops) or None, "awaits": waits, "token": token}
    return settle(db, outcome, now=now, worker=worker)


def await_members(name: str, *members: str, count: int) -> list[Json]:
    return [{"name": name, "round": 0, "kind": "wait", "awaited": True, "members": list(members), "count": count}]


def invoke(db: Db, id: str, name: str = "call", token: int = 1, now: float = 0, **options: Any) -> str:
    """Park a running execution on one child; returns the child's id."""
    operation = op(id, name, "invoke", *blank(1), **options)
    park(db, id, operation, token=token, now=now)
    return str(operation["children"][0]["id"])


def parent_and_child(db: Db, **options: Any) -> tuple[str, str]:
    """Return a waiting parent and its ready child."""
    register(db, "work", "child")
    enqueue(db)
    parent = claim_one(db, tasks=["work"])
    return parent, invoke(db, parent, **options)


def chain(db: Db, depth: int) -> list[str]:
    """Return executions each of which waits for the next; the last one runs."""
    register(db, "work", "child")
    enqueue(db)
    ids = [claim_one(db)]
    for _ in range(depth):
        invoke(db, ids[-1])
        ids.append(claim_one(db))
    return ids


def fan_out(db: Db, count: int, **options: Any) -> tuple[str, list[str]]:
    """Return a parent that waits for an `invoke_all`, and its children."""
    register(db, "work", "child")
    enqueue(db)
    parent = claim_one(db, tasks=["work"])
    operation = op(parent, "all", "invoke_all", *blank(count), **options)
    park(db, parent, operation)
    return parent, [child["id"] for child in operation["children"]]


# ---------------------------------------------------------------- what became of it


def state(db: Db, id: str) -> str:
    return str(call(db, "state_of", UUID(id)))


def states(db: Db, ids: Sequence[str]) -> list[str]:
    return [state(db, id) for id in ids]


def row(db: Db, id: str) -> DictRow:
    found = db.execute("select * from execution where id = %s", (id,)).fetchone()
    assert found is not None
    return found


def step(db: Db, id: str, name: str, index: int = 0) -> DictRow:
    query = "select * from recorded_step where execution_id = %s and name = %s and index = %s and round = 0"
    found = db.execute(query, (id, name, index)).fetchone()
    assert found is not None, f"{id} has no step {name} {index}"
    return found


def count(db: Db, table: str) -> int:
    found = db.execute(
        f"select count(*) as count from {table}".encode()  # noqa: S608 - a name that a test wrote
    ).fetchone()
    assert found is not None
    return int(found["count"])


# ---------------------------------------------------------------- two sessions


class Background(threading.Thread):
    """A call in another thread, whose answer or error `result` gives."""

    def __init__(self, body: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._body = body
        self._answer: Any = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._answer = self._body()
        except BaseException as error:  # noqa: BLE001 - raised again where the answer is asked for
            self._error = error

    def result(self) -> Any:
        self.join(30)
        assert not self.is_alive(), "the call hangs"
        if self._error is not None:
            raise self._error
        return self._answer


def wait_until_blocked(db: Db, other: psycopg.Connection[Any]) -> None:
    """Return when the other session waits for a lock of any kind."""
    query = "select cardinality(pg_blocking_pids(%s)) > 0 as blocked"
    for _ in range(100_000):
        found = db.execute(query, (other.info.backend_pid,)).fetchone()
        if found and found["blocked"]:
            return
    raise AssertionError("the other session never waited")
