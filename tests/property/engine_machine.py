"""The engine's SQL functions in any order, with the clock as an argument, against a model of who holds what.

A step calls one function, as a client, a worker, a zombie or an operator would; afterwards every invariant holds, what
has ended stays as it ended, and what was said to be lost has changed nothing. At the end of a life everything is driven
to its end: whatever happened, nothing may be left that no claim, timer or sweep ever reaches.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests import invariants
from tests.flow.support import concurrency, rate
from tests.sql.support import Db, Json, apart, array, at, call, claimed_of, op, settle_both

WORKERS = [UUID(int=number) for number in (1, 2, 3)]
TASKS = ("work", "child", "limited", "rated", "fleeting")
EVENTS = ("paid", "sent")
EXPIRY = "20 seconds"
ENDED = {"completed", "failed", "cancelled"}
END_ROUNDS_MAX = 400

workers = st.sampled_from(WORKERS)
numbers = st.integers(0, 10_000)
seconds = st.floats(0.1, 40)


@dataclass
class Held:
    """What a worker believes that it runs."""

    id: str
    worker: UUID
    token: int
    parent: str | None
    opened: list[Json] = field(default_factory=list[Json])


class EngineMachine(RuleBasedStateMachine):
    """One database's life. `connection` is set by whoever runs it, to a database that looks new."""

    connection: Db

    def __init__(self) -> None:
        super().__init__()
        self.db = type(self).connection
        self.now = 0.0
        self.token = 0
        self.known: list[str] = []
        self.held: list[Held] = []
        self.ended: dict[str, str] = {}
        self.cancelled: set[str] = set()
        self.last: tuple[UUID, list[Json], list[Json]] | None = None
        self.last_calls: list[Json] = []
        self.ids = random.Random(0)  # noqa: S311 - the same in every life: a life that is drawn again must go the same way

    # ------------------------------------------------------------ the start

    @initialize()
    def register(self) -> None:
        rows: list[Json] = [
            {"name": "work", "keep_completed": 500.0},
            {"name": "child"},
            {"name": "limited", "limits": [concurrency(2), concurrency(1, "key")]},
            {"name": "rated", "limits": [rate(2, 5.0)]},
            {"name": "fleeting", "expires_in": 15.0},
        ]
        defaults = {"queue": "default", "max_attempts": 3, "max_crashes": 3}
        call(self.db, "register_tasks", "test", [defaults | row for row in rows], at(0))
        subscription = {"task": "child", "event": "sent", "fields": None, "where": None}
        call(self.db, "register_subscriptions", "test", [subscription])
        for worker in WORKERS:
            self._join(worker)

    def _join(self, worker: UUID) -> None:
        call(self.db, "register_orchestrator", worker, "test", "1", "host", 1, "{default}", at(self.now))

    # ------------------------------------------------------------ clients

    @rule(
        tasks=st.lists(st.sampled_from(TASKS), min_size=1, max_size=4),
        delay=st.none() | seconds,
        priority=st.integers(-1, 1),
        key=st.none() | st.sampled_from("ab"),
        replace=st.booleans(),
    )
    def enqueue(self, tasks: list[str], delay: float | None, priority: int, key: str | None, replace: bool) -> None:
        more: Json = {"priority": priority, "delay": delay, "dedupe_key": key, "replace": replace and key is not None}
        self._enqueue([self._new(task) | more for task in tasks])

    @rule(task=st.sampled_from(TASKS), kind=st.sampled_from(["throttle", "debounce"]), period=seconds)
    def enqueue_thinned(self, task: str, kind: str, period: float) -> None:
        self._enqueue([self._new(task) | {kind: period}])
        self.last_calls = []  # repeated in a later period, it is let in there: as if it had come then

    @precondition(lambda self: bool(self.last_calls))
    @rule()
    def enqueue_again(self) -> None:
        """Repeat what was sent, as a client does whose reply was lost: it makes nothing new."""
        before = self._count()
        call(self.db, "enqueue", self.last_calls, None, None, True, at(self.now))
        assert self._count() == before

    def _new_id(self) -> str:
        return str(UUID(int=self.ids.getrandbits(128), version=4))

    def _new(self, task: str) -> Json:
        return {"id": self._new_id(), "task": task, "payload": {"key": len(self.known) % 2}}

    def _enqueue(self, calls: list[Json]) -> None:
        answer = call(self.db, "enqueue", calls, None, None, False, at(self.now))
        self.known += set(answer["ids"] or [each["id"] for each in calls]) - set(self.known)
        self.last_calls = calls

    def _count(self) -> int:
        found = self.db.execute("select count(*) as count from execution").fetchone()
        assert found is not None
        return int(found["count"])

    @precondition(lambda self: bool(self.known))
    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        id = self._pick(number)
        self._note_cancel(id, call(self.db, "cancel", UUID(id), "no longer needed", at(self.now))["result"])

    @rule(task=st.sampled_from(TASKS), key=st.sampled_from("ab"))
    def cancel_by_key(self, task: str, key: str) -> None:
        call(self.db, "cancel_by_key", task, key, "no longer needed", at(self.now))

    def _note_cancel(self, id: str, result: str) -> None:
        assert (result == "ended") == (id in self.ended and id not in self._unknown()), (id, result)
        if result in ("cancelled", "requested"):
            self.cancelled.add(id)

    @precondition(lambda self: bool(self.ended))
    @rule(number=numbers)
    def redrive(self, number: int) -> None:
        id = sorted(self.ended)[number % len(self.ended)]
        answer = call(self.db, "redrive", UUID(id))["result"]
        if id in self._unknown():
            assert answer == "unknown"
            return
        assert (answer == "refused") == (self.ended[id] == "completed")
        if answer == "ready":
            del self.ended[id]
            self.cancelled.discard(id)

    @rule(name=st.sampled_from(EVENTS), key=st.integers(0, 1))
    def emit(self, name: str, key: int) -> None:
        call(
            self.db, "emit_events", [{"id": self._new_id(), "name": name, "payload": {"key": key}}], False, at(self.now)
        )

    # ------------------------------------------------------------ workers

    @rule(worker=workers, limit=st.integers(1, 6), fire=st.booleans())
    def claim(self, worker: UUID, limit: int, fire: bool) -> None:
        self._claim(worker, limit, fire=fire)

    def _claim(self, worker: UUID, limit: int, *, fire: bool) -> int:
        self.token += 1
        tasks = array([each["id"] for each in self.db.execute("select id from task order by id")])
        wants = [{"queue": each["id"], "limit": limit} for each in self.db.execute("select id from queue")]
        answer = call(self.db, "claim", worker, self.token, wants, tasks, fire, at(self.now))
        claimed = self._hold(worker, answer)
        assert claimed <= limit * len(wants)
        return claimed

    @precondition(lambda self: bool(self.known))
    @rule(worker=workers, picks=st.lists(numbers, min_size=1, max_size=4))
    def claim_named(self, worker: UUID, picks: list[int]) -> None:
        self.token += 1
        ids = list(dict.fromkeys(self._pick(number) for number in picks))
        query = "select queue_id, task_id from lane where id = (select lane_id from execution where id = %s)"
        lane = self.db.execute(query, (ids[0],)).fetchone() or {"queue_id": 1, "task_id": 1}
        answer = call(self.db, "claim_named", worker, self.token, *lane.values(), array(ids), at(self.now))
        assert self._hold(worker, answer) <= len(ids)

    def _hold(self, worker: UUID, answer: Json | None) -> int:
        """Note what a claim brought; return how many."""
        claimed = claimed_of(answer or {})
        for each in claimed:
            id, parent = str(each["id"]), each["parent_id"]
            assert id not in self.ended
            self.held.append(Held(id, worker, self.token, parent=parent and str(parent)))
        return len(claimed)

    @precondition(lambda self: bool(self.held))
    @rule(picks=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5), delay=st.none() | seconds)
    def settle(self, picks: list[tuple[int, int]], delay: float | None) -> None:
        """Settle for one worker, what it holds and what it only believes that it holds."""
        first = self.held[picks[0][0] % len(self.held)]
        mine = [held for held in self.held if held.worker == first.worker]
        chosen = {mine[number % len(mine)].id: (mine[number % len(mine)], how) for number, how in picks}
        self._settle(first.worker, [self._outcome(held, how, delay) for held, how in chosen.values()])

    @precondition(lambda self: any(not held.opened for held in self.held))
    @rule(number=numbers)
    def settle_plain(self, number: int) -> None:
        plain = [held for held in self.held if not held.opened and not self._has_steps(held)]
        if plain:
            held = plain[number % len(plain)]
            completed = {"id": held.id, "token": held.token, "result": 1, "parent": held.parent}
            self._settle(held.worker, [], [completed])

    def _has_steps(self, held: Held) -> bool:
        return self.db.execute("select from step where execution_id = %s", (held.id,)).fetchone() is not None

    def _settle(self, worker: UUID, outcomes: list[Json], completed: Sequence[Json] = ()) -> None:
        live = self._live(worker, [*outcomes, *completed])
        answer = settle_both(self.db, list(completed), outcomes, worker=worker, now=self.now)
        self.last = worker, list(completed), outcomes
        if answer is None:
            assert not live
            return
        assert set(answer["lost"]) == {each["id"] for each in (*outcomes, *completed)} - live
        gone = {each["id"] for each in (*outcomes, *completed)}
        self.held = [held for held in self.held if held.worker != worker or held.id not in gone]

    @precondition(lambda self: self.last is not None)
    @rule()
    def settle_again(self) -> None:
        """Repeat the last settle, as a worker does whose reply was lost: all of it is lost, and nothing moves."""
        assert self.last is not None
        worker, completed, outcomes = self.last
        live = self._live(worker, [*completed, *outcomes])
        if live:
            return  # claimed again under the same token: never
        before = self._states()
        answer = settle_both(self.db, completed, outcomes, worker=worker, now=self.now)
        assert answer is None or set(answer["lost"]) == {each["id"] for each in (*completed, *outcomes)}
        assert self._states() == before

    def _live(self, worker: UUID, given: Sequence[Json]) -> set[str]:
        """Return of whom the lease is really held."""
        return {
            each["id"]
            for each in given
            if self.db.execute(
                "select from lease where execution_id = %s and token = %s and orchestrator_id = %s",
                (each["id"], each["token"], worker),
            ).fetchone()
            is not None
        }

    def _outcome(self, held: Held, how: int, delay: float | None) -> Json:
        outcome: Json = {"id": held.id, "token": held.token}
        kinds = ("completed", "failed", "retried", "released", "unstarted", "crashed", "parked", "parked", "parked")
        kind = kinds[how % len(kinds)]
        if kind in ("failed", "retried"):
            outcome["error"] = {"type": "ValueError", "message": "boom"}
        if kind == "retried" and self._is_last_attempt(held):
            kind = "failed"
        if kind in ("retried", "released", "unstarted"):
            outcome["delay"] = delay
        if kind == "parked":
            opened = self._operation(held, how // len(kinds))
            outcome["ops"] = [opened]
            waits = [(opened["name"], opened["kind"])] if opened["kind"] != "start" else []
            waits += [(each["name"], each["kind"]) for each in self._pending(held)]
            outcome["awaits"] = [{"name": n, "round": 0, "kind": k, "awaited": True} for n, k in waits]
            if not waits:
                return outcome | {"outcome": "completed", "ops": None, "awaits": None}
        return outcome | {"outcome": kind}

    def _is_last_attempt(self, held: Held) -> bool:
        found = self.db.execute("select failures from execution where id = %s", (held.id,)).fetchone()
        return found is not None and found["failures"] >= 2

    def _pending(self, held: Held) -> list[Json]:
        return self.db.execute(
            "select name, kind from step where execution_id = %s and status = 'pending' and index = 0 and round = 0"
            " and kind <> 'start' and not dropped",
            (held.id,),
        ).fetchall()

    def _operation(self, held: Held, how: int) -> Json:
        chance = random.Random(how)  # noqa: S311
        name, due = f"op{self._new_id()[:6]}", chance.choice([None, chance.uniform(1, 30)])
        kind = chance.choice(["invoke", "invoke", "invoke_all", "sleep", "wait_for"])
        more: Json = {"due_in": due, "keep": chance.random() < 0.3}
        if kind == "sleep":
            return op(held.id, name, kind, due_in=due or 3.0)
        if kind == "wait_for":
            return op(held.id, name, kind, event=chance.choice(EVENTS), where=chance.choice([None, {"key": 1}]), **more)
        count = 1 if kind == "invoke" else chance.randint(1, 4)
        children = [self._new(chance.choice(["child", "work", "limited"])) for _ in range(count)]
        window = {"window": chance.randint(1, 2)} if kind == "invoke_all" and chance.random() < 0.5 else {}
        return op(held.id, name, kind, *children, **more, **window)

    @precondition(lambda self: bool(self.held))
    @rule(number=numbers, how=numbers, start=st.booleans(), detached=st.booleans())
    def save(self, number: int, how: int, start: bool, detached: bool) -> None:
        """Record a step; with a start, open a child beside it."""
        held = self.held[number % len(self.held)]
        live = self._live(held.worker, [{"id": held.id, "token": held.token}])
        common = {"id": held.id, "token": held.token, "round": 0}
        steps = [common | {"name": f"s{how % 5}", "kind": "step", "value": how}]
        opened = op(held.id, f"c{self._new_id()[:6]}", "start", self._new("child"), detached=detached)
        ops = [opened | {"token": held.token}] if start else []
        before = self._count()
        bare, *children = apart(ops)
        answer = call(self.db, "save", held.worker, steps, bare, at(self.now), *children)
        if not live:
            assert answer is None or answer["lost"] == [held.id]
            assert self._count() == before
        held.opened += ops

    @precondition(lambda self: bool(self.held))
    @rule(number=numbers, name=st.sampled_from("tu"))
    def save_transaction(self, number: int, name: str) -> None:
        held = self.held[number % len(self.held)]
        live = self._live(held.worker, [{"id": held.id, "token": held.token}])
        answer = call(self.db, "save_transaction", held.worker, UUID(held.id), held.token, name, 0, "1", at(self.now))
        assert (answer == "lost") == (not live)
        held.opened.append({})

    @precondition(lambda self: bool(self.held))
    @rule(number=numbers, whom=numbers)
    def cancel_as_step(self, number: int, whom: int) -> None:
        held, id = self.held[number % len(self.held)], self._pick(whom)
        name = f"cancel#{whom % 3}"
        call(self.db, "cancel_as_step", held.worker, UUID(held.id), held.token, name, UUID(id), "told to", at(self.now))
        held.opened.append({})

    @rule(worker=workers, stopping=st.booleans())
    def beat(self, worker: UUID, stopping: bool) -> None:
        call(self.db, "beat", worker, stopping, at(self.now))

    @rule(worker=workers)
    def join(self, worker: UUID) -> None:
        self._join(worker)

    @rule(worker=workers, known=st.lists(st.integers(1, 50)))
    def reconcile(self, worker: UUID, known: list[int]) -> None:
        call(self.db, "reconcile", worker, array(known), at(self.now))

    @rule(worker=workers)
    def retire(self, worker: UUID) -> None:
        call(self.db, "retire", worker, at(self.now))

    # ------------------------------------------------------------ time, and operators

    @rule(by=seconds)
    def wait(self, by: float) -> None:
        self.now += by

    @rule(limit=st.sampled_from([1, 1000]))
    def fire_timers(self, limit: int) -> None:
        call(self.db, "fire_timers", at(self.now), limit)

    @rule()
    def sweep(self) -> None:
        call(self.db, "sweep", EXPIRY, at(self.now))

    @rule(limit=st.sampled_from([1, 100]), size_max=st.sampled_from([2, 10_001]))
    def prune(self, limit: int, size_max: int) -> None:
        call(self.db, "prune", limit, size_max, at(self.now))
        if any(each.get("dedupe_key") for each in self.last_calls):
            self.last_calls = []  # a key is free once its execution is removed

    @rule()
    def pause(self) -> None:
        call(self.db, "pause_queue", "default", at(self.now))

    @rule()
    def resume(self) -> None:
        call(self.db, "resume_queue", "default")

    @rule(limit=st.none() | st.integers(3, 5))
    def raise_limit(self, limit: int | None) -> None:
        """An operator's limit beats the code's; taking it back does not put anybody out."""
        call(self.db, "set_limit", "limited", limit, "concurrency", None)

    # ------------------------------------------------------------ what must be true

    @invariant()
    def every_invariant_holds(self) -> None:
        invariants.check_invariants(self.db)

    @invariant()
    def what_has_ended_stays_as_it_ended(self) -> None:
        states = self._states()
        for id, outcome in self.ended.items():
            assert states.get(id, outcome) == outcome, f"{id} had ended as {outcome} and is {states[id]}"
        for id, state in states.items():
            if state in ENDED:
                self.ended[id] = state
        known = set(self.known)
        self.known += sorted(id for id in states if id not in known)
        completed = {id for id in self.cancelled if states.get(id) in ("completed", "failed")}
        assert not completed, f"a cancel was accepted for {completed}"

    def _states(self) -> dict[str, str]:
        rows = self.db.execute("select id::text as id, state from executions").fetchall()
        return {row["id"]: row["state"] for row in rows}

    def _unknown(self) -> set[str]:
        """Return what retention has removed."""
        return set(self.ended) - self._states().keys()

    def _pick(self, number: int) -> str:
        return self.known[number % len(self.known)]

    # ------------------------------------------------------------ the end

    def teardown(self) -> None:
        """Drive everything to its end with one worker, and hold what is left to the rules of rest."""
        if not self.known:
            return
        call(self.db, "resume_queue", "default")
        for _ in range(END_ROUNDS_MAX):
            if not self._end_some():
                break
        left = {id: state for id, state in self._states().items() if state not in ENDED}
        assert not left, f"nothing ever reaches {json.dumps(left)}"
        for worker in WORKERS:  # what it was to be told goes with its next beat, if it lives
            call(self.db, "beat", worker, False, at(self.now))
        invariants.check_quiescent(self.db)

    def _end_some(self) -> bool:
        """Let time pass and complete what can be claimed; return whether anything is left."""
        self.now += 10
        self._join(WORKERS[0])
        call(self.db, "beat", WORKERS[0], False, at(self.now))
        call(self.db, "sweep", EXPIRY, at(self.now))
        for name in EVENTS:
            event = {"id": self._new_id(), "name": name, "payload": {"key": 1}}
            call(self.db, "emit_events", [event], False, at(self.now))
        call(self.db, "reconcile", WORKERS[0], "{}", at(self.now))
        self.held = []
        self._claim(WORKERS[0], 50, fire=True)
        self._settle(WORKERS[0], [{"id": h.id, "token": h.token, "outcome": "completed"} for h in self.held])
        self.every_invariant_holds()
        return any(state not in ENDED for state in self._states().values())
