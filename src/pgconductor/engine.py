"""The engine as Python sees it: one method per SQL function, and the values that cross the border.

A method builds a `Query`: the statement, its parameters and how to read the answer. A `Session` or a
`Pool` runs it. Nothing is decided here; what a function does stands in its SQL file. All values travel as one
JSON text a parameter, and long lists of ids in binary; payloads and results pass through unread (`msgspec.Raw`).

Instants are the database's. A test that moves the clock gives the engine a `clock`, whose answer goes along as
`p_now`; in production that argument is null.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal

from msgspec import UNSET, Raw, Struct
from msgspec.structs import replace

from pgconductor.claimed import NULL, Claimed, Loaded, Missing, read_loaded
from pgconductor.events import Emitted, NewEvent, Subscription
from pgconductor.id_array import IdArray
from pgconductor.queries import Query as Query  # noqa: PLC0414 (who imports the engine has it from here)
from pgconductor.queries import Report, Reports, Table, as_is, as_text, is_true, many_reports, reader
from pgconductor.queries import quote as quote  # noqa: PLC0414
from pgconductor.relations import TableShape, TriggerRow, TriggerStep
from pgconductor.running_steps import RunningStep
from pgconductor.scan import Range, ToldPlaces
from pgconductor.schedules import DueSchedule, Fired, FiredNow, FiredSchedule, NewSchedule
from pgconductor.written import (
    AlikeExecutions,
    Blocked,
    Completion,
    Names,
    NewExecution,
    Operation,
    Outcome,
    SavedStep,
    TaskRow,
    Want,
    apart,
    are_level,
    in_columns,
    parents_of,
)

Carried = Literal["queue", "named"]
"""The hint that a commit carries: it names the queue, or the executions themselves."""
TREE_SIZE_MAX: Final = 10_001
"""The most executions of a tree that retention removes in one transaction: a parent and all its children."""

# ---------------------------------------------------------------- what the engine hands out


class Claim(Struct):
    """What one claim brought; `next_due` is in seconds from now, below zero when overdue; `schedules` are those due.

    `closing`: of tasks with a window, in how many seconds it closes. `more`: queues that it did not come to, or with
    more limited work. For `Scan`: `last`, how far it came in which lanes; `seconds`, how long it looked for work and
    took it; `search_seconds`, how much of that it took to find where work begins.
    """

    next_due: float | None = None
    claimed: list[Claimed] | None = None
    closing: dict[int, float] | None = None
    more: list[int] | None = None
    last: list[tuple[int, int]] | None = None
    seconds: float = 0.0
    search_seconds: float = 0.0
    schedules: list[DueSchedule] | None = None


class Settled(Struct):
    """What became of a settle: outcomes that were refused, who has new work, who is to be told."""

    lost: list[str]
    queues: list[int] | None = None
    watchers: list[str] | None = None
    next_due: float | None = None


class Saved(Struct):
    """What became of a save; `next_due` only where events are to be delivered."""

    lost: list[str] | None = None
    queues: list[int] | None = None
    next_due: float | None = None


class Moved(Struct):
    """What an operation set in motion besides itself; `prune`: whether a prune would find something.

    `first_lost`, `dead`: which executions a sweep took over, and of which processes, as host:pid.
    `futile`: a vacuum would be in vain, and nobody holds it off.
    `gave_up`: a sweep met a lock that others hold on to, here, and did nothing.
    """

    result: str = ""
    lost: int = 0
    first_lost: list[str] | None = None
    dead: list[str] | None = None
    queues: list[int] | None = None
    watchers: list[str] | None = None
    prune: bool = False
    futile: bool = False
    gave_up: str | None = None


class Enqueued(Struct):
    """`ids` only where a dedupe key may have kept earlier executions; `hinted`: the commit has sent the hint;
    `unconfirmed`: it has not waited for the disk, or that of a try whose reply was lost may not have."""

    queues: list[int]
    ids: list[str] | None = None
    hinted: bool = False
    unconfirmed: bool = False


class Beat(Struct):
    """Whether the process still counts as alive, which of its executions are to be cancelled, whether it is to stop."""

    alive: bool
    cancel: list[str]
    stop: bool = False


class Result(Struct):
    """How an execution stands; `outcome` is None until it ends."""

    outcome: Literal["completed", "failed", "cancelled"] | None
    result: Raw
    error: Raw
    task: str
    reason: str | None


class Ended(Struct):
    """How an execution ended; `outcome` is None where there is no such execution."""

    id: str
    outcome: Literal["completed", "failed", "cancelled"] | None = None
    result: Raw = NULL
    error: Raw = NULL
    task: str = ""
    reason: str | None = None


class Outstanding(Struct):
    """What a drain waits for."""

    ready: int
    leased: int
    next_due: datetime | None = None


class Pruned(Struct):
    """How much was removed, and whether there is more to do now; `gave_up` as in `Moved`."""

    removed: int
    more: bool
    gave_up: str | None = None


class Named(Struct):
    """An interned name."""

    name: str
    id: int


# ---------------------------------------------------------------- the queries


_claim = reader(Claim)
_settled = reader(Settled)
_saved = reader(Saved)
_moved = reader(Moved)
_enqueued = reader(Enqueued)
_emitted = reader(Emitted)
_beat = reader(Beat)
_told_places = reader(ToldPlaces)
_result = reader(Result)
_labels = reader(list[str])
_ended = reader(Ended)
_outstanding = reader(Outstanding)
_fired = reader(Fired)
_fired_now = reader(FiredNow)
_trigger_step = reader(TriggerStep)
_shapes = reader(list[TableShape])
_names = reader(list[Named])
_pruned = reader(Pruned)


def _all_ended(rows: Table) -> list[Ended]:
    return [_ended(row[0]) for row in rows]


def _enqueued_again(answer: Any) -> Enqueued:
    enqueued: Enqueued = _enqueued(answer)
    enqueued.unconfirmed = True  # what the first try has committed may not be on the disk yet
    return enqueued


class Engine(Reports):
    """Build the queries of one schema."""

    def register_tasks(self, deployment: str, tasks: Sequence[TaskRow]) -> Query[list[Named] | None]:
        """See 05_register.sql."""
        return self._query("register_tasks", "text json timestamptz", (deployment, as_text(tasks), self._now()), _names)

    def register_queues(self, names: Sequence[str]) -> Query[list[Named] | None]:
        """See 05_register.sql."""
        return self._query("register_queues", "text[]", (list(names),), _names)

    def register_orchestrator(
        self, id: str, name: str, version: str, host: str, pid: int, queues: Sequence[str], migration: int | None
    ) -> Query[ToldPlaces | None]:
        """See 05_register.sql. None: no process finds it dear to begin at the heads of lanes."""
        parameters = (id, name, version, host, pid, list(queues), self._now(), migration)
        types = "uuid text text text int text[] timestamptz int"
        return self._query("register_orchestrator", types, parameters, _told_places)

    def next_trigger(
        self, deployment: str, triggers: Sequence[TriggerRow], *, apply: bool = False
    ) -> Query[TriggerStep | None]:
        """See 57_changes.sql. None: the triggers are as the code says."""
        return self._query("next_trigger", "text json boolean", (deployment, as_text(triggers), apply), _trigger_step)

    def describe_rows(self, schema: str, tables: Sequence[str] | None) -> Query[list[TableShape]]:
        """See 57_changes.sql."""
        names = None if tables is None else list(tables)
        return self._query("describe_rows", "text text[]", (schema, names), _shapes)

    def enqueue(
        self, calls: Sequence[NewExecution], hint: Carried | None = None, *, lock_seconds: float | None = None
    ) -> Query[Enqueued]:
        """See 10_enqueue.sql. `hint`: let the hint go out with the commit; `lock_seconds`: wait no longer for a key."""
        parameters = (as_text(calls), hint, lock_seconds, False, self._now())
        types = "json text float8 boolean timestamptz"
        return self._query("enqueue", types, parameters, _enqueued, harmless=False)

    def enqueue_one(self, call: NewExecution, hint: Carried | None = None) -> Query[Enqueued]:
        """The same for one plain call. After the hint "named", `confirm` it."""
        parameters = (call.id, call.task, call.queue, call.priority, as_text(call.payload), hint, False, self._now())
        casts = "uuid text text smallint json text boolean timestamptz"
        return self._query("enqueue_one", casts, parameters, _enqueued, harmless=False)

    def enqueue_alike(self, calls: AlikeExecutions, hint: Carried | None = None) -> Query[Enqueued]:
        """The same for plain calls that differ in their payloads only. After the hint "named", `confirm` them."""
        payloads = f"[{','.join(calls.payloads)}]"
        parameters = (IdArray(calls.ids), calls.task, calls.queue, calls.priority, payloads, hint, False, self._now())
        casts = "uuid[] text text smallint json text boolean timestamptz"
        return self._query("enqueue_alike", casts, parameters, _enqueued, harmless=False)

    @staticmethod
    def enqueue_again(query: Query[Enqueued]) -> Query[Enqueued]:
        """Return the repetition of an enqueue whose reply was lost, without encoding it again."""
        *parameters, _, now = query.parameters
        return Query(query.statement, (*parameters, True, now), _enqueued_again, query.harmless)

    def enqueue_within(self, calls: Sequence[NewExecution]) -> Query[Enqueued]:
        """The same for a connection of any library: one text parameter, and the hint goes out with the commit."""
        return self._within("enqueue", "'always', null, false", calls, _enqueued)

    def emit(self, events: Sequence[NewEvent]) -> Query[Emitted]:
        """See 56_events.sql. Done again, it changes nothing: an event has its id before it is sent."""
        return self._query("emit_events", "json boolean timestamptz", (as_text(events), False, self._now()), _emitted)

    def emit_within(self, events: Sequence[NewEvent]) -> Query[Emitted]:
        """The same for a connection of any library, as `enqueue_within`."""
        return self._within("emit_events", "true", events, _emitted)

    def register_subscriptions(self, deployment: str, subscriptions: Sequence[Subscription]) -> Query[list[str] | None]:
        """See 56_events.sql. Answers what it has removed."""
        return self._query("register_subscriptions", "text json", (deployment, as_text(subscriptions)), _labels)

    def claim(
        self,
        orchestrator: str,
        token: int,
        wants: Sequence[Want] | None,
        tasks: Sequence[int],
        *,
        fire: bool = False,
        ranges: Sequence[Range] | None = None,
    ) -> Query[Claim | None]:
        """See 20_claim.sql. None: the process was declared dead."""
        behind = None if ranges is None else as_text(ranges)
        wanted = None if wants is None else as_text(wants)
        parameters = (orchestrator, token, wanted, list(tasks), fire, self._now(), behind)
        return self._query(
            "claim", "uuid bigint json int[] boolean timestamptz json", parameters, _claim, harmless=False
        )

    def claim_named(self, orchestrator: str, token: int, names: Names) -> Query[Claim | None]:
        """See 20_claim.sql."""
        parameters = (orchestrator, token, names.queue_id, names.task_id, IdArray(names.ids), self._now())
        casts = "uuid bigint int int uuid[] timestamptz"
        return self._query("claim_named", casts, parameters, _claim, harmless=False)

    def save(
        self, orchestrator: str, steps: Sequence[SavedStep], operations: Sequence[Operation]
    ) -> Query[Saved | None]:
        """See 25_save.sql. None: the process was declared dead."""
        opened, *children = apart(operations)
        parameters = (orchestrator, as_text(steps), opened, self._now(), *children)
        return self._query("save", "uuid json json timestamptz json uuid[] json", parameters, _saved)

    def save_transaction(
        self, orchestrator: str, step: SavedStep, idle_seconds: float
    ) -> Query[Literal["saved", "lost", "exists"]]:
        """See 25_save.sql; for the step's own transaction, which the server ends once it is idle for so long.

        From here on no sweep can take over from its process, which may stand still.
        """
        seconds = 0.0 if step.seconds is UNSET else step.seconds
        value = bytes(step.value).decode()
        parameters = (orchestrator, step.id, step.token, step.name, step.round, value, self._now(), seconds)
        casts = "uuid uuid bigint text smallint json timestamptz float8"
        query = self._query("save_transaction", casts, parameters, as_is, harmless=False)
        statement = f"{query.statement}, set_config('idle_in_transaction_session_timeout', %s, true)"
        return Query(statement, (*parameters, str(round(idle_seconds * 1000))), as_is, harmless=False)

    def settle(
        self, orchestrator: str, completed: Sequence[Completion], outcomes: Sequence[Outcome] | None
    ) -> Query[Settled | None]:
        """See 30_settle.sql. Answers None when the process was declared dead."""
        opened = apart([operation for each in outcomes or () for operation in each.ops or ()])
        bare = [replace(each, ops=None) if each.ops else each for each in outcomes or ()]
        written = None if outcomes is None else as_text(bare)
        ties = parents_of(completed), are_level(completed)
        parameters = (orchestrator, *in_columns(completed), written, self._now(), *opened, *ties)
        types = "uuid uuid[] bigint[] json json timestamptz json json uuid[] json uuid[] boolean"
        return self._query("settle", types, parameters, _settled)

    def cancel(self, id: str, reason: str) -> Query[Moved]:
        """See 50_cancel.sql."""
        return self._query("cancel", "uuid text timestamptz", (id, reason, self._now()), _moved)

    def cancel_by_key(self, task: str, key: str, reason: str) -> Query[Moved]:
        """See 50_cancel.sql."""
        parameters = (task, key, reason, self._now())
        return self._query("cancel_by_key", "text text text timestamptz", parameters, _moved)

    def cancel_as_step(
        self, orchestrator: str, id: str, token: int, name: str, target: str, reason: str
    ) -> Query[Moved | None]:
        """See 50_cancel.sql. None: the lease is gone."""
        parameters = (orchestrator, id, token, name, target, reason, self._now())
        return self._query("cancel_as_step", "uuid uuid bigint text uuid text timestamptz", parameters, _moved)

    def register_schedules(self, deployment: str, schedules: Sequence[NewSchedule]) -> Query[list[str] | None]:
        """See 55_schedules.sql, as the next ones. Answers what it has removed."""
        return self._query(
            "register_schedules", "text json timestamptz", (deployment, as_text(schedules), self._now()), _labels
        )

    def fire_schedules(self, fired: Sequence[FiredSchedule]) -> Query[Fired]:
        """The first to answer what is due wins."""
        return self._query("fire_schedules", "json timestamptz", (as_text(fired), self._now()), _fired)

    def schedule_as_step(self, lease: Sequence[object], name: str, schedule: NewSchedule) -> Query[str]:
        """`lease`: orchestrator, execution, token. Answers `false` when it is gone."""
        parameters = (*lease, name, as_text([schedule]), self._now())
        return self._query("schedule_as_step", "uuid uuid bigint text json timestamptz", parameters, as_is)

    def unschedule_as_step(self, lease: Sequence[object], name: str, task: str, schedule: str) -> Query[str]:
        """The same for a removal."""
        parameters = (*lease, name, task, schedule, self._now())
        return self._query("unschedule_as_step", "uuid uuid bigint text text text timestamptz", parameters, as_is)

    def pause_schedules(self, task: str, schedule: str | None, *, paused: bool) -> Query[int]:
        """Answers how many were changed."""
        parameters = (task, schedule, paused, self._now())
        return self._query("pause_schedules", "text text boolean timestamptz", parameters, int)

    def fire_now(self, task: str, schedule: str | None) -> Query[FiredNow]:
        """Start a tick by hand."""
        return self._query("fire_now", "text text timestamptz", (task, schedule, self._now()), _fired_now, False)

    def list_schedules(self) -> Query[list[Report]]:
        """For people."""
        return self._query("list_schedules", "", (), many_reports)

    def redrive(self, id: str) -> Query[Moved]:
        """See 50_cancel.sql. Not harmless: done again after its new life has failed too, it would open another one."""
        return self._query("redrive", "uuid", (id,), _moved, harmless=False)

    def pause_queue(self, queue: str) -> Query[None]:
        """See 50_cancel.sql."""
        return self._query("pause_queue", "text timestamptz", (queue, self._now()), as_is)

    def resume_queue(self, queue: str) -> Query[None]:
        """See 50_cancel.sql."""
        return self._query("resume_queue", "text", (queue,), as_is)

    def set_limit(
        self, task: str, limit: int | None, kind: str, key: str | None, per_seconds: float | None
    ) -> Query[bool]:
        """See 35_permits.sql. False: there is no such task or limit."""
        per = None if per_seconds is None else f"{per_seconds} seconds"
        return self._query("set_limit", "text int text text interval", (task, limit, kind, key, per), is_true)

    def beat(
        self,
        orchestrator: str,
        stopping: bool = False,
        places: ToldPlaces | None = None,
        steps: Sequence[RunningStep] | None = None,
        blocked: Blocked | None = None,
    ) -> Query[Beat]:
        """See 60_sweep.sql."""
        told = (None if each is None else as_text(each) for each in (places, steps, blocked))
        parameters = (orchestrator, stopping, self._now(), *told)
        return self._query("beat", "uuid boolean timestamptz json json json", parameters, _beat)

    def sweep(self, expiry_seconds: float) -> Query[Moved]:
        """See 60_sweep.sql."""
        return self._query("sweep", "interval timestamptz", (f"{expiry_seconds} seconds", self._now()), _moved)

    def prune(self, limit: int = 1_000) -> Query[Pruned]:
        """See 80_prune.sql."""
        return self._query("prune", "int int timestamptz", (limit, TREE_SIZE_MAX, self._now()), _pruned)

    def reconcile(self, orchestrator: str, known: Sequence[int]) -> Query[Moved | None]:
        """See 60_sweep.sql. None: the process was declared dead."""
        return self._query("reconcile", "uuid bigint[] timestamptz", (orchestrator, list(known), self._now()), _moved)

    def retire(self, orchestrator: str) -> Query[Moved]:
        """See 60_sweep.sql."""
        return self._query("retire", "uuid timestamptz", (orchestrator, self._now()), _moved)

    def fire_timers(self) -> Query[Any]:
        """See 60_sweep.sql."""
        return self._query("fire_timers", "timestamptz", (self._now(),), as_is)

    def watch_result(self, id: str, watcher: str | None) -> Query[Result | None]:
        """See 70_inspect.sql. None: no such execution."""
        return self._query("watch_result", "uuid text", (id, watcher), _result)

    def watch_results(self, ids: Sequence[str], watcher: str | None) -> Query[list[Ended]]:
        """See 70_inspect.sql. Tells only of those that have ended, or are not known."""
        return self._table("watch_results", "uuid[] text", (list(ids), watcher), _all_ended)

    def state_of(self, id: str) -> Query[str | None]:
        """See 70_inspect.sql. None: no such execution."""
        return self._query("state_of", "uuid", (id,), as_is)

    def load_executions(self, missing: Sequence[Missing]) -> Query[Mapping[str, Loaded]]:
        """See 20_claim.sql."""
        return self._table("load_executions", "json", (as_text(missing),), read_loaded)

    def outstanding(self, orchestrator: str, queues: Sequence[int], tasks: Sequence[int]) -> Query[Outstanding]:
        """See 70_inspect.sql."""
        parameters = (orchestrator, list(queues), list(tasks), self._now())
        return self._query("outstanding", "uuid int[] int[] timestamptz", parameters, _outstanding)
