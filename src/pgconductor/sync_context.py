"""What a plain `def` handler sees: the same operations without `await`.

The handler runs in a thread. It does one thing at a time, so it parks at once: what is not answered is opened, and
`Suspend` unwinds the thread. Steps are stored through the process's event loop, where those of all executions are
committed together.
"""

import asyncio
import copy
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from datetime import datetime
from typing import Any, Concatenate, Final, Literal, TypeVar, cast
from uuid import UUID

from typing_extensions import ParamSpec
from typing_extensions import TypeVar as DefaultTypeVar

from pgconductor.attempt import Attempt
from pgconductor.checks import check_execution_id
from pgconductor.durations import Duration, seconds
from pgconductor.engine import Engine, Query
from pgconductor.errors import AttemptTimeout, ConductorError, Suspend
from pgconductor.faults import fault
from pgconductor.journal import CANCELLED, PENDING, remember_call
from pgconductor.model import EventDef, RetryPolicy
from pgconductor.operations import (
    PLAIN,
    Child,
    RunFacts,
    StepOptions,
    Trying,
    call_plainly,
    check_instant,
    check_reason,
    check_step_function,
    is_final,
    members_of,
    partition,
    run_in_own_thread,
)
from pgconductor.schedules import schedule_of
from pgconductor.signature import return_codec_of
from pgconductor.task import Call, Task, check_task
from pgconductor.transactions import commit_once_sync
from pgconductor.written import Operation, SavedStep

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
E = TypeVar("E")
D = DefaultTypeVar("D", default=None)

log = logging.getLogger("pgconductor.attempt")
LOOK_SECONDS: Final = 0.2
"""How often a pause between two tries of a step looks whether the run is to be left."""


class SyncContext(RunFacts[D]):
    """What a plain `def` handler is given; see `Context` for what each operation does, returns and raises.

    Use it in the handler's own thread only.
    """

    _options: StepOptions = PLAIN
    _thread: int

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(attempt)
        self._thread = threading.get_ident()

    # ------------------------------------------------------------ steps

    def step(self, name: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function once and remember what it returned. See `Context.step`."""
        self._boundary()
        check_step_function(fn, f"step {name!r}", is_plain=True)
        codec = return_codec_of(fn)
        memo = self._attempt.journal.begin(name, "step")
        if memo is not None:
            return cast("T", codec.decode(memo.value, f"step {name!r}"))
        fault("before_step")
        began_at = time.monotonic()
        raw, copied = codec.store(self._tries(name, fn, args, kwargs), f"step {name!r}")
        fault("before_step_save")
        step = self._attempt.journal.finished(name, "step", raw, began_at)
        self._on_loop(self._store_step(step))
        fault("after_step_save")
        return cast("T", copied)

    def step_options(
        self, *, retry: RetryPolicy | None = None, max_attempts: int = 1, timeout: Duration | None = None
    ) -> "SyncContext[D]":
        """Return this context with other rules for its steps. See `Context.step_options`.

        A step that outlives its timeout goes on in a thread of its own; what it returns is dropped.
        """
        other = copy.copy(self)
        other._options = StepOptions(retry, max_attempts, timeout)
        return other

    def _tries(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        options = self._options
        for number in range(1, options.max_attempts):
            try:
                return self._try(name, fn, args, kwargs)
            except Exception as error:
                if is_final(error, options.retry):
                    raise
                self._pause(self._pause_after(name, number, options, error))
        return self._try(name, fn, args, kwargs)

    def _pause(self, seconds: float) -> None:
        """Wait before the next try, but leave when the run is to be left."""
        ends_at = time.monotonic() + seconds
        while (left := ends_at - time.monotonic()) > 0:
            self._boundary()
            time.sleep(min(left, LOOK_SECONDS))
        self._boundary()

    def _try(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        with Trying(self._attempt, name):
            if self._options.timeout is None:
                return fn(*args, **kwargs)
            return self._limited(name, fn, args, kwargs, self._options.timeout)

    def _limited(self, name: str, fn: Callable[..., Any], args: Any, kwargs: Any, timeout: float) -> Any:
        future = run_in_own_thread(lambda: fn(*args, **kwargs))
        try:
            return future.result(timeout)
        except TimeoutError:
            if future.done():
                raise
            raise AttemptTimeout(self.task, timeout, step=name) from None

    async def _store_step(self, step: SavedStep) -> None:
        attempt = self._attempt
        await attempt.store(attempt.host.save(step), lambda _: attempt.journal.remember(step))

    def transaction(self, name: str, fn: Callable[Concatenate[Any, P], T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function in a transaction; its writes and the step commit together. See `Context.transaction`.

        The function's first argument is a `psycopg.Connection`.
        """
        self._boundary()
        check_step_function(fn, f"transaction {name!r}", is_plain=True)
        codec = return_codec_of(fn)
        memo = self._attempt.journal.begin(name, "transaction")
        if memo is not None:
            return cast("T", codec.decode(memo.value, f"transaction {name!r}"))
        return cast("T", commit_once_sync(self._attempt, name, lambda conn: fn(conn, *args, **kwargs), codec))

    # ------------------------------------------------------------ sleeping

    def sleep(self, name: str, duration: Duration) -> None:
        """Park for a while, on the database's clock. See `Context.sleep`."""
        self._boundary()
        due_in = seconds(duration, f"sleep {name!r}: duration")
        self._answer(self._attempt.journal.sleep(name, due_in=due_in))

    def sleep_until(self, name: str, at: datetime) -> None:
        """Park until an instant of the database's clock. See `Context.sleep_until`."""
        self._boundary()
        self._answer(self._attempt.journal.sleep(name, due_at=check_instant(name, at)))

    def checkpoint(self) -> None:
        """Let shutdown, cancellation or a closing window leave the handler here; else return at once."""
        self._boundary()

    # ------------------------------------------------------------ children

    def invoke(
        self,
        name: str,
        call: Call[R],
        *,
        timeout: Duration | None = None,
        on_timeout: Literal["cancel", "keep"] = "cancel",
    ) -> R:
        """Create a child, park until it has ended, and return its value. See `Context.invoke`."""
        self._boundary()
        return cast("R", self._answer(self._attempt.journal.invoke(name, call, timeout, on_timeout)))

    def invoke_all(
        self,
        name: str,
        calls: Sequence[Call[R]],
        *,
        timeout: Duration | None = None,
        max_in_flight: int | None = None,
    ) -> list[R]:
        """Create many children, park once, and return their values in order. See `Context.invoke_all`."""
        self._boundary()
        return cast("list[R]", self._answer(self._attempt.journal.invoke_all(name, calls, timeout, max_in_flight)))

    def start(self, name: str, call: Call[R], *, detached: bool = False) -> Child[R]:
        """Create a child and go on; wait for it with `ctx.wait` or `child.result_sync()`. See `Context.start`."""
        self._boundary()
        child_id, operation = self._attempt.journal.start(name, call, detached=detached)
        if operation is not None:
            self._on_loop(self._store_operation(operation))
        return Child(child_id, name, call, self, detached=detached)

    async def _store_operation(self, operation: Operation) -> None:
        attempt = self._attempt
        await attempt.store(attempt.host.open(operation), lambda _: attempt.journal.remember_open(operation))

    def wait(
        self, name: str, children: Sequence[Child[R]], *, count: int | None = None, timeout: Duration | None = None
    ) -> tuple[list[Child[R]], list[Child[R]]]:
        """Park until so many started children have ended. See `Context.wait`."""
        return self._wait(name, children, count, timeout)

    def _wait(
        self,
        name: str,
        children: Sequence[Child[R]],
        count: int | None,
        timeout: Duration | None,
        *,
        is_ours: bool = False,
    ) -> tuple[list[Child[R]], list[Child[R]]]:
        members, needed = members_of(name, children, count)
        if not children:
            return [], []
        self._boundary()
        done = self._answer(self._attempt.journal.wait(name, members, needed, timeout, is_ours=is_ours))
        return partition(children, cast("list[str]", done))

    def child_result(self, child: Child[R], timeout: Duration | None) -> R:
        """Park until a started child has ended; `Child.result_sync` calls this."""
        members_of("result", [child], 1)
        journal = self._attempt.journal
        if timeout is not None:
            name = journal.result_name(child.step)
            if not self._wait(name, [child], 1, timeout, is_ours=True)[0]:
                raise journal.late_result(name, child.step)
        self._boundary()
        answer = journal.result_of(journal.result_name(child.step), child.step, child.call)
        return cast("R", self._answer(answer))

    # ------------------------------------------------------------ reaching out

    def cancel(self, execution_id: UUID, reason: str = "") -> bool:
        """Ask for the end of an execution, once. See `Context.cancel`."""
        self._boundary()
        attempt = self._attempt
        wanted = check_execution_id(execution_id, "cancel")
        name = attempt.journal.numbered("cancel")
        memo = attempt.journal.begin(name, "call")
        if memo is not None:
            return bytes(memo.value) == b"true"
        query = attempt.host.engine.cancel_as_step(
            attempt.host.orchestrator_id, attempt.claimed.id, attempt.token, name, wanted, check_reason(reason)
        )
        moved = self._on_loop(
            attempt.store(attempt.host.run_query(query), lambda moved: attempt.journal.remember_cancel(name, moved))
        )
        if moved is None:
            attempt.exit = "abandoned"
            raise Suspend
        return moved.result in CANCELLED

    def wait_for(
        self, name: str, event: EventDef[E], *, where: dict[str, Any] | None = None, timeout: Duration | None = None
    ) -> E:
        """Park until an event is emitted, and return its payload. See `Context.wait_for`."""
        self._boundary()
        return cast("E", self._answer(self._attempt.journal.wait_for(name, event, where, timeout)))

    def emit(self, event: EventDef[E], payload: E) -> UUID:
        """Emit an event, once, and return its id. See `Context.emit`."""
        self._boundary()
        event_id, step = self._attempt.journal.emit(event, payload)
        if step is not None:
            self._on_loop(self._store_step(step))
        return event_id

    def schedule(self, name: str, call: Call[Any], *, cron: str, tz: str = "UTC") -> None:
        """Start a call on a schedule from now on, once per tick. See `Context.schedule`."""
        row = schedule_of(name, call, cron, tz)
        self._record_once("schedule", lambda engine, step, lease: engine.schedule_as_step(lease, step, row))

    def unschedule(self, name: str, task: Task[..., Any]) -> None:
        """Remove a schedule that `schedule` made. See `Context.unschedule`."""
        check_task(task, f"unschedule {name!r}")
        self._record_once(
            "unschedule", lambda engine, step, lease: engine.unschedule_as_step(lease, step, task.name, name)
        )

    def _record_once(self, verb: str, query: "Callable[[Engine, str, tuple[str, str, int]], Query[str]]") -> None:
        self._boundary()
        attempt = self._attempt
        name = attempt.journal.numbered(verb)
        if attempt.journal.begin(name, "call") is not None:
            return
        asked = query(attempt.host.engine, name, (attempt.host.orchestrator_id, attempt.claimed.id, attempt.token))
        answer = self._on_loop(
            attempt.store(attempt.host.run_query(asked), lambda answer: remember_call(attempt.journal, name, answer))
        )
        if answer == "false":
            attempt.exit = "abandoned"
            raise Suspend

    # ------------------------------------------------------------ between thread and loop

    def _boundary(self) -> None:
        if threading.get_ident() != self._thread:
            raise ConductorError("a context is used outside its handler's thread; pass values to the other thread")
        self._attempt.enter()
        if self._attempt.is_leaving:
            self._attempt.exit = "released"
            raise Suspend

    def _answer(self, answer: object) -> object:
        if answer is PENDING:
            self._attempt.exit = "parked"
            raise Suspend
        return answer

    def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._attempt.host.loop).result()


def call_in_thread(fn: Callable[..., Any], attempt: Attempt, args: Any, kwargs: Any) -> Awaitable[Any]:
    """Run a plain handler in a thread; when the awaiting task is cancelled, its next operation is refused.

    Threads serve one handler after the other, so each handler gets context variables of its own.
    """

    def handle() -> Any:
        try:
            return fn(SyncContext(attempt), *args, **kwargs)
        finally:
            attempt.has_returned = True

    attempt.is_in_thread = True
    _ = attempt.journal  # made here, or thread and loop might each make one
    context = copy_context()
    running = attempt.host.submit_thread(lambda: context.run(call_plainly, handle))
    waiting = asyncio.wrap_future(running)
    waiting.add_done_callback(lambda _: _warn_if_left_behind(attempt, running))
    return waiting


def _warn_if_left_behind(attempt: Attempt, running: Future[Any]) -> None:
    if running.running() and not attempt.is_alone:
        log.warning(
            "%s: its handler goes on in its thread although the run is over; until it returns, the process has one "
            "thread more",
            attempt.label,
        )
