"""The record of one run: which names it has used, what was answered before, what it newly asks for.

A handler runs from its first line every time. Each of its operations asks the journal first:

    recorded and answered   the answer is given back, or raised, without doing anything
    recorded and open       `PENDING`: it is still waited for
    not recorded            it is done now (a step), or opened (`PENDING`)

What is opened gathers in `unsaved` until the run parks, or is stored at once when something else still runs. The
journal decides nothing about when to park and touches neither database nor event loop, so the same one serves
coroutines, threads and processes.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, TypeVar, cast
from uuid import UUID

import msgspec
from msgspec import Raw

from pgconductor.calls import BYTES_MAX
from pgconductor.checks import INT_MAX, check_flag, check_integer, check_name
from pgconductor.children import check_children, gathered, new_children, value_of
from pgconductor.claimed import NULL, Claimed, Recorded, StepKind, StepStatus
from pgconductor.codec import codec_for
from pgconductor.durations import Duration, seconds
from pgconductor.engine import Moved
from pgconductor.errors import (
    NO_ID,
    ChildTimeout,
    ConductorError,
    ConfigurationError,
    DepthExceeded,
    DuplicateStep,
    EncodeError,
    StepMismatch,
    TooMany,
    WaitTimeout,
    error_type_of,
    errors_in,
)
from pgconductor.events import encode_where, new_event
from pgconductor.memos import Memos
from pgconductor.model import EventDef, check_event
from pgconductor.task import Call, check_call, check_calls
from pgconductor.written import Await, Children, Operation, SavedStep

E = TypeVar("E")
T = TypeVar("T", bound=Exception)
Turn = Literal["waits", "left", "forgotten"]
"""Of an answer that a task asked for: it waits, it was cancelled, or that too, and the handler has gone on since."""

STEPS_MAX = 10_000
MOMENT_SECONDS: Final = 0.001
"""A step that took less is stored without how long it took."""
CHILDREN_MAX = 10_000
DEPTH_MAX = 100
CANCELLED = ("cancelled", "requested")
"""What the engine answers where it took a cancel request."""


class _Pending:
    """The type of `PENDING`."""

    __slots__ = ()


PENDING: Final = _Pending()
"""Not answered yet: the run has to park."""


class _TimeoutError(msgspec.Struct):
    """The error that the row of an invocation or an event wait holds in case it times out."""

    type: str
    message: str
    timeout: float


class _TimedOut(NamedTuple):
    """Which operation an error reports as timed out; kept in the error itself."""

    name: str
    round: int


_RESULT_OF: Final = ".result"
_TIMED_OUT: Final = "_pgconductor_timed_out"


class Journal:
    """What one run has asked for.

    Attributes:
        memos: What earlier runs recorded; grows with this one.
        unvisited: Those of them that are answered, and that this run has not come to yet.
        unsaved: Operations that the database does not know yet.
        unsaved_bytes: About how many bytes they take in a statement.
        awaits: What this run has open, by name.
        late_tasks: The asyncio tasks in which a timeout was raised that the handler itself may not have seen.
        asked: The answers for whose turn tasks have waited, by name.
    """

    __slots__ = (
        "_answered_at_start", "_calls", "_claimed", "_has_new", "_names", "_token", "asked", "awaits", "late_tasks",
        "memos", "unsaved", "unsaved_bytes", "unvisited",
    )  # fmt: skip

    def __init__(self, claimed: Claimed, token: int, memos: Memos) -> None:
        self.memos = memos
        self.unsaved: list[Operation] = []
        self.unsaved_bytes = 0
        self.awaits: dict[str, Await] = {}
        self.late_tasks: list[asyncio.Task[Any]] = []
        self.asked: dict[str, Turn] = {}
        self._claimed = claimed
        self._token = token
        self._names: set[str] = set()
        self._calls: dict[str, int] = {}
        self._has_new = False
        self.unvisited = memos.answered()
        self._answered_at_start = len(self.unvisited)

    @property
    def is_tied(self) -> bool:
        """Whether the execution's end concerns more than itself: something is open, or may have left rows behind."""
        return self.memos.is_tied or bool(self.memos.open)

    @property
    def is_replaying(self) -> bool:
        """Whether the run is still where an earlier one has been."""
        return not self._has_new and any(name not in self.asked for name in self.unvisited)

    @property
    def asked_count(self) -> int:
        """A number that grows with what the run asks for, be it answered or not."""
        return self._used_count + len(self._calls)

    @property
    def _used_count(self) -> int:
        """How many names the run has used."""
        return len(self._names) + self._answered_at_start - len(self.unvisited)

    # ------------------------------------------------------------ names

    def begin(
        self, name: str, kind: StepKind, child_task: str | None = None, *, is_ours: bool = False
    ) -> Recorded | None:
        """Use a name, and return what is recorded under it. One of ours may be a little longer than a user's.

        It stays used where the operation is refused behind this: were it free again, the next run would give the
        refused operation what the second one of that name has recorded.

        Raises:
            ConfigurationError: It is not a name.
            DuplicateStep: This run has used it before.
            StepMismatch: It is recorded for another kind of operation or another child task.
            TooMany: The execution has `STEPS_MAX` operations.
        """
        memo = self.unvisited.pop(name, None)
        if memo is not None:
            check_match(memo, kind, child_task)
            return memo
        names, memos = self._names, self.memos
        memo = memos.operations.get(name)
        if name in names or (memo is not None and name not in memos.open):
            raise DuplicateStep(name)
        if memo is None and not is_ours:  # what is recorded was checked then
            check_name(name, f"{kind}: name")
        if self._used_count >= STEPS_MAX:
            raise TooMany("steps", STEPS_MAX)
        names.add(name)
        if memo is None or memo.dropped:
            self._has_new = True
            return None
        check_match(memo, kind, child_task)
        return memo

    def numbered(self, verb: str) -> str:
        """Return the name of an operation that has none of its own: the verb and how often the run has used it."""
        number = self._calls.get(verb, 0) + 1
        self._calls[verb] = number
        return f"{verb}#{number}"

    def unasked(self) -> list[str]:
        """Return the names that are recorded and that this run has not used."""
        still_open = [memo.name for memo in self.memos.open.values() if not memo.dropped]
        names = [*(name for name in self.unvisited if name not in self.asked), *still_open]
        return [name for name in names if name not in self._names]

    def round_of(self, name: str) -> int:
        """Return the round in which a name that is not answered is done."""
        memo = self.memos.operations.get(name)
        return 0 if memo is None else memo.round + memo.dropped

    # ------------------------------------------------------------ steps

    def finished(self, name: str, kind: StepKind, value: bytes, began_at: float | None = None) -> SavedStep:
        """Return what is to be stored of a step that has just finished; `began_at`: on the monotonic clock."""
        step = SavedStep(self._claimed.id, self._token, name, self.round_of(name), kind, Raw(value))
        if began_at is not None and (seconds := time.monotonic() - began_at) >= MOMENT_SECONDS:
            step.seconds = round(seconds, 6)
        return step

    def remember(self, step: SavedStep) -> None:
        """Know a step once it is stored."""
        self.memos.add(
            Recorded(step.name, step.round, 0, step.kind, "completed", step.value, NULL, None, None, dropped=False)
        )

    def remember_cancel(self, name: str, moved: Moved | None) -> None:
        """Know what `ctx.cancel` was answered, as it was recorded beside the cancel; None: it was not."""
        if moved is not None:
            self.remember(self.finished(name, "call", b"true" if moved.result in CANCELLED else b"false"))

    def emit(self, event: EventDef[E], payload: E) -> tuple[UUID, SavedStep | None]:
        """Emit an event; returns its id, and what has to be stored, if it is new."""
        check_event(event, "emit")
        name = self.numbered(f"emit:{event.name}")
        memo = self.begin(name, "call", is_ours=True)
        if memo is not None:
            return msgspec.json.decode(memo.value, type=UUID), None
        new = new_event(event, payload)
        step = self.finished(name, "call", f'"{new.id}"'.encode())
        step.event = new
        return UUID(new.id), step

    # ------------------------------------------------------------ waits

    def sleep(self, name: str, *, due_in: float | None = None, due_at: datetime | None = None) -> object:
        """Sleep; returns None once it is over."""
        memo = self.begin(name, "sleep")
        if memo is None:
            self._open(Operation(self._claimed.id, name, self.round_of(name), "sleep", due_at=due_at, due_in=due_in))
            return PENDING
        return self._await(memo) if memo.status == "pending" else None

    def invoke(self, name: str, call: Call[Any], timeout: Duration | None, on_timeout: str) -> object:
        """Invoke a child; returns its value once it has ended, or raises what became of it."""
        if type(call) is not Call:
            check_call(call, f"invoke {name!r}")
        memo = self.begin(name, "invoke", call.task)
        if memo is None:
            operation = self._child_operation(name, "invoke", [call], timeout)
            operation.keep = _is_kept(name, on_timeout)
            self._open(operation)
            return PENDING
        return self._await(memo) if memo.status == "pending" else self.child_value(memo, call)

    def invoke_all(
        self, name: str, calls: Sequence[Call[Any]], timeout: Duration | None, max_in_flight: int | None
    ) -> object:
        """Invoke many children; returns their values once all have ended, or raises a group of what failed."""
        check_calls(calls, f"invoke_all {name!r}")
        memo = self.begin(name, "invoke_all")
        if memo is None:
            return self._open_fan_out(name, calls, timeout, max_in_flight)
        answers = self.memos.children.get(name, [])
        check_children(memo, answers, calls)
        if memo.status == "pending":
            return self._await(memo)
        if memo.status == "timed_out":
            raise self._timeout_of(memo, "")
        return gathered(name, calls, answers)

    def start(self, name: str, call: Call[Any], *, detached: bool) -> tuple[str, Operation | None]:
        """Start a child; returns its id, and what has to be stored first, if it is new."""
        check_call(call, f"start {name!r}")
        check_flag(detached, f"start {name!r}: detached")
        memo = self.begin(name, "start", call.task)
        if memo is not None:
            return cast("str", memo.child_id), None
        operation = self._child_operation(name, "start", [call], None)
        operation.detached = detached
        operation.token = self._token
        return cast("Children", operation.children).ids[0], operation

    def wait(
        self, name: str, members: Sequence[str], count: int, timeout: Duration | None, *, is_ours: bool = False
    ) -> object:
        """Wait for started children, by step name; returns the names of those that ended."""
        memo = self.begin(name, "wait", is_ours=is_ours)
        if memo is None:
            due_in = None if timeout is None else seconds(timeout, f"wait {name!r}: timeout")
            self._open(
                Operation(self._claimed.id, name, self.round_of(name), "wait", due_in=due_in),
                Await(name, self.round_of(name), "wait", awaited=True, members=list(members), count=count),
            )
            return PENDING
        if memo.status != "pending":
            return msgspec.json.decode(memo.value, type=list[str])
        self.awaits[name] = Await(name, memo.round, "wait", awaited=True, members=list(members), count=count)
        return PENDING

    def wait_for(
        self, name: str, event: EventDef[Any], where: Mapping[str, Any] | None, timeout: Duration | None
    ) -> object:
        """Wait for an event; returns its payload once there is one, or raises that there was none in time."""
        check_event(event, f"wait_for {name!r}")
        memo = self.begin(name, "wait_for", event.name)
        if memo is None:
            operation = Operation(self._claimed.id, name, self.round_of(name), "wait_for", event=event.name)
            if where is not None:
                operation.where = encode_where(name, where)
            if timeout is not None:
                operation.due_in = seconds(timeout, f"wait_for {name!r}: timeout")
                operation.timeout_error = _stored_timeout(WaitTimeout(name, timeout), timeout)
            self._open(operation)
            return PENDING
        if memo.status == "pending":
            return self._await(memo)
        if memo.status == "timed_out":
            raise self._timed_out(name, memo.round, WaitTimeout(name, _timeout_in(memo)))
        return codec_for(event.payload).decode(memo.value, f"event {event.name!r}")

    def result_name(self, step: str) -> str:
        """Name the next wait for one started child."""
        return self.numbered(step + _RESULT_OF)

    def result_of(self, name: str, step: str, call: Call[Any]) -> object:
        """Wait for one started child; returns its value once it has ended, or raises what became of it."""
        child = self.memos.operations[step]
        if child.status == "pending":
            return self.wait(name, [step], 1, None, is_ours=True)
        if name in self.memos.operations:
            self.begin(name, "wait", is_ours=True)
        return self.child_value(child, call)

    def late_result(self, name: str, step: str) -> TimeoutError:
        """Return the error of a wait for one child's result that ended without it; uncaught, it is done afresh."""
        late = TimeoutError(f"child {step!r} did not end within the timeout")
        return self._timed_out(name, self.round_of(name), late)

    def timed_out_by(self, error: BaseException) -> set[tuple[str, int]]:
        """Return (name, round) of the timeouts that end the attempt: those of its error, and those beside it.

        Several may pass at once, under `gather`, which raises the first of them only. Those count that have ended
        tasks as the first one has, and those that tasks were still to be given: the next attempt would else fail by
        them before anything is done afresh.
        """
        found = timed_out_operations(error)
        ended = [timed_out_operations(each) for task in self.late_tasks if (each := _error_of(task)) is not None]
        if not any(found & each for each in ended):
            return found
        withheld = [memo for name, memo in self.unvisited.items() if self.asked.get(name) in ("waits", "left")]
        return found.union(*ended, {(memo.name, memo.round) for memo in withheld if _is_late(memo)})

    def go_on(self) -> None:
        """Know that the handler itself goes on: what timed out, it has seen, or does not care for."""
        self.late_tasks.clear()
        self.asked = {name: "forgotten" if turn == "left" else turn for name, turn in self.asked.items()}

    def child_value(self, memo: Recorded, call: Call[Any]) -> Any:
        """Return what a child returned, or raise what became of it."""
        if memo.status == "completed":
            try:
                return call.returns.read(memo.value)
            except Exception:  # noqa: BLE001, S110  (it comes again below, and is named)
                pass
        elif memo.status == "timed_out":
            raise self._timeout_of(memo, call.task)
        return value_of(memo, memo.name, call)

    def _timeout_of(self, memo: Recorded, task: str) -> ChildTimeout:
        child_id = UUID(memo.child_id) if memo.child_id else NO_ID
        late = ChildTimeout(_timeout_in(memo), execution_id=child_id, task=task)
        return self._timed_out(memo.name, memo.round, late)

    def _timed_out(self, name: str, round_: int, error: T) -> T:
        """Mark an error as the timeout of an operation, which a retry does afresh if it is not caught."""
        error.__dict__[_TIMED_OUT] = _TimedOut(name, round_)
        with suppress(RuntimeError):  # in a thread there is no task
            if (task := asyncio.current_task()) is not None:
                self.late_tasks.append(task)
        return error

    def open_awaits(self) -> list[Await]:
        """Return everything this execution has open, for parking: what is awaited, and what is only known of."""
        known = [
            Await(memo.name, memo.round, memo.kind)
            for memo in self.memos.open.values()
            if memo.status == "pending" and memo.name not in self.awaits
        ]
        return [*self.awaits.values(), *known]

    def take_unsaved(self) -> list[Operation]:
        """Return the operations that the database does not know, to be stored by themselves."""
        taken, self.unsaved, self.unsaved_bytes = self.unsaved, [], 0
        for operation in taken:
            operation.token = self._token
        return taken

    # ------------------------------------------------------------ opening

    def _await(self, memo: Recorded) -> object:
        self.awaits[memo.name] = Await(memo.name, memo.round, memo.kind, awaited=True)
        return PENDING

    def _open(self, operation: Operation, awaited: Await | None = None) -> None:
        size = operation.weigh()
        if size > BYTES_MAX:
            place = f"{operation.kind} {operation.name!r}"
            raise EncodeError(
                place, f"its children take {size} bytes, at most {BYTES_MAX} at once; pass what finds them"
            )
        self.remember_open(operation)
        self.unsaved.append(operation)
        self.unsaved_bytes += size
        self.awaits[operation.name] = awaited or Await(operation.name, operation.round, operation.kind, awaited=True)

    def remember_open(self, operation: Operation) -> None:
        """Know an operation as the database will: open, with its children."""
        name, round_, kind = operation.name, operation.round, operation.kind
        children = operation.children
        child_id, child_task = None, operation.event
        if children is not None:
            child_task = children.task
            if kind == "invoke_all":
                self.memos.add_children(name, children.pending())
            else:
                child_id = children.ids[0]
        status: StepStatus = "completed" if operation.detached else "pending"
        self.memos.add(Recorded(name, round_, 0, kind, status, NULL, NULL, child_id, child_task, dropped=False))

    def _open_fan_out(
        self, name: str, calls: Sequence[Call[Any]], timeout: Duration | None, max_in_flight: int | None
    ) -> object:
        if not calls:
            return []
        earlier = sum(len(children) for other, children in self.memos.children.items() if other != name)
        if earlier + len(calls) > CHILDREN_MAX:
            raise TooMany("children", CHILDREN_MAX)
        if max_in_flight is not None:
            check_integer(max_in_flight, f"invoke_all {name!r}: max_in_flight", 1, INT_MAX)
        operation = self._child_operation(name, "invoke_all", calls, timeout)
        operation.window = max_in_flight
        self._open(operation)
        return PENDING

    def _child_operation(
        self, name: str, kind: StepKind, calls: Sequence[Call[Any]], timeout: Duration | None
    ) -> Operation:
        if self._claimed.depth >= DEPTH_MAX:
            raise DepthExceeded(calls[0].task, DEPTH_MAX)
        operation = Operation(self._claimed.id, name, self.round_of(name), kind)
        operation.children = new_children(calls, f"{kind} {name!r}")
        if timeout is not None:
            operation.due_in = seconds(timeout, f"{kind} {name!r}: timeout")
            operation.timeout_error = _stored_timeout(ChildTimeout(timeout), timeout)
        return operation


def remember_call(journal: Journal, name: str, answer: str) -> None:
    """Know that something which answers nothing was done; `false`: it was not, the lease is gone."""
    if answer != "false":
        journal.remember(journal.finished(name, "call", b"null"))


def check_match(memo: Recorded, kind: StepKind, child_task: str | None) -> None:
    """Refuse to give back what was recorded for something else.

    Raises:
        StepMismatch: It is recorded for another kind of operation or another child task.
    """
    if memo.kind != kind or (child_task is not None and memo.child_task not in (None, child_task)):
        recorded = memo.kind + (f" of {memo.child_task!r}" if memo.child_task else "")
        found = kind + (f" of {child_task!r}" if child_task else "")
        raise StepMismatch(memo.name, recorded, found)


def _error_of(task: "asyncio.Task[Any]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _is_late(memo: Recorded) -> bool:
    """Tell whether an answer is raised as a timeout, as that of a wait for one child's result may be."""
    is_result = memo.kind == "wait" and f"{_RESULT_OF}#" in memo.name
    return memo.status == "timed_out" or (is_result and bytes(memo.value) == b"[]")


def timed_out_operations(error: BaseException) -> set[tuple[str, int]]:
    """Return (name, round) of the timeouts that an error is, was raised `from`, or gathers.

    What was merely being handled when it was raised does not count: that timeout has been observed, and stays.
    """
    found: set[tuple[str, int]] = set()
    todo: list[BaseException] = [error]
    seen: set[int] = set()
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        timed_out = each.__dict__.get(_TIMED_OUT)
        if type(timed_out) is _TimedOut:
            found.add((timed_out.name, timed_out.round))
        if each.__cause__ is not None:
            todo.append(each.__cause__)
        todo += errors_in(each)
    return found


def _stored_timeout(error: ConductorError, timeout: Duration) -> Raw:
    return Raw(msgspec.json.encode(_TimeoutError(error_type_of(error), str(error), seconds(timeout))))


def _timeout_in(memo: Recorded) -> float:
    return msgspec.json.decode(memo.error, type=_TimeoutError).timeout


def _is_kept(name: str, on_timeout: str) -> bool:
    if on_timeout not in ("cancel", "keep"):
        raise ConfigurationError(f"invoke {name!r}: on_timeout", f"{on_timeout!r} is unknown", 'use "cancel" or "keep"')
    return on_timeout == "keep"
