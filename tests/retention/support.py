"""Executions of a given age, and pruning at a given instant."""

from typing import Any
from uuid import UUID

from tests.sql.support import Db, Json, at, blank, call, claim_one, complete, enqueue, finish, op, park, register

DAY = 86_400.0
FOR_EVER = -1.0


def id_at(seconds: float, number: int = 0) -> str:
    """Return an id as a client makes it at an instant."""
    milliseconds = int(at(seconds).timestamp() * 1000)
    return str(UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62 | number))


def prune(db: Db, now: float, limit: int = 1000, size_max: int = 10_001) -> int:
    """Prune until there is no more to do; return how many executions went."""
    removed, more = 0, True
    while more:
        answer: Json = call(db, "prune", limit, size_max, at(now))
        removed, more = removed + answer["removed"], answer["more"]
    return removed


def keep(db: Db, completed: float = 7 * DAY, failed: float = 30 * DAY, *tasks: str) -> None:
    """Register tasks with these lengths of retention; `work` and `child` if none is named."""
    register(db, *(tasks or ("work", "child")), keep_completed=completed, keep_failed=failed)


def ready(db: Db, now: float = 0, number: int = 0, **options: Any) -> str:
    """Enqueue an execution whose id is of its time."""
    return enqueue(db, id=id_at(now, number), now=now, **options)


def completed(db: Db, now: float = 0, number: int = 0, **options: Any) -> str:
    """Return an execution without children that was enqueued and completed at an instant."""
    id = ready(db, now, number, **options)
    claim_one(db, now=now)
    complete(db, id, 1, worker=UUID(int=1), now=now)
    return id


def completed_tree(db: Db, children: int, now: float = 0, number: int = 0) -> tuple[str, list[str]]:
    """Return a completed parent of completed children, all of one instant."""
    parent = ready(db, now, number)
    claim_one(db, now=now)
    operation = op(parent, "all", "invoke_all", *blank(children))
    for index, child in enumerate(operation["children"]):
        child["id"] = id_at(now, number * 1000 + index + 1)
    park(db, parent, operation, now=now)
    for _ in range(children):
        finish(db, claim_one(db, limit=1, now=now), now=now)
    finish(db, claim_one(db, token=2, now=now), token=2, now=now)
    return parent, [child["id"] for child in operation["children"]]


def exists(db: Db, *ids: str) -> list[bool]:
    """Tell of each whether it is there."""
    there = {str(row["id"]) for row in db.execute("select id from execution where id = any(%s::uuid[])", (list(ids),))}
    return [id in there for id in ids]
