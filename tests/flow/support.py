"""Limited tasks as the SQL tests of flow control register them."""

from typing import Any

from tests.sql.support import Db, Json, call, register


def concurrency(limit: int, key: str | None = None) -> Json:
    return {"kind": "concurrency", "key_path": key, "max": limit}


def rate(limit: int, seconds: float, key: str | None = None) -> Json:
    return {"kind": "rate", "key_path": key, "max": limit, "seconds": seconds}


def limited(db: Db, *limits: Json, task: str = "work", now: float = 0, **options: Any) -> None:
    """Register a process and a task with these limits."""
    register(db, task, now=now, limits=list(limits), **options)


def set_limit(db: Db, limit: int | None, kind: str = "concurrency", key: str | None = None, task: str = "work") -> bool:
    return bool(call(db, "set_limit", task, limit, kind, key))


def let_limits_be_lowered(db: Db) -> None:
    """Tell the invariants that more may run than a limit, which came later, says."""
    db.execute("create table audit.lowered ()")
