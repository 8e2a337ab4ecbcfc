"""Waits for events as a worker opens them, and events as SQL emits them."""

import json
from typing import Any
from uuid import UUID

from tests.sql.support import Db, Json, call, claim, claim_one, enqueue, op, park, register


def wait_op(id: str, name: str = "paid", event: str = "order.paid", **options: Any) -> Json:
    return op(id, name, "wait_for", event=event, **options)


def emit(db: Db, payload: object = None, event: str = "order.paid") -> UUID:
    text = json.dumps({} if payload is None else payload)
    found = db.execute("select emit(%s, cast(%s as jsonb)) as id", (event, text)).fetchone()
    assert found is not None
    return UUID(str(found["id"]))


def running(db: Db, count: int = 1) -> list[str]:
    """Return executions of `work` that run."""
    register(db, "work")
    for _ in range(count):
        enqueue(db)
    return [str(each["id"]) for each in claim(db, limit=count)]


def waiting(db: Db, **options: Any) -> str:
    """Return an execution that waits for `order.paid`."""
    (id,) = running(db)
    park(db, id, wait_op(id, **options))
    return id


def deliver(db: Db) -> None:
    """Deliver what is pending, as any claim does."""
    call(db, "fire_timers")


def answer(db: Db, id: str, name: str = "paid", round_: int = 0) -> Any:
    """Return the payload that a wait was answered with; None while it is open."""
    found = db.execute(
        "select value from step where execution_id = %s and name = %s and round = %s", (id, name, round_)
    ).fetchone()
    assert found is not None
    return found["value"]


def resume(db: Db, token: int) -> str:
    return claim_one(db, token=token)
