"""One run of one claimed execution: handler + context → outcome. Knows no SQL.

**Unwinding.** A handler is left from the outside. When it has nothing to do but wait for children, sleeps or events,
its asyncio task is cancelled while the waits stay unanswered; `finally` blocks run, `gather` and `TaskGroup` cancel
what they hold, and `run` turns the cancellation into the outcome that was decided before, here called the *exit*:

    parked      what is awaited goes to the database; any worker resumes the handler when something has been answered
    released    the process stops; the execution is ready again, at no cost
    refused     the database refused children that were asked for beside a step: the attempt fails
    abandoned   the lease is lost, somebody else runs it: nothing is settled

Only then is the outcome returned and settled, so that two runs never overlap. A handler that swallows the cancellation
and goes on gets `Suspend`, a BaseException, from its next operation; whatever it returns is dropped, with a warning.

**When to park.** At least one wait is open, no step or transaction runs, and the loop has passed without a new
operation. A handler that runs several tasks gets more passes after each: an answer that one of them has just been given
may be several callbacks away from the operation that it leads to, and parking before that would wait for the others
only. A mere `checkpoint` does not count: a task that looks again and again for what another waits for would never park.

**What is left behind.** `gather` does not end the others when one of them fails, and a handler may return beside a
step. Such a run is settled after its steps have ended and are recorded, or the next one would do them once more. Where
the run is left, cancelled or out of time, before or meanwhile, they are cancelled, and waited for all the same.

**What is under way.** What is being stored goes on when the handler's wait for it is cancelled. It is remembered when
it is stored, and the run is settled only after that, so that memory and database never differ.
"""

import asyncio
import logging
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future as ThreadFuture
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from datetime import timedelta
from functools import cache
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

import psycopg
from msgspec import Raw

from pgconductor.claimed import Claimed, Loaded, Missing, Recorded, StepKind
from pgconductor.engine import Engine, Query
from pgconductor.errors import AttemptTimeout, ConductorError, Crash, StaleLease, Suspend, is_permanent
from pgconductor.faults import fault
from pgconductor.journal import Journal, check_match
from pgconductor.logs import current_run, shown
from pgconductor.memos import Memos
from pgconductor.model import delay_after
from pgconductor.running_steps import RunningSteps
from pgconductor.stored_error import error_to_json
from pgconductor.task import Task, runs_on_loop
from pgconductor.turns import Turns
from pgconductor.written import Completion, Fresh, Operation, Outcome, SavedStep

T = TypeVar("T")
Exit = Literal["parked", "released", "refused", "abandoned"]

LONG_COUNT = 150
"""From so many recorded operations on, a resume finds what is new by name, which costs short ones more."""

PARKED_BYTES_MAX = 16 * 1024 * 1024
"""How much may go with a park; settling others would wait too long for more."""

PASSES_CONCURRENT = 32
"""How many more passes of the loop a handler that runs several tasks gets after an operation, before it is parked."""

log = logging.getLogger("pgconductor.attempt")
inside_step: ContextVar[str | None] = ContextVar("inside_step", default=None)
_chance = random.Random()  # noqa: S311


@cache
def call_handler() -> "Callable[[Attempt], Awaitable[Any]]":
    """Return what calls a run's handler; it is looked up late, since the contexts are built on this module."""
    from pgconductor.context import call_handler

    return call_handler


class Host(Protocol):
    """What a run needs of the process around it."""

    deps: Any
    loop: asyncio.AbstractEventLoop
    orchestrator_id: str
    schema: str
    engine: Engine
    steps: RunningSteps
    is_leaving: bool
    """Whether the process is stopping: runs leave at their next operation."""

    @property
    def transaction_settings(self) -> str | None:
        """What a transaction must say at its beginning, because its connection could not at its start."""
        ...

    def is_fenced(self) -> bool:
        """Tell whether the leases can no longer be confirmed: no step may begin."""
        ...

    def save(self, step: SavedStep, /) -> Awaitable[None]:
        """Store a finished step; raises `StaleLease`."""
        ...

    def open(self, operation: Operation, /) -> Awaitable[None]:
        """Store an operation and create its children; raises `StaleLease`."""
        ...

    def submit_thread(self, fn: Callable[[], T], /) -> "ThreadFuture[T]":
        """Run a function in a thread of the process's own."""
        ...

    def save_transaction(self, step: SavedStep, /) -> Query[Literal["saved", "lost", "exists"]]:
        """Build the call that stores a step in the transaction of its own writes."""
        ...

    def transaction(self) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]:
        """Lend a connection."""
        ...

    def sync_transaction(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """Lend a connection to a thread."""
        ...

    async def load(self, missing: Missing, /) -> Loaded:
        """Load what a claim left out of an execution."""
        ...

    async def run_query(self, query: Query[T], /) -> T:
        """Run any other call of the engine."""
        ...


class Attempt:
    """One run of a claimed execution, in the asyncio task that calls `run`.

    Attributes:
        claimed: The execution.
        token: The number of the claim, part of the lease.
        task: What it runs.
        queue: Where it was claimed from.
        host: The process.
        cancelled: Whether its cancellation was requested.
        exit: How the handler is being left, once that is decided.
        closed: Whether the run is over; a thread that outlives it is refused everything.
        has_returned: Whether the handler is over; its context is of no more use to what it left behind.
        is_in_thread: Whether the handler runs in a thread, and may go on when the run is over.
    """

    is_alone: ClassVar[bool] = False  # whether its process is there for this run
    __slots__ = (
        "_asked_count", "_busy", "_check_is_due", "_hard", "_is_concurrent", "_is_left", "_journal", "_leaving",
        "_main", "_opening", "_quiet", "_refusal", "_rest", "_storing", "_turns", "_waits", "cancelled", "claimed",
        "closed", "exit", "has_returned", "host", "is_in_thread", "queue", "task", "token",
    )  # fmt: skip

    def __init__(
        self, claimed: Claimed, token: int, task: Task[..., Any], queue: str, host: Host, memos: Memos | None = None
    ) -> None:
        self.claimed = claimed
        self.token = token
        self.task = task
        self.queue = queue
        self.host = host
        if memos is None and claimed.steps:
            memos = Memos.of(claimed.steps)
        self._journal = None if memos is None else Journal(claimed, token, memos)
        self.cancelled = False
        self.exit: Exit | None = None
        self.closed = False
        self.has_returned = False
        self.is_in_thread = False
        self._main: asyncio.Task[Any] | None = None
        self._busy: dict[object, asyncio.Task[Any] | None] = {}
        self._rest: asyncio.Future[None] | None = None
        self._asked_count = 0
        self._quiet = 0
        self._leaving = self._hard = False
        self._is_concurrent = False
        self._is_left = False
        self._check_is_due = False
        self._refusal: BaseException | None = None
        self._turns: Turns | None = None
        self._waits: dict[asyncio.Future[None], str | None] = {}
        self._storing: set[asyncio.Future[Any]] = set()
        self._opening: set[asyncio.Future[None]] = set()

    @property
    def journal(self) -> Journal:
        """What the run asks for. Where nothing is recorded it is made with the first question: many runs have none."""
        if self._journal is None:
            self._journal = Journal(self.claimed, self.token, Memos())
        return self._journal

    # ------------------------------------------------------------ the run

    async def run(self) -> Completion | Outcome | None:
        """Run the handler to its end or to where it has to wait. Whatever the handler raises is its own failure.

        Returns:
            What is to be settled; None when there is nothing, since the lease is lost.
        """
        self._main = asyncio.current_task(self.host.loop)
        current_run.set(self)
        if self.is_over() or self.is_closing():
            return self.unstarted()
        try:
            fault("before_handler")
            timeout = self.task.config.timeout
            call = call_handler()
            value = await (call(self) if timeout is None else self._within(timeout, call))
            outcome = self._returned(value)
        except asyncio.CancelledError as error:
            outcome = self._stopped(error)
        except (Suspend, Crash):
            outcome = self.leave(self.exit or "abandoned")
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001  (a handler's SystemExit is its failure, not the process')
            outcome = self._failed(error)
        self._close()
        if self._busy and self._is_working():
            await self._finish_work()
        if self._storing:
            await asyncio.wait(self._storing)
            if isinstance(outcome, Outcome) and outcome.outcome == "parked":
                outcome.awaits = self.journal.open_awaits()  # what was started meanwhile is open, too
        return None if self.exit == "abandoned" else outcome

    def _close(self) -> None:
        """End the run; waits that the handler left behind in tasks of its own are ended too."""
        self.closed = True
        if not self.is_in_thread:
            self.has_returned = True
        for future in tuple(self._waits):
            future.cancel()
        if self._turns is not None:
            self._turns.end()

    async def _finish_work(self) -> None:
        """Wait for the steps that the handler has left behind; where they are not wanted any more, end them."""
        self._rest = self.host.loop.create_future()
        timeout, timer = self.task.config.timeout, None
        if self._is_left or self.is_over():
            self._interrupt()
        else:
            log.warning("%s has left steps behind that still run: it is settled after them", self.label)
            if timeout is not None:
                timer = self.host.loop.call_later(timeout.total_seconds(), self._interrupt)
        while not self._rest.done():
            try:
                await asyncio.wait([self._rest])
            except asyncio.CancelledError:
                self._uncancel()
                self._interrupt()
        if timer is not None:
            timer.cancel()

    async def _within(self, timeout: timedelta, call: "Callable[[Attempt], Awaitable[Any]]") -> Any:
        limit = asyncio.timeout(timeout.total_seconds())
        try:
            async with limit:
                return await call(self)
        except TimeoutError:
            if limit.expired():
                raise AttemptTimeout(self.task.name, timeout) from None
            raise
        finally:
            self._is_left = limit.expired()

    def _returned(self, value: Any) -> Completion | Outcome | None:
        if self.exit:
            self._warn_of_swallowing()
            return self.leave(self.exit)
        fault("handler_returned")
        returns: Any = self.task.returns
        result = Raw(returns.store(value, "result")[0])
        if self._journal and self._journal.memos.operations:
            self._warn_of_unasked()
        if not (self._storing or self._busy or (self._journal and self._journal.is_tied)):
            return Completion(self.claimed.id, self.token, result, self.claimed.parent_id, self.claimed.depth)
        return Outcome(self.claimed.id, self.token, "completed", result=result)

    def _stopped(self, error: asyncio.CancelledError) -> Outcome | None:
        self._uncancel()
        if self.exit or self.cancelled or self._hard:
            return self.leave(self.exit or "released")
        return self._failed(error)  # the handler's own doing

    def _uncancel(self) -> None:
        main = cast("asyncio.Task[Any]", self._main)
        while main.cancelling():
            main.uncancel()

    def unstarted(self) -> Outcome | None:
        """Return what is to be settled of a run whose handler was not called."""
        return None if self.exit == "abandoned" else Outcome(self.claimed.id, self.token, "unstarted")

    def leave(self, way: Exit) -> Outcome | None:
        """Return what is to be settled of a run that is left."""
        self._is_left = True
        if way == "abandoned":
            return None
        if self._refusal is not None:
            self.exit, refusal, self._refusal = None, self._refusal, None
            return self._failed(refusal)
        if way == "parked" and not self.cancelled:
            return Outcome(
                self.claimed.id, self.token, "parked", ops=self.journal.unsaved or None,
                awaits=self.journal.open_awaits(), cached=True, long=len(self.journal.memos.operations) >= LONG_COUNT,
            )  # fmt: skip
        return Outcome(self.claimed.id, self.token, "released")

    def _failed(self, error: BaseException) -> Outcome | None:
        if self.exit or self._hard:
            way = self.exit or "released"
            log.warning("task %r raised while it was being %s", self.task.name, way, exc_info=error)
            return self.leave(way)
        if isinstance(error, StaleLease):
            return None
        config, number = self.task.config, self.claimed.failures + 1
        stored = Raw(error_to_json(error).encode())
        if is_permanent(error) or config.retry.gives_up_on(error) or number >= config.max_attempts:
            log.error("%s failed after %d attempt%s", self.label, number, "s" * (number > 1), exc_info=shown(error))
            return Outcome(self.claimed.id, self.token, "failed", error=stored)
        delay = delay_after(error, config.retry, number, _chance)
        log.warning("%s failed, attempt %d; again in %.3gs", self.label, number, delay, exc_info=shown(error))
        fresh = [Fresh(name, round_) for name, round_ in sorted(self.journal.timed_out_by(error))]
        return Outcome(self.claimed.id, self.token, "retried", error=stored, delay=delay, fresh=fresh or None)

    def log_ids(self) -> dict[str, Any]:
        """Return what each log line of the run tells of it."""
        claimed = self.claimed
        return {
            "execution_id": claimed.id,
            "root_id": claimed.root_id or claimed.id,
            "parent_id": claimed.parent_id,
            "task": self.task.name,
            "queue": self.queue,
            "attempt": claimed.failures + 1,
            "step": inside_step.get(),
        }

    @property
    def label(self) -> str:
        """How log lines name the run."""
        return f"task {self.task.name!r} execution {self.claimed.id}"

    def _warn_of_unasked(self) -> None:
        if names := self.journal.unasked():
            told = ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            log.warning("%s has ended, and its code no longer asks for what is recorded as %s", self.label, told)

    def _warn_of_swallowing(self) -> None:
        log.warning(
            "%s returned although it was being %s: it catches BaseException or CancelledError around an operation; "
            "its return value is dropped",
            self.label,
            self.exit,
        )

    # ------------------------------------------------------------ from outside, on the loop

    def request_cancel(self) -> None:
        """Tell the handler that its execution is being cancelled: at its next operation, or, on the loop, at once."""
        if not self.cancelled:
            self.cancelled = True
            if runs_on_loop(self.task):
                self._interrupt()

    def request_release(self, *, hard: bool = False) -> None:
        """Leave at the next operation; with `hard`, at once."""
        self._leaving = True
        if hard:
            self._hard = True
            self._interrupt()

    def abandon(self) -> None:
        """Leave at once and settle nothing: the lease is lost."""
        self.exit = "abandoned"
        self._interrupt()

    def is_over(self) -> bool:
        """Whether the execution is being cancelled, or the run left."""
        return self.cancelled or self._hard or self.exit is not None

    def _interrupt(self) -> None:
        """Cancel the handler; once it has ended, the steps that it has left behind."""
        if not self.closed:
            if self._main is not None:
                self._main.cancel()
            return
        for task in tuple(self._busy.values()):
            if task is not None and task is not self._main:
                task.cancel()

    # ------------------------------------------------------------ for the contexts

    def enter(self) -> None:
        """Begin an operation: leave here if the run is to be left.

        Raises:
            Suspend: The handler is being left; nothing was done.
            asyncio.CancelledError: The execution is being cancelled.
            ConductorError: It stands inside a step, or its handler has returned.
        """
        if self.exit:
            raise Suspend
        if self.has_returned:
            raise ConductorError(
                f"the handler of task {self.task.name!r} has returned: its context cannot be used any more; "
                "await everything that uses it before returning"
            )
        if self.closed:
            raise Suspend
        step = inside_step.get()
        if step is not None:
            raise ConductorError(
                f"step {step!r} uses its context: what a step does is not recorded; move the operation out of the step"
            )
        if self.cancelled:
            raise asyncio.CancelledError(f"execution {self.claimed.id} is being cancelled")
        if self.host.is_fenced():
            self.exit = "abandoned"
            raise Suspend

    @property
    def is_leaving(self) -> bool:
        """Whether the next operation is where the run is left."""
        return self._leaving or self.host.is_leaving or self.is_closing()

    def is_closing(self) -> bool:
        """Whether the task's window has closed."""
        closes_at = self.claimed.closes_at
        return closes_at is not None and time.monotonic() >= closes_at

    async def boundary(self, name: str | None = None) -> None:
        """Begin an operation; wait here for its turn, or, when the process is stopping, until the run is left."""
        if self.must_stay(name):
            await self.stay(name)

    def must_stay(self, name: str | None = None) -> bool:
        """Begin an operation, and tell whether something comes before it, for which to `stay`."""
        self.enter()
        host, journal, is_ordered = self.host, self.journal, bool(self._turns)
        if asyncio.current_task(host.loop) is not self._main:
            self._is_concurrent = is_ordered = True
        elif journal.late_tasks and sys.exception() is None:
            journal.go_on()
        if self._leaving or host.is_leaving or (self.claimed.closes_at is not None and self.is_closing()):
            return True
        return is_ordered and name in journal.unvisited

    async def stay(self, name: str | None = None) -> None:
        """Wait for the turn of an answer; where the run is to be left, for the steps that still run, and then leave."""
        if name in self.journal.unvisited and not self.is_leaving:
            if self._turns is None:
                self._turns = Turns(self.journal, self.host.loop)
            await self._turns.wait(name)
            if not self.must_stay():
                return
        await self.pend()

    def recall(self, name: str, kind: StepKind, child_task: str | None = None) -> Recorded | None:
        """Answer an operation from memory, if it has an answer and nothing stands in its way; None: begin it.

        Long executions come here thousands of times in each run. A fence is not looked for: nothing is done here.

        Raises:
            StepMismatch: As for `Journal.begin`.
        """
        journal, host = self._journal, self.host
        if journal is None or not journal.unvisited or self._busy or self.exit or self.cancelled or self.closed:
            return None
        if self._leaving or self._turns or host.is_leaving or journal.late_tasks or self.claimed.closes_at is not None:
            return None
        if asyncio.current_task(host.loop) is not self._main:
            return None
        memo = journal.unvisited.pop(name, None)
        if memo is not None and (memo.kind != kind or memo.child_task != child_task):
            check_match(memo, kind, child_task)
        return memo

    async def pend(self, name: str | None = None) -> None:
        """Stay here until the handler is left: what the caller asks for is not answered in this run.

        A wait that the handler itself gives up, as `asyncio.timeout` does, no longer counts.
        """
        future = self.host.loop.create_future()
        self._waits[future] = name
        self._look_later()
        try:
            await future
        finally:
            del self._waits[future]
            if name is not None and not self.exit and not self.closed and name not in self._waits.values():
                self.journal.awaits.pop(name, None)

    def begin_work(self, work: object) -> None:
        """Note a step or transaction and its asyncio task: it keeps the run from being left, and from being settled."""
        self._busy[work] = asyncio.current_task(self.host.loop)

    def end_work(self, work: object) -> None:
        """Strike it off."""
        del self._busy[work]
        if self._rest is not None:
            if not self._rest.done() and not self._is_working():
                self._rest.set_result(None)
        elif self._waits and not self._busy:
            self._look_later()

    def _is_working(self) -> bool:
        return any(task is not self._main for task in self._busy.values())

    async def store(self, stored: Awaitable[T], remember: Callable[[T], None]) -> T:
        """Wait until something is stored; a lost lease ends the run.

        Args:
            stored: Goes on when this is cancelled.
            remember: Called when it is stored, even then.

        Raises:
            Suspend: The lease is lost.
        """
        future = asyncio.ensure_future(stored)
        waiter: asyncio.Future[T] = self.host.loop.create_future()
        self._storing.add(future)

        def keep(future: "asyncio.Future[T]") -> None:  # one callback, where a shield would add two
            self._storing.discard(future)
            if future.cancelled():
                waiter.cancel()
            elif (error := future.exception()) is None:
                if not waiter.done():
                    waiter.set_result(future.result())
                remember(future.result())
            elif not waiter.done():
                waiter.set_exception(error)

        future.add_done_callback(keep)
        try:
            return await waiter
        except StaleLease:
            self.exit = "abandoned"
            raise Suspend from None

    def _look_later(self) -> None:
        """Look in the loop's next pass whether to leave, or some passes later."""
        self._quiet = PASSES_CONCURRENT if self._is_concurrent else 0
        if not self._check_is_due:
            self._check_is_due = True
            self.host.loop.call_soon(self._check)

    def _check(self) -> None:
        if self._is_concurrent and (self._turns or self._asked_count != self.journal.asked_count):
            self._asked_count, self._quiet = self.journal.asked_count, PASSES_CONCURRENT
        if self._quiet and not self.exit:
            self._quiet -= 1
            self.host.loop.call_soon(self._check)
            return
        self._check_is_due = False
        if self.exit or self.closed or not self._waits:
            return
        if self._busy or self.journal.unsaved_bytes > PARKED_BYTES_MAX:
            self._store_unsaved(self.journal.take_unsaved())
        elif not self._opening:  # one that is refused fails the attempt: it must not park on that
            self._unwind("parked" if self.journal.awaits else "released")

    def _store_unsaved(self, operations: Iterable[Operation]) -> None:
        """Create children at once: a step runs beside them, or they are too many bytes to go with the park."""
        for operation in operations:
            future = asyncio.ensure_future(self.host.open(operation))
            self._storing.add(future)
            self._opening.add(future)
            future.add_done_callback(self._stored)

    def _stored(self, future: "asyncio.Future[None]") -> None:
        self._storing.discard(future)
        self._opening.discard(future)
        error = None if future.cancelled() else future.exception()
        if self.exit or self.closed:
            return
        if error is None:
            self._look_later()
        elif isinstance(error, StaleLease | Crash):
            self._unwind("abandoned")
        else:
            self._refusal = error
            self._unwind("refused")

    def _unwind(self, way: Exit) -> None:
        self.exit = way
        self._interrupt()
