"""A database in which every state-changing function has something to do, and those functions as acts upon it."""

from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

from tests.flow.support import concurrency, rate
from tests.sql.support import (
    Db,
    Json,
    array,
    at,
    call,
    cancel,
    claim,
    claim_one,
    complete,
    enqueue,
    enqueue_many,
    fail,
    finish,
    op,
    register,
    save,
    settle,
)

OTHER = UUID(int=2)
DEAD = UUID(int=3)
LAST = UUID(int=9)
ROUNDS_MAX = 60
Act = Callable[[Db], object]


def grow(db: Db) -> dict[str, str]:
    """Make a tree in which all that follows has something to do at second 30.

    The root waits for a parent, which runs; of its children one runs, one is ready, one is due. A fan-out beside it
    waits for a child that runs, with a deadline; and another process has died with two executions in its hands.
    """
    register(db, "work", "child", "lost", max_attempts=9)
    register(db, worker=OTHER, now=25)
    register(db, worker=DEAD)
    root = enqueue(db)
    claim(db, worker=OTHER)
    outer = op(root, "call", "invoke", {}, due_in=40)
    outcome = {
        "id": root,
        "token": 1,
        "outcome": "parked",
        "ops": [outer],
        "awaits": [{"name": "call", "round": 0, "kind": "invoke", "awaited": True}],
    }
    settle(db, outcome, worker=OTHER)
    parent = claim_one(db, worker=OTHER)
    starts = [
        op(parent, name, "start", {"task": task} | more)
        for name, task, more in (("a", "child", {}), ("b", "work", {}), ("c", "work", {"delay": 28}), ("d", "lost", {}))
    ]
    save(db, parent, worker=OTHER, ops=starts)
    claim(db, worker=OTHER, tasks=["child"])
    claim(db, worker=DEAD, tasks=["lost"])
    a, b, c, d = (each["children"][0]["id"] for each in starts)
    inner = {
        "id": a,
        "token": 1,
        "outcome": "parked",
        "ops": [op(a, "all", "invoke_all", *[{"task": "lost"}] * 3, due_in=29, window=2)],
        "awaits": [{"name": "all", "round": 0, "kind": "invoke_all", "awaited": True}],
    }
    settle(db, inner, worker=OTHER)
    claim(db, worker=DEAD, tasks=["lost"], token=2, limit=1)
    running = claim_one(db, worker=OTHER, tasks=["lost"], token=3)
    return {"root": root, "parent": parent, "a": a, "b": b, "c": c, "d": d, "running": running}


def acts_on(tree: dict[str, str]) -> dict[str, Act]:
    """Return what clients, workers and time do to such a tree."""
    parent, nap = tree["parent"], op(tree["parent"], "nap", "sleep", due_in=60)
    again = {
        "id": parent,
        "token": 1,
        "outcome": "parked",
        "ops": [nap, op(parent, "new", "invoke", {})],
        "awaits": [{"name": "nap", "round": 0, "kind": "sleep", "awaited": True}],
    }
    return {
        "cancel the root": lambda db: cancel(db, tree["root"], now=30),
        "cancel the parent": lambda db: cancel(db, parent, now=30),
        "cancel a scheduled child": lambda db: cancel(db, tree["c"], now=30),
        "cancel a waiting child": lambda db: cancel(db, tree["a"], now=30),
        "settle a child": lambda db: finish(db, tree["running"], token=3, worker=OTHER, now=30),
        "complete a child": lambda db: complete(db, tree["running"], token=3, worker=OTHER, now=30, parent=tree["a"]),
        "park the parent": lambda db: settle(db, again, worker=OTHER, now=30),
        "fail the parent": lambda db: fail(db, parent, worker=OTHER, now=30),
        "start a child": lambda db: save(db, parent, worker=OTHER, ops=[op(parent, "late", "start", {})]),
        "fire the timers": lambda db: call(db, "fire_timers", at(30)),
        "sweep": lambda db: call(db, "sweep", "20 seconds", at(30)),
        "claim": lambda db: claim(db, worker=OTHER, token=9, now=30, fire=True),
        "reconcile": lambda db: call(db, "reconcile", OTHER, array([1, 3]), at(30)),
        "retire": lambda db: call(db, "retire", DEAD, at(30)),
    }


# ---------------------------------------------------------------- with keys, limits, events and an end beside it


def grow_garden(db: Db) -> dict[str, str]:
    """Make the tree, and beside it: who waits for an event, what has failed, what a key names, what a limit holds."""
    tree = grow(db)
    register(db, "ear", "failing", worker=OTHER, now=25)
    register(db, "narrow", worker=OTHER, now=25, limits=[concurrency(1)])
    tree["ear"], tree["failed"] = enqueue(db, "ear"), enqueue(db, "failing")
    claim(db, worker=OTHER, tasks=["ear", "failing"], token=5)
    _park_on_event(db, tree["ear"], 5)
    fail(db, tree["failed"], token=5, worker=OTHER, now=10)
    tree["keyed"] = enqueue(db, "work", dedupe_key="k", delay=50)
    tree["narrow"], _ = enqueue(db, "narrow"), enqueue(db, "narrow")
    claim(db, worker=OTHER, tasks=["narrow"], token=6)
    register(db, "rated", worker=OTHER, now=25, limits=[rate(1, 20)])
    enqueue_many(db, *[{"task": "rated"}] * 3)
    claim(db, worker=OTHER, tasks=["rated"], token=7)
    return tree


def _park_on_event(db: Db, id: str, token: int) -> None:
    wait = op(id, "heard", "wait_for", event="paid", where=None, due_in=29)
    awaits = [{"name": "heard", "round": 0, "kind": "wait_for", "awaited": True}]
    settle(db, {"id": id, "token": token, "outcome": "parked", "ops": [wait], "awaits": awaits}, worker=OTHER)


def emit(db: Db, now: float) -> object:
    """Emit what is waited for."""
    event: Json = {"id": str(uuid4()), "name": "paid", "payload": {}}
    return call(db, "emit_events", [event], False, at(now))


def lose_for_good(db: Db, id: str, lose: Act) -> object:
    """Settle the last crash that its task allows."""
    db.execute("update execution set crashes = 4 where id = %s", (id,))
    return lose(db)


def acts_in(tree: dict[str, str]) -> dict[str, Act]:
    """Return every state-changing function of the engine, with something to do."""
    parent = tree["parent"]
    running: Json = {"id": tree["running"], "token": 3}

    def settled(outcome: str, **details: Any) -> Act:
        return lambda db: settle(db, running | {"outcome": outcome} | details, worker=OTHER, now=30)

    def called(function: str, *values: object) -> Act:
        return lambda db: call(db, function, *values)

    step = (OTHER, UUID(parent), 1)
    more: dict[str, Act] = {
        "enqueue": lambda db: enqueue(db, "work", now=30),
        "enqueue with a key": lambda db: enqueue(db, "work", now=30, dedupe_key="k"),
        "replace": lambda db: enqueue(db, "work", now=30, dedupe_key="k", replace=True, priority=1),
        "throttle": lambda db: enqueue(db, "work", now=30, throttle=5.0),
        "emit": lambda db: emit(db, 30),
        "save a step": lambda db: save(db, parent, "s", worker=OTHER),
        "record a transaction": called("save_transaction", *step, "t", 0, "1", at(30)),
        "cancel as a step": called("cancel_as_step", *step, "cancel#1", UUID(tree["a"]), "told to", at(30)),
        "cancel by key": called("cancel_by_key", "work", "k", "no more", at(30)),
        "redrive": called("redrive", UUID(tree["failed"])),
        "retry a child": settled("retried", delay=5, error={"type": "E", "message": "again"}),
        "release a child": settled("released"),
        "lose a child": settled("crashed"),
        "lose a child for good": lambda db: lose_for_good(db, tree["running"], settled("crashed")),
        "settle a limited one": lambda db: finish(db, tree["narrow"], token=6, worker=OTHER, now=30),
        "beat": called("beat", OTHER, False, at(30)),
        "register": lambda db: register(db, "work", "child", "lost", worker=OTHER, now=30, max_attempts=9),
        "raise a limit": called("set_limit", "narrow", 2, "concurrency", None),
        "add a limit": called("set_limit", "narrow", 2, "concurrency", "user"),
        "register a limit": lambda db: register(
            db, "narrow", "rated", worker=OTHER, now=30, limits=[concurrency(2), rate(5, 20)]
        ),
        "enqueue a limited one": lambda db: enqueue(db, "narrow", now=30),
        "enqueue in another queue": lambda db: enqueue(db, "rated", now=30, queue="fresh"),
        "pause": called("pause_queue", "default", at(30)),
        "prune": called("prune", 100, 10_001, at(3_000_000)),
    }
    return acts_on(tree) | more


TREE_ACTS = list(acts_on(dict.fromkeys(("root", "parent", "a", "c", "running"), "")))
ACTS = list(acts_in(dict.fromkeys(("root", "parent", "a", "c", "running", "failed", "narrow"), str(UUID(int=0)))))


def drive_to_the_end(db: Db) -> list[str]:
    """Let time pass and complete whatever can be claimed; return what is never reached."""
    call(db, "resume_queue", "default")
    left: list[str] = []
    for number in range(1, ROUNDS_MAX):
        now, token = 30 + 15 * number, 100 + number
        register(db, worker=LAST, now=now)
        call(db, "beat", LAST, False, at(now))
        call(db, "sweep", "20 seconds", at(now))
        emit(db, now)
        claimed = [
            each["id"]
            for queue in ("default", "fresh")
            for each in claim(db, 50, token, worker=LAST, now=now, queue=queue, fire=True)
        ]
        settle(db, *({"id": id, "token": token, "outcome": "completed"} for id in claimed), worker=LAST, now=now)
        left = [str(each["id"]) for each in db.execute("select id from execution where outcome is null").fetchall()]
        if not left:
            break
    return left
