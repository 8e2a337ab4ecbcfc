"""One run of one claimed execution: handler + context → outcome. Knows no SQL.

**Unwinding.** A handler is left from the outside. When it has nothing to do but wait for children, sleeps or events,
its asyncio task is cancelled while the waits stay unanswered; `finally` blocks run, `gather` and `TaskGroup` cancel
what they hold, and `run` turns the cancellation into the outcome that was decided before, here called the *exit*:

    parked      what is awaited goes to the database; any worker resumes the handler when something has been answered
    released    the process stops; the execution is ready again, at no cost
    abandoned   the lease is lost, somebody else runs it: nothing is settled

Only then is the outcome returned and settled, so that two runs never overlap. A handler that swallows the cancellation
and goes on gets `Suspend`, a BaseException, from its next operation; whatever it returns is dropped, with a warning.

**When to park.** At least one wait is open, no step or transaction runs, and the loop has passed without a new
operation; after a step has ended it passes more often, since what awaits it may be several callbacks away.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future as ThreadFuture
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from contextvars import ContextVar
from typing import Any, Literal, Protocol, TypeVar, cast
from uuid import UUID

import psycopg
from msgspec import Raw

from pgconductor.engine import Claimed, Completion, Engine, Fresh, Operation, Outcome, Query, SavedStep
from pgconductor.errors import AttemptTimeout, ConductorError, Crash, Retry, StaleLease, Suspend, is_permanent
from pgconductor.faults import fault
from pgconductor.journal import Journal, timed_out_operations
from pgconductor.memos import Memos
from pgconductor.stored_error import error_to_json
from pgconductor.task import Task

T = TypeVar("T")
Exit = Literal["parked", "released", "abandoned"]

PASSES_AFTER_STEP = 4
"""How often the loop must pass without a new operation once a step has ended; else once."""

log = logging.getLogger("pgconductor.attempt")
inside_step: ContextVar[str | None] = ContextVar("inside_step", default=None)
_chance = random.Random()  # noqa: S311


class OutcomeUnknown(Exception):
    """A transaction's connection was lost, or an earlier try of it has committed: look the step up."""


def accept_transaction(attempt: "Attempt", answer: str | None) -> None:
    """Go on to the commit, or leave: by what `save_transaction` answered.

    Raises:
        Suspend: The lease is lost.
        OutcomeUnknown: An earlier try has committed.
    """
    if answer == "lost":
        attempt.exit = "abandoned"
        raise Suspend
    if answer != "saved":
        raise OutcomeUnknown


class Host(Protocol):
    """What a run needs of the process around it."""

    deps: Any
    loop: asyncio.AbstractEventLoop
    orchestrator_id: str
    schema: str
    engine: Engine

    def is_stopping(self) -> bool:
        """Tell whether the process is stopping: runs leave at their next operation."""
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

    def transaction(self) -> AbstractAsyncContextManager[psycopg.AsyncConnection[Any]]:
        """Lend a connection."""
        ...

    def sync_transaction(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """Lend a connection to a thread."""
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
        journal: What the run asks for.
        cancelled: Whether its cancellation was requested.
        exit: How the handler is being left, once that is decided.
        closed: Whether the run is over; a thread that outlives it is refused everything.
    """

    __slots__ = (
        "_busy",
        "_check_is_due",
        "_futures",
        "_hard",
        "_leaving",
        "_main",
        "_quiet",
        "_storing",
        "cancelled",
        "claimed",
        "closed",
        "exit",
        "host",
        "journal",
        "queue",
        "task",
        "token",
    )

    def __init__(
        self, claimed: Claimed, token: int, task: Task[..., Any], queue: str, host: Host, memos: Memos | None = None
    ) -> None:
        self.claimed = claimed
        self.token = token
        self.task = task
        self.queue = queue
        self.host = host
        self.journal = Journal(claimed, token, memos or Memos.of(claimed.steps))
        self.cancelled = False
        self.exit: Exit | None = None
        self.closed = False
        self._main: asyncio.Task[Any] | None = None
        self._busy = 0
        self._quiet = 0
        self._leaving = False
        self._hard = False
        self._check_is_due = False
        self._futures: list[asyncio.Future[None]] = []
        self._storing: set[asyncio.Future[None]] = set()

    @property
    def memos(self) -> Memos:
        """What the execution has recorded, for the process to keep while it is parked."""
        return self.journal.memos

    # ------------------------------------------------------------ the run

    async def run(self) -> Completion | Outcome | None:
        """Run the handler to its end or to where it has to wait.

        Returns:
            What is to be settled; None when there is nothing, since the lease is lost.

        Raises:
            asyncio.CancelledError: The calling task was cancelled by somebody else.
        """
        self._main = asyncio.current_task()
        if self.is_over():
            return self.leave(self.exit or "released")
        fault("before_handler")
        try:
            value = await self._call_handler()
            outcome = self._returned(value)
        except asyncio.CancelledError as error:
            outcome = self._stopped(error)
        except (Suspend, Crash):
            outcome = self.leave(self.exit or "abandoned")
        except GeneratorExit:
            raise
        except BaseException as error:  # noqa: BLE001  (a handler's SystemExit is its failure, not the process')
            outcome = self._failed(error)
        self.closed = True
        if self._storing:
            await asyncio.wait(self._storing)
        return outcome

    async def _call_handler(self) -> Any:
        timeout = self.task.config.timeout
        if timeout is None:
            return await self._handler()
        limit = asyncio.timeout(timeout.total_seconds())
        try:
            async with limit:
                return await self._handler()
        except TimeoutError:
            if limit.expired():
                raise AttemptTimeout(self.task.name, timeout) from None
            raise

    def _handler(self) -> Awaitable[Any]:
        # imported late: the contexts are built on this module
        from pgconductor.context import call_handler

        return call_handler(self)

    def _returned(self, value: Any) -> Completion | Outcome | None:
        if self.exit:
            self._warn_of_swallowing()
            return self.leave(self.exit)
        fault("handler_returned")
        result = Raw(self.task.returns.encode(value).encode())
        if self.claimed.parent_id is None and not self.journal.has_children:
            return Completion(self.claimed.id, self.token, result)
        return Outcome(self.claimed.id, self.token, "completed", result=result)

    def _stopped(self, error: asyncio.CancelledError) -> Completion | Outcome | None:
        main = cast("asyncio.Task[Any]", self._main)
        if self.exit or self.cancelled or self._hard:
            while main.cancelling():
                main.uncancel()
            return self.leave(self.exit or "released")
        if main.cancelling():
            raise error
        return self._failed(error)

    def leave(self, way: Exit) -> Outcome | None:
        """Return what is to be settled of a run that is left."""
        if way == "abandoned":
            return None
        if way == "parked" and not self.cancelled:
            return Outcome(
                self.claimed.id,
                self.token,
                "parked",
                ops=self.journal.unsaved or None,
                awaits=self.journal.open_awaits(),
                cached=True,
            )
        return Outcome(self.claimed.id, self.token, "released")

    def _failed(self, error: BaseException) -> Outcome | None:
        if self.exit:
            log.warning("task %r raised while it was being %s", self.task.name, self.exit, exc_info=error)
            return self.leave(self.exit)
        if isinstance(error, StaleLease):
            return None
        config, number = self.task.config, self.claimed.failures + 1
        stored = Raw(error_to_json(error).encode())
        if is_permanent(error) or config.retry.gives_up_on(error) or number >= config.max_attempts:
            log.error("%s failed after %d attempts", self.label, number, exc_info=error)
            return Outcome(self.claimed.id, self.token, "failed", error=stored)
        delay = error.after.total_seconds() if isinstance(error, Retry) else config.retry.delay(number, _chance)
        log.warning("%s failed, attempt %d; again in %.3gs", self.label, number, delay, exc_info=error)
        fresh = [Fresh(name, round_) for name, round_ in sorted(timed_out_operations(error))]
        return Outcome(self.claimed.id, self.token, "retried", error=stored, delay=delay, fresh=fresh or None)

    @property
    def label(self) -> str:
        """How log lines name the run."""
        return f"task {self.task.name!r} execution {self.claimed.id}"

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
            if self.task.config.executor == "loop":
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
        """Whether the run was to be left before it began."""
        return self.cancelled or self.exit is not None

    def _interrupt(self) -> None:
        if self._main is not None and not self._main.done():
            self._main.cancel()

    # ------------------------------------------------------------ for the contexts

    def enter(self) -> None:
        """Begin an operation: leave here if the run is to be left.

        Raises:
            Suspend: The handler is being left; nothing was done.
            asyncio.CancelledError: The execution is being cancelled.
            ConductorError: It stands inside a step.
        """
        if self.exit or self.closed:
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
        return self._leaving or self.host.is_stopping()

    async def boundary(self) -> None:
        """Begin an operation; when the process is stopping, wait here for the steps that still run, then leave."""
        self.enter()
        if self.is_leaving:
            await self.pend()

    async def pend(self) -> None:
        """Stay here until the handler is left: what the caller asks for is not answered in this run."""
        future = self.host.loop.create_future()
        self._futures.append(future)
        self._touch(0)
        await future

    def begin_work(self) -> None:
        """Count a step or transaction that keeps the run from being left."""
        self._busy += 1

    def end_work(self) -> None:
        """Count it off."""
        self._busy -= 1
        if self._futures and not self._busy:
            self._touch(PASSES_AFTER_STEP)

    async def store(self, stored: Awaitable[None]) -> None:
        """Wait until something is stored; a lost lease ends the run."""
        future = asyncio.ensure_future(stored)
        self._storing.add(future)
        future.add_done_callback(self._storing.discard)
        try:
            await asyncio.shield(future)
        except StaleLease:
            self.exit = "abandoned"
            raise Suspend from None

    def _touch(self, quiet: int) -> None:
        """Look in the loop's next pass whether to leave; `quiet` is how many more must go by."""
        self._quiet = max(quiet, self._quiet) if self._check_is_due else quiet
        if not self._check_is_due:
            self._check_is_due = True
            self.host.loop.call_soon(self._check)

    def _check(self) -> None:
        if self._quiet and not self.exit:
            self._quiet -= 1
            self.host.loop.call_soon(self._check)
            return
        self._check_is_due = False
        if self.exit:
            return
        if self._busy:
            self._store_unsaved(self.journal.take_unsaved())
        elif self.is_leaving and not self.journal.awaits:
            self._unwind("released")
        else:
            self._unwind("parked" if self.journal.awaits else "released")

    def _store_unsaved(self, operations: Iterable[Operation]) -> None:
        """Create children at once that were asked for while a step runs."""
        for operation in operations:
            future = asyncio.ensure_future(self.host.open(operation))
            self._storing.add(future)
            future.add_done_callback(self._stored)

    def _stored(self, future: "asyncio.Future[None]") -> None:
        self._storing.discard(future)
        if not future.cancelled() and future.exception() is not None and not self.exit:
            log.warning("%s could not start its children", self.label, exc_info=future.exception())
            self._unwind("abandoned")

    def _unwind(self, way: Exit) -> None:
        self.exit = way
        self._interrupt()

    # ------------------------------------------------------------ facts

    @property
    def execution_id(self) -> UUID:
        """The execution's id."""
        return UUID(self.claimed.id)
