"""What goes to the engine: calls, steps, operations with their children, outcomes, and what a process wants and knows.

Many of a kind go in one JSON text. Where there may be thousands that are alike, their ids and their values go beside
each other instead (`apart`, `in_columns`): objects cost the server three times as much to read.
"""

from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import Literal

from msgspec import UNSET, Raw, Struct, UnsetType
from msgspec.structs import replace

from pgconductor.claimed import NULL, ChildAnswer, StepKind
from pgconductor.events import NewEvent
from pgconductor.id_array import IdArray
from pgconductor.queries import as_text

_id_of = attrgetter("id")


class NewExecution(Struct, omit_defaults=True, gc=False):
    """One call to enqueue, or a child to create."""

    id: str
    task: str
    payload: Raw
    queue: str | None = None
    priority: int = 0
    run_at: datetime | None = None
    delay: float | None = None
    dedupe_key: str | None = None
    replace: bool = False
    trigger: str | None = None
    throttle: float | None = None
    debounce: float | None = None

    @property
    def is_keyed(self) -> bool:
        """Whether it may have to wait for a transaction that has named the same key."""
        return self.dedupe_key is not None or self.throttle is not None or self.debounce is not None

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing but what to run, where, and how soon."""
        return self.run_at is None and self.delay is None and self.trigger is None and not self.is_keyed


class AlikeExecutions(Struct):
    """Plain calls to enqueue that differ in nothing but their payloads, which are JSON text in the order of the ids."""

    ids: list[str]
    task: str
    queue: str | None
    priority: int
    payloads: list[str]


def alike(rows: Sequence[NewExecution]) -> AlikeExecutions | None:
    """Gather calls that differ in nothing but their payloads; None if they differ otherwise, or are not plain."""
    task, queue, priority = rows[0].task, rows[0].queue, rows[0].priority
    for row in rows:
        if row.task != task or row.queue != queue or row.priority != priority or not row.is_plain:
            return None
    payloads = [bytes(row.payload).decode() for row in rows]
    return AlikeExecutions([row.id for row in rows], task, queue, priority, payloads)


class SavedStep(Struct, gc=False):
    """A finished step of a running execution, and how long it took. With `event`, what it did was to emit that."""

    id: str
    token: int
    name: str
    round: int
    kind: StepKind
    value: Raw
    event: NewEvent | UnsetType = UNSET
    seconds: float | UnsetType = UNSET


class AlikeChildren(Struct, omit_defaults=True, gc=False):
    """How so many children in a row are called; `op`: the operation that has them, by its place among those sent."""

    op: int
    count: int
    task: str
    queue: str | None = None
    priority: int = 0
    run_at: datetime | None = None
    delay: float | None = None


class Children(Struct, gc=False):
    """The children of one operation, in order: their ids, their payloads as JSON text, and how they are called."""

    ids: list[str]
    payloads: list[str]
    alike: list[AlikeChildren]

    @property
    def task(self) -> str | None:
        """The task that all of them are of; None where they are of several."""
        first = self.alike[0].task
        return first if all(each.task == first for each in self.alike) else None

    def pending(self) -> list[ChildAnswer]:
        """Return what is known of each while it has not ended: its task, where they are of several."""
        if self.task is not None:
            return [ChildAnswer(NULL, "pending")] * len(self.ids)
        return [ChildAnswer(NULL, "pending", child_task=each.task) for each in self.alike for _ in range(each.count)]

    def weigh(self) -> int:
        """Return about how many bytes they take in a statement."""
        return 100 * len(self.ids) + len("".join(self.payloads).encode())


class Operation(Struct, omit_defaults=True, gc=False):
    """Something to wait for: a sleep, children, a wait on children, an event. `token` only where saved by itself."""

    id: str
    name: str
    round: int
    kind: StepKind
    token: int | UnsetType = UNSET
    due_at: datetime | None = None
    due_in: float | None = None
    keep: bool = False
    detached: bool = False
    timeout_error: Raw | UnsetType = UNSET
    window: int | None = None
    children: Children | None = None
    event: str | None = None
    where: Raw | UnsetType = UNSET

    def weigh(self) -> int:
        """Return about how many bytes it takes in a statement."""
        return 100 + (0 if self.children is None else self.children.weigh())


class Await(Struct, omit_defaults=True, gc=False):
    """An operation that a parked execution has open. Those not `awaited` are only told of.

    `members` and `count`: a wait on started children, by step name.
    """

    name: str
    round: int
    kind: StepKind
    awaited: bool = False
    members: list[str] | None = None
    count: int | None = None


class Completion(Struct, gc=False):
    """The outcome of an execution of whose children none is open, and which has left no waits behind."""

    id: str
    token: int
    result: Raw
    parent: str | None = None
    depth: int = 0


class Fresh(Struct, gc=False):
    """A timed out operation that the next attempt does anew."""

    name: str
    round: int


class Outcome(Struct, omit_defaults=True, gc=False):
    """Any other outcome. `delay`: seconds; `cached`: this process keeps the steps of what it parks; `long`: many."""

    id: str
    token: int
    outcome: Literal["completed", "failed", "retried", "released", "unstarted", "crashed", "parked"]
    result: Raw | UnsetType = UNSET
    error: Raw | UnsetType = UNSET
    delay: float | None = None
    ops: list[Operation] | None = None
    awaits: list[Await] | None = None
    fresh: list[Fresh] | None = None
    cached: bool = False
    long: bool = False


class Blocked(Struct, frozen=True):
    """For how long the event loop of a process has been blocked, and by what."""

    seconds: float
    by: str


class Names(Struct, frozen=True):
    """Executions of one lane that a hint names."""

    queue_id: int
    task_id: int
    ids: list[str]


class Want(Struct):
    """How many executions a process wants of a queue; `free`: how many of them of limited tasks, None for all."""

    queue: int
    limit: int
    free: int | None = None


class TaskRow(Struct):
    """The options of a task that the database must know. `keep_*` are in seconds; below zero is for ever."""

    name: str
    queue: str
    max_attempts: int
    max_crashes: int
    keep_completed: float = 604_800
    keep_failed: float = 2_592_000
    expires: float | None = None
    window_start: str | None = None
    window_end: str | None = None
    window_zone: str | None = None
    limits: list["LimitRow"] = []


class LimitRow(Struct):
    """A limit of a task; a rate has a period in seconds."""

    kind: Literal["concurrency", "rate"]
    key_path: str | None
    max: int
    seconds: float | None = None


def apart(operations: Sequence[Operation]) -> tuple[str, str, IdArray, str]:
    """Write operations, and their children apart from them: how these are called, their ids and their payloads."""
    alike: list[AlikeChildren] = []
    ids: list[str] = []
    payloads: list[str] = []
    for place, operation in enumerate(operations, 1):
        if (children := operation.children) is not None:
            alike += [replace(each, op=place) for each in children.alike]
            ids += children.ids
            payloads += children.payloads
    bare = [replace(each, children=None) for each in operations]
    return as_text(bare), as_text(alike), IdArray(ids), f"[{','.join(payloads)}]"


def in_columns(completed: Sequence[Completion]) -> tuple[IdArray, str, str]:
    """Write completions in the order of their ids, which settle reads fastest: ids, tokens and results."""
    ordered = sorted(completed, key=_id_of)
    tokens = ",".join([str(each.token) for each in ordered])
    return IdArray([each.id for each in ordered]), f"{{{tokens}}}", as_text([each.result for each in ordered])


def parents_of(completed: Sequence[Completion]) -> IdArray:
    """Write the parents of completions, each once."""
    return IdArray({each.parent for each in completed if each.parent is not None})


def are_level(completed: Sequence[Completion]) -> bool:
    """Whether completions are all of one depth in their trees."""
    return len({each.depth for each in completed}) <= 1
